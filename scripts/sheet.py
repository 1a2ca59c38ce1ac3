"""Sample sheets: many pictures on one."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ldm.pictures import to_pil


def to_images(images: Tensor) -> list[Image.Image]:
    """images [B,3,H,W] in [-1,1] -> RGB pictures, clamped and rounded to 8 bits."""
    return to_pil((images.float() / 2 + 0.5).clamp(0, 1))


def write_sheet(file: Path, images: Sequence[Image.Image], columns: int, scale: int = 2) -> None:
    """Write pictures of one size, row by row, enlarged `scale` times, as one PNG."""
    width, height = images[0].width * scale, images[0].height * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, image in enumerate(images):
        place = ((i % columns) * (width + 2), (i // columns) * (height + 2))
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), place)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
