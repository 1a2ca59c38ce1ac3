"""The picturebook's score: the share of pictures that show all that their caption states, as the judge reads them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from judge import Reading, load_judge, score
from picturebook import COUNT_WORDS, PLURALS, UNITS, Scene
from torch import Tensor

from evaluation.metrics import mean

Scores = list[dict[str, bool]]
AT_ONCE = 100


@dataclass(frozen=True)
class Readings:
    """What the judge read in some pictures, and which of the stated attributes are so."""

    texts: list[Reading]
    scores: Scores


def read_all(scenes: Sequence[Scene], images: Tensor) -> Readings:
    """Reads pictures [N,3,H,W] in [-1,1] of scenes, or what shall pass for them."""
    judge = load_judge()
    readings = [reading for some in images.split(AT_ONCE) for reading in judge.read(some)]
    return Readings(readings, _judged(scenes, readings))


def _judged(scenes: Sequence[Scene], readings: Sequence[Reading]) -> Scores:
    return [score(scene.metadata("", UNITS), reading) for scene, reading in zip(scenes, readings, strict=True)]


def accuracy(scores: Scores) -> dict[str, Any]:
    """Share of pictures with every stated attribute right; also per attribute, and per number of attributes."""
    right = [all(each.values()) for each in scores]
    attributes: dict[str, list[bool]] = defaultdict(list)
    numbers: dict[int, list[bool]] = defaultdict(list)
    for each, whole in zip(scores, right, strict=True):
        numbers[len(each)].append(whole)
        for name, value in each.items():
            attributes[name.rstrip(" 12")].append(value)
    whole_accuracy, by_attribute = mean(right), {name: mean(values) for name, values in sorted(attributes.items())}
    return {
        "accuracy": round(whole_accuracy.value, 4),
        "interval": [round(whole_accuracy.low, 4), round(whole_accuracy.high, 4)],
        "per attribute": {name: round(each.value, 4) for name, each in by_attribute.items()},
        "per attribute intervals": {
            name: [round(each.low, 4), round(each.high, 4)] for name, each in by_attribute.items()
        },
        "per number of attributes": {n: [round(float(np.mean(v)), 4), len(v)] for n, v in sorted(numbers.items())},
    }


def controls(scenes: Sequence[Scene], real: Readings, decoded: Readings) -> dict[str, float]:
    """The judge's own test, before its word on a model counts: accuracy where it should be 1, and where 0.

    `real` and `decoded` are its readings of the scenes' pictures and of their reconstructions, the model's ceiling.
    """
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(len(scenes), 3, UNITS, UNITS, generator=rng).clamp(-1, 1)
    found = {
        "real pictures": real.scores,
        "reconstructions": decoded.scores,
        "another picture's caption": _judged(scenes, [*real.texts[1:], *real.texts[:1]]),
        "noise": read_all(scenes, noise).scores,
    }
    return {name: accuracy(scores)["accuracy"] for name, scores in found.items()}


def in_words(reading: Reading) -> str:
    """What the judge saw, such as "night: two small red fish, one big blue boat"."""
    seen: dict[tuple[str, str, str], int] = defaultdict(int)
    for thing in reading.things:
        seen[thing.size, thing.color, thing.kind] += 1
    things = [
        f"{COUNT_WORDS.get(n, n) if n > 1 else 'one'} {size} {color} {PLURALS.get(kind, kind + 's') if n > 1 else kind}"
        for (size, color, kind), n in seen.items()
    ]
    return f"{reading.background}: {', '.join(things) or 'nothing'}"
