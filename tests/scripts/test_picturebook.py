"""The picturebook's promises: deterministic, captions that are true, and what is held out stays out."""

import json
import re
import sys
from pathlib import Path

import picturebook
import pytest
from picturebook import (
    BACKGROUND_WORDS,
    COUNT_WORDS,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    KINDS,
    OPENINGS,
    OPPOSITE,
    PLURALS,
    RELATION_WORDS,
    SIZE_WORDS,
    SIZES,
    Scene,
    picture,
    scene,
)
from picturebook_drawing import BACKGROUNDS, COLORS, UNITS
from PIL import Image

COUNT = 2000


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return [scene(i, 0)[0] for i in range(COUNT)]


@pytest.fixture(scope="module")
def heldout() -> list[Scene]:
    return [scene(i, 0, "heldout")[0] for i in range(300)]


def pairs(of: Scene) -> set[tuple[str, str]]:
    return {(group.color, group.kind) for group in of.things}


def triples(of: Scene) -> set[tuple[str, str, str]]:
    """As the caption says it, and the other way round."""
    if of.relation is None:
        return set()
    first, second = (group.kind for group in of.things)
    return {(first, of.relation, second), (second, OPPOSITE[of.relation], first)}


def words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text))


def test_a_tenth_is_held_out() -> None:
    assert len(HELD_OUT_PAIRS) == len(KINDS) * len(COLORS) // 10
    assert len(HELD_OUT_TRIPLES) / (len(KINDS) * (len(KINDS) - 1) * 4) == pytest.approx(0.1, abs=0.002)
    assert {(b, OPPOSITE[relation], a) for a, relation, b in HELD_OUT_TRIPLES} == HELD_OUT_TRIPLES
    assert all(color in COLORS and kind in KINDS for color, kind in HELD_OUT_PAIRS)
    assert len(KINDS) >= 16
    assert len(COLORS) == 10
    assert len(BACKGROUNDS) >= 6


def test_train_has_nothing_held_out(train: list[Scene]) -> None:
    assert not any(pairs(one) & HELD_OUT_PAIRS for one in train)
    assert not any(triples(one) & HELD_OUT_TRIPLES for one in train)


def test_heldout_always_has_something_held_out(heldout: list[Scene]) -> None:
    assert all(pairs(one) & HELD_OUT_PAIRS or triples(one) & HELD_OUT_TRIPLES for one in heldout)
    assert sum(one.relation is not None for one in heldout) > len(heldout) / 2


def test_each_kind_is_trained_in_seven_colours_or_more(train: list[Scene]) -> None:
    seen = set().union(*map(pairs, train))
    for kind in KINDS:
        assert len({color for color, other in seen if other == kind}) >= 7


def test_every_word_occurs_in_train(train: list[Scene], heldout: list[Scene]) -> None:
    trained = set().union(*(words(one.text) for one in train))
    assert set().union(*(words(one.text) for one in heldout)) <= trained
    phrases = [*KINDS, *COLORS, *COUNT_WORDS.values(), *OPENINGS, *(PLURALS.get(kind, f"{kind}s") for kind in KINDS)]
    for table in (SIZE_WORDS, RELATION_WORDS, BACKGROUND_WORDS):
        phrases += [phrase for choices in table.values() for phrase in choices]
    assert words(" ".join(phrases)) <= trained


def test_relations_are_true(train: list[Scene], heldout: list[Scene]) -> None:
    seen = set()
    for one in [*train, *heldout]:
        if one.relation is None:
            assert len(one.things) == 1
            continue
        first, second = (group.boxes for group in one.things)
        if one.relation in ("right of", "below"):
            first, second = second, first
        axis = 0 if one.relation in ("left of", "right of") else 1
        assert max(box[axis + 2] for box in first) <= min(box[axis] for box in second)
        seen.add(one.relation)
    assert seen == set(RELATION_WORDS)


def test_things_are_in_the_picture_and_apart(train: list[Scene]) -> None:
    for one in train:
        boxes = [box for group in one.things for box in group.boxes]
        assert all(0 <= x0 < x1 <= UNITS and 0 <= y0 < y1 <= UNITS for x0, y0, x1, y1 in boxes)
        for i, a in enumerate(boxes):
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
        for group in one.things:
            assert len(group.boxes) == group.count
            assert all(abs((b[2] - b[0]) / SIZES[group.size] - 1) < 0.05 for b in group.boxes)


def test_captions_state_what_is_there(train: list[Scene]) -> None:
    for one in train:
        text, start = one.text, 0
        for group in one.things:
            noun = group.kind if group.count == 1 else PLURALS.get(group.kind, f"{group.kind}s")
            size = f"(?:{'|'.join(SIZE_WORDS[group.size])}) " if group.size in SIZE_WORDS else ""
            count = COUNT_WORDS.get(group.count, "an?")
            found = re.compile(rf"\b{count} {size}{group.color} {noun}\b").search(text, start)
            assert found, text
            start = found.end()
        if one.relation is not None:
            assert any(f" {phrase} " in text for phrase in RELATION_WORDS[one.relation]), text
        stated = {name for name, phrases in BACKGROUND_WORDS.items() if any(phrase in text for phrase in phrases)}
        assert stated == ({one.background} if one.background_stated else set()), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", text), text


def test_scenes_depend_on_index_seed_and_split_alone() -> None:
    assert scene(5, 1)[0] == scene(5, 1)[0]
    assert len({scene(5, 1)[0], scene(6, 1)[0], scene(5, 2)[0], scene(5, 1, "heldout")[0], scene(5, 1, "all")[0]}) == 5


def test_pictures_are_deterministic_at_every_size() -> None:
    (scene64, image64), (_, again) = picture(3, 7), picture(3, 7)
    assert image64.tobytes() == again.tobytes()
    assert (image64.size, image64.mode) == ((64, 64), "RGB")
    scene32, image32 = picture(3, 7, size=32)
    assert scene32 == scene64
    assert image32.size == (32, 32)
    assert picture(4, 7)[1].tobytes() != image64.tobytes()


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="choose train, heldout or all"):
        scene(0, 0, "test")


def test_no_room_for_things_that_are_too_many() -> None:
    with pytest.raises(ValueError, match="no room"):
        picturebook._draw_layout(scene(0, 0)[1], None, [30], ["big"])


def test_an_imagefolder(tmp_path: Path) -> None:
    picturebook.write_folder(tmp_path / "few", count=3, seed=4, split="heldout", size=32)
    lines = [json.loads(line) for line in (tmp_path / "few" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["000000.png", "000001.png", "000002.png"]
    for i, line in enumerate(lines):
        drawn, image = picture(i, 4, "heldout", 32)  # no other picture has a part in it, nor their number
        with Image.open(tmp_path / "few" / line["file_name"]) as written:
            assert written.tobytes() == image.tobytes()
        assert line.keys() == {"file_name", "text", "background", "background_stated", "relation", "things"}
        assert (line["text"], line["background"], line["relation"]) == (drawn.text, drawn.background, drawn.relation)
        assert line["background"] in BACKGROUNDS
        assert line["relation"] in {None, *RELATION_WORDS}
        for thing, group in zip(line["things"], drawn.things, strict=True):
            assert thing.keys() == {"kind", "color", "size", "count", "boxes"}
            assert len(thing["boxes"]) == thing["count"] == group.count
            assert thing["boxes"][0] == pytest.approx([v / 2 for v in group.boxes[0]], abs=0.01)


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--count", "1", "--size", "8"]])
def test_bad_arguments(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["picturebook.py", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as left:
        picturebook.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: count is ")
    assert not (tmp_path / "out").exists()
