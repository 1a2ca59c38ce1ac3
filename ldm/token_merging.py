"""Token merging for Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604): self-attention over fewer tokens.

An approximation that changes the picture. Tokens that look alike are averaged before self-attention, and each gets the
average's output. It pays at large sizes, where self-attention's cost is most of all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.denoiser import read
from ldm.transformer import Context, SpatialTransformer, TransformerBlock
from ldm.unet import UNet

MOST_MERGED = 0.75
"""Share of tokens that can be merged: of each square of four one stays, for the others to be merged into."""
Change = Callable[[Tensor], Tensor]


class TokenMerging(nn.Module):
    """A network whose self-attentions at the U-Net's first attending level are over a part of the tokens.

    Args:
        network: the U-Net, or a network around it: (latents, t, context) -> output.
        unet: whose attentions to change, while `network` runs and at no other time.
        share: of the tokens, how many to merge into others.

    Raises:
        ValueError: a share outside 0 to 0.75.
    """

    def __init__(self, network: nn.Module, unet: UNet, share: float) -> None:
        super().__init__()
        if not 0 <= share <= MOST_MERGED:
            raise ValueError(f"the share of tokens to merge is {share}; give a number from 0 to {MOST_MERGED}")
        self.network, self.share = network, share
        level = unet.config.attends.index(True)
        parts = [*unet.down_blocks[level].modules(), *unet.up_blocks[-1 - level].modules()]
        self.transformers = [part for part in parts if isinstance(part, SpatialTransformer)]

    def read(self, context: Tensor) -> Context:
        return read(self.network, context)

    def forward(self, latents: Tensor, t: Tensor, context: Context) -> Tensor:
        hooks = [hook for transformer in self.transformers for hook in _merge_in(transformer, self.share)]
        try:
            out: Tensor = self.network(latents, t, context)
        finally:
            for hook in hooks:
                hook.remove()
        return out


def matching(tokens: Tensor, height: int, width: int, share: float) -> tuple[Change, Change]:
    """Bipartite soft matching (section 3 of the paper): (merge, unmerge) for tokens [B,N,C] of a height x width grid.

    The first token of each 2x2 square is a destination. Of the others, int(share * N) are merged, those most like a
    destination by cosine. `merge` takes [B,N,C] to [B,N - int(share * N),C] by means, `unmerge` brings it back.
    """
    first = torch.zeros(height, width, dtype=torch.bool)
    first[::2, ::2] = True
    to, others = (
        index.to(tokens.device) for index in (first.flatten().nonzero()[:, 0], (~first).flatten().nonzero()[:, 0])
    )
    unit = F.normalize(tokens, dim=-1)
    likeness, nearest = (unit[:, others] @ unit[:, to].transpose(1, 2)).max(dim=-1)
    order = likeness.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order.tensor_split([min(int(share * tokens.shape[1]), len(others))], dim=1)
    into = nearest.gather(1, merged)

    def wide(index: Tensor, like: Tensor) -> Tensor:
        return index[..., None].expand(-1, -1, like.shape[-1])

    def merge(x: Tensor) -> Tensor:
        rest = x[:, others]
        away = rest.gather(1, wide(merged, x))
        means = x[:, to].scatter_reduce(1, wide(into, x), away, reduce="mean", include_self=True)
        return torch.cat([rest.gather(1, wide(kept, x)), means], dim=1)

    def unmerge(y: Tensor) -> Tensor:
        alone, means = y.tensor_split([kept.shape[1]], dim=1)
        rest = y.new_empty(len(y), len(others), y.shape[-1])
        rest = rest.scatter(1, wide(kept, y), alone).scatter(1, wide(merged, y), means.gather(1, wide(into, y)))
        out = y.new_empty(len(y), len(to) + len(others), y.shape[-1])
        out[:, to], out[:, others] = means, rest
        return out

    return merge, unmerge


def _merge_in(transformer: SpatialTransformer, share: float) -> list[Any]:
    """Hooks that merge before each self-attention and undo it after; they know the grid from the feature map."""
    size: list[int] = []
    changes: list[Change] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        size[:] = inputs[0].shape[2:]

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        height, width = size
        changes[:] = matching(inputs[0], height, width, share)
        return changes[0](inputs[0]), *inputs[1:]

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return changes[1](output)

    hooks: list[Any] = [transformer.register_forward_pre_hook(look)]
    for block in transformer.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        attention = block.attn1
        hooks += [attention.register_forward_pre_hook(before), attention.register_forward_hook(after)]
    return hooks
