"""A network that is told more than time and context becomes one that is not: (latents, t, context) -> output.

What it is told is held fixed, for `make_denoiser` or for one training step. Where a batch holds several times as many
latents, such as guidance's two halves, each part is told the same.
"""

import torch
from torch import Tensor, nn

from ldm.denoiser import read
from ldm.layers import as_many
from ldm.transformer import Context


class Labelled(nn.Module):
    """A network with classes at fixed `class_labels` [B, ...], which it takes as its fourth argument.

    Classifier-free guidance of the classes themselves (Ho and Salimans 2022) takes labels [2B], the null class first;
    at a scale of 1 or 0, where one half alone is run, it takes that half's [B].
    """

    def __init__(self, network: nn.Module, class_labels: Tensor) -> None:
        super().__init__()
        self.network, self.class_labels = network, class_labels

    def read(self, context: Tensor) -> Context:
        return read(self.network, context)

    def forward(self, latents: Tensor, t: Tensor, context: Context) -> Tensor:
        """Raises ValueError for a batch of latents, or of contexts, that is no multiple of the labels'."""
        t, latents = as_many(t.expand(len(latents)), context), as_many(latents, context)  # each may have its own class
        out: Tensor = self.network(latents, t, context, as_many(self.class_labels, latents))
        return out


class Concatenated(nn.Module):
    """A network that reads `extra` [B,C,h,w] as further channels behind the latents (Rombach et al. 2022, figure 3).

    Masked latents for inpainting and a small picture's for super-resolution are such channels. The network has C input
    channels more than the latents.
    """

    def __init__(self, network: nn.Module, extra: Tensor) -> None:
        super().__init__()
        self.network, self.extra = network, extra

    def read(self, context: Tensor) -> Context:
        return read(self.network, context)

    def forward(self, latents: Tensor, t: Tensor, context: Context) -> Tensor:
        """Raises ValueError for latents of another height or width, or a batch that is no multiple of `extra`'s."""
        if latents.shape[2:] != self.extra.shape[2:]:
            raise ValueError(
                f"extra is {tuple(self.extra.shape)}, but the latents are {tuple(latents.shape)}: resize it"
            )
        extra = as_many(self.extra.to(latents), latents)
        out: Tensor = self.network(torch.cat((latents, extra), dim=1), t, context)
        return out
