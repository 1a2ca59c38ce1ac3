"""DeepCache (Ma et al. 2023, arXiv 2312.00858): most of the U-Net runs at every n-th call only.

An approximation that changes the picture. What the deep layers say changes slowly from step to step, so that in between
only the first and the last layer run, on what the deep ones said last.
"""

import torch
from torch import Tensor, nn

from ldm.blocks import UpBlock
from ldm.layers import as_many, silu
from ldm.transformer import Context
from ldm.unet import UNet


class FeatureReuse(nn.Module):
    """A network (latents, t, context) -> output that runs the whole U-Net at its first call and at every n-th after.

    It remembers, so each picture needs one of its own. A call with a batch of another size runs the whole U-Net.

    Args:
        every: 1 is the U-Net itself. At 3, as the paper recommends, two of three calls are shallow.

    Raises:
        ValueError: every < 1.
    """

    def __init__(self, unet: UNet, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"features are to be reused for {every} steps; give at least 1")
        self.unet, self.every = unet, every
        self.since = 0
        """Calls since the deep features were computed, that one included."""
        self.deep: Tensor | None = None

    def read(self, context: Tensor) -> Context:
        return self.unet.read(context)

    def forward(self, latents: Tensor, t: Tensor, context: Context) -> Tensor:
        if self.deep is None or self.since == self.every or len(self.deep) != len(context):
            self.since = 1
            return self._whole(latents, t, context)
        self.since += 1
        return self._shallow(latents, t, context, self.deep)

    @property
    def _last(self) -> UpBlock:
        block = self.unet.up_blocks[-1]
        assert isinstance(block, UpBlock)
        return block

    def _whole(self, latents: Tensor, t: Tensor, context: Context) -> Tensor:
        skip, last = self.unet.config.block_out_channels[0], self._last

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.deep = inputs[0][:, :-skip]

        hook = last.resnets[-1].register_forward_pre_hook(keep)
        try:
            out: Tensor = self.unet(latents, t, context)
        finally:
            hook.remove()
        return out

    def _shallow(self, latents: Tensor, t: Tensor, context: Context, deep: Tensor) -> Tensor:
        unet, last = self.unet, self._last
        x = torch.cat((deep, as_many(unet.conv_in(latents), deep)), dim=1)
        x = last.resnets[-1](x, unet._embed(latents, t, context))
        if last.attentions:
            x = last.attentions[-1](x, context)
        out: Tensor = unet.conv_out(silu(unet.conv_norm_out(x)))
        return out
