"""Captioned images from a folder, parquet, WebDataset tars or the hub, in an order that (seed, step) determines."""

import glob
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.pictures import as_rgb, as_tensor
from ldm.training import randomness

if TYPE_CHECKING:
    import datasets


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Where the captioned pictures are and how they are read."""

    path: str
    """A folder of images with metadata.jsonl, of parquet files or of WebDataset tars; or hub:owner/name."""
    size: int = Field(64, ge=8)
    """Pixels: the shorter side is resized to this and the middle cut out."""
    image_column: str = "image"
    caption_column: str = "text"
    flip: bool = False
    """Mirror half of the pictures. Not for captions that say left or right."""
    workers: int = Field(0, ge=0)
    """Processes that decode pictures, beside each training process."""


def open_dataset(config: DataConfig) -> "datasets.Dataset":
    """The dataset behind `config.path`, its images undecoded. The builder is named: none that unpickles is chosen.

    Raises FileNotFoundError if the folder is missing or holds no images, ValueError if a column is missing or
    holds no images, or a file that lists or holds the pictures cannot be read or holds none.
    """
    from_hub = config.path.startswith("hub:")
    if not from_hub:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when `datasets` is imported
    import datasets

    datasets.disable_progress_bars()
    if from_hub:
        data = datasets.load_dataset(config.path.removeprefix("hub:"), split="train")
    else:
        builder, files = _builder_of(Path(config.path))
        try:
            data = datasets.load_dataset(builder, data_files={"train": files}, split="train")
        except Exception as error:  # each builder lets through what its own readers raise
            raise ValueError(f"{config.path} cannot be read: {error.__cause__ or error}") from None
    for column in (config.image_column, config.caption_column):
        if column not in data.column_names:
            raise ValueError(f"{config.path} has no column {column!r}: it has {', '.join(data.column_names)}")
    data = data.select_columns([config.image_column, config.caption_column])
    try:
        return data.cast_column(config.image_column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's, one for each type
        found = data.features[config.image_column]
        raise ValueError(
            f"column {config.image_column!r} of {config.path} holds no images but {found}: name another with "
            f"data.image_column ({error})"
        ) from None


def _builder_of(folder: Path) -> tuple[str, list[str]]:
    """The builder in `datasets` that reads a folder, and the files that it is to be given."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist: give data.path a folder of captioned images")
    for pattern, builder in (("*.parquet", "parquet"), ("*.tar", "webdataset")):
        if found := sorted(map(str, folder.glob(pattern))):
            return builder, found
    listed = folder / "metadata.jsonl"
    if listed.exists() and listed.stat().st_size > 0:
        # Given as a folder, its files would be split by what their names begin with, such as "test".
        return "imagefolder", [f"{glob.escape(str(folder))}/**"]
    raise FileNotFoundError(
        f"{folder} has no lines in metadata.jsonl, no parquet and no tar files: write metadata.jsonl with lines "
        '{"file_name": "a.png", "text": "a caption"}'
    )


def decode_image(source: bytes | str, size: int) -> Tensor:
    """A picture as float32 [3,size,size] in [-1,1]: EXIF rotation applied, transparency on white, middle square.

    Raises what `as_rgb` does, and OSError for what is no picture.
    """
    image = as_rgb(Image.open(source if isinstance(source, str) else io.BytesIO(source)))
    return as_tensor(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Batch:
    """One micro-batch, and where in training it stands."""

    inputs: Tensor
    """Images [B,3,H,W] in [-1,1], or what a script made of them beforehand."""
    captions: list[str]
    indices: list[int]
    """Rows of the dataset."""
    positions: list[int]
    """Places in the global batch: the counters of this batch's randomness."""
    step: int


Place = tuple[int, int, int]
"""A sample's row of the dataset, the step that it is for, and its position in that step's global batch."""


class CaptionedDataset(Dataset[tuple[Tensor, str, Place]]):
    """`data[index, step, position]` is that row's input and caption, for one place in training."""

    workers: int

    def __len__(self) -> int:
        raise NotImplementedError


class CaptionedImages(CaptionedDataset):
    """Decodes pictures as they are asked for."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.workers = config.workers
        self.rows = open_dataset(config)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Place) -> tuple[Tensor, str, Place]:
        index, step, position = place
        row = self.rows[index]
        image = self._decode(index, row[self.config.image_column])
        if self.config.flip and randomness.uniform(self.seed, "flip", step, [position]) < 0.5:
            image = image.flip(-1)
        return image, row[self.config.caption_column], place

    def _decode(self, index: int, source: dict[str, Any] | None) -> Tensor:
        if source is None:
            raise ValueError(f"row {index} of {self.config.path} has no picture: add it, or delete the row")
        try:
            return decode_image(source["bytes"] or source["path"], self.config.size)
        except Exception as error:  # Pillow's readers raise nearly anything
            raise ValueError(
                f"row {index} ({source['path']}) of {self.config.path} is no readable image: {error}"
            ) from None

    def images(self, start: int, stop: int) -> Tensor:
        """The pictures of rows start ... stop - 1 as they are, not mirrored: [N,3,H,W]."""
        column = self.rows[start:stop][self.config.image_column]
        return torch.stack([self._decode(start + i, source) for i, source in enumerate(column)])

    def captions(self) -> list[str]:
        """All captions, in the order of the rows. Raises ValueError for one that is no text."""
        column = list(self.rows[self.config.caption_column])
        for index, caption in enumerate(column):
            if not isinstance(caption, str):
                found = "nothing" if caption is None else f"a {type(caption).__name__}"
                raise ValueError(
                    f"row {index} of {self.config.path} has {found} in column {self.config.caption_column!r}: write a "
                    "caption, or delete the row"
                )
        return column


@dataclass(frozen=True)
class Share:
    """Which part of each global batch is this process' own: `batch` samples make a step, over `parts` micro-batches of
    each of `ranks` processes. Raises ValueError if they do not divide evenly.
    """

    batch: int
    parts: int = 1
    ranks: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.batch % (self.parts * self.ranks):
            raise ValueError(
                f"batch_size {self.batch} is not a multiple of {self.parts} accumulation steps x {self.ranks} processes"
            )

    def positions(self, part: int) -> range:
        """Positions in the global batch of this process' micro-batch `part`."""
        size = self.batch // (self.parts * self.ranks)
        first = (part * self.ranks + self.rank) * size
        return range(first, first + size)


class _Order(Sampler[list[Place]]):
    """The places of each micro-batch of one process, from step `start` to `steps`; every epoch is shuffled anew."""

    def __init__(self, count: int, seed: int, start: int, steps: int, share: Share) -> None:
        self.count, self.seed, self.start, self.steps, self.share = count, seed, start, steps, share

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            for part in range(self.share.parts):
                places = []
                for position in self.share.positions(part):
                    place = step * self.share.batch + position
                    if place // self.count != epoch:
                        epoch = place // self.count
                        order = randomness.permutation(self.count, self.seed, epoch)
                    places.append((int(order[place % self.count]), step, position))
                yield places


def _collate(items: Sequence[tuple[Tensor, str, Place]]) -> Batch:
    inputs, captions, places = zip(*items, strict=True)
    indices, steps, positions = zip(*places, strict=True)
    return Batch(torch.stack(inputs), list(captions), list(indices), list(positions), steps[0])


def micro_batches(data: CaptionedDataset, seed: int, start: int, steps: int, share: Share) -> Iterator[Batch]:
    """This process' micro-batches from step `start` on, `share.parts` of them a step."""
    order = _Order(len(data), seed, start, steps, share)
    try:
        yield from DataLoader(data, batch_sampler=order, collate_fn=_collate, num_workers=data.workers)
    except ValueError as error:
        # A worker's error comes with its traceback written out; the last line is what it says.
        raise ValueError(str(error).rstrip().rpartition("\nValueError: ")[2]) from None
