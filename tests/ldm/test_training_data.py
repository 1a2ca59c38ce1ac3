"""Data: the order, what becomes of a picture, and what a user may get wrong."""

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError
from torch import Tensor

from ldm.pictures import as_rgb
from ldm.training.data import (
    Batch,
    CaptionedDataset,
    CaptionedImages,
    DataConfig,
    Place,
    Share,
    decode_image,
    micro_batches,
    open_dataset,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class Numbers(CaptionedDataset):
    """Row i is the number i."""

    workers = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Place) -> tuple[Tensor, str, Place]:
        return torch.tensor([float(place[0])]), str(place[0]), place


def gather(count: int, start: int, steps: int, share: tuple[int, int, int]) -> dict[tuple[int, int], int]:
    """The row at every (step, position), put together from all processes and micro-batches."""
    rows: dict[tuple[int, int], int] = {}
    batch, parts, ranks = share
    for rank in range(ranks):
        made = list(micro_batches(Numbers(count), 0, start, steps, Share(batch, parts, ranks, rank)))
        assert len(made) == parts * (steps - start)
        for one in made:
            assert one.inputs[:, 0].tolist() == one.indices
            assert one.captions == [str(index) for index in one.indices]
            for position, index in zip(one.positions, one.indices, strict=True):
                assert (one.step, position) not in rows
                rows[one.step, position] = index
    return rows


def test_every_epoch_visits_every_row_once() -> None:
    rows = gather(count=10, start=0, steps=10, share=(4, 1, 1))  # epochs end within a batch
    order = [rows[key] for key in sorted(rows)]
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


@pytest.mark.parametrize("share", [(4, 2, 1), (4, 4, 1), (4, 1, 2), (4, 2, 2), (4, 1, 4)])
def test_order_depends_on_neither_processes_nor_accumulation(share: tuple[int, int, int]) -> None:
    assert gather(10, 0, 6, share) == gather(10, 0, 6, (4, 1, 1))


def test_order_goes_on_where_it_stopped() -> None:
    whole = gather(10, 0, 8, (4, 1, 1))
    assert gather(10, 5, 8, (4, 2, 1)) == {key: row for key, row in whole.items() if key[0] >= 5}


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="batch_size 6 is not a multiple of 2 accumulation steps x 2 processes"):
        Share(6, 2, 2)


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def color_at(image: Tensor, y: int, x: int) -> tuple[int, ...]:
    return tuple(((image[:, y, x] + 1) * 127.5).round().int().tolist())


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (7, 7)), (6, (0, 7)), (8, (7, 0))])
@pytest.mark.parametrize("size", [8, 4])
def test_exif_rotation(orientation: int, corner: tuple[int, int], size: int) -> None:
    image = Image.new("RGB", (8, 8), BLUE)
    image.paste(RED, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(image, exif=exif), size)
    assert decoded.shape == (3, size, size)
    y, x = (0 if place == 0 else size - 1 for place in corner)
    red, green, blue = color_at(decoded, y, x)
    assert red > 200 > 60 > max(green, blue)
    assert sum(float(c) > 0 for c in decoded[0].flatten()) == size * size // 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation: int) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(8, 6) * 5).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(io.BytesIO(encode(image, exif=exif)))
    expected = ImageOps.exif_transpose(stored)
    assert (as_rgb(stored).size, as_rgb(stored).tobytes()) == (expected.size, expected.tobytes())


def test_a_mistyped_tag_beside_the_orientation_is_harmless() -> None:
    entry = struct.Struct(">HHI4s")
    tags = entry.pack(0x0112, 3, 1, b"\0\x06\0\0") + entry.pack(0x0128, 2, 1, b"\0\x02\0\0")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + tags + bytes(4)
    stored = Image.open(io.BytesIO(encode(Image.new("RGB", (16, 8), RED), "JPEG", exif=exif)))
    assert as_rgb(stored).size == (8, 16)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 0, 128), (0, 0, 4, 8))
    clear.paste((0, 255, 0, 255), (0, 0, 1, 1))
    decoded = decode_image(encode(clear), 8)
    assert color_at(decoded, 4, 6) == (255, 255, 255)
    assert color_at(decoded, 4, 1) == (127, 127, 127)
    assert color_at(decoded, 0, 0) == GREEN
    grey = Image.new("LA", (8, 8), (0, 0))
    assert decode_image(encode(grey), 8).min() == 1


def test_palettes() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.paste(2, (0, 0, 4, 8))
    decoded = decode_image(encode(palette), 8)
    assert color_at(decoded, 0, 0) == BLUE
    assert color_at(decoded, 0, 7) == GREEN
    decoded = decode_image(encode(palette, transparency=1), 8)
    assert color_at(decoded, 0, 0) == BLUE
    assert color_at(decoded, 0, 7) == (255, 255, 255)


@pytest.mark.parametrize("upright", [False, True])
def test_the_middle_of_an_oblong_picture(upright: bool) -> None:
    image = Image.new("RGB", (64, 32), GREEN)
    image.paste(RED, (0, 0, 16, 32))
    image.paste(BLUE, (48, 0, 64, 32))
    if upright:
        image = image.transpose(Image.Transpose.ROTATE_90)
    decoded = decode_image(encode(image), 16)
    assert all(color_at(decoded, y, x)[1] > 230 for y in range(1, 15) for x in range(1, 15))


def test_values_and_modes() -> None:
    decoded = decode_image(encode(Image.new("L", (8, 8), 51)), 8)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, torch.full((3, 8, 8), 51 / 127.5 - 1))
    assert decode_image(encode(Image.new("1", (8, 8), 1)), 8).min() == 1
    deep = Image.fromarray(np.full((8, 8), 51 * 257, dtype=np.uint16))
    assert torch.equal(decode_image(encode(deep), 8), torch.full((3, 8, 8), 51 / 127.5 - 1))
    assert color_at(decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 8), 4, 4)[0] > 200


def write_folder(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as lines:
        for i in range(count):
            image = Image.new("RGB", (16, 16), (0, 0, 20 * i))
            image.paste((255, 255, 255), (0, 0, 8, 16))
            image.save(folder / f"{i}.png")
            lines.write(json.dumps({"file_name": f"{i}.png", "text": f"number {i}", "more": i}) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_folder_of_captioned_images(tmp_path: Path) -> None:
    images = CaptionedImages(DataConfig(path=str(write_folder(tmp_path / "data")), size=16), seed=0)
    assert images.captions() == [f"number {i}" for i in range(4)]
    assert images.images(1, 3).shape == (2, 3, 16, 16)
    image, caption, place = images[3, 7, 1]
    assert (caption, place) == ("number 3", (3, 7, 1))
    assert torch.equal(image, images.images(3, 4)[0])
    assert color_at(image, 0, 15) == (0, 0, 60)
    batch: Batch = next(micro_batches(images, 0, 0, 1, Share(4)))
    assert torch.equal(batch.inputs, torch.stack([images.images(i, i + 1)[0] for i in batch.indices]))


def test_names_that_look_like_splits_are_only_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data [test]", count=3)
    (folder / "train").mkdir()
    names = ["test.png", "a test.png", "train/2.png"]
    for i, name in enumerate(names):
        (folder / f"{i}.png").rename(folder / name)
    lines = [json.dumps({"file_name": name, "text": f"number {i}"}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    images = CaptionedImages(DataConfig(path=str(folder), size=16), seed=0)
    blue = [round(float(images.images(i, i + 1)[0, 2, 0, 15] + 1) * 127.5) for i in range(3)]
    assert {(caption, b) for caption, b in zip(images.captions(), blue, strict=True)} == {
        (f"number {i}", 20 * i) for i in range(3)
    }


def test_flips_about_half_and_the_same_ones_again(tmp_path: Path) -> None:
    images = CaptionedImages(DataConfig(path=str(write_folder(tmp_path / "data")), size=16, flip=True), seed=0)
    straight = images.images(0, 1)[0]
    flipped = [bool((images[0, step, 0][0] != straight).any()) for step in range(40)]
    assert 10 < sum(flipped) < 30
    assert flipped == [bool((images[0, step, 0][0] != straight).any()) for step in range(40)]
    step = flipped.index(True)
    assert torch.equal(images[0, step, 0][0], straight.flip(-1))


def test_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    cells = [{"bytes": encode(Image.new("RGB", (8, 8), c)), "path": None} for c in (RED, GREEN)]
    datasets.Dataset.from_dict({"image": cells, "text": ["red", "green"]}).to_parquet(str(folder / "a.parquet"))
    images = CaptionedImages(DataConfig(path=str(folder), size=8), seed=0)
    assert images.captions() == ["red", "green"]
    assert color_at(images[1, 0, 0][0], 0, 0) == GREEN


def test_webdataset(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, color in (("red", RED), ("green", GREEN)):
            for suffix, content in (("png", encode(Image.new("RGB", (8, 8), color))), ("txt", name.encode())):
                entry = tarfile.TarInfo(f"{name}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    config = DataConfig(path=str(folder), size=8, image_column="png", caption_column="txt")
    images = CaptionedImages(config, seed=0)
    assert images.captions() == ["red", "green"]
    assert color_at(images[0, 0, 0][0], 0, 0) == RED


def test_what_a_user_may_get_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_dataset(DataConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no lines in metadata\.jsonl, no parquet and no tar files: write"):
        open_dataset(DataConfig(path=str(tmp_path / "empty")))
    folder = write_folder(tmp_path / "data")
    with pytest.raises(ValueError, match="no column 'caption': it has image, text, more"):
        open_dataset(DataConfig(path=str(folder), caption_column="caption"))
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write('{"file_name": "3.png", "te\n')
    with pytest.raises(ValueError, match=r"data cannot be read: "):
        open_dataset(DataConfig(path=str(folder)))
    with pytest.raises(ValidationError, match="size"):
        DataConfig(path=str(folder), size=4)


def test_files_that_hold_no_rows_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    config = DataConfig(path=str(folder))
    (folder / "metadata.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"no lines in metadata\.jsonl"):
        open_dataset(config)
    (folder / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"data cannot be read: "):
        open_dataset(config)
    none: dict[str, list[Any]] = {"image": [], "text": []}
    datasets.Dataset.from_dict(none).to_parquet(str(folder / "a.parquet"))
    with pytest.raises(ValueError, match=r"data cannot be read: .* no data"):
        open_dataset(config)


def test_a_column_that_holds_no_images_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [1], "text": ["one"]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"^column 'image' of .* holds no images but .*int64.*data\.image_column"):
        open_dataset(DataConfig(path=str(tmp_path)))


def test_a_row_without_a_picture_is_named(tmp_path: Path) -> None:
    cells = [{"bytes": encode(Image.new("RGB", (8, 8))), "path": None}, None]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b"]}, features)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    images = CaptionedImages(DataConfig(path=str(tmp_path), size=8), seed=0)
    with pytest.raises(ValueError, match=r"^row 1 of .* has no picture: add it, or delete the row$"):
        images.images(0, 2)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_an_unreadable_picture_is_named(tmp_path: Path, content: bytes | None) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60] if content is None else content)
    images = CaptionedImages(DataConfig(path=str(folder), size=16), seed=0)
    images[1, 0, 0]
    for read in (lambda: images[2, 0, 0], lambda: images.images(1, 4)):
        with pytest.raises(ValueError, match=r"^row 2 .*2\.png.* no readable image"):
            read()


def test_what_a_worker_finds_wrong_is_one_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / "2.png").write_bytes(b"")
    images = CaptionedImages(DataConfig(path=str(folder), size=16, workers=1), seed=0)
    with pytest.raises(ValueError, match=r"^row 2 .*2\.png.* no readable image") as caught:
        list(micro_batches(images, 0, 0, 1, Share(4)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "found"), [(None, "nothing"), (7, "a int")])
def test_a_caption_that_is_no_text_is_named(text: Any, found: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    lines = [{"file_name": f"{i}.png", "text": text} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=rf"row 0 of .* has {found} in column 'text': write a caption, or delete"):
        CaptionedImages(DataConfig(path=str(folder), size=16), seed=0).captions()


def test_length_is_the_subclass_s_own() -> None:
    with pytest.raises(NotImplementedError):
        len(CaptionedDataset())


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(ValueError, match="mode F"):
        decode_image(encode(Image.new("F", (8, 8), 0.5), "TIFF"), 8)
