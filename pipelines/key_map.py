"""The names of weights in a Stable Diffusion folder and in a single file, both ways, from one table of modules.

A single file is what CompVis' and Stability's code saved: `model.diffusion_model.*` is the U-Net, `first_stage_model.*`
the autoencoder, whose attention is made of 1x1 convolutions there, and `cond_stage_model.*` the text tower, as
transformers has it (Stable Diffusion 1) or as OpenCLIP has it (Stable Diffusion 2).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from autoencoder import AutoencoderConfig
from ldm.unet import UNetConfig
from pipelines.families import PUBLISHED, NetworkConfigs
from text_encoder.clip import OPEN_CLIP_NAMES, from_open_clip

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
AVERAGE = "model_ema."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", **{f"to_{letter}": letter for letter in "qkv"}, "to_out.0": "proj_out"}

PartWeights = Mapping[str, Mapping[str, Tensor]]
"""Tensors by a folder's name, of each of "unet", "vae" and "text_encoder"."""


def to_single_file(configs: NetworkConfigs, weights: PartWeights) -> dict[str, Tensor]:
    """The tensors of a single file; all but the text tower's in OpenCLIP's layout are the same memory.

    Raises:
        ValueError: a network has a module that single files have no name for.
    """
    unet, vae = unet_modules(configs.unet), autoencoder_modules(configs.vae)
    prefix, text = CLIP, weights["text_encoder"]
    if configs.has_open_clip:
        prefix, text = OPEN_CLIP, _to_open_clip(text, configs.text_encoder.num_hidden_layers)
    return {
        **{UNET + _renamed(name, unet): tensor for name, tensor in weights["unet"].items()},
        **{AUTOENCODER + _renamed(name, vae): _as_convolution(tensor) for name, tensor in weights["vae"].items()},
        **{prefix + name: tensor for name, tensor in text.items()},
    }


def from_single_file(
    configs: NetworkConfigs, names: Mapping[str, Iterable[str]], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The inverse of `to_single_file`, for the given names of each part; any other tensors are left."""
    unet, vae = unet_modules(configs.unet), autoencoder_modules(configs.vae)
    if configs.has_open_clip:
        bare = {name.removeprefix(OPEN_CLIP): tensor for name, tensor in tensors.items() if name.startswith(OPEN_CLIP)}
        text = from_open_clip(bare, configs.text_encoder.num_hidden_layers)
    else:
        text = {name: tensors[CLIP + name] for name in names["text_encoder"]}
    return {
        "unet": {name: tensors[UNET + _renamed(name, unet)] for name in names["unet"]},
        "vae": {name: _as_linear(name, tensors[AUTOENCODER + _renamed(name, vae)]) for name in names["vae"]},
        "text_encoder": text,
    }


def ema_name(name: str) -> str:
    """Where a single file has the moving average of a U-Net's weight."""
    return AVERAGE + name.removeprefix("model.").replace(".", "")


def unused_block(configs: NetworkConfigs, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The 24th block that readers of Stable Diffusion 2 expect of the text tower and take no context from.

    A folder does not have it. It is all zeros, and a residual block of zeros returns its input: so whoever reads the
    last block after all gets the same context.
    """
    layers = configs.text_encoder.num_hidden_layers
    if not configs.has_open_clip or layers != PUBLISHED[1].text_encoder.num_hidden_layers:
        return {}
    last, unused = (f"{OPEN_CLIP}transformer.resblocks.{index}." for index in (layers - 1, layers))
    return {
        name.replace(last, unused): torch.zeros_like(tensor)
        for name, tensor in tensors.items()
        if name.startswith(last)
    }


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """A single file's name of each module of a U-Net that has weights, by a folder's."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    residual = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    layers = config.layers_per_block
    for level, up_type in enumerate(config.up_block_types):
        first_down, first_up = 1 + level * (layers + 1), level * (layers + 1)
        for index in range(layers):
            residual[f"down_blocks.{level}.resnets.{index}"] = f"input_blocks.{first_down + index}.0"
            modules[f"down_blocks.{level}.attentions.{index}"] = f"input_blocks.{first_down + index}.1"
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first_down + layers}.0.op"
        for index in range(layers + 1):
            residual[f"up_blocks.{level}.resnets.{index}"] = f"output_blocks.{first_up + index}.0"
            modules[f"up_blocks.{level}.attentions.{index}"] = f"output_blocks.{first_up + index}.1"
        place = 1 + (up_type == "CrossAttnUpBlock2D")  # in its block, where the attention comes first
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first_up + layers}.{place}.conv"
    for ours, theirs in residual.items():
        modules |= {f"{ours}.{inner}": f"{theirs}.{original}" for inner, original in RESIDUAL.items()}
    return modules


def autoencoder_modules(config: AutoencoderConfig) -> dict[str, str]:
    """A single file's name of each module of an autoencoder that has weights, by a folder's."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    residual: dict[str, str] = {}
    for coder in ("encoder", "decoder"):
        modules |= {f"{coder}.{name}": f"{coder}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{coder}.conv_norm_out"] = f"{coder}.norm_out"
        for inner, original in ATTENTION.items():
            modules[f"{coder}.mid_block.attentions.0.{inner}"] = f"{coder}.mid.attn_1.{original}"
        residual |= {f"{coder}.mid_block.resnets.{index}": f"{coder}.mid.block_{index + 1}" for index in range(2)}
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for inner, original in ATTENTION.items():
            modules |= {
                f"encoder.down_blocks.{level}.attentions.{i}.{inner}": f"{down}.attn.{i}.{original}"
                for i in range(layers)
            }
            modules |= {
                f"decoder.up_blocks.{level}.attentions.{i}.{inner}": f"{up}.attn.{i}.{original}"
                for i in range(layers + 1)
            }
        residual |= {f"encoder.down_blocks.{level}.resnets.{i}": f"{down}.block.{i}" for i in range(layers)}
        residual |= {f"decoder.up_blocks.{level}.resnets.{i}": f"{up}.block.{i}" for i in range(layers + 1)}
        modules[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        modules[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    for ours, theirs in residual.items():
        modules |= {f"{ours}.{name}": f"{theirs}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
        modules[f"{ours}.conv_shortcut"] = f"{theirs}.nin_shortcut"
    return modules


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """A weight's name with that of its module, the longest part of it in the table, exchanged."""
    module, end = name, ""
    while module not in modules:
        module, dot, last = module.rpartition(".")
        end = f".{last}{end}"
        if not dot:
            raise ValueError(f"single files have no name for {name}; a model with it can only be a folder")
    return modules[module] + end


def _as_convolution(tensor: Tensor) -> Tensor:
    """Of an autoencoder's weights only those of its attention are matrices [C,C]: they become [C,C,1,1]."""
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if ".attentions." in name and tensor.ndim > 2 else tensor


def _to_open_clip(weights: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`: queries, keys and values become one tensor again."""
    tensors = {
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        **{f"ln_final.{kind}": weights[f"text_model.final_layer_norm.{kind}"] for kind in ("weight", "bias")},
    }
    for index in range(num_layers):
        theirs, ours = f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            split = [weights[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            tensors[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(split)
            for old, new in OPEN_CLIP_NAMES.items():
                tensors[f"{theirs}.{old}.{kind}"] = weights[f"{ours}.{new}.{kind}"]
    return tensors
