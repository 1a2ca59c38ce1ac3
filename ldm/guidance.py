"""From denoiser to denoiser: guidance. A sampler never knows about it."""

import torch
from torch import Tensor

from ldm.denoiser import ConditionalDenoiser, Denoiser, Estimate


def classifier_free(
    denoise: ConditionalDenoiser, cond: Tensor, uncond: Tensor, scale: float, rescale: float = 0.0
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6, whose w is `scale` - 1): (x_t, t) -> Estimate.

    x0 is affine in every kind of output, so extrapolating x0 is extrapolating the output. Both halves go through the
    network as one batch of 2B, unconditional first; at scale 1 the conditional half goes alone.

    Args:
        cond, uncond: contexts [B, L, D].
        scale: 0 is unconditional, 1 conditional, above 1 guided.
        rescale: in [0, 1], how far each guided output is given back the standard deviation of the conditional one
            (Lin et al. 2023, eqs. 14-16).

    Raises:
        ValueError: contexts of different shapes, or rescale outside [0, 1].
    """
    if cond.shape != uncond.shape:
        raise ValueError(f"cond is {tuple(cond.shape)} and uncond {tuple(uncond.shape)}: give both the same shape")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}, but must be from 0 to 1")
    if scale == 1:
        return lambda x_t, t: denoise(x_t, t, cond)
    context = torch.cat([uncond, cond])

    def guided(x_t: Tensor, t: Tensor) -> Estimate:
        both = denoise(torch.cat([x_t, x_t]), t.expand(len(x_t)).repeat(2), context)
        x0_uncond, x0_cond = both.x0.chunk(2)
        x0 = x0_uncond + scale * (x0_cond - x0_uncond)
        if rescale > 0:
            output = denoise.to_output(x0, x_t, t)
            output = _rescaled(output, denoise.to_output(x0_cond, x_t, t), rescale)
            x0 = denoise.to_x0(output, x_t, t)
        return Estimate(x0, v=None if both.v is None else both.v.chunk(2)[1])

    return guided


def _rescaled(output: Tensor, output_cond: Tensor, rescale: float) -> Tensor:
    """Lin et al. 2023, eqs. 14-16; the standard deviations are those of each sample."""
    per_sample = tuple(range(1, output.ndim))
    ratio = output_cond.std(per_sample, keepdim=True) / output.std(per_sample, keepdim=True)
    return output * (1 + rescale * (ratio - 1))
