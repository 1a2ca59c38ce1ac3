"""Sample sheets: many pictures on one."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.pictures import to_pil

SMALL = 128  # pixels: narrower pictures are enlarged on a sheet


def to_images(images: Tensor) -> list[Image.Image]:
    """images [B,3,H,W] in [-1,1] -> RGB pictures, clamped and rounded to 8 bits."""
    return to_pil((images.float() / 2 + 0.5).clamp(0, 1))


def write_sheet(file: Path, images: Sequence[Image.Image], columns: int) -> None:
    """Write pictures of one size, row by row, as one PNG; those narrower than `SMALL` twice or more as large."""
    scale = -(-SMALL // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, image in enumerate(images):
        place = ((i % columns) * (width + 2), (i // columns) * (height + 2))
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), place)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """One of the fonts that ship with matplotlib, such as `DejaVuSans`; `size` in pixels.

    Its letters are set by Pillow itself, so that they lie the same on every machine.
    """
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def captioned(images: Sequence[Image.Image], captions: Sequence[str], columns: int, side: int) -> Image.Image:
    """Pictures row by row, each as large as fits a square of `side` pixels, with up to four lines of caption."""
    letters, gap, line = font("DejaVuSans", 11), 8, 14
    across = int(12 * side / letters.getlength("etaoin shrdlu"))  # of 13: some captions have wider letters
    texts = [textwrap.wrap(caption, max(8, across), max_lines=4, placeholder=" …") for caption in captions]
    rows, height = -(-len(images) // columns), side + gap + line * max(map(len, texts))
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * height
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + size[1] + 2), "\n".join(text), "#3a3340", letters, spacing=line - 11)
    return sheet
