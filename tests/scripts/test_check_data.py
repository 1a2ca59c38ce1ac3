"""The check finds what is wrong with a folder, says what training would say, and leaves sound folders alone."""

import io
import json
import re
from pathlib import Path
from typing import Any

import check_data
import datasets
import glyphs
import numpy as np
import pytest
from check_data import HARMS, STOPS, Picture
from PIL import Image

from ldm.training.data import CaptionedImages, DataConfig

Lines = list[Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image(i: int, size: int = 64) -> Image.Image:
    return glyphs.picture(i, 0, size=size)[1]


def write(folder: Path, lines: Lines) -> Path:
    folder.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n")
    return folder


@pytest.fixture
def sound(tmp_path: Path) -> tuple[Path, Lines]:
    """A folder of six pictures without a fault, and the lines of its metadata."""
    lines = [{"file_name": f"{i}.png", "text": glyphs.glyph(i, 0)[0].text} for i in range(6)]
    folder = write(tmp_path / "data", lines)
    for i in range(6):
        image(i).save(folder / f"{i}.png")
    return folder, lines


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, list[str], list[str]]:
    """Exit code, and the lines of stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["check_data.py", str(folder), *arguments])
    code = 0
    try:
        check_data.main()
    except SystemExit as left:
        code = int(str(left.code))
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.splitlines()


def found(folder: Path, size: int = 64) -> dict[str, list[str]]:
    return check_data.check(DataConfig(path=str(folder), size=size)).found


def test_a_sound_folder(
    sound: tuple[Path, Lines], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, file = tmp_path / "sheet.png", tmp_path / "check.json"
    code, out, err = run(sound[0], monkeypatch, capsys, "--sheet", str(sheet), "--json", str(file))
    assert (code, err) == (0, [])
    assert out[-1] == "6 of 6 pictures can be trained on"
    result = json.loads(file.read_text())
    assert (result["rows"], result["trainable"], result["found"]) == (6, 6, {})
    assert result["shorter side"] == {"64 to 127": 6}
    texts = [line["text"] for line in sound[1]]
    captions = result["captions"]
    assert captions["distinct"] == 6
    assert captions["words each"] == round(sum(len(text.split()) for text in texts) / 6, 1)
    new = captions["words new to the default model"]
    assert "letter" in new
    assert not {"a", "red", "the"} & set(new)
    with Image.open(sheet) as drawn:
        assert drawn.width > 8 * 128


def test_everything_that_may_be_wrong(
    sound: tuple[Path, Lines], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lines = sound
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "1.png").write_text("no picture")
    (folder / "2.png").unlink()
    lines[3]["text"] = None
    lines[4]["text"] = " "
    lines[5]["text"] = "letter " * 75 + "and the rest"
    image(5).resize((48, 48)).save(folder / "small.png")
    image(7).resize((320, 64)).save(folder / "oblong.png")
    (folder / "again.png").write_bytes((folder / "4.png").read_bytes())
    image(4).save(folder / "saved anew.jpg", quality=90)
    image(8).save(folder / "nobody.png")
    for name in ("small.png", "oblong.png", "again.png", "saved anew.jpg"):
        lines.append({"file_name": name, "text": "twice" if name.startswith(("small", "oblong")) else f"a {name}"})
    lines += ["{", '["a list"]', '{"text": "no file"}', '{"file_name": "../outside.png", "text": "a"}', ""]
    cases = found(write(folder, lines))
    assert cases.keys() == STOPS.keys() | HARMS.keys()
    assert {kind: [case.split(":")[0] for case in each] for kind, each in cases.items()} == {
        "unreadable picture": ["0.png", "1.png"],
        "missing picture": ["2.png"],
        "caption that is no text": ["3.png"],
        "empty caption": ["4.png"],
        "caption that is cut": ["5.png"],
        "small picture": ["small.png"],
        "oblong picture": ["oblong.png"],
        "exact duplicate": ["again.png"],
        "near duplicate": ["small.png", "saved anew.jpg"],
        "picture without caption": ["nobody.png"],
        "repeated caption": ["2 times"],
        "line that cannot be read": [f"line {n} of metadata.jsonl" for n in (11, 12, 13, 14)],
    }
    assert cases["caption that is cut"] == ["5.png: ... and the rest"]
    assert cases["oblong picture"] == ["oblong.png: 320 x 64"]

    code, out, err = run(folder, monkeypatch, capsys)
    assert code == 2
    assert out[-1] == "6 of 10 pictures can be trained on"
    assert [line for line in out if line.startswith("unreadable picture (2): ")] != []
    assert len(err) == 1
    assert err[0].startswith("error: training would stop: line that cannot be read (4), missing picture (1), ")


def test_what_only_harms_does_not_stop(
    sound: tuple[Path, Lines], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lines = sound
    lines[0]["text"] = ""
    code, out, err = run(write(folder, lines), monkeypatch, capsys, "--size", "128")
    assert (code, err) == (0, [])
    assert "small picture (6): " in "\n".join(out)
    assert "  ... and 1 more" in out
    assert len(CaptionedImages(DataConfig(path=str(folder), size=128), 0).images(0, 6)) == 6


@pytest.mark.parametrize("fault", ["no picture", "cut off", "missing", "float pixels"])
def test_pictures_that_stop_the_check_stop_the_training(sound: tuple[Path, Lines], fault: str) -> None:
    folder, lines = sound
    file = folder / "2.png"
    match fault:
        case "no picture":
            file.write_text("no picture")
        case "cut off":
            file.write_bytes(file.read_bytes()[:200])
        case "missing":
            file.unlink()
        case "float pixels":
            Image.new("F", (64, 64), 0.5).save(folder / "2.tiff")
            write(folder, [*lines[:2], {"file_name": "2.tiff", "text": "a"}, *lines[3:]])
    kinds = {kind for kind in found(folder) if kind in STOPS}
    assert len(kinds) == 1
    images = CaptionedImages(DataConfig(path=str(folder), size=64), 0)
    assert images[1, 0, 0][0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match=r"row 2 .* is no readable image"):
        images[2, 0, 0]


def test_names_that_datasets_may_take_for_splits(
    sound: tuple[Path, Lines], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever training makes of a picture called test, the check says so."""
    folder, lines = sound
    (folder / "0.png").rename(folder / "test.png")
    lines[0]["file_name"] = "test.png"
    code, _, err = run(write(folder, lines), monkeypatch, capsys)
    try:
        trains = len(CaptionedImages(DataConfig(path=str(folder), size=64), 0)) == 6
    except ValueError:
        trains = False
    assert (code, len(err)) == ((0, 0) if trains else (2, 1))


def test_rows_that_training_would_not_read(sound: tuple[Path, Lines], monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(sound[0]), size=64)
    checked = check_data.check(config)
    monkeypatch.setattr(check_data, "open_dataset", lambda _: range(5))
    assert str(check_data.fault_of(config, checked)).startswith("training would read 5 of 6 rows")


def test_pictures_in_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    stream = io.BytesIO()
    image(0).save(stream, "PNG")
    cells = [{"bytes": content, "path": None} for content in (stream.getvalue(), b"no picture")]
    datasets.Dataset.from_dict({"picture": cells, "words": ["an a", "a b"]}).to_parquet(str(folder / "a.parquet"))
    columns = ["--image_column", "picture", "--caption_column", "words"]
    code, out, err = run(folder, monkeypatch, capsys, *columns)
    assert code == 2
    assert out[-1] == "1 of 2 pictures can be trained on"
    assert err == [
        "error: training would stop: unreadable picture (1); the first is row 1: no picture of a kind that is known"
    ]


@pytest.mark.parametrize(
    ("lines", "arguments", "error"),
    [
        (None, [], "does not exist"),
        ([], [], "none of 0 pictures in .* can be trained on"),
        ([{"file_name": "a.png", "text": "a"}], [], "none of 1 pictures in .* can be trained on"),
        ([], ["--size", "4"], "--size is 4; give at least 8"),
    ],
    ids=["no folder", "no pictures", "captions alone", "tiny"],
)
def test_folders_without_pictures(
    lines: Lines | None,
    arguments: list[str],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if lines is not None:
        write(tmp_path / "data", lines)
    code, _, err = run(tmp_path / "data", monkeypatch, capsys, *arguments)
    assert code == 2
    assert len(err) == 1
    assert re.search(f"^error: .*{error}", err[0])


def test_pictures_without_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image(0).save(tmp_path / "a.png")
    code, _, err = run(tmp_path, monkeypatch, capsys)
    assert code == 2
    assert len(err) == 1
    assert 'write metadata.jsonl with lines {"file_name": "a.png", "text": "a caption"}' in err[0]


def test_duplicates_are_those_of_every_pair() -> None:
    """More pictures than one block of rows; the thumbnails of every fifth are nearly those of an earlier one."""
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 255, (1100, 192)).astype(np.float32)
    copies = range(5, 1100, 5)
    originals = [int(rng.integers(0, i)) for i in copies]
    for i, original in zip(copies, originals, strict=True):
        points[i] = points[original] + rng.normal(0, 0.5, 192)
    pictures = [Picture(str(i), "", (8, 8), str(i), point) for i, point in enumerate(points)]
    expected = []
    for i in range(1100):
        near = np.flatnonzero(np.sqrt(((points[:i] - points[i]) ** 2).mean(1)) < check_data.NEAR)
        expected += [f"{i}: of {near[0]}"] if len(near) else []
    assert len(expected) == len(copies)
    assert [case for _, case in check_data.find_duplicates(pictures)] == expected


def test_pictures_that_differ_are_no_duplicates() -> None:
    """Even among letters on eight kinds of background."""
    points = [np.asarray(image(i).resize((8, 8), Image.Resampling.BOX), dtype=np.float32).ravel() for i in range(100)]
    pictures = [Picture(str(i), "", (64, 64), str(i), point) for i, point in enumerate(points)]
    assert list(check_data.find_duplicates(pictures)) == []


def test_histogram_of_sides() -> None:
    assert check_data.histogram([64, 127, 128, 600]) == {
        "64 to 127": 2,
        "128 to 255": 1,
        "256 to 511": 0,
        "512 to 1023": 1,
    }
    assert check_data.histogram([]) == {}
