"""The real pictures that generated ones are compared with, and their captions, which are the prompts."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from picturebook import WORLD, Scene, picture, scene
from torch import Tensor

from ldm.pictures import as_tensor
from ldm.training.data import CaptionedImages, DataConfig

MOST_NAMED = 3


@dataclass(frozen=True)
class RealPictures:
    """`images(start, stop)` are pictures [N,3,size,size] in [-1,1]; the first `len(prompts)` belong to the prompts."""

    prompts: tuple[str, ...]
    count: int
    size: int
    images: Callable[[int, int], Tensor]
    fingerprint: str
    """A SHA-256 that only the same pictures in the same order have."""
    scenes: tuple[Scene, ...] | None = None
    """What the pictures show, where that is known: in the picturebook."""


def from_picturebook(count: int, seed: int, size: int) -> RealPictures:
    """The first `count` held-out scenes of a seed's world."""
    scenes = tuple(scene(index, seed, "heldout")[0] for index in range(count))

    @cache
    def draw(index: int) -> Tensor:
        return as_tensor(picture(index, seed, "heldout", size)[1])

    def images(start: int, stop: int) -> Tensor:
        return torch.stack([draw(index) for index in range(start, stop)])

    named = hashlib.sha256(f"{WORLD}/heldout/{seed}/{count}".encode()).hexdigest()
    return RealPictures(tuple(each.text for each in scenes), count, size, images, named, scenes)


def from_folder(folder: Path, count: int, size: int) -> RealPictures:
    """All pictures of a folder as training takes it; the captions of the first `count` are the prompts.

    Raises:
        ValueError: fewer pictures than asked for, or captions without a picture.
        OSError: no folder, or nothing in it that could be trained on.
    """
    from datasets.exceptions import DatasetGenerationError

    try:
        data = CaptionedImages(DataConfig(path=str(folder), size=size), seed=0)
    except DatasetGenerationError as error:
        raise ValueError(f"{folder} cannot be read: {error.__cause__ or error}") from None
    if len(data) < count:
        raise ValueError(
            f"{folder} has {len(data)} pictures with captions, but {count} are asked for: give --prompts {len(data)}"
        )
    column = [row[data.config.image_column] for row in data.rows]
    if missing := [row["path"] for row in column if row["bytes"] is None and not Path(row["path"]).is_file()]:
        raise ValueError(f"{folder} has captions without pictures: {', '.join(missing[:MOST_NAMED])}")
    digest = hashlib.sha256()
    for row in column:
        digest.update(hashlib.sha256(row["bytes"] or Path(row["path"]).read_bytes()).digest())

    def images(start: int, stop: int) -> Tensor:
        return torch.stack([data[index, 0, 0][0] for index in range(start, stop)])

    return RealPictures(tuple(data.captions()[:count]), len(data), size, images, digest.hexdigest())
