"""A model on disk is a Stable Diffusion folder: read with every fault named, written so that diffusers loads it too."""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from autoencoder import Autoencoder
from ldm.unet import UNet
from pipelines.json_files import name_unknown_keys, naming_file, read_json, write_json
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings
from pipelines.weights import WithoutInitialValues, fill, find_weights, read_weights, with_current_attention_keys
from text_encoder import TextEncoder, Tokenizer
from text_encoder.clip import with_prefix

DEFAULT_MODEL = Path(__file__).parent / "default_model"
DIFFUSERS_VERSION = "0.38.0"  # the oldest that reads what is written here
MODULE_STEM = "diffusion_pytorch_model"
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
WEIGHTS_STEM = {"unet": MODULE_STEM, "vae": MODULE_STEM, "text_encoder": "model"}

Part = UNet | Autoencoder | TextEncoder
PartT = TypeVar("PartT", UNet, Autoencoder, TextEncoder)


@dataclass(frozen=True)
class Model:
    """The parts of a model folder. `tokenizer_folder` holds the tokenizer's own files, which `save_model` copies;
    `folder` is where the model was read from, if it was.
    """

    unet: UNet
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    tokenizer_folder: Path
    scheduler: SchedulerConfig
    settings: Settings = field(default_factory=Settings)
    folder: Path | None = None


def find_model(source: str | os.PathLike[str] | None) -> Path:
    """The folder that `source` means; None is the embedded default.

    Raises:
        ValueError: there is no such folder, or it is no Stable Diffusion folder.
    """
    if source is None:
        if not (DEFAULT_MODEL / "model_index.json").is_file():
            raise ValueError("this installation has no default model; name a Stable Diffusion folder with --model")
        return DEFAULT_MODEL
    if str(source).startswith("hub:"):
        raise ValueError(f"{source}: reading from the hub comes in a later version; --model takes a folder")
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{folder}: single files come in a later version; --model takes a Stable Diffusion folder")
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json; --model takes a Stable Diffusion folder")
    return folder


def load_model(source: str | os.PathLike[str] | None = None) -> Model:
    """Reads a Stable Diffusion folder; weights stay mapped from disk, in the dtype of the file, on the CPU.

    Raises:
        ValueError: one line that names the file and what is wrong in it.
    """
    folder = find_model(source)
    index = read_json(folder / "model_index.json")
    for part, (_, name) in CLASSES.items():
        found = index.get(part)
        if not isinstance(found, list) or len(found) != 2 or str(found[1]).removesuffix("Fast") != name:
            raise ValueError(f"{folder / 'model_index.json'}: {part} is {found!r}, but only {name} is supported")
    model = Model(
        unet=load_unet(folder / "unet"),
        autoencoder=load_autoencoder(folder / "vae"),
        text_encoder=load_text_encoder(folder / "text_encoder"),
        tokenizer=Tokenizer.from_folder(folder / "tokenizer"),
        tokenizer_folder=folder / "tokenizer",
        scheduler=load_scheduler(folder / "scheduler"),
        settings=load_settings(folder),
        folder=folder,
    )
    _check_parts_fit(model, folder)
    return model


def load_unet(folder: str | os.PathLike[str]) -> UNet:
    """Reads `unet/` of a model folder. Raises ValueError, one line, naming the file."""
    return _load_module(Path(folder), MODULE_STEM, UNet.from_diffusers_config)


def load_autoencoder(folder: str | os.PathLike[str]) -> Autoencoder:
    """Reads `vae/` of a model folder. Raises ValueError, one line, naming the file."""
    return _load_module(Path(folder), MODULE_STEM, Autoencoder.from_diffusers_config, with_current_attention_keys)


def load_text_encoder(folder: str | os.PathLike[str]) -> TextEncoder:
    """Reads `text_encoder/` of a model folder. Raises ValueError, one line, naming the file."""
    return _load_module(Path(folder), WEIGHTS_STEM["text_encoder"], TextEncoder.from_transformers_config, with_prefix)


def load_scheduler(folder: str | os.PathLike[str]) -> SchedulerConfig:
    """Reads `scheduler/` of a model folder. Raises ValueError, one line, naming the file."""
    path = Path(folder) / "scheduler_config.json"
    config = read_json(path)
    made = naming_file(path, lambda: SchedulerConfig.from_diffusers_config(config))
    name_unknown_keys(path, config, SchedulerConfig)
    return made


def load_settings(folder: str | os.PathLike[str]) -> Settings:
    """Reads `ldm.json` of a model folder, if there is one. Raises ValueError, one line, naming the file."""
    path = Path(folder) / "ldm.json"
    if not path.exists():
        return Settings()
    content = read_json(path)
    made = naming_file(path, lambda: Settings.model_validate(content))
    name_unknown_keys(path, content, Settings)
    return made


def weight_files(folder: Path) -> list[Path]:
    """The weights files that `load_model` reads, in a fixed order."""
    return [find_weights(folder / part, stem) for part, stem in sorted(WEIGHTS_STEM.items())]


def save_model(folder: str | os.PathLike[str], model: Model, dtype: torch.dtype | None = None) -> None:
    """Writes a model as a Stable Diffusion folder with stock class names; never leaves a half-written one there.

    The folder is made beside its place, flushed to disk and renamed; a model that was there before is replaced.

    Args:
        dtype: of the weights on disk; None keeps each tensor's own.

    Raises:
        ValueError: the place is taken by something that is no model.
    """
    target = Path(folder).absolute()
    if target.exists() and not _may_replace(target):
        raise ValueError(f"{target} exists and is no model folder; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.new-{secrets.token_hex(4)}")
    staged.mkdir()
    try:
        _write_parts(staged, model, dtype)
        _flush(staged)
        _put_in_place(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def save_part(folder: str | os.PathLike[str], module: Part, dtype: torch.dtype | None = None) -> None:
    """Writes one part of a model folder: its `config.json` and its weights under the published names.

    Args:
        folder: the part's own folder, such as `model/unet`; made if it is missing.
        dtype: of the weights on disk; None keeps each tensor's own.
    """
    part = {UNet: "unet", Autoencoder: "vae", TextEncoder: "text_encoder"}[type(module)]
    library, name = CLASSES[part]
    stock: dict[str, Any] = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
    if library == "transformers":
        stock = {"architectures": [name], "model_type": "clip_text_model"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**module.config.model_dump(mode="json"), **stock})
    _write_weights(folder / f"{WEIGHTS_STEM[part]}.safetensors", module.state_dict(), dtype)


def _load_module(
    folder: Path,
    stem: str,
    make: Callable[[Mapping[str, Any]], PartT],
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> PartT:
    path = folder / "config.json"
    config = read_json(path)
    with torch.device("meta"), WithoutInitialValues():  # the config is checked before any weight is read
        made = naming_file(path, lambda: make(config))
    name_unknown_keys(path, config, type(made.config))
    weights = find_weights(folder, stem)
    return fill(made, rename(read_weights(weights)), weights)


def _check_parts_fit(model: Model, folder: Path) -> None:
    channels, latent_channels = model.unet.config.in_channels, model.autoencoder.config.latent_channels
    if not channels == model.unet.config.out_channels == latent_channels:
        raise ValueError(
            f"{folder}: the unet turns {channels} channels into {model.unet.config.out_channels},"
            f" but the autoencoder's latents have {latent_channels}"
        )
    wanted, width = model.unet.config.cross_attention_dim, model.text_encoder.config.hidden_size
    if wanted != width:
        raise ValueError(f"{folder}: the unet's cross_attention_dim is {wanted}, but the text encoder is {width} wide")
    for name, needed, there in (
        ("vocab_size", model.tokenizer.vocab_size, model.text_encoder.config.vocab_size),
        ("max_position_embeddings", model.tokenizer.max_length, model.text_encoder.config.max_position_embeddings),
    ):
        if needed > there:
            raise ValueError(f"{folder}: the text encoder's {name} is {there}, but its tokenizer needs {needed}")


def _write_parts(folder: Path, model: Model, dtype: torch.dtype | None) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        **{part: list(names) for part, names in CLASSES.items()},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / "ldm.json", model.settings.model_dump(mode="json", exclude_none=True))
    scheduler = {**model.scheduler.to_diffusers_config(), "_diffusers_version": DIFFUSERS_VERSION}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    (folder / "tokenizer").mkdir()
    for file in filter(Path.is_file, sorted(model.tokenizer_folder.iterdir())):
        shutil.copyfile(file, folder / "tokenizer" / file.name)  # without the mode: the umask decides
    modules: dict[str, Part] = {"unet": model.unet, "vae": model.autoencoder, "text_encoder": model.text_encoder}
    for part, module in modules.items():
        save_part(folder / part, module, dtype)


def _write_weights(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    cast = {name: tensor.to(dtype or tensor.dtype) for name, tensor in weights.items()}
    save_file({name: tensor.contiguous() for name, tensor in cast.items()}, path, metadata={"format": "pt"})
    # safetensors makes its files private whatever the umask says
    path.chmod((path.parent / "config.json").stat().st_mode)


def _may_replace(target: Path) -> bool:
    return target.is_dir() and ((target / "model_index.json").is_file() or not any(target.iterdir()))


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or os.name == "posix":  # only POSIX flushes directories
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _put_in_place(staged: Path, target: Path) -> None:
    former = staged.with_name(staged.name.replace(".new-", ".old-"))
    if target.exists():
        target.rename(former)
    try:
        staged.rename(target)
    except OSError:
        if former.exists():
            former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)
