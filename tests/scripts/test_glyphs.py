"""The promises of the glyphs: deterministic, captions that are true of the pictures, and what is held out stays out."""

import json
import re
import string
import sys
from dataclasses import replace
from pathlib import Path

import glyphs
import numpy as np
import pytest
from glyphs import BACKGROUND_WORDS, COLORS, FAMILIES, HELD_OUT, ITALIC_WORDS, LETTERS, SIZE_WORDS, TILT_WORDS, Glyph
from PIL import Image


@pytest.fixture(scope="module")
def train() -> list[Glyph]:
    return [glyphs.glyph(i, 0)[0] for i in range(2000)]


@pytest.fixture(scope="module")
def heldout() -> list[Glyph]:
    return [glyphs.glyph(i, 0, "heldout")[0] for i in range(300)]


def words(text: str) -> set[str]:
    return set(re.findall("[A-Za-z]+", text))


def test_a_tenth_is_held_out(train: list[Glyph], heldout: list[Glyph]) -> None:
    assert len(HELD_OUT) == len(LETTERS) * len(COLORS) // 10
    assert not {(one.letter, one.color) for one in train} & HELD_OUT
    assert {(one.letter, one.color) for one in heldout} == HELD_OUT
    assert {one.letter for one in train} == set(string.ascii_uppercase)
    assert all(len({one.color for one in train if one.letter == letter}) == len(COLORS) - 1 for letter in LETTERS)


def test_every_word_of_the_held_out_captions_is_trained(train: list[Glyph], heldout: list[Glyph]) -> None:
    trained = set().union(*(words(one.text) for one in train))
    assert set().union(*(words(one.text) for one in heldout)) <= trained


def test_captions_state_what_is_there(train: list[Glyph]) -> None:
    for one in train:
        text = one.text
        assert f"letter {one.letter}" in text
        assert words(text) & set(COLORS) == {one.color}
        assert ("bold" in words(text)) == one.bold
        assert bool(words(text) & set(ITALIC_WORDS)) == one.italic
        assert words(text) & set(FAMILIES) <= {one.family}
        assert {size for size, names in SIZE_WORDS.items() if words(text) & set(names)} == {one.size} - {"medium"}
        assert {tilt for tilt, names in TILT_WORDS.items() if any(n in text for n in names)} == {one.tilt} - {"upright"}
        places = {place for place, names in BACKGROUND_WORDS.items() if any(name in text for name in names)}
        assert places <= {one.background}
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |,,", text), text


def test_glyphs_depend_on_index_seed_and_split_alone() -> None:
    assert glyphs.glyph(5, 1)[0] == glyphs.glyph(5, 1)[0]
    assert len({glyphs.glyph(*place)[0] for place in ((5, 1), (6, 1), (5, 2), (5, 1, "heldout"))}) == 4
    (one, image), (_, again) = glyphs.picture(3, 7), glyphs.picture(3, 7)
    assert image.tobytes() == again.tobytes()
    assert (image.size, image.mode) == ((64, 64), "RGB")
    small, picture = glyphs.picture(3, 7, size=32)
    assert (small, picture.size) == (one, (32, 32))


@pytest.mark.parametrize("background", BACKGROUND_WORDS)
def test_the_letter_shows_in_its_colour(background: str) -> None:
    """Of all colours that a letter may have, its own is the nearest to the pixels inside the letter."""
    for color in COLORS:
        drawn, rng = glyphs.glyph(0, 0)
        drawn = replace(drawn, color=color, background=background, letter="H", size="big", tilt="upright", bold=True)
        pixels = np.asarray(glyphs.draw_glyph(drawn, rng, 64), dtype=float)
        middle = np.median(pixels[29:36, 24:40].reshape(-1, 3), 0)  # the bar of the H, which is half way down
        assert min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - middle).sum()) == color


def test_the_letter_has_a_pale_rim() -> None:
    drawn, rng = glyphs.glyph(0, 0)
    drawn = replace(drawn, color="black", background="wood")
    pixels = np.asarray(glyphs.draw_glyph(drawn, rng, 64), dtype=int)
    body, rim = (np.asarray(mask).mean() / 255 for mask in glyphs._masks(drawn, 4, 256))
    assert (pixels.max(2) < 110).mean() == pytest.approx(body, rel=0.15)
    assert (pixels.min(2) > 200).mean() == pytest.approx(rim - body, rel=0.35)


def test_bold_big_and_italic_letters_are_so() -> None:
    plain = Glyph("", "H", "red", "sans", False, False, "medium", "upright", "paper")

    def body(**changes: object) -> np.ndarray:
        return np.asarray(glyphs._masks(replace(plain, **changes), 4, 256)[0]) > 127

    def slope(ink: np.ndarray) -> float:
        """How far the letter's left edge moves to the left from top to bottom, in pixels."""
        rows = np.flatnonzero(ink.any(1))
        return float(ink[rows[2]].argmax()) - float(ink[rows[-3]].argmax())

    assert body(bold=True).sum() > 1.3 * body().sum()
    assert body(size="big").sum() > 1.3 * body().sum() > 1.6 * body(size="small").sum()
    assert slope(body()) == 0
    assert slope(body(italic=True)) > 15
    assert all((body(family=family) != body()).any() for family in ("serif", "typewriter"))


@pytest.mark.parametrize("letter", LETTERS)
def test_no_letter_leaves_the_picture(letter: str) -> None:
    margin = 2.5 + 0.5  # units that it may still be moved, and rounding
    for family in FAMILIES:
        for italic in (False, True):
            drawn = Glyph("", letter, "red", family, True, italic, "big", "left", "paper")
            rim = glyphs._masks(drawn, 1, 64)[1]
            for turn in (-26, 26):
                x0, y0, x1, y1 = rim.rotate(turn).getbbox()
                assert min(x0, y0, 64 - x1, 64 - y1) >= margin - 1.5, (family, italic, turn)


def test_an_imagefolder(tmp_path: Path) -> None:
    glyphs.write_folder(tmp_path / "few", count=3, seed=4, split="heldout", size=32)
    lines = [json.loads(line) for line in (tmp_path / "few" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["000000.png", "000001.png", "000002.png"]
    for i, line in enumerate(lines):
        drawn, image = glyphs.picture(i, 4, "heldout", 32)
        with Image.open(tmp_path / "few" / line.pop("file_name")) as written:
            assert written.tobytes() == image.tobytes()
        assert Glyph(**line) == drawn


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="choose train or heldout"):
        glyphs.glyph(0, 0, "test")


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--count", "1", "--size", "8"]])
def test_bad_arguments(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["glyphs.py", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as left:
        glyphs.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: count is ")
    assert not (tmp_path / "out").exists()
