"""Transformer blocks over the positions of a feature map, and the attention in them.

Attribute names are those of a published Stable Diffusion U-Net, so that its state dict loads without renaming.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.hardware import multiplies_bfloat16_by_vectors
from ldm.layers import VECTOR, GroupNorm, as_many, made_again, needs_gradient, untouched, zeroed

SHORT = 2**16  # queries times keys below which the plain formula is the faster one to train with on a CPU
FEW_KEYS = 512  # that the fused kernel of a CPU takes in one block
LONG = 2**19  # heads times queries times keys from which the formula in blocks is the faster one, and the fewest keys,
MANY_KEYS = 256  # on a CPU that has no instructions for whole matrices
BLOCK = 2**21  # scores worked on at a time
MANY_TOKENS = 512  # from which a 1x1 convolution is the faster linear layer there
EVERY = 16  # of so many keys one is asked how large the scores of a query are


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (arXiv 1706.03762, equation 1): q [B,H,N,d], k and v [B,H,L,d] -> [B,H,N,d].

    On a CPU the fused kernel's backward pass in bfloat16 takes two to four times as long as the plain formula's where
    sequences are short, though the formula is then worked out twice, so that no probabilities are kept meanwhile. Where
    they are long, and nothing but vector instructions multiplies bfloat16, its forward pass takes 1.3 to 1.9 times as
    long as the formula's in blocks.

    The kernel reads `VECTOR` keys at once, and what is left over of its block one by one: CLIP's 77 keys take it twice
    as long as 80, of which three have no weight.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    queries, keys = q.shape[-2], k.shape[-2]
    if q.dtype == torch.bfloat16:
        if q.requires_grad and queries * keys <= SHORT:
            return made_again(_attend_plainly, q, k, v)
        many = keys >= MANY_KEYS and q.shape[1] * queries * keys >= LONG
        if many and not needs_gradient(q, k, v) and multiplies_bfloat16_by_vectors():
            return _attend_in_blocks(q, k, v)
    missing = -keys % VECTOR
    if missing == 0 or keys > FEW_KEYS:
        return F.scaled_dot_product_attention(q, k, v)
    k, v = (F.pad(each, (0, 0, 0, missing)) for each in (k, v))
    bias = q.new_zeros(keys + missing)
    bias[keys:] = -torch.inf
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(1, 1, 1, -1))


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return out


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, for so many heads, or so many queries of one, at a time that a cache holds their scores.

    A score is rounded, and the larger it is the worse. Softmax does not change when all scores of a query are lowered
    alike: here by the largest that a sample of the keys gives, so that those that weigh most are small. The product
    itself lowers them, before they are rounded, by one more number in each query and a 1 in each key.
    """
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    rows = max(1, min(BLOCK // keys, queries))
    at_once = max(1, BLOCK // (rows * keys))
    q, k = F.pad(q, (0, 1)).flatten(0, 1), F.pad(k, (0, 1), value=1.0).flatten(0, 1)
    v = F.pad(v, (0, -width % VECTOR)).flatten(0, 1)  # a product of whole vectors takes three quarters of the time
    out, unread = v.new_empty(batch * heads, queries, width), q.new_zeros(1)
    for some_q, some_k, some_v, of_some in zip(*(torch.split(each, at_once) for each in (q, k, v, out)), strict=True):
        some_q[:, :, width] = -torch.bmm(some_q, some_k[:, ::EVERY].transpose(1, 2)).amax(2)
        for one_q, of_one in zip(*(torch.split(each, rows, dim=1) for each in (some_q, of_some)), strict=True):
            scores = torch.baddbmm(unread, one_q, some_k.transpose(1, 2), beta=0, alpha=width**-0.5)
            of_one.copy_(torch.bmm(scores.softmax(2), some_v)[:, :, :width])
    return out.view(batch, heads, queries, width)


def joined(matrices: Sequence[Tensor]) -> Tensor | None:
    """The matrix of the rows of all these, if they lie in memory one after the other, without gradients."""
    if torch.compiler.is_compiling():  # places in memory are not known there
        return None
    first = matrices[0]
    memory, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for matrix in matrices:
        if matrix.requires_grad or not matrix.is_contiguous() or matrix.storage_offset() != end:
            return None
        if matrix.untyped_storage().data_ptr() != memory:
            return None
        end += matrix.numel()
    return first.as_strided((sum(map(len, matrices)), first.shape[1]), first.stride())


@dataclass(frozen=True)
class Reading:
    """What a network makes of a context [B,L,D] by itself, so that it need not be made again at every time: of each
    attention to it the keys and values, [B,H,L,d] both. `ldm.unet.UNet.read` makes one, of the weights of that moment.
    """

    of: Mapping["Attention", tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        """B."""
        return len(next(iter(self.of.values()))[0])


Context = Tensor | Reading


class Attention(nn.Module):
    """Multi-head attention from x [B,N,C] to context [B,L,D], or to x itself (arXiv 1706.03762, equation 1)."""

    def __init__(self, channels: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        source = channels if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source, channels, bias=False)
        self.to_v = nn.Linear(source, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def join(self) -> None:
        """For self-attention without gradients: moves the weights of queries, keys and values to where each follows the
        other in memory, so that x is multiplied by all three at once. They stay three in name, in the state dict and in
        what they do; whatever moves or replaces one of them later takes them apart.
        """
        weights = self.to_q.weight, self.to_k.weight, self.to_v.weight
        together = torch.cat([weight.data for weight in weights])
        for weight, rows in zip(weights, torch.chunk(together, 3), strict=True):
            weight.data = rows

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to: [B,L,D] -> [B,H,L,d] twice."""
        return self._heads(self.to_k(source)), self._heads(self.to_v(source))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        q, k, v = self._read_itself(x) if context is None else (self._heads(self.to_q(x)), *self._look_up(context))
        mixed = attend(q, k, v)
        out: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out

    def _look_up(self, context: Context) -> tuple[Tensor, Tensor]:
        return context.of[self] if isinstance(context, Reading) else self.read(context)

    def _read_itself(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x [B,N,C]: [B,H,N,d] thrice."""
        layers = self.to_q, self.to_k, self.to_v
        plain = all(untouched(layer, nn.Linear) for layer in layers)
        together = joined([layer.weight for layer in layers]) if plain else None
        if together is None:
            return self._heads(self.to_q(x)), *self.read(x)
        return tuple(self._heads(each) for each in F.linear(x, together).chunk(3, dim=-1))

    def _heads(self, tokens: Tensor) -> Tensor:
        """[B,N,C] -> [B,H,N,d]."""
        return tokens.view(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


class GEGLU(nn.Module):
    """Linear layer whose output is gated by the GELU of a second one (arXiv 2002.05202, equation 6)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        return made_again(gated, *self._halves(x))  # GELUs alone would be a ninth of all that is kept

    def _halves(self, x: Tensor) -> tuple[Tensor, ...]:
        """Values and gates [B,N,D]. On a CPU each has a product of its own: halves of one tensor are strided, which
        slows down all that reads them."""
        if x.device.type == "cpu" and untouched(self.proj, nn.Linear):
            each = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
            return tuple(_project(x, weight, bias) for weight, bias in each)
        halves: tuple[Tensor, ...] = self.proj(x).chunk(2, dim=-1)
        return halves


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear(x, weight, bias)` of x [B,N,C] on a CPU. That fills the result with the bias before it multiplies; a
    1x1 convolution, which adds the bias as it goes, takes up to an eighth less time.
    """
    many = x.dtype == torch.bfloat16 and x.shape[1] >= MANY_TOKENS and not torch.is_grad_enabled()
    if not many or not multiplies_bfloat16_by_vectors():
        return F.linear(x, weight, bias)
    return F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


def gated(values: Tensor, gate: Tensor) -> Tensor:
    """values GELU(gate), in their own memory unless a gradient will need them."""
    if values.requires_grad or gate.requires_grad:
        return values * F.gelu(gate)
    return values.mul_(torch.ops.aten.gelu_(gate))


class FeedForward(nn.Module):
    """Gated perceptron on each token, four times as wide inside: [B,N,C] -> [B,N,C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The published layout has a dropout at index 1; it holds no weights, but index 2 is the layer's name on disk.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward: x [B,N,C], context [kB,L,D] -> [kB,N,C]."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = as_many(x + self.attn1(self.norm1(x)), context)
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class TokenConv(nn.Conv2d):
    """A 1x1 convolution applied to tokens [B,N,C]: the weights of a `Conv2d`, the arithmetic of a `Linear`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map: x [B,C,h,w], context [kB,L,D] -> [kB,C,h,w].

    Rombach et al. 2022 (arXiv 2112.10752), section 3.3. `depth` is their number. All but the first start as the
    identity, so that a trained network can be made deeper. `linear` says how the projections around them are stored:
    as `Linear` (SD 2.x) or as 1x1 convolutions (SD 1.x).
    """

    def __init__(
        self, channels: int, heads: int, context_dim: int, groups: int, *, depth: int = 1, linear: bool
    ) -> None:
        super().__init__()
        projection = nn.Linear if linear else TokenConv
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        blocks = [TransformerBlock(channels, heads, context_dim) for _ in range(depth)]
        for block in blocks[1:]:
            for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
                zeroed(last)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = zeroed(projection(channels, channels))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # In channels_last memory the tokens are a view of the feature map, and so is the way back.
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens)
        out: Tensor = as_many(x, tokens) + tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return out
