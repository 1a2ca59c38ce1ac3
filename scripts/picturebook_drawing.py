"""How the picturebook world looks: paper cut-outs on painted backgrounds, drawn with Pillow.

Everything is drawn `SUPERSAMPLING` times too large and reduced once, so edges are smooth. Lengths are in *units*:
a picture is 64 units wide whatever its size in pixels.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFilter

Rgb = tuple[int, int, int]
Point = tuple[float, float]

UNITS = 64  # width and height of every picture
SUPERSAMPLING = 4
COLORS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 207, 34),
    "green": (56, 160, 72),
    "blue": (38, 99, 214),
    "purple": (128, 62, 190),
    "pink": (250, 140, 190),
    "brown": (122, 74, 40),
    "white": (244, 244, 240),
    "black": (38, 38, 44),
}
CREAM: Rgb = (255, 248, 228)
INK: Rgb = (52, 44, 60)


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """`share` of b in a."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Pen:
    """Draws in a thing's own square: (0, 0) is its top left and (1, 1) its bottom right corner."""

    draw: ImageDraw.ImageDraw
    offset: float  # pixels from the layer's corner to the square's corner
    side: float  # pixels
    main: Rgb

    @property
    def dark(self) -> Rgb:
        return mix(self.main, INK, 0.4) if sum(self.main) > 160 else mix(self.main, (0, 0, 0), 0.6)

    @property
    def light(self) -> Rgb:
        return mix(self.main, (255, 255, 255), 0.4) if sum(self.main) < 690 else mix(self.main, (150, 170, 200), 0.25)

    def _at(self, x: float, y: float) -> Point:
        return (self.offset + x * self.side, self.offset + y * self.side)

    def polygon(self, points: list[Point], fill: Rgb) -> None:
        self.draw.polygon([self._at(*point) for point in points], fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Rgb) -> None:
        self.draw.ellipse([self._at(x - rx, y - ry), self._at(x + rx, y + ry)], fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: Rgb) -> None:
        self.ellipse(x, y, radius, radius, fill)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb) -> None:
        self.draw.rectangle([self._at(x0, y0), self._at(x1, y1)], fill=fill)

    def line(self, points: list[Point], width: float, fill: Rgb) -> None:
        self.draw.line([self._at(*p) for p in points], fill=fill, width=max(1, round(width * self.side)), joint="curve")

    def pie(self, x: float, y: float, rx: float, ry: float, start: float, end: float, fill: Rgb) -> None:
        self.draw.pieslice([self._at(x - rx, y - ry), self._at(x + rx, y + ry)], start, end, fill=fill)


def _around(x: float, y: float, radii: tuple[float, ...], count: int, turn: float = -90) -> list[Point]:
    """`count` points on circles of alternating radii: stars, rays."""
    angles = [math.radians(turn + 360 * i / count) for i in range(count)]
    rays = [radii[i % len(radii)] for i in range(count)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, rays, strict=True)]


def _house(pen: Pen) -> None:
    pen.rectangle(0.66, 0.06, 0.78, 0.34, pen.dark)
    pen.rectangle(0.12, 0.42, 0.88, 1.0, pen.main)
    pen.polygon([(0.0, 0.46), (0.5, 0.0), (1.0, 0.46)], pen.dark)
    pen.rectangle(0.24, 0.58, 0.46, 0.76, CREAM)
    pen.rectangle(0.58, 0.62, 0.76, 1.0, pen.dark)


def _tree(pen: Pen) -> None:
    pen.polygon([(0.42, 0.6), (0.58, 0.6), (0.63, 1.0), (0.37, 1.0)], (94, 58, 36))
    pen.disc(0.3, 0.47, 0.26, pen.main)
    pen.disc(0.7, 0.47, 0.26, pen.main)
    pen.disc(0.5, 0.28, 0.28, pen.main)
    pen.disc(0.5, 0.5, 0.24, pen.main)
    pen.disc(0.42, 0.24, 0.1, pen.light)


def _sun(pen: Pen) -> None:
    pen.polygon(_around(0.5, 0.5, (0.5, 0.33), 24), pen.dark)
    pen.disc(0.5, 0.5, 0.34, pen.main)
    pen.disc(0.38, 0.45, 0.05, INK if sum(pen.main) > 160 else CREAM)
    pen.disc(0.62, 0.45, 0.05, INK if sum(pen.main) > 160 else CREAM)
    pen.pie(0.5, 0.55, 0.14, 0.12, 0, 180, pen.dark if sum(pen.main) > 160 else CREAM)


def _moon(pen: Pen) -> None:
    outer = _around(0.5, 0.5, (0.5,), 48)
    crescent = [p for p in outer if (p[0] - 0.76) ** 2 + (p[1] - 0.4) ** 2 > 0.42**2]
    start = next(i for i in range(len(crescent)) if math.dist(crescent[i - 1], crescent[i]) > 0.2)
    crescent = crescent[start:] + crescent[:start]
    bite = [p for p in _around(0.76, 0.4, (0.42,), 48) if math.dist(p, (0.5, 0.5)) < 0.5]
    bite.sort(key=lambda p: math.atan2(p[1] - 0.4, 0.76 - p[0]), reverse=True)
    pen.polygon(crescent + bite[::-1], pen.main)
    pen.disc(0.2, 0.42, 0.06, pen.dark)
    pen.disc(0.3, 0.72, 0.08, pen.dark)


def _star(pen: Pen) -> None:
    pen.polygon(_around(0.5, 0.53, (0.53, 0.24), 10), pen.main)
    pen.polygon(_around(0.5, 0.53, (0.26, 0.12), 10), pen.light)


def _heart(pen: Pen) -> None:
    pen.disc(0.27, 0.3, 0.27, pen.main)
    pen.disc(0.73, 0.3, 0.27, pen.main)
    pen.polygon([(0.03, 0.42), (0.5, 0.2), (0.97, 0.42), (0.5, 0.96)], pen.main)
    pen.disc(0.24, 0.25, 0.1, pen.light)


def _cloud(pen: Pen) -> None:
    for x, y, radius in ((0.2, 0.6, 0.2), (0.42, 0.42, 0.26), (0.68, 0.5, 0.22), (0.84, 0.63, 0.16)):
        pen.disc(x, y, radius, pen.main)
    pen.rectangle(0.2, 0.6, 0.84, 0.79, pen.main)
    pen.disc(0.38, 0.36, 0.1, pen.light)


def _flower(pen: Pen) -> None:
    pen.rectangle(0.46, 0.5, 0.54, 1.0, (48, 122, 60))
    pen.ellipse(0.68, 0.86, 0.17, 0.08, (48, 122, 60))
    for x, y in _around(0.5, 0.34, (0.21,), 6):
        pen.disc(x, y, 0.15, pen.main)
    pen.disc(0.5, 0.34, 0.13, pen.dark)


def _mushroom(pen: Pen) -> None:
    pen.polygon([(0.36, 0.45), (0.64, 0.45), (0.7, 1.0), (0.3, 1.0)], CREAM)
    pen.pie(0.5, 0.54, 0.5, 0.5, 180, 360, pen.main)
    for x, y, radius in ((0.27, 0.36, 0.08), (0.52, 0.2, 0.09), (0.75, 0.38, 0.07)):
        pen.disc(x, y, radius, CREAM if sum(pen.main) < 690 else pen.dark)


def _fish(pen: Pen) -> None:
    pen.polygon([(0.62, 0.5), (1.0, 0.2), (0.92, 0.5), (1.0, 0.8)], pen.dark)
    pen.polygon([(0.3, 0.3), (0.62, 0.12), (0.6, 0.4)], pen.dark)
    pen.ellipse(0.38, 0.5, 0.38, 0.27, pen.main)
    pen.pie(0.45, 0.52, 0.16, 0.14, 20, 160, pen.light)
    pen.disc(0.19, 0.43, 0.08, CREAM)
    pen.disc(0.18, 0.43, 0.045, INK)


def _boat(pen: Pen) -> None:
    pen.rectangle(0.47, 0.0, 0.53, 0.7, (94, 58, 36))
    pen.polygon([(0.58, 0.04), (0.58, 0.58), (0.95, 0.58)], pen.light)
    pen.polygon([(0.42, 0.16), (0.42, 0.58), (0.12, 0.58)], CREAM)
    pen.polygon([(0.0, 0.66), (1.0, 0.66), (0.82, 1.0), (0.18, 1.0)], pen.main)


def _car(pen: Pen) -> None:
    pen.polygon([(0.2, 0.48), (0.32, 0.2), (0.68, 0.2), (0.82, 0.48)], pen.main)
    pen.polygon([(0.29, 0.46), (0.36, 0.28), (0.49, 0.28), (0.49, 0.46)], (190, 226, 244))
    pen.polygon([(0.54, 0.46), (0.54, 0.28), (0.64, 0.28), (0.72, 0.46)], (190, 226, 244))
    pen.rectangle(0.0, 0.46, 1.0, 0.72, pen.main)
    for x in (0.25, 0.75):
        pen.disc(x, 0.72, 0.14, INK)
        pen.disc(x, 0.72, 0.06, CREAM)


def _balloon(pen: Pen) -> None:
    pen.polygon([(0.3, 0.56), (0.7, 0.56), (0.6, 0.82), (0.4, 0.82)], pen.dark)
    pen.disc(0.5, 0.36, 0.36, pen.main)
    pen.polygon([(0.18, 0.52), (0.82, 0.52), (0.62, 0.74), (0.38, 0.74)], pen.main)
    pen.ellipse(0.5, 0.38, 0.13, 0.36, pen.light)
    pen.rectangle(0.39, 0.82, 0.61, 1.0, (150, 98, 52))


def _umbrella(pen: Pen) -> None:
    pen.line([(0.5, 0.3), (0.5, 0.86), (0.56, 0.95), (0.66, 0.95), (0.71, 0.84)], 0.075, (94, 58, 36))
    pen.pie(0.5, 0.54, 0.5, 0.5, 180, 360, pen.main)
    pen.pie(0.5, 0.54, 0.2, 0.5, 180, 360, pen.light)
    pen.polygon([(0.47, 0.08), (0.53, 0.08), (0.5, 0.0)], pen.dark)


def _butterfly(pen: Pen) -> None:
    for side in (-1, 1):
        pen.ellipse(0.5 + 0.27 * side, 0.34, 0.23, 0.27, pen.main)
        pen.ellipse(0.5 + 0.21 * side, 0.71, 0.18, 0.2, pen.main)
        pen.disc(0.5 + 0.28 * side, 0.33, 0.1, pen.light)
        pen.line([(0.5, 0.25), (0.5 + 0.14 * side, 0.03)], 0.05, INK)
    pen.ellipse(0.5, 0.52, 0.065, 0.36, INK)


def _cat(pen: Pen) -> None:
    for side in (-1, 1):
        pen.polygon([(0.5 + 0.44 * side, 0.0), (0.5 + 0.46 * side, 0.5), (0.5 + 0.06 * side, 0.26)], pen.main)
        pen.polygon([(0.5 + 0.38 * side, 0.12), (0.5 + 0.38 * side, 0.34), (0.5 + 0.2 * side, 0.26)], pen.light)
    pen.ellipse(0.5, 0.58, 0.48, 0.38, pen.main)
    for side in (-1, 1):
        pen.ellipse(0.5 + 0.2 * side, 0.52, 0.1, 0.11, CREAM)
        pen.ellipse(0.5 + 0.2 * side, 0.53, 0.045, 0.09, INK)
    pen.polygon([(0.43, 0.68), (0.57, 0.68), (0.5, 0.76)], pen.dark if sum(pen.main) > 160 else CREAM)


THINGS: dict[str, Callable[[Pen], None]] = {
    "house": _house,
    "tree": _tree,
    "sun": _sun,
    "moon": _moon,
    "star": _star,
    "heart": _heart,
    "cloud": _cloud,
    "flower": _flower,
    "mushroom": _mushroom,
    "fish": _fish,
    "boat": _boat,
    "car": _car,
    "balloon": _balloon,
    "umbrella": _umbrella,
    "butterfly": _butterfly,
    "cat": _cat,
}

Gradient = tuple[Rgb, Rgb]
# Sky from top to horizon, far ridge, near ground. Muted, so that every cut-out stands out.
BACKGROUNDS: dict[str, tuple[Gradient, Rgb, Rgb]] = {
    "meadow": (((150, 206, 238), (218, 240, 246)), (170, 208, 150), (136, 190, 118)),
    "beach": (((134, 208, 230), (206, 238, 240)), (84, 170, 196), (240, 216, 164)),
    "snow": (((176, 196, 220), (222, 230, 240)), (206, 218, 234), (236, 240, 246)),
    "desert": (((250, 216, 160), (252, 236, 200)), (226, 170, 112), (236, 190, 128)),
    "mountains": (((178, 206, 226), (230, 238, 240)), (132, 146, 172), (158, 178, 160)),
    "night": (((44, 50, 104), (86, 92, 150)), (58, 62, 112), (50, 78, 92)),
    "sunset": (((222, 112, 128), (252, 190, 130)), (150, 92, 140), (112, 74, 122)),
    "ocean": (((96, 190, 206), (30, 110, 160)), (28, 98, 144), (206, 190, 150)),
}


def _ridge(rng: random.Random, base: float, height: float, step: float, sharp: bool) -> list[Point]:
    """A skyline in units, from the left to the right edge and closed below: rolling hills, or peaks."""
    phase, wave = rng.uniform(0, 2 * math.pi), rng.uniform(0.8, 1.3)
    if sharp:
        xs = [x + rng.uniform(-3, 3) for x in range(-10, UNITS + 12, round(step))]
        ys = [base - (height * rng.uniform(0.7, 1.2) if i % 2 else 0) for i in range(len(xs))]
        line = list(zip(xs, ys, strict=True))
    else:
        line = [(float(x), base - height * math.sin(phase + wave * x / step)) for x in range(-1, UNITS + 3, 2)]
    return [*line, (UNITS + 4.0, UNITS + 4.0), (-4.0, UNITS + 4.0)]


def _vertical_gradient(size: int, top: Rgb, bottom: Rgb) -> Image.Image:
    column = Image.new("RGB", (1, UNITS))
    column.putdata([mix(top, bottom, y / (UNITS - 1)) for y in range(UNITS)])
    return column.resize((size, size), Image.Resampling.BILINEAR)


def _paint_background(name: str, rng: random.Random, side: int) -> Image.Image:
    (top, horizon), far, near = BACKGROUNDS[name]
    scale = side / UNITS
    image = _vertical_gradient(side, top, horizon)
    draw = ImageDraw.Draw(image)

    def fill(outline: list[Point], color: Rgb) -> None:
        draw.polygon([(x * scale, y * scale) for x, y in outline], fill=color)

    if name == "night":
        for _ in range(14):
            x, y = rng.uniform(0, UNITS) * scale, rng.uniform(0, 40) * scale
            draw.ellipse([x, y, x + 0.7 * scale, y + 0.7 * scale], fill=(196, 198, 224))
    if name == "mountains":
        fill(_ridge(rng, 50, 18, 11, sharp=True), far)
    elif name == "beach":
        fill(_ridge(rng, rng.uniform(38, 41), 0, 8, sharp=False), far)
    else:
        fill(_ridge(rng, rng.uniform(44, 49), rng.uniform(1.5, 3.5), 11, sharp=False), far)
    fill(_ridge(rng, rng.uniform(53, 57), rng.uniform(1, 2.2), 9, sharp=False), near)
    return image


def _paste_thing(image: Image.Image, kind: str, color: str, x: float, y: float, side: float, scale: float) -> None:
    """Draw one cut-out: shadow, cream rim, thing. (x, y) is its square's top left corner, in units."""
    margin = 3
    pixels = round((side + 2 * margin) * scale)
    layer = Image.new("RGBA", (pixels, pixels), (0, 0, 0, 0))
    THINGS[kind](Pen(ImageDraw.Draw(layer), margin * scale, side * scale, COLORS[color]))
    alpha = layer.getchannel("A")
    rim = alpha.filter(ImageFilter.MaxFilter(2 * round(0.75 * scale) + 1))
    corner = (round((x - margin) * scale), round((y - margin) * scale))
    shift = round(0.8 * scale)
    shadow = ImageChops.multiply(rim, Image.new("L", rim.size, 70))
    image.paste((30, 24, 50), (corner[0] + shift, corner[1] + shift), shadow)
    image.paste(CREAM, corner, rim)
    image.paste(layer, corner, alpha)


def draw_picture(
    background: str, things: list[tuple[str, str, float, float, float]], rng: random.Random, size: int
) -> Image.Image:
    """Draw a scene as an RGB picture of `size` pixels; things are (kind, color, x, y, side) in units."""
    side = size * SUPERSAMPLING
    image = _paint_background(background, rng, side)
    for kind, color, x, y, thing_side in things:
        _paste_thing(image, kind, color, x, y, thing_side, side / UNITS)
    return image.reduce(SUPERSAMPLING)
