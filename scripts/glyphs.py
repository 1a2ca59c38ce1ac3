"""A second captioned world, unlike the picturebook: letters in many fonts, like stickers on papers and walls.

    python scripts/glyphs.py OUT --count 2000 --seed 0 [--size 64] [--split train|heldout]

writes an imagefolder: `OUT/000000.png`, ... and `OUT/metadata.jsonl`, one line a picture with `file_name`, `text` and
what the caption is made of: `letter`, `color`, `family`, `bold`, `italic`, `size`, `tilt` and `background`. It stands
for a folder of your own in the tests and in the README: the default model has seen neither such pictures nor their
words. The fonts are those that ship with matplotlib.

A tenth of the (letter, colour) pairs never occurs in the split `train`, and every picture of `heldout` has one of them.
"""

import json
import random
import string
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import world_command
from picturebook_drawing import Rgb, mix
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from sheet import font

WORLD = "glyphs-1"  # part of every seed
SUPERSAMPLING = 4
UNITS = 64  # width and height of every picture, whatever its size in pixels
LETTERS = string.ascii_uppercase
COLORS: dict[str, Rgb] = {
    "red": (214, 46, 46),
    "orange": (240, 124, 22),
    "gold": (236, 184, 32),
    "green": (62, 158, 78),
    "teal": (20, 146, 146),
    "blue": (44, 100, 214),
    "violet": (134, 74, 198),
    "pink": (240, 116, 168),
    "brown": (128, 82, 48),
    "black": (44, 42, 50),
}
FAMILIES = {"sans": "DejaVuSans", "serif": "DejaVuSerif", "typewriter": "DejaVuSansMono"}
SIZES = {"small": 22.0, "medium": 30.0, "big": 38.0}  # height of a capital in units
TILTS = {"left": 22.0, "upright": 0.0, "right": -22.0}  # degrees, counter-clockwise
WHITE: Rgb = (252, 250, 244)

ITALIC_WORDS = ("italic", "slanted")
SIZE_WORDS = {"small": ("small", "little"), "big": ("big", "large")}
TILT_WORDS = {"left": ("leaning to the left", "tilted left"), "right": ("leaning to the right", "tilted right")}
BACKGROUND_WORDS = {
    "paper": ("on a paper background", "on paper"),
    "grid": ("on graph paper", "on squared paper"),
    "chalkboard": ("on a chalkboard", "on a blackboard"),
    "wood": ("on wooden planks", "on wood"),
    "sky": ("in a cloudy sky", "among the clouds"),
    "stripes": ("on a striped background", "on stripes"),
    "dots": ("on a dotted background", "on polka dots"),
    "bricks": ("on a brick wall", "on bricks"),
}
# One colour of each letter, so that each letter is trained in nine colours.
HELD_OUT = frozenset((letter, list(COLORS)[(3 * i + 4) % len(COLORS)]) for i, letter in enumerate(LETTERS))


@dataclass(frozen=True)
class Glyph:
    """What a picture shows, and the caption that says so."""

    text: str
    letter: str
    color: str
    family: str
    bold: bool
    italic: bool
    size: str
    tilt: str
    background: str


def _caption(rng: random.Random, glyph: Glyph) -> str:
    """States letter, colour, weight, slant, size and tilt as they are; family and background often."""
    looks = [rng.choice(SIZE_WORDS[glyph.size])] if glyph.size in SIZE_WORDS else []
    looks += ["bold"] * glyph.bold + [rng.choice(ITALIC_WORDS)] * glyph.italic
    looks += [glyph.family] if rng.random() < 0.5 else []
    looks.append(glyph.color)
    tilt = rng.choice(TILT_WORDS[glyph.tilt]) if glyph.tilt in TILT_WORDS else ""
    where = rng.choice(BACKGROUND_WORDS[glyph.background]) if rng.random() < 0.8 else ""
    if rng.random() < 0.6:
        article = "an" if looks[0][0] in "aeiou" else "a"
        return " ".join(filter(None, [article, *looks, "letter", glyph.letter, tilt, where]))
    return ", ".join(filter(None, [f"the letter {glyph.letter} in {' '.join(looks)}", tilt, where]))


def glyph(index: int, seed: int, split: str = "train") -> tuple[Glyph, random.Random]:
    """Glyph `index` of a seed's world, and the generator that its painting goes on with.

    Raises ValueError for another split than train and heldout.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}: choose train or heldout")
    rng = random.Random(f"{WORLD}/{split}/{seed}/{index}")
    pairs = [(one, color) for one in LETTERS for color in COLORS if ((one, color) in HELD_OUT) == (split == "heldout")]
    letter, color = rng.choice(pairs)
    drawn = Glyph(
        text="",
        letter=letter,
        color=color,
        family=rng.choice(list(FAMILIES)),
        bold=rng.random() < 0.5,
        italic=rng.random() < 0.3,
        size=rng.choice(list(SIZES)),
        tilt=rng.choices(list(TILTS), (1, 2, 1))[0],
        background=rng.choice(list(BACKGROUNDS)),
    )
    return Glyph(**{**asdict(drawn), "text": _caption(rng, drawn)}), rng


def _font_name(glyph: Glyph) -> str:
    slant = "Italic" if glyph.family == "serif" else "Oblique"  # as the files are called
    style = "Bold" * glyph.bold + slant * glyph.italic
    return FAMILIES[glyph.family] + (f"-{style}" if style else "")


def _paper(rng: random.Random, side: int) -> Image.Image:
    cells = side // 8
    grain = Image.frombytes("L", (cells, cells), rng.randbytes(cells**2)).resize((side, side), Image.Resampling.BICUBIC)
    return Image.composite(_plain(side, (250, 243, 226)), _plain(side, (240, 230, 208)), grain)


def _plain(side: int, color: Rgb) -> Image.Image:
    return Image.new("RGB", (side, side), color)


def _grid(rng: random.Random, side: int) -> Image.Image:
    image, step = _plain(side, (247, 249, 252)), side // 10
    draw, first = ImageDraw.Draw(image), rng.randrange(step)
    for place in range(first, side, step):
        draw.line([(place, 0), (place, side)], (168, 200, 228), width=side // 64)
        draw.line([(0, place), (side, place)], (168, 200, 228), width=side // 64)
    return image


def _chalkboard(rng: random.Random, side: int) -> Image.Image:
    image = _plain(side, (48, 74, 66))
    dust = Image.new("L", (side, side))
    draw = ImageDraw.Draw(dust)
    for _ in range(5):
        y, slope = rng.uniform(0, side), rng.uniform(-0.4, 0.4) * side
        draw.line([(-9, y), (side + 9, y + slope)], rng.randrange(20, 50), width=side // 6)
    image.paste(_plain(side, (226, 232, 226)), mask=dust.filter(ImageFilter.GaussianBlur(side / 16)))
    return image


def _wood(rng: random.Random, side: int) -> Image.Image:
    image = _plain(side, (190, 142, 92))
    draw, plank = ImageDraw.Draw(image), side // 4
    for top in range(0, side, plank):
        shade = mix((206, 158, 106), (176, 126, 78), rng.random())
        draw.rectangle([0, top, side, top + plank - side // 48], shade)
        for _ in range(3):
            y = top + rng.uniform(0.15, 0.8) * plank
            draw.line([(0, y), (side, y + rng.uniform(-4, 4))], mix(shade, (140, 96, 56), 0.4), width=side // 96)
        draw.line([(0, top + plank - 1), (side, top + plank - 1)], (120, 80, 46), width=side // 48)
    return image


def _sky(rng: random.Random, side: int) -> Image.Image:
    image = Image.composite(_plain(side, (206, 232, 250)), _plain(side, (104, 174, 232)), _downwards(side))
    clouds = Image.new("L", (side, side))
    draw = ImageDraw.Draw(clouds)
    for _ in range(4):
        x, y, width = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.12, 0.2) * side
        for shift, radius in ((-0.8, 0.5), (0, 0.75), (0.8, 0.55)):
            r, center = radius * width, x + shift * width
            draw.ellipse([center - r, y - r, center + r, y + 0.6 * r], 235)
    image.paste(_plain(side, (255, 255, 255)), mask=clouds.filter(ImageFilter.GaussianBlur(side / 80)))
    return image


def _stripes(rng: random.Random, side: int) -> Image.Image:
    image = _plain(side, (252, 238, 226))
    draw, step = ImageDraw.Draw(image), side // 6
    for place in range(-side - rng.randrange(step), side, step):
        draw.line([(place, -4), (place + side + 8, side + 4)], (246, 214, 200), width=step // 3)
    return image


def _dots(rng: random.Random, side: int) -> Image.Image:
    image, step = _plain(side, (226, 240, 232)), side // 6
    draw, first = ImageDraw.Draw(image), rng.randrange(step)
    for row, y in enumerate(range(first - step, side + step, step)):
        for x in range(-step + row % 2 * step // 2, side + step, step):
            r = step / 5
            draw.ellipse([x - r, y - r, x + r, y + r], (176, 212, 194))
    return image


def _bricks(rng: random.Random, side: int) -> Image.Image:
    image = _plain(side, (222, 208, 196))
    draw, height, width = ImageDraw.Draw(image), side // 8, side // 4
    for row, y in enumerate(range(0, side, height)):
        for x in range(-width // 2 * (row % 2), side, width):
            shade = mix((190, 104, 84), (164, 80, 66), rng.random())
            draw.rectangle([x, y, x + width - side // 40, y + height - side // 40], shade)
    return image


def _downwards(side: int) -> Image.Image:
    """0 at the top, 255 at the bottom."""
    return Image.linear_gradient("L").resize((side, side))


BACKGROUNDS: dict[str, Callable[[random.Random, int], Image.Image]] = {
    "paper": _paper,
    "grid": _grid,
    "chalkboard": _chalkboard,
    "wood": _wood,
    "sky": _sky,
    "stripes": _stripes,
    "dots": _dots,
    "bricks": _bricks,
}


def _masks(drawn: Glyph, unit: float, side: int) -> tuple[Image.Image, Image.Image]:
    """The letter and the letter with its rim, upright in the middle: L [side, side] each."""
    name, middle = _font_name(drawn), (side / 2, side / 2)
    left, top, right, bottom = font(name, 200).getbbox(drawn.letter, anchor="ls")
    largest = max(bottom - top, (right - left) / 1.15)  # wide letters are made smaller, or W would not fit
    letters = font(name, 200 * SIZES[drawn.size] * unit / largest)
    left, top, right, bottom = letters.getbbox(drawn.letter, anchor="ls")
    place = (middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2)
    masks = []
    for stroke in (0, round(2.2 * unit)):
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).text(place, drawn.letter, 255, letters, anchor="ls", stroke_width=stroke)
        masks.append(mask)
    return masks[0], masks[1]


def draw_glyph(drawn: Glyph, rng: random.Random, size: int) -> Image.Image:
    """Its RGB picture of `size` pixels: a sticker with a pale rim and a soft shadow."""
    side = SUPERSAMPLING * size
    unit = side / UNITS
    image = BACKGROUNDS[drawn.background](rng, side)
    turn = TILTS[drawn.tilt] + rng.uniform(-4, 4)
    across, down = (round(rng.uniform(-2.5, 2.5) * unit) for _ in range(2))
    body, rim = (
        ImageChops.offset(mask.rotate(turn, Image.Resampling.BICUBIC), across, down)
        for mask in _masks(drawn, unit, side)
    )
    shadow = ImageChops.offset(rim, round(unit), round(1.6 * unit)).filter(ImageFilter.GaussianBlur(1.2 * unit))
    image.paste(_plain(side, (30, 24, 30)), mask=shadow.point(lambda v: v * 0.4))
    image.paste(_plain(side, WHITE), mask=rim)
    color = COLORS[drawn.color]
    shades = _plain(side, mix(color, (0, 0, 0), 0.14)), _plain(side, mix(color, (255, 255, 255), 0.16))
    image.paste(Image.composite(*shades, _downwards(side)), mask=body)
    return image.resize((size, size), Image.Resampling.BOX)


def picture(index: int, seed: int, split: str = "train", size: int = 64) -> tuple[Glyph, Image.Image]:
    """Glyph `index` of a seed's world and its RGB picture of `size` pixels."""
    drawn, rng = glyph(index, seed, split)
    return drawn, draw_glyph(drawn, rng, size)


def write_folder(folder: Path, count: int, seed: int, split: str, size: int) -> None:
    """Write an imagefolder of `count` pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for i in range(count):
            drawn, image = picture(i, seed, split, size)
            image.save(folder / f"{i:06}.png", compress_level=1)
            lines.write(json.dumps({"file_name": f"{i:06}.png", **asdict(drawn)}) + "\n")


def main() -> None:
    world_command.run(__doc__ or "", write_folder)


if __name__ == "__main__":
    main()
