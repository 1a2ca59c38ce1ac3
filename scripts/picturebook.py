"""The picturebook: an endless, deterministic world of captioned illustrations to train on and to be judged by.

    python scripts/picturebook.py OUT --count 1000 --seed 0 [--size 64] [--split train|heldout]

writes an imagefolder: `OUT/000000.png`, ... and `OUT/metadata.jsonl`, one line a picture with `file_name`, `text`,
`background`, `background_stated`, `relation` and `things: [{kind, color, size, count, boxes}]`. Boxes are
[x0, y0, x1, y1] in pixels. A caption states each thing's kind, colour and count, its size unless that is "medium",
the relation of two things, and the background if `background_stated`.

A tenth of the (colour, kind) pairs and a tenth of the (kind, relation, kind) triples never occur in the split `train`;
every scene of `heldout` has at least one of them and is otherwise drawn from the same law.
"""

import json
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import world_command
from picturebook_drawing import BACKGROUNDS, COLORS, THINGS, UNITS, draw_picture
from PIL import Image

WORLD = "picturebook-1"  # part of every seed: scores of different worlds are not comparable
KINDS = tuple(THINGS)
SIZES = {"small": 15.0, "medium": 20.0, "big": 27.0}  # side of a thing's box in units
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GAP = 2.0  # least distance between things, and to the picture's edge, in units

PLURALS = {"fish": "fish", "butterfly": "butterflies"}
COUNT_WORDS = {2: "two", 3: "three"}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
BACKGROUND_WORDS = {
    "meadow": ("in a meadow", "on a meadow"),
    "beach": ("on a beach", "at the beach"),
    "snow": ("in the snow", "in a snowy field"),
    "desert": ("in the desert", "on the sand dunes"),
    "mountains": ("in the mountains", "before the mountains"),
    "night": ("at night", "on a starry night"),
    "sunset": ("at sunset", "in the evening"),
    "ocean": ("in the ocean", "deep in the ocean"),
}
OPENINGS = ("", "", "a picture of ", "an illustration of ", "a drawing of ")

# One colour of each kind, so that each kind is trained in nine colours and each colour on fourteen kinds or more.
HELD_OUT_PAIRS = frozenset((list(COLORS)[(3 * i + 4) % len(COLORS)], kind) for i, kind in enumerate(KINDS))


def _held_out_triples() -> frozenset[tuple[str, str, str]]:
    """A tenth of all triples. "A left of B" and "B right of A" are one picture, so they are held out together."""
    triples = [(a, rel, b) for a in KINDS for rel in ("left of", "above") for b in KINDS if a != b]
    chosen = random.Random(WORLD).sample(triples, len(triples) // 10)
    return frozenset(chosen) | frozenset((b, OPPOSITE[rel], a) for a, rel, b in chosen)


HELD_OUT_TRIPLES = _held_out_triples()


@dataclass(frozen=True)
class Things:
    """`count` equal things; `boxes` in units."""

    kind: str
    color: str
    size: str
    count: int
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Scene:
    text: str
    background: str
    background_stated: bool
    relation: str | None
    things: tuple[Things, ...]

    @property
    def held_out(self) -> bool:
        if any((group.color, group.kind) in HELD_OUT_PAIRS for group in self.things):
            return True
        return (
            self.relation is not None and (self.things[0].kind, self.relation, self.things[1].kind) in HELD_OUT_TRIPLES
        )

    def metadata(self, file_name: str, size: int) -> dict[str, object]:
        things = [
            {
                "kind": group.kind,
                "color": group.color,
                "size": group.size,
                "count": group.count,
                "boxes": [[round(v * size / UNITS, 2) for v in box] for box in group.boxes],
            }
            for group in self.things
        ]
        return {
            "file_name": file_name,
            "text": self.text,
            "background": self.background,
            "background_stated": self.background_stated,
            "relation": self.relation,
            "things": things,
        }


def _place(
    rng: random.Random, count: int, side: float, region: tuple[float, float, float, float]
) -> list[list[float]] | None:
    """`count` boxes inside the region that keep their distance, or None if chance found no room."""
    x0, y0, x1, y1 = region
    boxes: list[list[float]] = []
    for _ in range(count):
        own = side * rng.uniform(0.96, 1.04)
        if x1 - x0 < own or y1 - y0 < own:
            return None
        for _ in range(30):
            x, y = rng.uniform(x0, x1 - own), rng.uniform(y0, y1 - own)
            if all(x + own + GAP < b[0] or b[2] + GAP < x or y + own + GAP < b[1] or b[3] + GAP < y for b in boxes):
                boxes.append([x, y, x + own, y + own])
                break
        else:
            return None
    return boxes


def _regions(rng: random.Random, relation: str) -> list[tuple[float, float, float, float]]:
    """Two parts of the picture, first thing first, so that placing the things there makes the relation true."""
    low, high = GAP, UNITS - GAP
    cut = rng.uniform(0.3, 0.7) * UNITS
    if relation in ("left of", "right of"):
        parts = [(low, low, cut - GAP / 2, high), (cut + GAP / 2, low, high, high)]
    else:
        parts = [(low, low, high, cut - GAP / 2), (low, cut + GAP / 2, high, high)]
    return parts if relation in ("left of", "above") else parts[::-1]


def _aligned(relation: str, groups: list[list[list[float]]]) -> bool:
    """Whether two things are more beside (or above) each other than diagonal, so that one relation is natural."""
    centers = [[sum(box[i] + box[i + 2] for box in boxes) / (2 * len(boxes)) for i in (0, 1)] for boxes in groups]
    apart = [abs(a - b) for a, b in zip(*centers, strict=True)]
    return apart[0] > apart[1] if relation in ("left of", "right of") else apart[1] > apart[0]


def _draw_layout(
    rng: random.Random, relation: str | None, counts: list[int], sizes: list[str]
) -> list[list[list[float]]]:
    """Boxes of each group of things. Raises ValueError if no room is found."""
    for _ in range(200):
        regions = [(GAP, GAP, UNITS - GAP, UNITS - GAP)] if relation is None else _regions(rng, relation)
        groups = [_place(rng, n, SIZES[size], r) for n, size, r in zip(counts, sizes, regions, strict=True)]
        found = [boxes for boxes in groups if boxes is not None]
        if len(found) == len(counts) and (relation is None or _aligned(relation, found)):
            return found
    raise ValueError(f"no room for {counts} things of sizes {sizes}")


def _choose_size(rng: random.Random, count: int, alone: bool) -> str:
    sizes = ["small", "medium", "big"]
    largest = {1: 3, 2: 3 if alone else 2, 3: 2 if alone else 1}[count]
    return rng.choice(sizes[:largest])


def _noun_phrase(rng: random.Random, group: Things) -> str:
    words = [group.color, group.kind if group.count == 1 else PLURALS.get(group.kind, group.kind + "s")]
    if group.size in SIZE_WORDS:
        words.insert(0, rng.choice(SIZE_WORDS[group.size]))
    if group.count > 1:
        return " ".join([COUNT_WORDS[group.count], *words])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _caption(
    rng: random.Random, background: str, stated: bool, relation: str | None, things: tuple[Things, ...]
) -> str:
    text = _noun_phrase(rng, things[0])
    if relation is not None:
        text += f" {rng.choice(RELATION_WORDS[relation])} {_noun_phrase(rng, things[1])}"
    text = rng.choice(OPENINGS) + text
    if not stated:
        return text
    where = rng.choice(BACKGROUND_WORDS[background])
    return f"{text} {where}" if rng.random() < 0.7 else f"{where}, {text}"


def _draw_scene(rng: random.Random) -> Scene:
    """One scene from the world's law, whatever its split."""
    relation = rng.choice(RELATIONS) if rng.random() < 0.6 else None
    number = 1 if relation is None else 2
    kinds = rng.sample(KINDS, number)
    colors = [rng.choice(list(COLORS)) for _ in kinds]
    counts = [rng.choices((1, 2, 3), (6, 3, 2))[0] for _ in kinds]
    sizes = [_choose_size(rng, count, alone=relation is None) for count in counts]
    layout = _draw_layout(rng, relation, counts, sizes)
    boxes = [tuple((b[0], b[1], b[2], b[3]) for b in group) for group in layout]
    things = tuple(Things(*group) for group in zip(kinds, colors, sizes, counts, boxes, strict=True))
    background = rng.choice(list(BACKGROUNDS))
    stated = rng.random() < 0.7
    return Scene(_caption(rng, background, stated, relation, things), background, stated, relation, things)


def scene(index: int, seed: int, split: str = "train") -> tuple[Scene, random.Random]:
    """Scene `index` of a seed's world, and the generator that its painting goes on with.

    `split` is "train", "heldout" or "all" (the law itself, for the judge). Raises ValueError for another name.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split is {split!r}: choose train, heldout or all")
    rng = random.Random(f"{WORLD}/{split}/{seed}/{index}")
    while True:
        drawn = _draw_scene(rng)
        if split == "all" or drawn.held_out == (split == "heldout"):
            return drawn, rng


def picture(index: int, seed: int, split: str = "train", size: int = 64) -> tuple[Scene, Image.Image]:
    """Scene `index` of a seed's world and its RGB picture of `size` pixels."""
    drawn, rng = scene(index, seed, split)
    things = [(g.kind, g.color, box[0], box[1], box[2] - box[0]) for g in drawn.things for box in g.boxes]
    return drawn, draw_picture(drawn.background, things, rng, size)


def pictures(count: int, seed: int, split: str, size: int) -> Iterator[tuple[Scene, Image.Image]]:
    """The first `count` pictures in order, drawn by all cores."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        yield from pool.imap(partial(picture, seed=seed, split=split, size=size), range(count), chunksize=32)


def write_folder(folder: Path, count: int, seed: int, split: str, size: int) -> None:
    """Write an imagefolder of `count` pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for i, (drawn, image) in enumerate(pictures(count, seed, split, size)):
            image.save(folder / f"{i:06}.png", compress_level=1)
            lines.write(json.dumps(drawn.metadata(f"{i:06}.png", size)) + "\n")


def main() -> None:
    world_command.run(__doc__ or "", write_folder)


if __name__ == "__main__":
    main()
