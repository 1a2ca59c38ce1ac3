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
        ValueError: fewer pictures than asked for, captions without a picture, or an empty one for a prompt.
        OSError: no folder, or nothing in it that could be trained on.
    """
    data = CaptionedImages(DataConfig(path=str(folder), size=size), seed=0)
    if len(data) < count:
        raise ValueError(
            f"{folder} has {len(data)} pictures with captions, but {count} are asked for: give --prompts {len(data)}"
        )
    captions = data.captions()
    if "" in (firsts := [caption.strip() for caption in captions[:count]]):
        raise ValueError(f"row {firsts.index('')} of {folder} has an empty caption, which is no prompt: write one")
    digest, missing = hashlib.sha256(), []
    for row in data.rows:
        source = row[data.config.image_column]
        if source["bytes"] is None and not Path(source["path"]).is_file():
            missing.append(source["path"])
        else:
            digest.update(hashlib.sha256(source["bytes"] or Path(source["path"]).read_bytes()).digest())
    if missing:
        raise ValueError(f"{folder} has captions without pictures: {', '.join(missing[:MOST_NAMED])}")

    def images(start: int, stop: int) -> Tensor:
        return torch.stack([data[index, 0, 0][0] for index in range(start, stop)])

    return RealPictures(tuple(captions[:count]), len(data), size, images, digest.hexdigest())
