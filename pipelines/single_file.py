"""A model in one file, as most programs exchange it; what the published layout has no place for is in its metadata."""

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderConfig
from ldm.unet import UNet, UNetConfig
from pipelines.families import (
    INPAINTING_CHANNELS,
    PUBLISHED_SCHEDULER,
    NetworkConfigs,
    configs_from_shapes,
    differences,
    refuse_other_families,
)
from pipelines.json_files import naming_file
from pipelines.key_map import (
    AUTOENCODER,
    AVERAGE,
    CLIP,
    OPEN_CLIP,
    UNET,
    ema_name,
    from_single_file,
    to_single_file,
    unused_block,
)
from pipelines.prediction_type import (
    MARKS,
    VELOCITY,
    ZERO_SNR_MARK,
    checked,
    find_prediction_type,
    share_of_input,
    statement,
)
from pipelines.scheduler_config import SchedulerConfig
from pipelines.stored_model import (
    CONFIGS,
    DIFFUSERS_VERSION,
    INDEX,
    SCHEDULER,
    SETTINGS,
    StoredModel,
    check_index,
    config_name,
    stock_config,
    stock_index,
)
from pipelines.weights import (
    PICKLES,
    Weights,
    fill,
    in_place,
    on_meta,
    read_pickle,
    read_safetensors,
    refuse,
    write_weights,
)
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer
from text_encoder.clip import with_prefix

SUFFIX = ".safetensors"
METADATA = "ldm"  # the key of an `Embedded` as JSON
RESOLUTION = "modelspec.resolution"  # in pixels; anything but a square is not read
CLIP_VOCABULARY = 49408

FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class Embedded(BaseModel, frozen=True):
    """What a folder has beside weights: its JSON by path, the text of its tokenizer's files by name. And which keys a
    folder has not, because they stand for nothing (`unused_block`).
    """

    configs: dict[str, dict[str, Any]] = {}
    tokenizer: dict[FileName, str] = {}
    unused: tuple[str, ...] = ()


def read_single_file(
    path: Path,
    published_tokenizer: Path,
    prediction: str | None = None,
    ema: bool = False,
    allow_pickle: bool = False,
) -> StoredModel:
    """Reads a checkpoint of Stable Diffusion 1.x or 2.x, or one of any sizes that `write_single_file` wrote.

    Args:
        published_tokenizer: the folder of CLIP's, for a file that brings none.
        prediction: the prediction type; None is what the file says, else what a probing evaluation tells.
        ema: take the moving average of the U-Net's weights.
        allow_pickle: read `.ckpt` too, of which only the tensors are ever built.

    Raises:
        ValueError: one line that names the file and what is wrong in it.
    """
    tensors, metadata = _read(path, allow_pickle)
    naming_file(path, lambda: refuse_other_families(tensors))
    if path.suffix not in PICKLES:
        read = (AVERAGE if ema else UNET, AUTOENCODER, CLIP, OPEN_CLIP)
        tensors |= in_place(path, {name: tensor for name, tensor in tensors.items() if name.startswith(read)})
    tensors = _with_clip_prefix(tensors)
    embedded = _read_embedded(path, metadata)
    if embedded is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        networks = naming_file(path, lambda: configs_from_shapes(shapes))
    else:
        networks = network_configs(path, embedded.configs)
    weights, left_out = _take(path, networks, tensors, ema)
    reason = f"{SCHEDULER} in its metadata"
    if prediction is not None:
        prediction, reason = checked(prediction), "asked for"
    if embedded is not None:
        left_out = left_out - set(embedded.unused)
        tokenizer, folder = _unpack_tokenizer(path, embedded.tokenizer)
        changed = {} if prediction is None else {"prediction_type": prediction}
        configs = {**embedded.configs, SCHEDULER: {**embedded.configs[SCHEDULER], **changed}}
    else:
        tokenizer, folder = _published_tokenizer(path, published_tokenizer, networks)

        def probe() -> float:
            return share_of_input(fill(on_meta(lambda: UNet(networks.unet)), weights["unet"]))

        if prediction is None:
            prediction, reason = naming_file(path, lambda: find_prediction_type(metadata, tensors, probe))
        configs = _published_configs(networks, metadata, prediction, ZERO_SNR_MARK in tensors)
    return StoredModel(path, configs, weights, tokenizer, folder, reason, tuple(sorted(left_out)))


def write_single_file(path: Path, stored: StoredModel, dtype: torch.dtype | None) -> None:
    """Writes a model as one safetensors file; `dtype` None keeps each tensor's own.

    Raises:
        ValueError: a network has a module that single files have no name for, or a tokenizer's file is no text.
    """
    networks = network_configs(stored.source, stored.configs)
    parts = {part: weights.tensors for part, weights in stored.weights.items()}
    tensors = naming_file(stored.source, lambda: to_single_file(networks, parts))
    scheduler = SchedulerConfig.from_diffusers_config(stored.configs[SCHEDULER])
    stated, marks = statement(scheduler.prediction_type, scheduler.rescale_betas_zero_snr)
    unused = unused_block(networks, tensors)
    texts = _read_texts(stored.tokenizer_folder)
    embedded = naming_file(
        stored.tokenizer_folder,
        lambda: Embedded(configs=dict(stored.configs), tokenizer=texts, unused=tuple(unused)),
    )
    metadata = {METADATA: json.dumps(embedded.model_dump(), ensure_ascii=False), **stated}
    write_weights(path, {**tensors, **unused, **marks}, dtype, metadata)


def unreadable(stored: StoredModel, scheduler: SchedulerConfig) -> tuple[str, ...]:
    """What keeps other programs from reading a model as a single file; nothing does if it has a published size."""
    try:
        return tuple(differences(network_configs(stored.source, stored.configs), scheduler))
    except ValueError as error:
        return (str(error),)


def network_configs(path: Path, configs: Mapping[str, Mapping[str, Any]]) -> NetworkConfigs:
    """The configs of the networks that a single file can hold; `path` is for the messages.

    Raises:
        ValueError: a config is not supported, or the model has no autoencoder of Stable Diffusion's kind.
    """
    name = configs[INDEX]["vae"][1]
    if name != "AutoencoderKL":
        raise ValueError(f"{path}: its vae is of class {name}, which only a folder can hold")
    unet, vae, text_encoder = (config_name(part) for part in NetworkConfigs._fields)
    return NetworkConfigs(
        naming_file(path / unet, lambda: UNetConfig.model_validate(configs[unet])),
        naming_file(path / vae, lambda: AutoencoderConfig.model_validate(configs[vae])),
        naming_file(path / text_encoder, lambda: TextEncoderConfig.model_validate(configs[text_encoder])),
    )


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix not in PICKLES:
        return read_safetensors(path)
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can run code; render and convert read nothing but its tensors if you add "
            "--allow-pickle"
        )
    return read_pickle(path), {}


def _read_embedded(path: Path, metadata: Mapping[str, str]) -> Embedded | None:
    """What `write_single_file` put into the metadata, if it did. Raises ValueError if it is broken."""
    if METADATA not in metadata:
        return None
    try:
        content = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {METADATA} in its metadata is no valid JSON: {error}") from None
    embedded = naming_file(path, lambda: Embedded.model_validate(content))
    refuse(path, "lacks in its metadata", set(CONFIGS) - embedded.configs.keys())
    check_index(path / INDEX, embedded.configs[INDEX])
    known = {name: embedded.configs[name] for name in (*CONFIGS, SETTINGS) if name in embedded.configs}
    return embedded.model_copy(update={"configs": known})


def _take(
    path: Path, networks: NetworkConfigs, tensors: dict[str, Tensor], ema: bool
) -> tuple[dict[str, Weights], set[str]]:
    """The weights of each network under a folder's names, and the keys that are none of theirs.

    Raises:
        ValueError: keys are missing, or the U-Net or the autoencoder has some that the configs do not know.
    """
    blank = on_meta(lambda: (UNet(networks.unet), Autoencoder(networks.vae), TextEncoder(networks.text_encoder)))
    parts = {part: module.state_dict() for part, module in zip(NetworkConfigs._fields, blank, strict=True)}
    names = naming_file(path, lambda: to_single_file(networks, parts)).keys()
    if ema:
        tensors = _with_ema(path, tensors, names)
    refuse(path, "lacks", names - tensors.keys())
    left_out = tensors.keys() - names - set(MARKS)
    coders = (AUTOENCODER + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    inner = (UNET, *coders)
    refuse(path, "holds the unknown", (name for name in left_out if name.startswith(inner)))
    taken = from_single_file(networks, parts, tensors)
    return {part: Weights(path, of_part) for part, of_part in taken.items()}, left_out


def _with_clip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with every key of a tower in transformers' layout under `text_model.`; some files leave that out."""
    clip = with_prefix({name.removeprefix(CLIP): t for name, t in tensors.items() if name.startswith(CLIP)})
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLIP)}
    return others | {CLIP + name: tensor for name, tensor in clip.items()}


def _with_ema(path: Path, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The same with the moving average in the place of the U-Net's weights."""
    averages = {name: ema_name(name) for name in names if name.startswith(UNET)}
    if missing := averages.values() - tensors.keys():
        raise ValueError(f"{path} has no moving average of the U-Net ({min(missing)} is missing); leave out --ema")
    return {**tensors, **{name: tensors[average] for name, average in averages.items()}}


def _read_texts(folder: Path) -> dict[str, str]:
    """The files of a folder by name, each byte of them. Raises ValueError if one is no text."""

    def text(file: Path) -> str:
        return naming_file(file, lambda: file.read_bytes().decode())

    return {file.name: text(file) for file in sorted(folder.iterdir()) if file.is_file()}


def _unpack_tokenizer(path: Path, files: Mapping[str, str]) -> tuple[Tokenizer, Path]:
    """A tokenizer and a temporary folder of its files, which lasts as long as the tokenizer does."""
    folder = Path(tempfile.mkdtemp(prefix="ldm-tokenizer-"))
    try:
        for name, text in files.items():
            (folder / name).write_bytes(naming_file(folder / name, text.encode))
        tokenizer = Tokenizer.from_folder(folder)
    except ValueError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(str(error).replace(str(folder), str(path / "tokenizer"))) from None
    weakref.finalize(tokenizer, shutil.rmtree, folder, ignore_errors=True)
    return tokenizer, folder


def _published_tokenizer(path: Path, folder: Path, networks: NetworkConfigs) -> tuple[Tokenizer, Path]:
    """CLIP's own; Stable Diffusion 2 pads with the token of id 0, "!", as OpenCLIP's zeros are read."""
    if (size := networks.text_encoder.vocab_size) != CLIP_VOCABULARY:
        raise ValueError(f"{path} brings no tokenizer, and its {size} tokens are not CLIP's {CLIP_VOCABULARY}")
    if not networks.has_open_clip:
        return Tokenizer.from_folder(folder), folder
    files = _read_texts(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        files[name] = json.dumps({**json.loads(files[name]), "pad_token": "!"}, indent=2)
    return _unpack_tokenizer(path, files)


def _published_configs(
    networks: NetworkConfigs, metadata: Mapping[str, str], prediction: str, zero_terminal_snr: bool
) -> dict[str, dict[str, Any]]:
    """The folder's JSON for a file without any."""
    process = PUBLISHED_SCHEDULER.model_dump() | {"prediction_type": prediction}
    if zero_terminal_snr and prediction == VELOCITY:  # must start from the last time (Lin et al. 2023, section 3.3)
        process |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = SchedulerConfig.model_validate(process).to_diffusers_config()
    factor = 2 ** (len(networks.vae.block_out_channels) - 1)
    stated = re.fullmatch(r"(\d{2,4})x\1", metadata.get(RESOLUTION, ""))
    side = int(stated[1]) if stated else 768 if networks.has_open_clip and prediction == VELOCITY else 512
    unet = networks.unet.model_copy(update={"sample_size": side // factor})
    return {
        INDEX: stock_index(scheduler["_class_name"], "AutoencoderKL", unet.in_channels == INPAINTING_CHANNELS),
        SCHEDULER: {**scheduler, "_diffusers_version": DIFFUSERS_VERSION},
        config_name("unet"): stock_config("UNet2DConditionModel", unet),
        config_name("vae"): stock_config("AutoencoderKL", networks.vae),
        config_name("text_encoder"): stock_config("CLIPTextModel", networks.text_encoder),
    }
