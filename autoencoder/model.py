"""Encoder, decoder and the KL autoencoder of latent diffusion (Rombach et al. 2022, appendix G.1), named as published.

images [B,3,H,W] in [-1,1] -> latents [B,C,H/f,W/f] -> images, f = 2 ** (levels - 1).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from autoencoder.bottleneck import DiagonalGaussian, Generators, unit_noise

Count = Annotated[int, Field(ge=1, le=65536)]


class CoderConfig(BaseModel, frozen=True):
    """What the configs of all autoencoders say of encoder and decoder, in diffusers' names."""

    in_channels: Count = 3
    out_channels: Count = 3
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1, max_length=16)] = (64,)
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    layers_per_block: int = Field(1, ge=1, le=16)
    act_fn: Literal["silu"] = "silu"
    latent_channels: Count = 4
    norm_num_groups: Count = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = Field(0.18215, gt=0, allow_inf_nan=False)
    force_upcast: bool = True  # concerns float16 alone, where overflow is found out when it happens
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _levels_agree(self) -> "CoderConfig":
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels or len(self.up_block_types) != levels:
            raise ValueError(
                f"block_out_channels has {levels} levels: down_block_types and up_block_types need as many"
            )
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(f"norm_num_groups {self.norm_num_groups} must divide each of {self.block_out_channels}")
        return self

    @property
    def downsampling_factor(self) -> int:
        """Pixels per latent, along height and width."""
        return int(2 ** (len(self.block_out_channels) - 1))


class AutoencoderConfig(CoderConfig, frozen=True):
    """The fields of diffusers' `AutoencoderKL` config; what is not supported must keep its neutral value."""

    shift_factor: Literal[None] = None
    latents_mean: Literal[None] = None
    latents_std: Literal[None] = None
    use_quant_conv: Literal[True] = True
    use_post_quant_conv: Literal[True] = True


def silu(x: Tensor) -> Tensor:
    """SiLU of an x that nothing else reads, in x's own memory unless a gradient will need it."""
    return F.silu(x, inplace=not x.requires_grad)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = silu(self.norm2(h))  # gives up what went in before the convolution
        out: Tensor = self.conv2(h)
        out += self.conv_shortcut(x)
        return out


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions.

    `attend` is softmax(q k^T / sqrt(d)) v (arXiv 1706.03762, equation 1), [B,1,N,d] all; another way to compute it may
    take its place.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)
        attended = self.attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        attended = self.to_out[0](attended).reshape(batch, height, width, channels)
        out: Tensor = attended.permute(0, 3, 1, 2)
        out += x
        return out


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Downsample(nn.Module):
    """Halve height and width; padded on the right and below only, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double height and width by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not x.requires_grad:
            return convolve_doubled(x, self.conv.weight, self.conv.bias)
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def convolve_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1)` with 4/9 of the arithmetic: [B,C,2h,2w].

    Where a pixel is doubled, two of a kernel's three taps meet the same one. Added up beforehand, they leave a kernel
    of 2x2 for each of the four places in a doubled pixel.
    """
    batch, _, height, width = x.shape
    out = x.new_empty(batch, height, 2, width, 2, len(weight))
    for row in (0, 1):
        for column in (0, 1):
            kernel = _two_taps(_two_taps(weight.float(), row, dim=2), column, dim=3).to(weight.dtype)
            convolved = F.conv2d(x, kernel, bias, padding=1)[:, :, row : row + height, column : column + width]
            out[:, :, row, :, column] = convolved.permute(0, 2, 3, 1)
    return out.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def _two_taps(kernel: Tensor, place: int, dim: int) -> Tensor:
    """Of three taps, the last two added up at the first place of a doubled pixel, the first two at the second."""
    first, middle, last = torch.split(kernel, 1, dim)
    return torch.cat((first + middle, last) if place else (first, middle + last), dim)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention or none of them, then the step to the next."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        groups: int,
        attention: bool,
        downsamplers: Sequence[nn.Module] = (),
        upsamplers: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList([ResidualBlock(channels, out_channels, groups) for channels in inputs])
        self.attentions = nn.ModuleList(
            [AttentionBlock(out_channels, groups) if attention else nn.Identity() for _ in inputs]
        )
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)


def steps(levels: nn.ModuleList) -> Iterator[nn.Module]:
    """What to apply of all levels, in order.

    A level has no forward of its own: to call it as a whole would keep its input to its end, and at full size that is
    the largest of all feature maps.
    """
    for level in levels:
        assert isinstance(level, Level)
        for resnet, attention in zip(level.resnets, level.attentions, strict=True):
            yield from (resnet, attention)
        yield from (*level.downsamplers, *level.upsamplers)


class Encoder(nn.Module):
    """images [B,3,H,W] -> [B,out_channels,h,w]: what the bottleneck needs to know."""

    def __init__(self, config: CoderConfig, out_channels: int) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for inputs, outputs, kind, last in _levels(widths, config.down_block_types):
            step = [] if last else [Downsample(outputs)]
            attention = kind == "AttnDownEncoderBlock2D"
            level = Level(inputs, outputs, config.layers_per_block, groups, attention, downsamplers=step)
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for step in steps(self.down_blocks):
            x = step(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(silu(self.conv_norm_out(x)))
        return out


class Decoder(nn.Module):
    """Unscaled latents [B,C,h,w], as the bottleneck lets them through -> images [B,3,H,W]."""

    def __init__(self, config: CoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for inputs, outputs, kind, last in _levels(widths, config.up_block_types):
            step = [] if last else [Upsample(outputs)]
            attention = kind == "AttnUpDecoderBlock2D"
            level = Level(inputs, outputs, config.layers_per_block + 1, groups, attention, upsamplers=step)
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for step in steps(self.up_blocks):
            x = step(x)
        out: Tensor = self.conv_out(silu(self.conv_norm_out(x)))
        return out


def _levels(widths: tuple[int, ...], kinds: tuple[str, ...]) -> Iterator[tuple[int, int, str, bool]]:
    """Of each level, in order: channels in, channels out, kind, whether it is the last."""
    is_last = [False] * (len(widths) - 1) + [True]
    return zip((widths[0], *widths[:-1]), widths, kinds, is_last, strict=True)


@torch.no_grad()
def fold_in(mean: Tensor, std: Tensor, quant_conv: nn.Conv2d, post_quant_conv: nn.Conv2d) -> None:
    """z' = (z - mean) / std, both [C], into the first C rows of one 1x1 convolution, its inverse into the other."""
    channels = len(mean)
    assert quant_conv.bias is not None
    assert post_quant_conv.bias is not None
    quant_conv.weight[:channels] /= std[:, None, None, None]
    quant_conv.bias[:channels] = (quant_conv.bias[:channels] - mean) / std
    post_quant_conv.bias += post_quant_conv.weight[:, :, 0, 0] @ mean
    post_quant_conv.weight *= std[None, :, None, None]


class Autoencoder(nn.Module):
    """Pixels <-> latents. `scaling_factor` of the config is applied inside `encode` and `decode` and nowhere else."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, 2 * channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> "Autoencoder":
        """Build from the contents of a `vae/config.json`.

        Raises `pydantic.ValidationError`, a `ValueError` that names each key whose value is not supported.
        """
        return cls(AutoencoderConfig.model_validate(config))

    @property
    def downsampling_factor(self) -> int:
        """Pixels per latent, along height and width."""
        return self.config.downsampling_factor

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """q(z|x) of images [B,3,H,W] in [-1,1], before scaling."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(images)))

    def encode(self, images: Tensor, generator: Generators | None = None) -> Tensor:
        """Latents [B,C,h,w], scaled: the posterior's mode; with a generator (one, or one for each picture) a sample, or
        of one picture as many as there are generators.

        Raises ValueError if the number of generators is not the number of pictures.
        """
        posterior = self.posterior(images)
        latents = posterior.mean if generator is None else posterior.sample(unit_noise(posterior.mean, generator))
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B,3,H,W] of scaled latents [B,C,h,w]; not clamped to [-1,1]."""
        out: Tensor = self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))
        return out

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """For training: the reconstruction through a posterior sample of unit noise eps [B,C,h,w]; the posterior."""
        posterior = self.posterior(images)
        return self.decoder(self.post_quant_conv(posterior.sample(eps))), posterior

    @torch.no_grad()
    def whiten(self, mean: Tensor, std: Tensor) -> None:
        """Make latents with this mean and std, [C] each, have mean 0 and std 1 per channel; the pictures do not change.

        z' = (z - mean) / std is folded exactly into the 1x1 convolutions: into the rows of means and log-variances of
        `quant_conv`, and its inverse into the columns of `post_quant_conv`.
        """
        fold_in(mean, std, self.quant_conv, self.post_quant_conv)
        assert self.quant_conv.bias is not None
        self.quant_conv.bias[len(mean) :] -= 2 * std.log()
