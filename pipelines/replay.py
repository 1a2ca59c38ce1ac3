"""How a picture was made, as its file says, and making it again from that."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field
from torch import Generator

from pipelines import __version__
from pipelines.image_to_image import open_init
from pipelines.json_files import naming_file
from pipelines.loading import DEFAULT_MODEL, find_model, weight_files
from pipelines.png import read_record, weights_sha256
from pipelines.request import MAX_SEED, OPTIONS, Request
from pipelines.runtime import pick_device
from pipelines.text_to_image import BATCH, TextToImageOutput, TextToImagePipeline

FilePath = str | os.PathLike[str]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Source:
    """A file that a picture was made with; it is the same under another name."""

    sha256: str
    file: str = field(compare=False)


@dataclass(frozen=True)
class WeightedSource(Source):
    weight: Finite = 1.0


class Record(BaseModel, frozen=True, extra="ignore"):
    """All that a picture depends on, as its PNG file holds it in JSON.

    `sha256` is that of the model's weights files, `configs_sha256` that of the rest of the model
    (`pipelines/configs_digest.py`). `batch` is how many pictures went through the networks together: a kernel's
    rounding may depend on it. Earlier versions left `spacing`, `prediction`, `ema` and `configs_sha256` at None.
    """

    prompt: str
    negative: str = ""
    seed: int = Field(ge=0, le=MAX_SEED)
    steps: int
    guidance: float
    rescale: float = 0.0
    sampler: str
    eta: float = 0.0
    width: int
    height: int
    syntax: Literal["plain", "weighted"] = "plain"
    clip_skip: int = 0
    tiled: bool = False
    spacing: str | None = None
    guidance_interval: tuple[Finite, Finite] | None = None
    reuse: int = 1
    merge_tokens: float = 0.0
    strength: float | None = None
    init: Source | None = None
    mask: Source | None = None
    loras: tuple[WeightedSource, ...] = ()
    model: str
    sha256: str
    configs_sha256: str | None = None
    prediction: str | None = None
    ema: bool | None = None
    dtype: str
    device: str
    batch: int = Field(default=1, ge=1)
    versions: dict[str, str] = {}

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record of a picture file. Raises ValueError: it has none, or not a whole one."""
        content = read_record(path)
        return naming_file(path, lambda: cls.model_validate(content))

    def request(self) -> Request:
        """What to ask of a pipeline. Raises ValueError for what no pipeline can do."""
        return Request((self.prompt,), (self.negative,), **{name: getattr(self, name) for name in OPTIONS})

    def completed(self, pipe: TextToImagePipeline) -> "Record":
        """The same, with what an earlier version did not record taken from the pipeline."""
        own = _reading(pipe)
        return self.model_copy(update={name: own[name] for name in own if getattr(self, name) is None})

    def changes(self, now: "Record") -> dict[str, tuple[Any, Any]]:
        """What differs, by field, as (before, now); not the model's name, nor what was rendered beside the picture."""
        before, after = self.model_dump(), now.model_dump()
        return {
            name: (before[name], after[name])
            for name in before
            if name not in ("model", "batch") and getattr(self, name) != getattr(now, name)
        }


def make_records(
    pipe: TextToImagePipeline,
    request: Request,
    seeds: Sequence[int | None],
    init: FilePath | None = None,
    mask: FilePath | None = None,
) -> list[Record]:
    """The record of each picture of a request, in order; `init` and `mask` are the files to start from."""
    source = pipe.model.source
    assert source is not None
    count = len(request.prompts)
    shared = {
        **_reading(pipe),
        **request.options,
        "init": None if init is None else Source(_digest(init), _name(init)),
        "mask": None if mask is None else Source(_digest(mask), _name(mask)),
        "loras": tuple(WeightedSource(_digest(lora.path), _name(lora.path), weight) for lora, weight in pipe.loras),
        "model": "default" if source == DEFAULT_MODEL else _name(source.resolve()),
        "sha256": weights_sha256(weight_files(source)),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "versions": {"ldm": __version__, "torch": str(torch.__version__)},
    }
    pictures = zip(request.prompts, request.negatives, seeds, strict=True)
    return [
        Record.model_validate(
            {
                "prompt": prompt,
                "negative": negative,
                "seed": seed,
                "batch": min(BATCH, count - index // BATCH * BATCH),
                **shared,
            }
        )
        for index, (prompt, negative, seed) in enumerate(pictures)
    ]


def _reading(pipe: TextToImagePipeline) -> dict[str, Any]:
    """How the pipeline reads its model's weights, by the names of `Record`; `spacing` where a request does not say."""
    return {
        "spacing": pipe.own_spacing,
        "configs_sha256": pipe.configs_sha256,
        "prediction": pipe.model.scheduler.prediction_type,
        "ema": pipe.ema,
    }


def render(
    pipe: TextToImagePipeline,
    request: Request,
    seeds: Sequence[int],
    init: FilePath | None = None,
    mask: FilePath | None = None,
) -> TextToImageOutput:
    """Renders a request whose every picture has a seed of its own. Raises what the pipeline raises."""
    generators = [Generator().manual_seed(seed) for seed in seeds]
    return pipe.render(request, open_init(init, mask, request.strength), generator=generators)


@dataclass(frozen=True)
class Replayed:
    """A picture that was made again.

    before, now: the records of both.
    max_difference: the largest over all pixels and channels, of 255.
    share: of the pixels, those that differ.
    """

    image: Image.Image
    before: Record
    now: Record
    max_difference: int
    share: float

    @property
    def identical(self) -> bool:
        return self.max_difference == 0

    def lines(self) -> list[str]:
        """The verdict, and a line for each thing that may explain it."""
        verdict = f"not identical: up to {self.max_difference} of 255 off, in {self.share:.2%} of the pixels"
        changes = self.before.changes(self.now)
        model = f"it was made with model {self.before.model}, now with {self.now.model}; name its own with --model"
        return ["identical" if self.identical else verdict, *([model] if "sha256" in changes else []), *told(changes)]

    def summary(self) -> dict[str, Any]:
        """The same for a program to read, in what JSON can hold."""
        changes = {name: {"before": old, "now": new} for name, (old, new) in self.before.changes(self.now).items()}
        return {
            "identical": self.identical,
            "max_difference": self.max_difference,
            "share": self.share,
            "model": {"before": self.before.model, "now": self.now.model},
            "changes": changes,
        }


def told(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """A line for each of `Record.changes`."""
    names = {"sha256": "sha256 of the weights", "configs_sha256": "sha256 of the configs and the tokenizer"}
    return [f"{names.get(name, name)} was {before}, now {now}" for name, (before, now) in changes.items()]


def replay(
    path: FilePath,
    model: FilePath | None = None,
    *,
    init: FilePath | None = None,
    mask: FilePath | None = None,
    loras: Sequence[FilePath] = (),
    device: str | None = None,
    dtype: str | None = None,
    prediction: str | None = None,
    ema: bool = False,
    allow_pickle: bool = False,
) -> Replayed:
    """Renders a picture again from its own record, in a batch of the same size, and compares every pixel.

    With other weights or files than it was made with it is rendered all the same; the records then differ.

    Args:
        model: None is the embedded default; the record knows its model by name and digest only.
        init, mask, loras: the files that the picture was made with, if it was; the LoRAs' weights are in the record.
        device: None is the record's, or the best here if there is none such.
        dtype: None is the record's.
        prediction, ema, allow_pickle: how to read the model, as `pipelines.loading.load_model` does. Where the model's
            weights are the record's, None and False are the record's too.

    Raises:
        ValueError: one line; the file is no picture with a whole record, it was resized since, or files that it was
            made with are not given, or given although there were none.
    """
    path = Path(path)
    before = Record.read(path)
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(np.int16)
    if pixels.shape[:2] != (before.height, before.width):
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise ValueError(f"{path} is {size}, but was rendered at {before.width}x{before.height}; give the original")
    _check_given(path, "init", [] if before.init is None else [before.init], [] if init is None else [init])
    _check_given(path, "mask", [] if before.mask is None else [before.mask], [] if mask is None else [mask])
    _check_given(path, "lora", before.loras, loras)
    naming_file(path, before.request)  # what is wrong with it is told before a big model is read
    source = find_model(model)
    if weights_sha256(weight_files(source)) == before.sha256:  # another model may predict otherwise, or have no average
        prediction, ema = prediction or before.prediction, ema or bool(before.ema)
    pipe = TextToImagePipeline.from_pretrained(
        source, device or _device_like(before.device), dtype or before.dtype, prediction, ema, allow_pickle
    )
    before = before.completed(pipe)
    request = before.request()
    pipe.load_loras([(file, lora.weight) for file, lora in zip(loras, before.loras, strict=True)])
    # Copies of the picture instead of its former neighbours: its own rounding depends on its place, not on what they
    # show. The record does not have the place, so the nearest copy counts.
    copies = min(before.batch, BATCH)
    many = replace(request, prompts=request.prompts * copies, negatives=request.negatives * copies)
    out = naming_file(path, lambda: render(pipe, many, [before.seed] * copies, init, mask))
    (now, *_) = make_records(pipe, out.request, [before.seed] * copies, init, mask)
    compared = []
    for image in out.images:
        assert isinstance(image, Image.Image)
        difference = np.abs(np.asarray(image).astype(np.int16) - pixels)
        share = float((difference.max(axis=-1) > 0).mean())
        compared.append(Replayed(image, before, now, int(difference.max()), share))
    return min(compared, key=lambda each: (each.max_difference, each.share))


def _check_given(path: Path, option: str, used: Sequence[Source], given: Sequence[FilePath]) -> None:
    if len(given) < len(used):
        names = " and ".join(source.file for source in used)
        raise ValueError(f"{path} was made with {names}; give {'each' if len(used) > 1 else 'it'} with --{option}")
    if len(given) > len(used):
        raise ValueError(f"{path} was made with {len(used) or 'no'} --{option}; leave out {given[len(used)]}")


def _device_like(name: str) -> torch.device:
    try:
        return pick_device(name)
    except ValueError:
        return pick_device(None)


def _name(path: FilePath) -> str:
    """A file's name for a record, which is UTF-8; a name on disk may be any bytes."""
    return Path(path).name.encode("utf-8", "replace").decode()


def _digest(path: FilePath) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
