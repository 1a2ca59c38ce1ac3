"""Models in memory: made from a Stable Diffusion folder or a single file with every fault named, saved as either."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import nn

from autoencoder import Autoencoder, IdentityAutoencoder, VQAutoencoder
from ldm.unet import UNet
from pipelines import hub
from pipelines.errors import notice
from pipelines.families import refuse_other_channels
from pipelines.json_files import name_unknown_keys, naming_file, write_json
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings
from pipelines.single_file import SUFFIX, read_single_file, write_single_file
from pipelines.stored_model import (
    CLASSES,
    DIFFUSERS_VERSION,
    INDEX,
    SCHEDULER,
    SETTINGS,
    WEIGHTS_STEM,
    StoredModel,
    config_name,
    read_folder,
    read_part,
    stock_config,
    stock_index,
    write_folder,
)
from pipelines.weights import PICKLES, Weights, files_of, fill, find_weights, on_meta, write_weights
from text_encoder import TextEncoder, Tokenizer

DEFAULT_MODEL = Path(__file__).parent / "default_model"
CLASS_NAMES: Mapping[type[nn.Module], tuple[str, str]] = {
    UNet: ("unet", "UNet2DConditionModel"),
    Autoencoder: ("vae", "AutoencoderKL"),
    VQAutoencoder: ("vae", "VQModel"),
    IdentityAutoencoder: ("vae", "IdentityAutoencoder"),
    TextEncoder: ("text_encoder", "CLIPTextModel"),
}
"""The part that each class is in a model, and its class in other libraries."""

AnyAutoencoder = Autoencoder | VQAutoencoder | IdentityAutoencoder
Part = UNet | AnyAutoencoder | TextEncoder
PartT = TypeVar("PartT", bound=Part)


@dataclass(frozen=True)
class Model:
    """The parts of a model. `tokenizer_folder` holds the tokenizer's own files, which `save_model` copies; `source` is
    the folder or file that the model was read from, if it was.
    """

    unet: UNet
    autoencoder: AnyAutoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    tokenizer_folder: Path
    scheduler: SchedulerConfig
    settings: Settings = field(default_factory=Settings)
    source: Path | None = None

    @property
    def own_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        cells, factor = self.unet.config.sample_size or 64, self.autoencoder.downsampling_factor
        height, width = (cells, cells) if isinstance(cells, int) else cells
        return height * factor, width * factor

    @property
    def folder(self) -> Path | None:
        """The folder that the model was read from; None also for a single file."""
        return self.source if self.source is not None and self.source.is_dir() else None


def find_model(source: str | os.PathLike[str] | None) -> Path:
    """The folder or the file that `source` means; None is the embedded default, `hub:owner/name` may be downloaded.

    Raises:
        ValueError: there is no such model.
    """
    if source is None:
        if not (DEFAULT_MODEL / INDEX).is_file():
            raise ValueError("this installation has no default model; name another with --model")
        return DEFAULT_MODEL
    if str(source).startswith(hub.PREFIX):
        return hub.fetch(str(source))
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"model {path} does not exist; give a Stable Diffusion folder, a file or hub:OWNER/NAME")
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} has no {INDEX}; give a whole Stable Diffusion folder")
    return path


def read_model(
    source: str | os.PathLike[str] | None,
    prediction: str | None = None,
    ema: bool = False,
    allow_pickle: bool = False,
) -> StoredModel:
    """Reads a model without building it; the arguments are `load_model`'s.

    Raises:
        ValueError: one line that names the file and what is wrong in it.
    """
    path = find_model(source)
    if path.is_file():
        return read_single_file(path, DEFAULT_MODEL / "tokenizer", prediction, ema, allow_pickle)
    if ema:
        raise ValueError(f"{path} is a folder, which holds one set of weights only; leave out --ema")
    return read_folder(path, prediction)


def load_model(
    source: str | os.PathLike[str] | None = None,
    prediction: str | None = None,
    ema: bool = False,
    allow_pickle: bool = False,
) -> Model:
    """Reads a Stable Diffusion folder or a single file; weights keep the file's dtype and are on the CPU.

    Args:
        source: None is the embedded default, `hub:owner/name` is downloaded if it is not in the cache.
        prediction: the prediction type, by diffusers' name or ours, instead of what the model says.
        ema: of a single file, take the moving average of the U-Net's weights.
        allow_pickle: read `.ckpt` files too, of which only the tensors are ever built.

    Raises:
        ValueError: one line that names the file and what is wrong in it.
    """
    stored = read_model(source, prediction, ema, allow_pickle)
    model = build_model(stored)
    known: dict[str, type[BaseModel]] = {SCHEDULER: SchedulerConfig, SETTINGS: Settings}
    for module in (model.unet, model.autoencoder, model.text_encoder):
        known[config_name(CLASS_NAMES[type(module)][0])] = type(module.config)
    for name, fields in known.items():
        name_unknown_keys(stored.source / name, stored.configs.get(name, {}), fields)
    corrected = {key: value for config in _corrections(stored).values() for key, value in config.items()}
    if model.scheduler.timestep_spacing != "leading":
        corrected.pop("steps_offset", None)  # it shifts no other grid
    if corrected:
        values = ", ".join(f"{key} {json.dumps(value)}" for key, value in corrected.items())
        notice(f"{stored.source}: read as diffusers reads it, with {values}")
    if stored.source.is_file():
        notice(f"{stored.source}: prediction type {model.scheduler.prediction_type} ({stored.prediction_reason})")
    return model


def build_model(stored: StoredModel) -> Model:
    """The model that was read, with `_corrections`. Raises ValueError, one line, naming the file."""
    corrections = _corrections(stored)
    configs = {name: {**config, **corrections.get(name, {})} for name, config in stored.configs.items()}
    stored = replace(stored, configs=configs)
    source = stored.source
    model = Model(
        unet=build_part(stored, "unet", UNet.from_diffusers_config),
        autoencoder=build_part(stored, "vae", _make_autoencoder),
        text_encoder=build_part(stored, "text_encoder", TextEncoder.from_transformers_config),
        tokenizer=stored.tokenizer,
        tokenizer_folder=stored.tokenizer_folder,
        scheduler=naming_file(source / SCHEDULER, lambda: SchedulerConfig.from_diffusers_config(configs[SCHEDULER])),
        settings=naming_file(source / SETTINGS, lambda: Settings.model_validate(configs.get(SETTINGS, {}))),
        source=source,
    )
    naming_file(source, lambda: _check_parts_fit(model))
    return model


def build_part(stored: StoredModel, part: str, make: Callable[[Mapping[str, Any]], PartT]) -> PartT:
    """One network of a model that was read. Raises ValueError, one line, naming the file."""
    return _build(stored.source / config_name(part), stored.config(part), stored.weights[part], make)


def load_unet(folder: str | os.PathLike[str]) -> UNet:
    """Reads `unet/` of a model folder. Raises ValueError, one line, naming the file."""
    return _load_part(Path(folder), "unet", UNet.from_diffusers_config)


def load_autoencoder(folder: str | os.PathLike[str]) -> AnyAutoencoder:
    """Reads `vae/` of a model folder. Raises ValueError, one line, naming the file."""
    return _load_part(Path(folder), "vae", _make_autoencoder)


def load_text_encoder(folder: str | os.PathLike[str]) -> TextEncoder:
    """Reads `text_encoder/` of a model folder. Raises ValueError, one line, naming the file."""
    return _load_part(Path(folder), "text_encoder", TextEncoder.from_transformers_config)


def weight_files(source: Path) -> list[Path]:
    """The weights files that `load_model` reads of a folder or a single file, in a fixed order."""
    if source.is_file():
        return [source]
    parts = sorted(WEIGHTS_STEM.items())
    return [file for part, stem in parts for file in files_of(find_weights(source / part, stem))]


def save_model(destination: str | os.PathLike[str], model: Model, dtype: torch.dtype | None = None) -> None:
    """Writes a model as a Stable Diffusion folder with stock class names, or as a single file if that is what the name
    says; `dtype` is that of the weights on disk, None keeps each tensor's own. A model that was there is replaced.

    Raises:
        ValueError: the place is taken by something that is no model, or single files have no place for the model.
    """
    with new_model_at(Path(destination)) as place:
        write_model(place, _store(model, place), dtype)


def write_model(place: Path, stored: StoredModel, dtype: torch.dtype | None) -> None:
    """Writes a single file if `place` is named like one, else a folder. Raises ValueError as `save_model` does."""
    if place.suffix == SUFFIX:
        write_single_file(place, stored, dtype)
    else:
        place.mkdir()
        write_folder(place, stored, dtype)


@contextmanager
def new_model_at(destination: Path) -> Iterator[Path]:
    """A free name beside `destination` to write a model to. If the block ends well, what is there is flushed to disk
    and takes the destination's place, and if it does not, nothing has changed. A link stays, and what it points to is
    replaced.

    Raises:
        ValueError: the place is taken by something that is no model, or named like a pickle.
    """
    target = destination.resolve()
    if target.suffix in PICKLES:
        raise ValueError(f"{target} would be a pickle; name a folder or a file that ends in {SUFFIX}")
    if target.exists() and not _may_replace(target):
        raise ValueError(f"{target} exists and is no model; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".new-{secrets.token_hex(4)}-{target.name}")
    try:
        yield staged
        _flush(staged)
        _put_in_place(staged, target)
    finally:
        _remove(staged)


def save_part(folder: str | os.PathLike[str], module: Part, dtype: torch.dtype | None = None) -> None:
    """Writes one part of a model folder: its `config.json` and its weights under the published names.

    Args:
        folder: the part's own folder, such as `model/unet`; made if it is missing.
        dtype: of the weights on disk; None keeps each tensor's own.
    """
    part, name = CLASS_NAMES[type(module)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", stock_config(name, module.config))
    write_weights(folder / f"{WEIGHTS_STEM[part]}{SUFFIX}", module.state_dict(), dtype)


def _corrections(stored: StoredModel) -> dict[str, dict[str, Any]]:
    """What diffusers' Stable Diffusion pipelines put in the place of what early folders say: keys by config.

    Their inpainting pipeline mends `skip_prk_steps`, the others `clip_sample`. A model of pixels is none of theirs.
    """
    scheduler, unet = stored.configs[SCHEDULER], stored.config("unet")
    if stored.config("vae").get("_class_name") == CLASS_NAMES[IdentityAutoencoder][1]:
        return {}
    changes: dict[str, dict[str, Any]] = {SCHEDULER: {}, config_name("unet"): {}}
    offset = scheduler.get("steps_offset", 0)
    if isinstance(offset, int) and offset != 1:
        changes[SCHEDULER]["steps_offset"] = 1
    if "Inpaint" not in str(stored.configs[INDEX].get("_class_name")):
        if scheduler.get("clip_sample") is True:
            changes[SCHEDULER]["clip_sample"] = False
    elif scheduler.get("_class_name") == "PNDMScheduler" and scheduler.get("skip_prk_steps", False) is False:
        changes[SCHEDULER]["skip_prk_steps"] = True
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version")))
    size = unet.get("sample_size")
    if version and (int(version[1]), int(version[2])) < (0, 9) and isinstance(size, int) and size < 64:
        changes[config_name("unet")]["sample_size"] = 64
    return changes


def _make_autoencoder(config: Mapping[str, Any]) -> AnyAutoencoder:
    name = config.get("_class_name", "AutoencoderKL")
    for kind in (Autoencoder, VQAutoencoder, IdentityAutoencoder):
        if CLASS_NAMES[kind][1] == name:
            made: AnyAutoencoder = kind.from_diffusers_config(config)
            return made
    raise ValueError(f"_class_name is {name!r}, but only {' or '.join(CLASSES['vae'])} is supported")


def _load_part(folder: Path, part: str, make: Callable[[Mapping[str, Any]], PartT]) -> PartT:
    config, weights = read_part(folder, part)
    made = _build(folder / "config.json", config, weights, make)
    name_unknown_keys(folder / "config.json", config, type(made.config))
    return made


def _build(
    path: Path, config: Mapping[str, Any], weights: Weights, make: Callable[[Mapping[str, Any]], PartT]
) -> PartT:
    return fill(naming_file(path, lambda: on_meta(lambda: make(config))), weights)


def _check_parts_fit(model: Model) -> None:
    unet, text_encoder, tokenizer = model.unet.config, model.text_encoder.config, model.tokenizer
    channels = model.autoencoder.config.latent_channels
    inpaints = unet.in_channels == 2 * channels + 1  # a mask and the latents of the masked image beside the others
    learned = 2 if model.scheduler.learns_variance else 1
    if not inpaints and unet.in_channels != channels:
        refuse_other_channels(unet.in_channels)
    if not (inpaints or unet.in_channels == channels) or unet.out_channels != learned * channels:
        raise ValueError(
            f"the unet turns {unet.in_channels} channels into {unet.out_channels},"
            f" but the autoencoder's latents have {channels}"
        )
    if (wanted := unet.cross_attention_dim) != (width := text_encoder.hidden_size):
        raise ValueError(f"the unet's cross_attention_dim is {wanted}, but the text encoder is {width} wide")
    for name, needed, there in (
        ("vocab_size", tokenizer.vocab_size, text_encoder.vocab_size),
        ("max_position_embeddings", tokenizer.max_length, text_encoder.max_position_embeddings),
    ):
        if needed > there:
            raise ValueError(f"the text encoder's {name} is {there}, but its tokenizer needs {needed}")


def _store(model: Model, place: Path) -> StoredModel:
    """A model as it is to lie at `place`."""
    scheduler = {**model.scheduler.to_diffusers_config(), "_diffusers_version": DIFFUSERS_VERSION}
    written = SchedulerConfig.from_diffusers_config(scheduler)
    settings = model.settings
    for name in ("sampler", "spacing"):  # what the scheduler that is written does not stand for
        if getattr(settings, name) is None and (own := getattr(model.scheduler, name)) != getattr(written, name):
            settings = settings.model_copy(update={name: own})
    configs = {
        INDEX: stock_index(
            scheduler["_class_name"],
            CLASS_NAMES[type(model.autoencoder)][1],
            inpaints=model.unet.config.in_channels > model.autoencoder.config.latent_channels,
        ),
        SETTINGS: settings.model_dump(mode="json", exclude_none=True),
        SCHEDULER: scheduler,
    }
    weights = {}
    for module in (model.unet, model.autoencoder, model.text_encoder):
        part, name = CLASS_NAMES[type(module)]
        configs[config_name(part)] = stock_config(name, module.config)
        weights[part] = Weights(place, module.state_dict())
    return StoredModel(place, configs, weights, model.tokenizer, model.tokenizer_folder, SCHEDULER)


def _may_replace(target: Path) -> bool:
    if target.suffix == SUFFIX:
        return target.is_file()
    return target.is_dir() and ((target / INDEX).is_file() or not any(target.iterdir()))


def _flush(staged: Path) -> None:
    for path in (*staged.rglob("*"), staged):
        if path.is_file() or os.name == "posix":  # only POSIX flushes directories
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _put_in_place(staged: Path, target: Path) -> None:
    former = staged.with_name(staged.name.replace(".new-", ".old-", 1))
    if target.exists():
        target.rename(former)
    try:
        staged.rename(target)
    except OSError:
        if former.exists():
            former.rename(target)
        raise
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
