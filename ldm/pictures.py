"""Pictures as plain RGB, whatever their files hold, and as tensors."""

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

Turn = Image.Transpose
TURNS: dict[object, Turn] = {
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}
"""What makes a picture upright, by EXIF's orientation. `ImageOps.exif_transpose` would also write the rest of EXIF
anew, which it cannot where a tag has another type than it should."""


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB of 8 bits: EXIF rotation applied, transparency on white.

    Raises:
        ValueError: pixels without a known range (32-bit integers, floats), or of colours that Pillow cannot convert.
        Exception: whatever Pillow's reader of this kind of file raises if the data are broken or cut off.
    """
    image.load()
    if (turn := TURNS.get(image.getexif().get(ExifTags.Base.Orientation))) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow's own conversion saturates
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, whose range is unknown: save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [3,H,W] in [-1,1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [N,3,H,W] in [0, 1] as 8-bit RGB pictures, rounded to the nearest."""
    pixels = (images * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(picture.numpy()) for picture in pixels]
