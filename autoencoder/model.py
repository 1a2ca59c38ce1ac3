"""The KL autoencoder of latent diffusion (Rombach et al. 2022, appendix G.1), parameters named as published.

images [B,3,H,W] in [-1,1] -> latents [B,C,H/f,W/f] -> images, f = 2 ** (levels - 1).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from autoencoder.bottleneck import DiagonalGaussian, Generators, unit_noise


class AutoencoderConfig(BaseModel, frozen=True):
    """The fields of diffusers' `AutoencoderKL` config; what is not supported must keep its neutral value."""

    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(3, ge=1)
    block_out_channels: tuple[int, ...] = Field((64,), min_length=1)
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    layers_per_block: int = Field(1, ge=1, le=16)
    act_fn: Literal["silu"] = "silu"
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = Field(0.18215, gt=0, allow_inf_nan=False)
    shift_factor: Literal[None] = None
    latents_mean: Literal[None] = None
    latents_std: Literal[None] = None
    force_upcast: bool = True  # concerns float16 alone, which this model is not run in
    use_quant_conv: Literal[True] = True
    use_post_quant_conv: Literal[True] = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _levels_agree(self) -> "AutoencoderConfig":
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels or len(self.up_block_types) != levels:
            raise ValueError(
                f"block_out_channels has {levels} levels: down_block_types and up_block_types need as many"
            )
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(f"norm_num_groups {self.norm_num_groups} must divide each of {self.block_out_channels}")
        return self


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.conv_shortcut(x) + h
        return out


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions."""

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
        attended = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        attended = self.to_out[0](attended).reshape(batch, height, width, channels)
        out: Tensor = x + attended.permute(0, 3, 1, 2)
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
    """Double height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, then the step to the next, published as `downsamplers` or `upsamplers`."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList([ResidualBlock(channels, out_channels, groups) for channels in inputs])
        if resample is not None:
            name, module = resample
            self.add_module(name, nn.ModuleList([module]))

    def forward(self, x: Tensor) -> Tensor:
        for children in self.children():
            for module in children.children():
                x = module(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for inputs, outputs, last in zip((widths[0], *widths), widths, _is_last(widths), strict=False):
            step = None if last else ("downsamplers", Downsample(outputs))
            self.down_blocks.append(Level(inputs, outputs, config.layers_per_block, groups, step))
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for inputs, outputs, last in zip((widths[0], *widths), widths, _is_last(widths), strict=False):
            step = None if last else ("upsamplers", Upsample(outputs))
            self.up_blocks.append(Level(inputs, outputs, config.layers_per_block + 1, groups, step))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for level in self.up_blocks:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


def _is_last(items: tuple[int, ...]) -> list[bool]:
    return [False] * (len(items) - 1) + [True]


class Autoencoder(nn.Module):
    """Pixels <-> latents. `scaling_factor` of the config is applied inside `encode` and `decode` and nowhere else."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        channels = config.latent_channels
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
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """q(z|x) of images [B,3,H,W] in [-1,1], before scaling."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(images)))

    def encode(self, images: Tensor, generator: Generators | None = None) -> Tensor:
        """Latents [B,C,h,w], scaled: the posterior's mode; with a generator (one, or one for each picture) a sample.

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
        channels = len(mean)
        assert self.quant_conv.bias is not None
        assert self.post_quant_conv.bias is not None
        self.quant_conv.weight[:channels] /= std[:, None, None, None]
        self.quant_conv.bias[:channels] = (self.quant_conv.bias[:channels] - mean) / std
        self.quant_conv.bias[channels:] -= 2 * std.log()
        self.post_quant_conv.bias += self.post_quant_conv.weight[:, :, 0, 0] @ mean
        self.post_quant_conv.weight *= std[None, :, None, None]
