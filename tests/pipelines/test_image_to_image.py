"""Image to image and inpainting, against diffusers' pipelines; and what becomes of any picture file."""

import io
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from ldm.samplers import StepInfo
from ldm.unet import UNet
from pipelines import TextToImagePipeline, image_to_image, text_to_image
from pipelines.image_to_image import InitImage, open_init, open_picture

PROMPTS = ["a red house", "two fish"]
RED, WHITE = (255, 0, 0), (255, 255, 255)


def drawing(width: int = 64, height: int = 64) -> Image.Image:
    """Smooth colours with an edge, so that encoding and resizing leave something of it."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (255 * x / width, 255 * y / height, 255 * (x + y > (width + height) / 2))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def box_mask(width: int = 64, height: int = 64) -> Image.Image:
    """White in the middle, with a soft edge."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(100, (width // 8, height // 8, width - width // 4, height))
    mask.paste(255, (width // 4, height // 4, width - width // 4, height))
    return mask


def latents_of(pipe: TextToImagePipeline, prompt: Any = PROMPTS[0], **options: Any) -> torch.Tensor:
    latents = pipe(prompt, output_type="latent", **{"num_inference_steps": 4, **options}).images
    assert isinstance(latents, torch.Tensor)
    return latents


Pair = tuple[TextToImagePipeline, DiffusionPipeline]


@pytest.fixture(scope="module")
def pairs(model_folder: Path, pipe: TextToImagePipeline) -> dict[str, Pair]:
    """Ours and diffusers' of the same weights: image to image, inpainting with 4 channels and with 9."""
    scheduler = pipe.model.scheduler.model_copy(update={"timestep_spacing": "trailing"})
    ours = TextToImagePipeline(replace(pipe.model, scheduler=scheduler), "cpu", "float32")
    img2img = StableDiffusionImg2ImgPipeline.from_pretrained(model_folder, local_files_only=True)
    img2img.scheduler = DDIMScheduler.from_config(img2img.scheduler.config, timestep_spacing="trailing")
    parts = dict(img2img.components)
    torch.manual_seed(1)
    wide = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 9})
    unet = UNet.from_diffusers_config(dict(wide.config))
    unet.load_state_dict(wide.state_dict(), strict=True)
    checker = {"requires_safety_checker": False}
    pairs = {
        "image": (ours, img2img),
        "mask": (ours, StableDiffusionInpaintPipeline(**parts, **checker)),
        "native": (
            TextToImagePipeline(replace(ours.model, unet=unet), "cpu", "float32"),
            StableDiffusionInpaintPipeline(**{**parts, "unet": wide}, **checker),
        ),
    }
    for _, stock in pairs.values():
        stock.set_progress_bar_config(disable=True)
    return pairs


@pytest.fixture
def painter(pairs: dict[str, Pair]) -> TextToImagePipeline:
    """Told masks and masked images by nine channels."""
    return pairs["native"][0]


def render_both(
    pair: Pair, image: Image.Image, mask: Image.Image | None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of two pictures: ours, and diffusers' of the same seeds. It draws for each only if it is given as many
    images.
    """
    ours, stock = pair
    shared: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", **options}
    if mask is not None:
        shared |= {"height": 64, "width": 64}
    masks = {} if mask is None else {"mask_image": [mask] * 2}
    generators = [torch.Generator().manual_seed(5 + index) for index in range(2)]
    theirs = stock(PROMPTS, image=[image] * 2, generator=generators, **masks, **shared).images
    rendered = ours(PROMPTS, image=image, mask_image=mask, seed=5, **shared)
    assert rendered.seeds == [5, 6]
    assert isinstance(rendered.images, torch.Tensor)
    return rendered.images, theirs


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    ("kind", "strength"),
    [("image", 0.6), ("image", 1.0), ("mask", 0.6), ("mask", 1.0), ("native", 0.6), ("native", 1.0)],
)
def test_diffusers_paints_the_same(pairs: dict[str, Pair], kind: str, strength: float, guidance: float) -> None:
    mask = None if kind == "image" else box_mask(128, 128)
    image = drawing() if kind == "image" else drawing(128, 128)
    ours, theirs = render_both(pairs[kind], image, mask, strength=strength, guidance_scale=guidance)
    assert (ours - theirs).abs().max() < 3e-4
    assert (ours[0] - ours[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["image", "mask", "native"])
def test_diffusers_draws_the_same_noise_in_each_step(pairs: dict[str, Pair], kind: str) -> None:
    mask = None if kind == "image" else box_mask()
    ours, theirs = render_both(pairs[kind], drawing(), mask, strength=0.6, guidance_scale=1.0, eta=1.0)
    assert (ours - theirs).abs().max() < 3e-4


@pytest.mark.parametrize("kind", ["image", "mask", "native"])
def test_diffusers_decodes_the_same_pixels(pairs: dict[str, Pair], kind: str) -> None:
    ours, stock = pairs[kind]
    masks = {} if kind == "image" else {"mask_image": box_mask()}
    options: dict[str, Any] = {"image": drawing(), "strength": 0.6, "num_inference_steps": 5, **masks}
    theirs = stock(PROMPTS[0], generator=torch.Generator().manual_seed(7), output_type="np", **options).images
    pictures = ours(PROMPTS[0], generator=torch.Generator().manual_seed(7), **options).images
    difference = np.abs(np.asarray(pictures[0]).astype(int) - (theirs[0] * 255).round().astype(int))
    assert np.asarray(pictures[0]).std() > 5
    assert (difference <= 1).mean() >= 0.999


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_the_model_s_own_times_are_diffusers(
    pairs: dict[str, Pair], pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stock = pairs[kind][1]
    monkeypatch.setattr(
        stock, "scheduler", DDIMScheduler.from_config(stock.scheduler.config, timestep_spacing="leading")
    )
    mask = None if kind == "image" else box_mask()
    ours, theirs = render_both((pipe, stock), drawing(), mask, strength=0.4, guidance_scale=1.0)
    assert (ours - theirs).abs().max() < 3e-4


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun", "euler_ancestral"])
def test_what_is_known_stays(pipe: TextToImagePipeline, sampler: str) -> None:
    image, mask = drawing(), box_mask()
    latents = latents_of(pipe, image=image, mask_image=mask, sampler=sampler, seed=3)
    pixels, white = InitImage(image, mask, 1.0).tensors(64, 64)
    assert white is not None
    known = pipe.autoencoder.encode(pixels, torch.Generator().manual_seed(3))
    kept = (F.interpolate(white, (8, 8)) == 0).expand_as(latents)
    assert 0 < kept.float().mean() < 1
    assert torch.equal(latents[kept], known[kept])
    assert (latents - known)[~kept].abs().min() > 1e-3


def test_the_noised_image_is_where_sampling_starts(pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[torch.Tensor] = []

    def sample(denoise: object, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        starts.append(x)
        return x

    monkeypatch.setattr(text_to_image, "find_sampler", lambda name: sample)
    monkeypatch.setattr(text_to_image, "takes_eta", lambda _: False)
    image, noise = drawing(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pixels, _ = InitImage(image, None, 0.8).tensors(64, 64)
    known = pipe.autoencoder.encode(pixels, torch.Generator().manual_seed(0))
    for steps, strength, t in ((4, 0.5, 251), (4, 1.0, 751), (10, 0.35, 201)):
        latents_of(pipe, image=image, latents=noise, strength=strength, num_inference_steps=steps)
        expected = pipe.schedule.add_noise(known, noise, torch.tensor(t))
        assert (starts.pop() - expected).abs().max() < 1e-6
    latents_of(pipe, image=image, mask_image=box_mask(), latents=noise)
    assert torch.equal(starts.pop(), noise)


@pytest.mark.parametrize(("steps", "strength", "made"), [(5, 0.6, 3), (5, 0.59, 2), (5, 1, 5), (10, 0.1, 1)])
def test_strength_is_the_part_of_the_steps_that_is_made(
    pipe: TextToImagePipeline, steps: int, strength: float, made: int
) -> None:
    done: list[StepInfo] = []
    options: dict[str, Any] = {"strength": strength, "num_inference_steps": steps, "guidance_scale": 1.0}
    out = pipe(PROMPTS[0], image=drawing(), output_type="latent", on_step=done.append, **options)
    assert [step.index for step in done] == list(range(made))
    assert (out.request.strength, out.request.steps) == (strength, steps)


def test_strength_has_diffusers_defaults(pipe: TextToImagePipeline) -> None:
    shared: dict[str, Any] = {"output_type": "latent", "num_inference_steps": 2}
    assert pipe(PROMPTS[0], **shared).request.strength is None
    assert pipe(PROMPTS[0], image=drawing(), **shared).request.strength == 0.8
    assert pipe(PROMPTS[0], image=drawing(), mask_image=box_mask(), **shared).request.strength == 1.0


@pytest.mark.parametrize("kind", ["image", "mask", "native"])
def test_a_picture_does_not_depend_on_its_batch(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pipe, mask = pairs[kind][0], None if kind == "image" else box_mask()
    options: dict[str, Any] = {"image": drawing(), "mask_image": mask, "strength": 0.75, "eta": 0.5}
    monkeypatch.setattr(text_to_image, "BATCH", 2)
    together = latents_of(pipe, PROMPTS[0], num_images_per_prompt=3, seed=10, **options)
    for index in range(3):
        assert (together[index] - latents_of(pipe, seed=10 + index, **options)[0]).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")
def test_one_generator_draws_one_posterior_for_the_whole_batch(pairs: dict[str, Pair]) -> None:
    ours, stock = pairs["image"]
    shared: dict[str, Any] = {"image": drawing(), "strength": 0.6, "num_inference_steps": 5, "output_type": "latent"}
    theirs = stock(PROMPTS, generator=torch.Generator().manual_seed(2), **{**shared, "image": [drawing()]}).images
    assert (ours(PROMPTS, generator=torch.Generator().manual_seed(2), **shared).images - theirs).abs().max() < 3e-4


def test_images_masks_and_prompts_matter(painter: TextToImagePipeline) -> None:
    options: dict[str, Any] = {"image": drawing(), "mask_image": box_mask(), "strength": 0.75}
    first = latents_of(painter, **options)
    flipped = drawing().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in (
        {"image": flipped},
        {"mask_image": flipped},
        {"prompt": "a boat"},
        {"strength": 1.0},
        {"seed": 1},
    ):
        assert (latents_of(painter, **{**options, **change}) - first).abs().max() > 1e-3, change


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_networks_dtype_is_the_autoencoder_s_too(model_folder: Path, dtype: str) -> None:
    pipe = TextToImagePipeline.from_pretrained(model_folder, "cpu", dtype)
    latents = latents_of(pipe, image=drawing(), mask_image=box_mask(), num_inference_steps=1)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"strength": 0.5}, "strength is 0.5, but there is no image to start from; give one"),
        ({"mask_image": box_mask()}, "there is a mask, but no image that it belongs to; give both"),
        ({"image": drawing(), "strength": 1.5}, "strength is 1.5; give a number from 0 to 1"),
        ({"image": drawing(), "strength": float("nan")}, "strength is nan"),
        ({"image": drawing(), "strength": 0.2}, "strength 0.2 of 4 steps leaves none to make; give more of either"),
        ({"image": drawing(), "strength": 0.0}, "strength 0 of 4 steps leaves none"),
        ({"image": drawing(), "width": 100}, "width is 100, which is not a multiple of 8"),
        ({"image": drawing(), "height": -8}, "height is -8"),
        ({"image": drawing(8, 5000)}, "height is 5000; give a number from 8 to 4096"),
        ({"image": torch.zeros(3, 64, 64)}, "the image is Tensor; give a file's name or a PIL picture"),
        ({"image": drawing(), "mask_image": 1}, "the mask is int; give"),
        ({"image": Image.new("F", (64, 64))}, "the image is no readable picture: its pixels are of mode F"),
        ({"image": "none.png"}, "image none.png is no readable picture: No such file or directory; give a PNG or JPEG"),
        ({"image": drawing(), "mask_image": Path("none.png")}, "mask none.png is no readable picture: No such file"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str], options: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        latents_of(pipe, **options)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("images", [{}, {"image": drawing()}])
def test_an_inpainting_model_needs_image_and_mask(painter: TextToImagePipeline, images: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="this is an inpainting model; give an image and a mask"):
        latents_of(painter, **images)


def test_an_image_that_cannot_be_encoded_is_an_error(pipe: TextToImagePipeline) -> None:
    with torch.no_grad():
        bias = pipe.autoencoder.quant_conv.bias
        assert isinstance(bias, torch.Tensor)
        kept = bias.clone()
        bias.fill_(torch.nan)
        try:
            with pytest.raises(ValueError, match="the image's latents hold NaN or infinity"):
                latents_of(pipe, image=drawing())
        finally:
            bias.copy_(kept)


@pytest.mark.parametrize(
    ("image", "options", "expected", "told"),
    [
        ((64, 64), {}, (64, 64), ""),
        ((53, 75), {}, (56, 72), "notice: the image is 53x75; it is fitted to 56x72\n"),
        ((3, 2), {"width": 64, "height": 56}, (64, 56), ""),
        ((256, 192), {"width": 64}, (64, 48), ""),
        ((256, 192), {"height": 48}, (64, 48), ""),
    ],
)
def test_sizes(
    pipe: TextToImagePipeline,
    capsys: pytest.CaptureFixture[str],
    image: tuple[int, int],
    options: dict[str, int],
    expected: tuple[int, int],
    told: str,
) -> None:
    (picture,) = pipe(PROMPTS[0], image=drawing(*image), num_inference_steps=2, **options).images
    assert isinstance(picture, Image.Image)
    assert picture.size == expected
    assert capsys.readouterr().err == told


def test_the_middle_is_cut_out_and_the_mask_with_it() -> None:
    wide = Image.new("RGB", (128, 32), RED)
    wide.paste(WHITE, (44, 0, 84, 32))
    for mask in (wide, wide.resize((64, 16)), wide.crop((44, 0, 84, 32))):
        image, painted = InitImage(wide, mask.convert("RGB"), 1.0).tensors(64, 64)
        assert image.shape == (1, 3, 64, 64)
        assert image.min() == 1
        assert painted is not None
        assert torch.equal(painted, torch.ones(1, 1, 64, 64))


def test_a_mask_counts_from_half_bright_on() -> None:
    grey = Image.new("L", (4, 1))
    for x, value in enumerate((0, 127, 128, 255)):
        grey.putpixel((x, 0), value)
    init = open_init(drawing(4, 1), grey, None)
    assert init is not None
    _, mask = init.tensors(1, 4)
    assert mask is not None
    assert mask.flatten().tolist() == [0, 0, 1, 1]


def test_a_mask_s_transparency_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 4, 8))
    assert np.asarray(open_picture(clear, "mask"))[0, :, 0].tolist() == [255] * 4 + [0] * 4


def test_a_black_mask_is_worth_a_notice(pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    speck = Image.new("L", (64, 64), 0)
    speck.putpixel((1, 1), 255)  # between the pixels that the latents' mask is taken from
    latents_of(pipe, image=drawing(), mask_image=speck)
    assert capsys.readouterr().err == "notice: the mask is black wherever it counts: nothing is painted\n"


def saved(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    return saved(half_red().transpose(Image.Transpose.ROTATE_90), path, exif=exif)


def half_red(mode: str = "RGB") -> Image.Image:
    """Red on the left of white; 12x8."""
    picture = Image.new("RGB", (12, 8), WHITE)
    picture.paste(RED, (0, 0, 6, 8))
    return picture.convert(mode)


def half_clear(mode: str) -> Image.Image:
    """As `half_red`, but what is white there is clear here, over black."""
    picture = Image.new("RGBA", (12, 8), (0, 0, 0, 0))
    picture.paste((*RED, 255), (0, 0, 6, 8))
    return picture.convert(mode)


FILES: dict[str, Callable[[Path], Path]] = {
    "plain": lambda folder: saved(half_red(), folder / "x.png"),
    "exif": lambda folder: turned(folder / "x.jpg"),
    "exif in a PNG": lambda folder: turned(folder / "x.png"),
    "alpha": lambda folder: saved(half_clear("RGBA"), folder / "x.png"),
    "palette": lambda folder: saved(half_red("P"), folder / "x.png"),
    "palette with alpha": lambda folder: saved(half_clear("RGBA").quantize(4), folder / "x.png"),
    "palette with a clear colour": lambda folder: saved(
        half_red("RGB").quantize(2), folder / "x.gif", transparency=half_red("RGB").quantize(2).getpixel((11, 0))
    ),
    "cmyk": lambda folder: saved(half_red("CMYK"), folder / "x.jpg", quality=100),
    "ycbcr": lambda folder: saved(half_red("YCbCr"), folder / "x.tif"),
    "webp": lambda folder: saved(half_clear("RGBA"), folder / "x.webp", lossless=True),
    "animation": lambda folder: saved(
        half_red(), folder / "x.gif", save_all=True, append_images=[Image.new("RGB", (12, 8))]
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_any_picture_becomes_upright_rgb_on_white(tmp_path: Path, name: str) -> None:
    picture = open_picture(FILES[name](tmp_path), "image")
    assert (picture.mode, picture.size) == ("RGB", (12, 8))
    pixels = np.asarray(picture).astype(int)
    assert np.abs(pixels[:, [0, 1, 2, 3], :] - RED).max() <= 40
    assert np.abs(pixels[:, [8, 9, 10, 11], :] - WHITE).max() <= 40
    if name not in ("exif", "cmyk"):  # losses of JPEG
        assert np.abs(pixels[:, :6] - RED).max() <= 1
        assert np.abs(pixels[:, 6:] - WHITE).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = saved(Image.fromarray(ramp), tmp_path / f"x.{suffix}")
    assert np.array_equal(np.asarray(open_picture(path, "image"))[..., 1], ramp >> 8)


def test_grey_and_black_and_white() -> None:
    assert np.asarray(open_picture(Image.new("L", (2, 2), 51), "image")).tolist() == [[[51] * 3] * 2] * 2
    assert np.asarray(open_picture(Image.new("1", (2, 2), 1), "image")).min() == 255
    assert np.asarray(open_picture(Image.new("LA", (2, 2), (0, 102)), "image")).tolist() == [[[153] * 3] * 2] * 2


def test_a_picture_that_is_given_is_left_as_it_is() -> None:
    given = half_clear("RGBA")
    before = given.tobytes()
    open_picture(given, "image")
    assert (given.mode, given.tobytes()) == ("RGBA", before)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    stream = io.BytesIO()
    drawing().save(stream, "PNG")
    whole = stream.getvalue()
    for content in (b"", b"no picture", whole[:100], whole[: len(whole) // 2], whole[:40] + bytes(40) + whole[80:]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"image .*x\.png is no readable picture: .*; give a PNG or JPEG"
        ) as caught:
            open_picture(path, "image")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"image {tmp_path} is no readable picture: Is a directory"):
        open_picture(tmp_path, "image")
    for mode in ("I", "F"):
        saved(Image.new(mode, (8, 8)), tmp_path / "x.tif")
        with pytest.raises(ValueError, match=f"pixels are of mode {mode}, whose range is unknown: save it with 8 or"):
            open_picture(tmp_path / "x.tif", "image")


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, struct.error])
def test_readers_of_pillow_raise_all_kinds_of_errors(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def refuse(_: Image.Image) -> Image.Image:
        raise error("Failed to decode frame 0")

    monkeypatch.setattr(image_to_image, "as_rgb", refuse)
    with pytest.raises(ValueError, match="the image is no readable picture: Failed to decode frame 0"):
        open_picture(drawing(), "image")


def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(drawing(), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2)
    assert open_picture(path, "image").size == (64, 64)  # at most twice the limit, for which Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(ValueError, match=r"x\.png is no readable picture: .*decompression bomb"):
        open_picture(path, "image")


def test_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Image.Image] = []
    open_file = Image.open
    monkeypatch.setattr(image_to_image.Image, "open", lambda path: opened.append(open_file(path)) or opened[-1])
    open_picture(FILES["animation"](tmp_path), "image")
    with pytest.raises(ValueError, match="closed"):
        opened[0].seek(1)
