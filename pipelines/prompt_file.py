"""Many prompts from a file, each with options of its own, rendered into a folder; what is there already is skipped.

`FILE.txt` has a prompt on each line; empty lines, and those that begin with #, are none. `FILE.jsonl` has an object on
each, such as {"prompt": "a red house", "seed": 7, "steps": 30}; what it leaves out is as on the command line. Prompts
are numbered from 0. One that has no seed gets the command's plus its number; its copies count on from there.

Which pictures are rendered together depends on the file alone, not on what is there already or on the number of
processes, so that a run that was interrupted and resumed writes the same pictures, to the bit, as one that was not.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, Field

from pipelines.errors import is_out_of_memory, notice
from pipelines.image_to_image import InitImage, open_init
from pipelines.json_files import naming_file
from pipelines.png import check_writable, slug, write_png
from pipelines.replay import Record, make_records, render, told
from pipelines.request import MAX_PICTURES, MAX_SEED, OPTIONS, Request, checked_negatives, checked_prompts
from pipelines.runtime import pick_device
from pipelines.text_to_image import BATCH, TextToImagePipeline
from text_encoder.prompt import SYNTAXES

EXAMPLE = '{"prompt": "a red house", "seed": 7}'


class Options(BaseModel, frozen=True, extra="forbid", strict=True):
    """A prompt and what may be said with it, named as on the command line; None means the model's own default."""

    prompt: str
    negative: str | None = None
    seed: int = Field(ge=0, le=MAX_SEED - MAX_PICTURES)
    count: int = Field(default=1, ge=1, le=MAX_PICTURES)
    steps: int | None = None
    guidance: float | None = None
    rescale: float = 0.0
    sampler: str | None = None
    eta: float = 0.0
    width: int | None = None
    height: int | None = None
    syntax: Literal["plain", "weighted"] = "plain"
    clip_skip: int = Field(default=0, ge=0)
    tiled: bool = False
    spacing: str | None = None
    init: str | None = None
    mask: str | None = None
    strength: float | None = None
    guidance_interval: Annotated[tuple[float, float], Field(strict=False)] | None = None
    reuse: int = 1
    merge_tokens: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file. `where` is file:line, `number` counts prompts from 0."""

    where: Path
    number: int
    options: Options


@dataclass(frozen=True)
class Picture:
    """What is to be rendered, and the name of its file."""

    name: str
    seed: int
    request: Request
    init: str | None
    mask: str | None


@dataclass(frozen=True)
class Done:
    """A picture that is there now; `rendered` tells whether it was rendered, or skipped because it was there before."""

    path: Path
    seed: int
    rendered: bool


def read_prompts(file: Path, seed: int, options: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a file in their order.

    Args:
        seed: of the first prompt, if its line has none; each next one adds 1.
        options: for what a line leaves out, named as the fields of `Options`; None is as if it were not given.

    Raises:
        ValueError: one line that names file and line, and what is wrong there; or the file holds no prompt.
        OSError: the file cannot be read.
    """
    if file.suffix.lower() not in READERS:
        raise ValueError(f"{file} is no list of prompts; give FILE.txt, a prompt on each line, or FILE.jsonl")
    read = READERS[file.suffix.lower()]
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8; save it as such") from None
    prompts: list[Prompt] = []
    for line_number, line in enumerate(lines, 1):
        where = Path(f"{file}:{line_number}")
        given = naming_file(where, partial(read, line.strip()))
        if given is not None:
            both = {**_said(options), "seed": seed + len(prompts), **_said(given)}
            prompts.append(Prompt(where, len(prompts), naming_file(where, partial(Options.model_validate, both))))
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one on each line")
    return prompts


def _read_text(line: str) -> dict[str, Any] | None:
    return {"prompt": line} if line and not line.startswith("#") else None


def _read_object(line: str) -> dict[str, Any] | None:
    if not line:
        return None
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no valid JSON, {error.msg} at column {error.colno}; write {EXAMPLE}") from None
    except RecursionError:
        raise ValueError(f"no valid JSON, nested too deep; write {EXAMPLE}") from None
    if not isinstance(content, dict) or content.get("prompt") is None:
        raise ValueError(f"no object with a prompt; write {EXAMPLE}")
    if unknown := sorted(content.keys() - Options.model_fields.keys()):
        raise ValueError(f"key {unknown[0]!r} is unknown; there are {', '.join(Options.model_fields)}")
    return content


READERS: Mapping[str, Callable[[str], dict[str, Any] | None]] = {".txt": _read_text, ".jsonl": _read_object}
"""What a line says, by the file's ending; None is for a line that says nothing."""


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def open_folder(output: Path | None) -> Path:
    """The folder for the pictures, which is made if it does not exist.

    Raises:
        ValueError: none is given, it is a file, or nothing can be written to it.
        OSError: it cannot be made.
    """
    if output is None:
        raise ValueError("the pictures of a file of prompts need a folder; give it with -o FOLDER")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give the name of a folder")
    output.mkdir(parents=True, exist_ok=True)
    check_writable(output / "x.png")
    return output


def process_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, number) of this process among those that `accelerate launch` or `torchrun` started; (0, 1) if alone.

    Raises:
        ValueError: the variables RANK and WORLD_SIZE do not fit together.
    """
    rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK is {rank!r} and WORLD_SIZE {world!r}; unset both, or give a rank below the size")
    return int(rank), int(world)


def device_of(environment: Mapping[str, str], device: str | None) -> torch.device:
    """The accelerator of this process among those of its machine, by LOCAL_RANK; a device with a number stays.

    Raises:
        ValueError: no such device here, or LOCAL_RANK is no number.
    """
    picked, rank = pick_device(device), environment.get("LOCAL_RANK", "0")
    if not rank.isdecimal():
        raise ValueError(f"LOCAL_RANK is {rank!r}; unset it, or give a number")
    if picked.type == "cpu" or picked.index is not None or "LOCAL_RANK" not in environment:
        return picked
    return torch.device(picked.type, int(rank) % torch.accelerator.device_count())


def plan(pipe: TextToImagePipeline, prompts: Sequence[Prompt]) -> list[list[Picture]]:
    """All pictures, in batches of those that can be rendered together.

    Raises:
        ValueError: one line that names the line of the file and what is wrong there.
    """
    opened = lru_cache(maxsize=1)(open_init)  # neighbours often share a picture; all at once may not fit in memory
    alike: dict[Hashable, list[Picture]] = {}
    for prompt in prompts:
        options = prompt.options
        init = naming_file(prompt.where, partial(opened, options.init, options.mask, options.strength))
        request = naming_file(prompt.where, partial(make_request, pipe, options, init))
        chunks = naming_file(prompt.where, partial(_count_chunks, pipe, request))
        key = (replace(request, prompts=(), negatives=()), options.init, options.mask, chunks)
        for seed in range(options.seed, options.seed + options.count):
            name = f"{prompt.number:05}-{slug(options.prompt)}-{seed}.png"
            alike.setdefault(key, []).append(Picture(name, seed, request, options.init, options.mask))
    return [pictures[start : start + BATCH] for pictures in alike.values() for start in range(0, len(pictures), BATCH)]


def make_request(pipe: TextToImagePipeline, options: Options, init: InitImage | None) -> Request:
    """One picture, with the model's defaults filled in. Raises ValueError for what this model cannot do."""
    others = {name: getattr(options, name) for name in OPTIONS if name != "strength"}  # which is the picture's own
    return pipe.request(checked_prompts(options.prompt, 1), checked_negatives(options.negative, 1, 1), init, **others)


def render_prompts(
    pipe: TextToImagePipeline, prompts: Sequence[Prompt], folder: Path, process: tuple[int, int] = (0, 1)
) -> Iterator[Done]:
    """Renders what is not there yet, batch by batch, and yields each picture once it is there.

    A picture whose record says that it was made otherwise, or that cannot be read, is rendered anew with a notice. When
    memory runs out, batches are halved, which changes no picture beyond rounding.

    Args:
        process: (index, number): each process takes every number-th batch, and needs to know nothing of the others.

    Raises:
        ValueError: one line that names the line of the file and what is wrong there, before anything is rendered.
        RuntimeError, MemoryError: memory is too small for a single picture.
    """
    index, number = process
    size = BATCH
    for batch in plan(pipe, prompts)[index::number]:
        records = make_records(pipe, *_together(batch))
        there = {one for one, record in zip(batch, records, strict=True) if _is_there(pipe, folder / one.name, record)}
        yield from (Done(folder / one.name, one.seed, rendered=False) for one in batch if one in there)
        start = 0
        while start < len(batch):
            part = batch[start : start + size]
            absent = [one for one in part if one not in there]
            images = _render_in_memory(pipe, part) if absent else {}
            if images is None:
                size = len(part) // 2
                notice(f"memory is too small for {len(part)} pictures at once; going on with {size}")
                continue
            start += len(part)
            for one in absent:
                image, record = images[one]
                write_png(folder / one.name, image, record.model_dump())
                yield Done(folder / one.name, one.seed, rendered=True)


def _render_in_memory(
    pipe: TextToImagePipeline, pictures: Sequence[Picture]
) -> dict[Picture, tuple[Image.Image, Record]] | None:
    """Each picture with its record; None if there is too little memory for so many, of whom then nothing is left."""
    together = _together(pictures)
    try:
        images = render(pipe, *together).images
    except (RuntimeError, MemoryError) as error:
        if len(pictures) == 1 or not is_out_of_memory(error):
            raise
        return None
    return dict(zip(pictures, zip(images, make_records(pipe, *together), strict=True), strict=True))


def _together(pictures: Sequence[Picture]) -> tuple[Request, list[int], str | None, str | None]:
    """Pictures of one batch as the arguments of `render` and `make_records`."""
    request = replace(
        pictures[0].request,
        prompts=tuple(one.request.prompts[0] for one in pictures),
        negatives=tuple(one.request.negatives[0] for one in pictures),
    )
    return request, [one.seed for one in pictures], pictures[0].init, pictures[0].mask


def _count_chunks(pipe: TextToImagePipeline, request: Request) -> int:
    """How many times the text encoder's length the context is, which is one for all of a batch."""
    read = SYNTAXES[request.syntax]
    return max(len(read(pipe.tokenizer, text).chunks) for text in (*request.prompts, *request.negatives))


def _is_there(pipe: TextToImagePipeline, path: Path, record: Record) -> bool:
    if not path.exists():
        return False
    try:
        changes = Record.read(path).completed(pipe).changes(record)
    except ValueError as error:
        notice(f"{error}; it is rendered anew")
        return False
    # On another device or with another torch it would be the same picture but for rounding.
    otherwise = {name: values for name, values in changes.items() if name not in ("device", "versions")}
    if otherwise:
        notice(f"{path} was made otherwise and is rendered anew: {'; '.join(told(otherwise))}")
    return not otherwise
