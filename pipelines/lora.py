"""LoRA (Hu et al. 2021, arXiv 2106.09685) at render time: files of any usual spelling, added to a model's weights and
taken out again to the bit.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor, nn

from ldm.unet import UNet
from pipelines.errors import notice
from pipelines.json_files import naming_file
from pipelines.key_map import unet_modules
from pipelines.single_file import SUFFIX
from pipelines.weights import DTYPES, PICKLES, is_finite, read_safetensors, refuse, some
from text_encoder import TextEncoder

METADATA = "lora_adapter_metadata"  # where diffusers puts peft's configuration into a file's header
ENDINGS = {
    ".lora_A.weight": "down",  # peft
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # diffusers
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",  # its former attention processors
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # its former text encoders
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
"""What a tensor is, by how its key ends; what stands before is the module."""
OTHERS = {
    "_hada_": "LoHa",
    "_lokr_": "LoKr",
    "_oft_": "OFT",
    "_dora_scale_": "DoRA",
    "_lora_magnitude_vector_": "DoRA",
    "_lora_mid_": "a LoRA in Tucker form",
    "_lora_B_bias_": "a LoRA with biases",
    "_diff_": "a full difference of weights",
    "_double_blocks_": "a LoRA for Flux",
    "_single_transformer_blocks_": "a LoRA for Flux",
    "_joint_blocks_": "a LoRA for Stable Diffusion 3",
    "_transformer_transformer_blocks_": "a LoRA for Stable Diffusion 3 or another diffusion transformer",
    "_lora_te2_": "a LoRA for Stable Diffusion XL",
    "_text_encoder_2_": "a LoRA for Stable Diffusion XL",
    "_transformer_blocks_1_": "a LoRA for Stable Diffusion XL",
}
"""Kinds of files that are none of ours, by what only their keys hold, with `_` for `.` and at both ends."""
NUMBERS = (*DTYPES, torch.int64)  # an alpha may be whole

Finite = Annotated[float, Field(allow_inf_nan=False)]
ModuleName = Annotated[str, Field(pattern=r"^\^?[\w.]+$")]


class PeftConfig(BaseModel, frozen=True):
    """What of peft's `LoraConfig` tells how strong an update is; all else is plain from the tensors.

    A key of `alpha_pattern` is the end of a module's name, or with `^` before it the whole of one. (For peft it may be
    any regular expression, but one from a stranger's file could take forever.)
    """

    lora_alpha: Finite = 8
    alpha_pattern: dict[ModuleName, Finite] = {}
    use_rslora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) if it is rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
        fitting = (alpha for pattern, alpha in self.alpha_pattern.items() if f"^.{module}".endswith(_dotted(pattern)))
        return next(fitting, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


class Update(NamedTuple):
    """What is added to one weight [out, in, ...]: `scale` times `up` [out, r] times `down` [r, in * ...]."""

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True)
class LoRA:
    """A file that fits a model: the updates by the names of the modules, such as `unet.conv_in`."""

    path: Path
    updates: Mapping[str, Update]


def parse_lora(text: str) -> tuple[Path, float]:
    """The file and the weight in `FILE[:weight]`; the weight is 1 unless it is given.

    Raises:
        ValueError: the weight is no finite number.
    """
    file, _, weight = text.rpartition(":")
    if Path(file).suffix not in (SUFFIX, *PICKLES):  # there is no colon, or it belongs to the path
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the weight of LoRA {file} is {weight!r}; give a finite number, as in {file}:0.8")
    return Path(file), number


def read_lora(path: str | os.PathLike[str], unet: UNet, text_encoder: TextEncoder) -> LoRA:
    """Reads a safetensors file of peft, diffusers or kohya (LoRA or LoCon), mapped from disk, for this model.

    What has no place in the model is skipped and named in one notice.

    Raises:
        ValueError: one line; the file is missing, a pickle, broken, of another kind or family, or fits nothing here.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    _refuse_others(path, tensors)
    configs = _read_configs(path, metadata)
    weights, names = _weights(unet, text_encoder), _spellings(unet, text_encoder)
    modules: dict[str, dict[str, Tensor]] = {}
    skipped = set()
    for key, tensor in tensors.items():
        module, role = _split(key)
        if role and _flat(module) in names:
            modules.setdefault(module, {})[role] = tensor
        else:
            skipped.add(module)
    if not modules:
        raise ValueError(f"{path} fits nothing in this model; it holds {some(sorted(tensors)) or 'no tensors'}")
    updates: dict[str, Update] = {}
    for module, roles in modules.items():
        name = names[_flat(module)]
        if name in updates:
            raise ValueError(f"{path} holds two updates of {name}; one of them is {module}")
        updates[name] = _make_update(path, module, roles, configs, weights[name])
    if skipped:
        notice(f"{path}: skipped what has no place in this model: {some(sorted(skipped))}")
    return LoRA(path, updates)


def apply_loras(
    unet: UNet,
    text_encoder: TextEncoder,
    loras: Sequence[tuple[LoRA, float]],
    originals: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Makes the model's weights their originals plus all of `loras`: W + sum_i weight_i scale_i B_i A_i (equation 3).

    The sum is taken in float32 or better and rounded once. The new weights are new memory, and the originals are kept
    as they are: twice the memory of what the LoRAs touch, less what is still mapped from disk. With no LoRAs every
    weight is the original tensor again, to the bit.

    Args:
        loras: each with its weight.
        originals: what the last call for this model returned; at first nothing.

    Returns:
        The original tensors of the weights that the LoRAs changed, by module.

    Raises:
        ValueError: a weight is not finite, or a sum is too large for the model's dtype; then nothing has changed.
    """
    for lora, weight in loras:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of LoRA {lora.path} is {weight}; give a finite number")
    parameters = _weights(unet, text_encoder)
    names = dict.fromkeys(name for lora, _ in loras for name in lora.updates)
    before = {name: originals.get(name, parameters[name].data) for name in names}
    sums = {
        name: _sum(tensor, [(lora.updates[name], weight) for lora, weight in loras if name in lora.updates])
        for name, tensor in before.items()
    }
    for name, tensor in sums.items():
        if not is_finite(tensor):
            raise ValueError(f"LoRAs of such weights make {name} too large for {tensor.dtype}; give smaller ones")
    for name, tensor in {**originals, **sums}.items():
        parameters[name].data = tensor
    return before


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run code; save the LoRA as {SUFFIX} first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the {SUFFIX} file in it")
    if not path.is_file():
        raise ValueError(f"LoRA {path} does not exist; give a {SUFFIX} file")
    return read_safetensors(path)


def _refuse_others(path: Path, keys: Iterable[str]) -> None:
    flat = {f"_{_flat(key)}_": key for key in keys}
    for mark, kind in OTHERS.items():
        for key in flat:
            if mark in key:
                raise ValueError(
                    f"{path} is {kind} (it holds {flat[key]});"
                    " only LoRA and LoCon for Stable Diffusion 1.x and 2.x are supported"
                )


def _read_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """peft's configuration of each part that has one. Raises ValueError if it is broken."""
    try:
        content = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {METADATA} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {METADATA} is no JSON object")
    parts: dict[str, dict[str, object]] = {}
    for key, value in content.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    return naming_file(path, lambda: TypeAdapter(dict[str, PeftConfig]).validate_python(parts))


def _make_update(
    path: Path, module: str, roles: Mapping[str, Tensor], configs: Mapping[str, PeftConfig], weight: Tensor
) -> Update:
    refuse(path, "lacks", (f"{role} of {module}" for role in ("up", "down") if role not in roles))
    strange = {f"{module} of {tensor.dtype}" for tensor in roles.values() if tensor.dtype not in NUMBERS}
    refuse(path, "holds what is no usual number:", strange)
    up, down = roles["up"], roles["down"]
    # A matrix and a 1x1 convolution are the same; a larger kernel is all in `down`.
    (out, *inner), (rank, *inner_down) = _conv_shape(weight), _conv_shape(down)
    if _conv_shape(up) != (out, rank, 1, 1) or inner_down != inner or not rank:
        raise ValueError(
            f"{path} does not fit this model: {list(up.shape)} times {list(down.shape)} in {module}"
            f" makes no {list(weight.shape)}; it was made for a model of other sizes"
        )
    part, _, name = module.partition(".")
    if "alpha" in roles:
        if roles["alpha"].numel() != 1:
            raise ValueError(f"{path}: alpha of {module} has shape {list(roles['alpha'].shape)}; it must be one number")
        scale = roles["alpha"].item() / rank
    else:
        scale = configs[part].scale(name, rank) if part in configs else 1.0
    if not (is_finite(up) and is_finite(down) and math.isfinite(scale)):
        raise ValueError(f"{path}: {module} holds NaN or infinity; the file is damaged or its training diverged")
    return Update(up.reshape(out, rank), down.reshape(rank, -1), scale)


def _sum(original: Tensor, updates: Iterable[tuple[Update, float]]) -> Tensor:
    """The original weight plus each update times its weight, in the original's dtype and memory layout."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    total = original.to(dtype)
    for (up, down, scale), weight in updates:
        product = up.to(original.device, dtype) @ down.to(original.device, dtype)
        total = total + weight * scale * product.reshape(original.shape)
    return torch.empty_like(original).copy_(total)


def _weights(unet: UNet, text_encoder: TextEncoder) -> dict[str, Tensor]:
    """Every weight that a LoRA may change, by its module."""
    return {
        f"{part}.{name}": module.weight
        for part, network in (("unet", unet), ("text_encoder", text_encoder))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _spellings(unet: UNet, text_encoder: TextEncoder) -> dict[str, str]:
    """The name of each module in `_weights` by all that files call it, flattened."""
    originals = unet_modules(unet.config)
    spellings: dict[str, str] = {}
    for name in _weights(unet, text_encoder):
        part, _, path = name.partition(".")
        if part == "unet":
            starts = ("", "unet.", "lora_unet.")
            original = (
                new + path.removeprefix(old) for old, new in originals.items() if f"{path}.".startswith(f"{old}.")
            )
            former = re.sub(r"(attn\d)\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2", path)
            paths = (path, former, *original)
        else:
            starts = ("text_encoder.", "lora_te.", "lora_te1.")
            former = re.sub(r"(self_attn)\.(q|k|v|out)_proj$", r"\1.to_\2", path)
            paths = (path, former, path.removeprefix("text_model."))
        spellings |= {_flat(start + path): name for start in starts for path in paths}
    return spellings


def _split(key: str) -> tuple[str, str]:
    """A module and what of it the tensor is; nothing if the key does not tell."""
    for ending, role in ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return key, ""


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _dotted(pattern: str) -> str:
    return pattern.replace("^", "^.") if pattern.startswith("^") else f".{pattern}"


def _conv_shape(tensor: Tensor) -> tuple[int, ...]:
    return (*tensor.shape, *(1,) * (4 - tensor.ndim))
