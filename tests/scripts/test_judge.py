"""The judge: its protocol by hand, and that the frozen weights still read real pictures."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import judge
import numpy as np
import picturebook
import pytest
import torch
from judge import Detection, Judge, Reading, load_judge, score
from torch import Tensor

FROZEN = "126c8b46e01c7d289e7458c463776588c0d0c9327738a350402426568754a9fe"  # judge.safetensors
COUNT, SEED = 100, 31_337

STATED: dict[str, Any] = {
    "background": "beach",
    "background_stated": True,
    "relation": "left of",
    "things": [
        {"kind": "house", "color": "red", "size": "small", "count": 2},
        {"kind": "tree", "color": "green", "size": "medium", "count": 1},
    ],
}
RIGHT = (
    Detection("house", "red", "small", 3, 4),
    Detection("house", "red", "small", 5, 12),
    Detection("tree", "green", "big", 10, 8),  # a medium size is not stated, so it does not count
)
FIRST, SECOND = {"kind 1", "count 1", "color 1", "size 1"}, {"kind 2", "count 2", "color 2"}
ALL = {*FIRST, *SECOND, "relation", "background", "nothing else"}


def wrong(stated: dict[str, Any], *things: Detection, background: str = "beach") -> set[str]:
    return {name for name, right in score(stated, Reading(background, things)).items() if not right}


def test_weights_are_frozen() -> None:
    assert hashlib.sha256(judge.WEIGHTS.read_bytes()).hexdigest() == FROZEN
    assert judge.WEIGHTS.stat().st_size < 4_000_000


def test_all_right() -> None:
    assert score(STATED, Reading("beach", RIGHT)) == dict.fromkeys(ALL, True)
    assert wrong(STATED, *RIGHT[::-1]) == set()


@pytest.mark.parametrize(
    ("index", "seen", "faults"),
    [
        (2, Detection("fish", "green", "big", 10, 8), {"kind 2", "count 2", "color 2", "relation", "nothing else"}),
        (1, Detection("house", "blue", "small", 5, 12), {"color 1"}),
        (1, Detection("house", "red", "big", 5, 12), {"size 1"}),
        (2, Detection("tree", "red", "big", 10, 8), {"color 2"}),
        (1, Detection("house", "red", "small", 11, 12), {"relation"}),
        (1, Detection("house", "red", "small", 10, 12), {"relation"}),
        (1, Detection("tree", "green", "medium", 11, 12), {"count 1", "count 2"}),
    ],
)
def test_each_attribute_wrong_in_turn(index: int, seen: Detection, faults: set[str]) -> None:
    things = list(RIGHT)
    things[index] = seen
    assert wrong(STATED, *things) == faults


def test_background_and_what_is_too_many_or_missing() -> None:
    assert wrong(STATED, *RIGHT, background="snow") == {"background"}
    assert wrong({**STATED, "background_stated": False}, *RIGHT, background="snow") == set()
    assert wrong(STATED, *RIGHT, Detection("sun", "yellow", "small", 1, 1)) == {"nothing else"}
    assert wrong(STATED, *RIGHT, Detection("tree", "green", "big", 12, 1)) == {"count 2"}
    assert wrong(STATED, RIGHT[0], RIGHT[2]) == {"count 1"}
    assert wrong(STATED) == ALL - {"background", "nothing else"}


@pytest.mark.parametrize(
    ("relation", "x", "y"), [("left of", -3, 0), ("right of", 3, 0), ("above", 0, -3), ("below", 0, 3)]
)
def test_relations(relation: str, x: int, y: int) -> None:
    stated = copy.deepcopy(STATED)
    stated["relation"] = relation
    stated["things"][0]["count"] = 1
    tree = Detection("tree", "green", "big", 8, 8)
    assert wrong(stated, Detection("house", "red", "small", 8 + x, 8 + y), tree) == set()
    assert wrong(stated, Detection("house", "red", "small", 8 - x, 8 - y), tree) == {"relation"}
    assert wrong(stated, Detection("house", "red", "small", 8 + y, 8 + x), tree) == {"relation"}


def test_one_thing_has_no_relation() -> None:
    stated = {**STATED, "relation": None, "things": STATED["things"][1:]}
    assert score(stated, Reading("beach", RIGHT[2:])).keys() == FIRST - {"size 1"} | {"background", "nothing else"}


@pytest.fixture(scope="module")
def frozen() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def real() -> tuple[list[dict[str, Any]], Tensor]:
    """Lines of metadata.jsonl, and the pictures [N,3,64,64] in [-1,1]."""
    drawn = [picturebook.picture(i, SEED, "heldout") for i in range(COUNT)]
    pixels = np.stack([np.asarray(image) for _, image in drawn])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return [scene.metadata("", 64) for scene, _ in drawn], images


@pytest.fixture(scope="module")
def readings(frozen: Judge, real: tuple[list[dict[str, Any]], Tensor]) -> list[Reading]:
    return frozen.read(real[1])


def test_reads_real_held_out_pictures(real: tuple[list[dict[str, Any]], Tensor], readings: list[Reading]) -> None:
    right = [all(score(line, reading).values()) for line, reading in zip(real[0], readings, strict=True)]
    assert sum(right) >= 98


def test_refuses_other_captions(real: tuple[list[dict[str, Any]], Tensor], readings: list[Reading]) -> None:
    others = readings[1:] + readings[:1]
    right = [all(score(line, reading).values()) for line, reading in zip(real[0], others, strict=True)]
    assert sum(right) < 2


def test_sees_nothing_right_in_noise(frozen: Judge, real: tuple[list[dict[str, Any]], Tensor]) -> None:
    noise = torch.randn(20, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert not any(all(score(*pair).values()) for pair in zip(real[0], frozen.read(noise), strict=False))


def test_reads_larger_pictures(frozen: Judge) -> None:
    right = []
    for i in range(4):
        scene, image = picturebook.picture(i, SEED, "heldout", size=128)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        right.append(all(score(scene.metadata("", 128), frozen.read(pixels)[0]).values()))
    assert sum(right) >= 3


def test_features(frozen: Judge, real: tuple[list[dict[str, Any]], Tensor]) -> None:
    with torch.no_grad():
        assert frozen.features(real[1][:2]).shape == (2, 112, 16, 16)


def test_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "WEIGHTS", tmp_path / "judge.safetensors")
    with pytest.raises(FileNotFoundError, match=r"train_judge\.py"):
        load_judge()
