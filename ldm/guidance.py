"""From denoiser to denoiser: guidance. A sampler never knows about it.

Guided denoisers are denoisers, so they nest, and the outermost has the last word:

    plain = classifier_free(denoise, cond, uncond, scale=1)
    guided = interval(classifier_free(denoise, cond, uncond, scale=7.5), plain, schedule, low=0.3, high=5)
    guided = keep_known(threshold(guided, bound=4), known, noise, mask, schedule, start=999)

Each changes the estimate of x0 alone. Samplers work out eps from x_t and x0, so the eps that they use belongs to the x0
that came out last. The learned variance `v` is passed on.

One form of guidance is no denoiser: by algorithm 1 of Dhariwal and Nichol (2021) the gradient is scaled by the step's
own variance. That is `sample_ddpm(..., mean_shift=log_prob_gradient(log_prob, scale))`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ldm.denoiser import ConditionalDenoiser, Denoiser, Estimate, read
from ldm.schedule import ForwardProcess

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> log p(y | x_t) [B], each of its own sample alone."""


def classifier_free(
    denoise: ConditionalDenoiser, cond: Tensor, uncond: Tensor, scale: float, rescale: float = 0.0
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6): (x_t, t) -> Estimate.

    The paper's (1 + w) eps(c) - w eps() is eps() + scale (eps(c) - eps()) with w = `scale` - 1. x0 is affine in every
    kind of output, so extrapolating x0 is extrapolating the output. Both halves go through the network as one batch of
    2B contexts, unconditional first; at scale 1 the conditional half goes alone, and at scale 0 the unconditional one,
    unless it is to be rescaled. The contexts are read here, once for all evaluations: once the network's weights
    change, make a new denoiser.

    Args:
        cond, uncond: contexts [B, L, D]; `uncond` is the empty prompt's, or a negative prompt's, to lead away from it.
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
    if scale == 1 or scale == rescale == 0:
        alone = read(denoise, cond if scale == 1 else uncond)
        return lambda x_t, t: denoise(x_t, t, alone)
    context = read(denoise, torch.cat([uncond, cond]))

    def guided(x_t: Tensor, t: Tensor) -> Estimate:
        both = denoise(x_t, t, context)
        x0_uncond, x0_cond = both.x0.chunk(2)
        x0 = x0_uncond + scale * (x0_cond - x0_uncond)
        if rescale > 0:
            output = denoise.to_output(x0, x_t, t)
            output = _rescaled(output, denoise.to_output(x0_cond, x_t, t), rescale)
            x0 = denoise.to_x0(output, x_t, t)
        return Estimate(x0, v=None if both.v is None else both.v.chunk(2)[1])

    return guided


def interval(guided: Denoiser, plain: Denoiser, schedule: ForwardProcess, low: float, high: float) -> Denoiser:
    """`guided` while sigma / alpha is in (low, high], else `plain`, the conditional one (Kynkäänniemi et al. 2024).

    Outside the interval `plain` alone runs; to decide that, an accelerator's host waits for t.

    Args:
        low, high: noise levels sigma / alpha, which the paper calls sigma; `high` may be infinite.

    Raises:
        ValueError: unless 0 <= low < high; and, from the denoiser, for a batch with times inside and outside.
    """
    if not 0 <= low < high:
        raise ValueError(f"the interval's low {low} and high {high} must satisfy 0 <= low < high")

    def limited(x_t: Tensor, t: Tensor) -> Estimate:
        alpha, sigma = schedule.at(t)
        noise = sigma / alpha
        inside = (low < noise) & (noise <= high)
        if bool(inside.all()):
            return guided(x_t, t)
        if bool(inside.any()):
            raise ValueError("t is in the guidance interval for a part of the batch only: give all samples one time")
        return plain(x_t, t)

    return limited


def threshold(denoise: Denoiser, bound: float = 1.0, quantile: float | None = None) -> Denoiser:
    """Keep x0 in [-bound, bound], as guidance with a large scale does not (Saharia et al. 2022, section 2.3).

    Args:
        bound: 1 for pixels; latents of standard deviation 1 need a bound of several.
        quantile: None clips x0 (static thresholding). From 0 to 1, this quantile of each sample's |x0|, where it is
            above `bound`, is the value that x0 is clipped at and that then becomes `bound` (dynamic thresholding; 0.995
            is usual).

    Raises:
        ValueError: bound not positive, or quantile outside [0, 1].
    """
    if not bound > 0:
        raise ValueError(f"bound is {bound}, but must be above 0")
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}, but must be from 0 to 1")

    def bounded(x_t: Tensor, t: Tensor) -> Estimate:
        estimate = denoise(x_t, t)
        x0 = estimate.x0
        if quantile is None:
            return replace(estimate, x0=x0.clamp(-bound, bound))
        largest = x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=bound).reshape(-1, *[1] * (x0.ndim - 1))
        return replace(estimate, x0=x0.clamp(-largest, largest) * (bound / largest))

    return bounded


def log_prob_gradient(log_prob: LogProb, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t [B, ...], t [B] or 0-d) -> scale * grad log p(y | x_t), like x_t; for `sample_ddpm`'s `mean_shift`.

    It records gradients by itself: samplers run without.

    Raises:
        ValueError: from the callable, where `log_prob` does not give [B], or nothing that can be differentiated.
    """

    def gradient(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            return scale * _gradient("log_prob", log_prob(x, t.expand(len(x))), x).detach()

    return gradient


def classifier(denoise: Denoiser, log_prob: LogProb, schedule: ForwardProcess, scale: float) -> Denoiser:
    """Classifier guidance by algorithm 2 of Dhariwal and Nichol (2021): eps - sigma scale grad log p(y | x_t).

    At scale 1 and with the true p(y | x_t), an unconditional denoiser becomes the one conditional on y. Where alpha is
    0, x_t says nothing about y, and the estimate stays as it is.

    Raises:
        ValueError: from the denoiser, where `log_prob` does not give [B], or nothing that can be differentiated.
    """
    gradient = log_prob_gradient(log_prob, scale)

    def guided(x_t: Tensor, t: Tensor) -> Estimate:
        return _moved(denoise(x_t, t), gradient(x_t, t), x_t, t, schedule)

    return guided


def clip(denoise: Denoiser, similarity: Callable[[Tensor], Tensor], schedule: ForwardProcess, scale: float) -> Denoiser:
    """CLIP guidance (Nichol et al. 2021, section 2.4): eps - sigma scale grad similarity(x0), x0 as estimated at x_t.

    The gradient is with respect to x_t, through the network, so that a CLIP of clean images will do (Crowson 2021,
    "CLIP Guided Diffusion"); one of noisy images goes to `classifier`. Where alpha is 0, the estimate stays as it is.

    Args:
        similarity: x0 [B, ...] -> similarity of image and text [B], each of its own sample alone. It decodes x0 to
            pixels itself, and must do so with gradients.

    Raises:
        ValueError: from the denoiser, where `similarity` does not give [B], or nothing that can be differentiated.
    """

    def guided(x_t: Tensor, t: Tensor) -> Estimate:
        recording = torch.is_grad_enabled()  # then this is part of another's estimate, whose graph must stay
        with torch.enable_grad():
            x = x_t if x_t.requires_grad else x_t.detach().requires_grad_()
            estimate = denoise(x, t)
            gradient = _gradient("similarity", similarity(estimate.x0), x, keep_graph=recording).detach()
        return _moved(estimate, scale * gradient, x_t, t, schedule)

    return guided


def keep_known(
    denoise: Denoiser, known: Tensor, noise: Tensor, mask: Tensor, schedule: ForwardProcess, start: float
) -> Denoiser:
    """Inpainting with a network that was not made for it (as diffusers' inpaint pipeline does with 4 channels).

    At every time below `start` the network sees the known part as `add_noise(known, noise, t)`; x0 there is always
    `known`. At `start` itself x_t is left as the sampler began it. Sampling must end clean for the known part to end as
    `known`.

    Args:
        known: clean signal [B, ...]; what lies under the mask is without effect.
        noise: unit noise like `known`, the same at all times: that with which sampling starts.
        mask: 1 where to paint, 0 where known, in between a blend; like `known`, or 1 wide in any dimension.
        start: the first time of the sampler's grid.

    Raises:
        ValueError: shapes that do not fit.
    """
    if known.shape != noise.shape:
        raise ValueError(f"known is {tuple(known.shape)} and noise {tuple(noise.shape)}: give both the same shape")
    if mask.ndim != known.ndim or any(a not in (1, b) for a, b in zip(mask.shape, known.shape, strict=True)):
        raise ValueError(f"mask is {tuple(mask.shape)}, which does not fit known {tuple(known.shape)}")

    def kept(x_t: Tensor, t: Tensor) -> Estimate:
        if x_t.shape != known.shape:
            raise ValueError(f"x_t is {tuple(x_t.shape)} and known {tuple(known.shape)}: give both the same shape")
        noisy = torch.lerp(schedule.add_noise(known.to(x_t), noise.to(x_t), t), x_t, mask.to(x_t))
        under_way = (t < start).to(x_t.device).reshape(-1, *[1] * (x_t.ndim - 1))
        estimate = denoise(torch.where(under_way, noisy, x_t), t)
        x0 = estimate.x0
        return replace(estimate, x0=torch.lerp(known.to(x0), x0, mask.to(x0)))

    return kept


def _rescaled(output: Tensor, output_cond: Tensor, rescale: float) -> Tensor:
    """Lin et al. 2023, eqs. 14-16; the standard deviations are those of each sample."""
    per_sample = tuple(range(1, output.ndim))
    ratio = output_cond.std(per_sample, keepdim=True) / output.std(per_sample, keepdim=True)
    return output * (1 + rescale * (ratio - 1))


def _gradient(name: str, values: Tensor, x: Tensor, keep_graph: bool = False) -> Tensor:
    """The gradient of each sample's value [B] with respect to that sample; `name` is whose values they are."""
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"{name} gave shape {tuple(values.shape)}: it must give one number for each of {len(x)} samples"
        )
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), x, retain_graph=keep_graph, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError(f"{name} has no gradient: it must depend on its argument, by operations that record gradients")


def _moved(estimate: Estimate, gradient: Tensor, x_t: Tensor, t: Tensor, schedule: ForwardProcess) -> Estimate:
    """The estimate for eps - sigma gradient, which stands for x0 + sigma^2 / alpha gradient."""
    alpha, sigma = schedule.coefficients(t, like=x_t)
    # Towards alpha 0 a true gradient falls as alpha does; there itself it is 0, and the quotient unknown.
    reach = torch.where(alpha > 0, sigma**2 / alpha, 0)
    return replace(estimate, x0=estimate.x0 + reach * gradient)
