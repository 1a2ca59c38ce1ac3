import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import png

RECORD = {
    "prompt": "ein rotes Haus\nunter der Sonne ☀",
    "negative": "blue",
    "seed": 3,
    "steps": 20,
    "guidance": 7.5,
    "rescale": 0.0,
    "sampler": "ddim",
    "eta": 0.0,
    "width": 8,
    "height": 8,
    "model": "default",
    "sha256": "0123456789abcdef",
}


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ldm"


def test_the_record_and_the_pixels_come_back(tmp_path: Path, image: Image.Image) -> None:
    path = tmp_path / "x.png"
    png.write_png(path, image, RECORD)
    assert png.read_record(path) == RECORD
    with Image.open(path) as read:
        assert np.array_equal(np.asarray(read), np.asarray(image))
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["x.png"]


def test_other_programs_find_their_own_format(tmp_path: Path, image: Image.Image) -> None:
    png.write_png(tmp_path / "x.png", image, RECORD)
    with Image.open(tmp_path / "x.png") as read:
        *prompt, negative, last = read.info["parameters"].split("\n")
    assert "\n".join(prompt) == RECORD["prompt"]
    assert negative == "Negative prompt: blue"
    assert last == (
        "Steps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 8x8, Model hash: 0123456789, Model: default"
    )
    assert "Negative" not in png.parameters_text({**RECORD, "negative": ""})


def test_a_failed_write_leaves_the_former_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"former")

    class Broken(Image.Image):
        def save(self, fp: Path, *_: object, **__: object) -> None:
            Path(fp).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        png.write_png(path, Broken(), RECORD)
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_without_a_record_are_refused(tmp_path: Path, image: Image.Image) -> None:
    path = tmp_path / "x.png"
    image.save(path)
    with pytest.raises(ValueError, match="does not say how it was made"):
        png.read_record(path)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no readable picture"):
        png.read_record(path)
    path.write_bytes(b"DDS " + bytes(124))  # Pillow's reader of this kind raises what it likes
    with pytest.raises(ValueError, match="no readable picture"):
        png.read_record(path)
    chunks = png.PngInfo()
    chunks.add_itxt("ldm", "[1]")
    image.save(path, pnginfo=chunks)
    with pytest.raises(ValueError, match="broken record"):
        png.read_record(path)
    chunks.add_itxt("ldm", "[" * 100_000)
    image.save(path, pnginfo=chunks)
    with pytest.raises(ValueError, match="no readable picture with a record"):
        png.read_record(path)


def test_writability_is_found_out_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png.check_writable(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder.png").mkdir()
    for path, fault in (
        (tmp_path / "x.jpg", r"ends in \.png"),
        (tmp_path / "folder.png", "is a folder"),
        (tmp_path / "none" / "x.png", "does not exist"),
    ):
        with pytest.raises(ValueError, match=fault):
            png.check_writable(path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ValueError, match=r"nothing can be written to .*: Permission denied"):
        png.check_writable(tmp_path / "x.png")


def test_the_digest_follows_the_content(tmp_path: Path, cache_folder: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    both = png.weights_sha256([one, two])
    assert both != png.weights_sha256([two, one])
    assert both == png.weights_sha256([one, two])
    two.write_bytes(b"33")
    assert both != png.weights_sha256([one, two])


def test_the_digest_is_cached_and_a_bad_cache_is_harmless(tmp_path: Path, cache_folder: Path) -> None:
    file = tmp_path / "one"
    file.write_bytes(b"1")
    digest = png.weights_sha256([file])
    cache = json.loads((cache_folder / "sha256.json").read_text())
    assert list(cache.values()) == ["6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"]
    (cache_folder / "sha256.json").write_text(json.dumps(dict.fromkeys(cache, "cached")))
    assert png.weights_sha256([file]) != digest
    for content in ("{broken", "[]", '{"a": 1}'):
        (cache_folder / "sha256.json").write_text(content)
        assert png.weights_sha256([file]) == digest


def test_no_place_for_the_cache_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one"
    file.write_bytes(b"1")
    digest = png.weights_sha256([file])
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert png.weights_sha256([file]) == digest


def test_a_user_without_a_home_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one"
    file.write_bytes(b"1")
    digest = png.weights_sha256([file])
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    assert png.weights_sha256([file]) == digest


def test_without_a_cache_a_file_is_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one"
    file.write_bytes(b"1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    digest = png.weights_sha256([file])
    monkeypatch.setattr(png.hashlib, "file_digest", None)
    assert png.weights_sha256([file]) == digest


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "one"
    file.write_bytes(b"1")
    png.weights_sha256([file])
    assert (tmp_path / ".cache" / "ldm" / "sha256.json").is_file()
