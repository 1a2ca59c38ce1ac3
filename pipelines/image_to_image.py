"""A picture to start from: read, fitted, encoded and noised; under a mask, painted over in part."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm.pictures import as_rgb, as_tensor
from pipelines.errors import notice

ImageSource = str | os.PathLike[str] | Image.Image
"""The name of a picture file, or a picture."""

STRENGTH = 0.8  # as in diffusers
STRENGTH_UNDER_MASK = 1.0


@dataclass(frozen=True)
class InitImage:
    """What the caller brought: a picture and, to paint over a part of it only, a mask, both RGB and upright.

    The mask is white where to paint. `strength`, from 0 to 1, is the part of the steps that is made.
    """

    picture: Image.Image
    mask: Image.Image | None
    strength: float

    def size(self, height: int | None, width: int | None, multiple: int) -> tuple[int, int]:
        """(height, width) for what is left open: the picture's own, scaled to the one that is given, in multiples."""
        scale = Fraction(1)  # exact, for what is given may be too large for a float and is only refused later
        if height is not None:
            scale = Fraction(height, self.picture.height)
        elif width is not None:
            scale = Fraction(width, self.picture.width)
        rounded = [max(multiple, round(side * scale / multiple) * multiple) for side in self.picture.size]
        return rounded[1], rounded[0]

    def tell_if_fitted(self, height: int, width: int) -> None:
        """Gives a notice if pictures of this size, which nobody asked for, are not of the picture's own."""
        if self.picture.size != (width, height):
            notice(f"the image is {self.picture.width}x{self.picture.height}; it is fitted to {width}x{height}")

    def tensors(self, height: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Each resized to cover this size and cut to its middle: the picture [1,3,H,W] in [-1,1], and the mask
        [1,1,H,W], 1 where it is brighter than half, else 0.
        """

        def fitted(picture: Image.Image) -> Image.Image:
            return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)

        image = as_tensor(fitted(self.picture))[None]
        if self.mask is None:
            return image, None
        return image, torch.from_numpy(np.asarray(fitted(self.mask).convert("L")) >= 128).float()[None, None]


def open_init(image: ImageSource | None, mask: ImageSource | None, strength: float | None) -> InitImage | None:
    """The picture to start from, if there is one; strength None is 0.8, or 1 under a mask.

    Raises:
        ValueError: one line that says which picture is missing, or is none, and why.
    """
    if image is None:
        if mask is not None:
            raise ValueError("there is a mask, but no image that it belongs to; give both")
        if strength is not None:
            raise ValueError(f"strength is {strength}, but there is no image to start from; give one")
        return None
    if strength is None:
        strength = STRENGTH if mask is None else STRENGTH_UNDER_MASK
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; give a number from 0 to 1")
    return InitImage(open_picture(image, "image"), None if mask is None else open_picture(mask, "mask"), strength)


def open_picture(source: ImageSource, name: str) -> Image.Image:
    """The picture in RGB of 8 bits: upright, transparency on white, the first of an animation's.

    Raises:
        ValueError: one line that names the file and what is wrong with it; a picture that is given as such, by `name`.
    """
    if not isinstance(source, str | os.PathLike | Image.Image):
        raise ValueError(f"the {name} is {type(source).__name__}; give a file's name or a PIL picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and sizes that are not yet worth an error
            if isinstance(source, Image.Image):
                return as_rgb(source)
            with Image.open(source) as picture:
                return as_rgb(picture)
    except Exception as error:  # Pillow's readers raise nearly anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        which = f"the {name}" if isinstance(source, Image.Image) else f"{name} {os.fspath(source)}"
        raise ValueError(f"{which} is no readable picture: {reason}; give a PNG or JPEG file") from None


@dataclass(frozen=True)
class Known:
    """What `ldm.guidance.keep_known` keeps: latents [N,C,h,w] and their noise, and the mask [1,1,h,w], 1 to paint."""

    latents: Tensor
    noise: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Start:
    """What sampling starts from.

    x: [N,C,h,w], as noisy as the first time.
    known: what to keep, for a network that knows nothing of masks.
    extra: [N,1+C,h,w], mask and masked image, for one that is told them with each x.
    """

    x: Tensor
    known: Known | None = None
    extra: Tensor | None = None


def start_from(
    init: InitImage,
    height: int,
    width: int,
    *,
    encode: Callable[[Tensor], Tensor],
    draw_noise: Callable[[], Tensor],
    add_noise: Callable[[Tensor, Tensor], Tensor],
    network_inpaints: bool,
) -> Start:
    """Makes what diffusers' image-to-image and inpainting pipelines start from, drawing in the same order.

    Without a mask, x is the noised picture whatever the strength (Meng et al. 2021, arXiv 2108.01073, algorithm 1);
    with one, it is pure noise at strength 1.

    Args:
        height, width: pixels.
        encode: image [1,3,H,W] -> latents [N,C,h,w], drawn from its posterior for each picture that is to be made.
        draw_noise: unit noise [N,C,h,w].
        add_noise: (latents, noise) -> x at the first time.
        network_inpaints: whether mask and masked image are the network's input (Rombach et al. 2022, section 4.5).
    """
    image, mask = init.tensors(height, width)
    pure = mask is not None and init.strength == 1
    latents = None if pure and network_inpaints else encode(image)
    noise = draw_noise()
    x = noise if pure or latents is None else add_noise(latents, noise)
    if mask is None:
        return Start(x)
    small_mask = F.interpolate(mask, x.shape[2:], mode="nearest").to(x)
    if not bool(small_mask.any()):
        notice("the mask is black wherever it counts: nothing is painted")
    if latents is None or network_inpaints:
        masked = encode(image * (1 - mask))
        return Start(x, extra=torch.cat([small_mask.expand(len(x), -1, -1, -1), masked], dim=1))
    draw_noise()  # diffusers draws the masked image's posterior here, though this kind of network never sees it
    return Start(x, known=Known(latents, noise, small_mask))
