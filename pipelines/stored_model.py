"""A model as it lies on disk, in a folder or in one file: its JSON, its tokenizer, its weights; nothing is built."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from pipelines.families import refuse_other_pipelines
from pipelines.json_files import naming_file, read_json, write_json
from pipelines.prediction_type import checked
from pipelines.weights import (
    Weights,
    files_of,
    find_weights,
    read_weights,
    with_current_attention_keys,
    write_weights,
)
from text_encoder import Tokenizer
from text_encoder.clip import with_prefix

DIFFUSERS_VERSION = "0.38.0"  # the oldest that reads what is written here
INDEX, SCHEDULER, SETTINGS = "model_index.json", "scheduler/scheduler_config.json", "ldm.json"
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "VQModel", "IdentityAutoencoder"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer",),
}
LIBRARIES = {
    "UNet2DConditionModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "VQModel": "diffusers",
    "IdentityAutoencoder": "autoencoder",
    "CLIPTextModel": "transformers",
    "CLIPTokenizer": "transformers",
}
MODULE_STEM = "diffusion_pytorch_model"
WEIGHTS_STEM = {"unet": MODULE_STEM, "vae": MODULE_STEM, "text_encoder": "model"}
RENAMES: Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "unet": dict,
    "vae": with_current_attention_keys,
    "text_encoder": with_prefix,
}


def config_name(part: str) -> str:
    return f"{part}/config.json"


CONFIGS = (INDEX, SCHEDULER, *map(config_name, WEIGHTS_STEM))


@dataclass(frozen=True)
class StoredModel:
    """What is read before anything is built; `source / name` is what messages call a part of it.

    `configs` are JSON objects by their path in a folder (`CONFIGS`, and `ldm.json` if there is one), `weights` those of
    each part of `WEIGHTS_STEM` under a folder's names. `prediction_reason` says what told the prediction type, and
    `left_out` names what was found but has no place here: files of a folder, keys of a single file.
    """

    source: Path
    configs: Mapping[str, dict[str, Any]]
    weights: Mapping[str, Weights]
    tokenizer: Tokenizer
    tokenizer_folder: Path
    prediction_reason: str
    left_out: tuple[str, ...] = ()

    def config(self, part: str) -> dict[str, Any]:
        return self.configs[config_name(part)]


def read_folder(folder: Path, prediction: str | None = None) -> StoredModel:
    """Reads a Stable Diffusion folder; `prediction` goes before what its scheduler says.

    Raises:
        ValueError: one line that names the file and what is wrong in it.
    """
    index = read_json(folder / INDEX)
    check_index(folder / INDEX, index)
    configs = {INDEX: _without_strangers(index), SCHEDULER: read_json(folder / SCHEDULER)}
    weights = {}
    for part in WEIGHTS_STEM:
        configs[config_name(part)], weights[part] = read_part(folder / part, part)
    if (folder / SETTINGS).exists():
        configs[SETTINGS] = read_json(folder / SETTINGS)
    reason = SCHEDULER
    if prediction is not None:
        configs[SCHEDULER] = {**configs[SCHEDULER], "prediction_type": checked(prediction)}
        reason = "asked for"
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    used = {folder / name for name in configs} | {file for each in weights.values() for file in files_of(each.path)}
    used |= {each.path for each in weights.values()} | set((folder / "tokenizer").iterdir())
    unused = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    left_out = tuple(name for name in unused if folder / name not in used)
    return StoredModel(folder, configs, weights, tokenizer, folder / "tokenizer", reason, left_out)


def check_index(path: Path, index: Mapping[str, Any]) -> None:
    """Raises ValueError for a `model_index.json` of another family, or with a part of a class that is not supported."""
    naming_file(path, lambda: refuse_other_pipelines(index))
    for part, names in CLASSES.items():
        found = index.get(part)
        if not isinstance(found, list) or len(found) != 2 or str(found[1]).removesuffix("Fast") not in names:
            raise ValueError(f"{path}: {part} is {found!r}, but only {' or '.join(names)} is supported")


def read_part(folder: Path, part: str) -> tuple[dict[str, Any], Weights]:
    """The config and the weights, mapped from disk, in a part's own folder. Raises ValueError, naming the file."""
    config = read_json(folder / "config.json")
    weights = read_weights(find_weights(folder, WEIGHTS_STEM[part]))
    return config, weights._replace(tensors=RENAMES[part](weights.tensors))


def write_folder(folder: Path, stored: StoredModel, dtype: torch.dtype | None) -> None:
    """Writes a model into a folder that exists; `dtype` None keeps each tensor's own."""
    for name, config in stored.configs.items():
        write_json(folder / name, config)
    (folder / "tokenizer").mkdir()
    for file in filter(Path.is_file, sorted(stored.tokenizer_folder.iterdir())):
        shutil.copyfile(file, folder / "tokenizer" / file.name)  # without the mode: the umask decides
    for part, stem in WEIGHTS_STEM.items():
        write_weights(folder / part / f"{stem}.safetensors", stored.weights[part].tensors, dtype)


def with_dtype(stored: StoredModel, dtype: torch.dtype | None) -> StoredModel:
    """The same, with configs that state the weights' dtype, as transformers' do, stating this one."""
    if dtype is None:
        return stored
    stated = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype")}
    configs = {
        name: {key: stated.get(key, value) for key, value in config.items()} for name, config in stored.configs.items()
    }
    return replace(stored, configs=configs)


def stock_config(name: str, config: BaseModel) -> dict[str, Any]:
    """A part's `config.json` with the marks by which `name`, its class in diffusers or transformers, knows it."""
    marks: dict[str, Any] = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
    if LIBRARIES[name] == "transformers":
        marks = {"architectures": [name], "model_type": "clip_text_model"}
    return {**config.model_dump(mode="json"), **marks}


def stock_index(scheduler: str, autoencoder: str, inpaints: bool) -> dict[str, Any]:
    """A `model_index.json` of stock classes; `scheduler` and `autoencoder` name theirs."""
    names = {part: names[0] for part, names in CLASSES.items()} | {"vae": autoencoder}
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        **{part: [LIBRARIES[name], name] for part, name in names.items()},
        "scheduler": ["diffusers", scheduler],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def _without_strangers(index: Mapping[str, Any]) -> dict[str, Any]:
    """An index that names no part which is not read, such as a safety checker."""
    known = {*CLASSES, "scheduler"}
    strangers = [
        key for key, value in index.items() if key not in known and isinstance(value, list) and value != [None, None]
    ]
    without_checker = {"requires_safety_checker": False} if "safety_checker" in strangers else {}
    return {**index, **{key: [None, None] for key in strangers}, **without_checker}
