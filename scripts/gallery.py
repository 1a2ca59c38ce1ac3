"""Pictures of what a model can do, for the README: prompts, the way there, guidance and samplers.

    python scripts/gallery.py [MODEL] [--out scripts/gallery] [--prompts FILE.txt]

writes `prompts.webp` (the captions of the first 24 held-out scenes that evaluate.py scores, or the first 24 lines of a
file; picture i has seed i, nothing is chosen), `denoising.webp` and `denoising-animated.webp` (the first prompt, step
by step), `guidance.webp` and `samplers.webp` (the same prompts and seeds at several scales, by every sampler).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from picturebook import scene
from PIL import Image
from sheet import captioned, to_images
from torch import Tensor

from ldm.samplers import SAMPLERS, StepInfo
from pipelines import TextToImagePipeline
from pipelines.errors import one_line_errors

SEED = 2_000_001  # of the scenes, as in evaluate.py
PROMPTS = 24
SCALES = (1.0, 3.0, 7.0)
COLUMNS = 6
ENLARGED = 3
QUALITY = 80  # of WebP: all files together are to stay under 600 KB


def read_prompts(file: Path | None) -> list[str]:
    """The captions of held-out scenes, or the lines of a file. Raises ValueError if there are none."""
    if file is None:
        return [scene(i, SEED, "heldout")[0].text for i in range(PROMPTS)]
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file} has no prompts: write one a line")
    return prompts[:PROMPTS]


def render(pipe: TextToImagePipeline, prompts: Sequence[str], **options: Any) -> list[Image.Image]:
    """One picture a prompt; picture i has seed i."""
    images = pipe(prompts, seed=0, **options).images
    assert isinstance(images, list)
    return images


@torch.no_grad()
def watch(pipe: TextToImagePipeline, prompt: str) -> tuple[list[Image.Image], list[Image.Image]]:
    """After every step: the latents, and what the network takes for the picture behind them; both decoded."""
    steps: list[StepInfo] = []
    pipe(prompt, seed=0, on_step=steps.append, output_type="latent")

    def decode(latents: Tensor) -> list[Image.Image]:
        return to_images(
            torch.cat([pipe.autoencoder.decode(one.to(pipe.autoencoder_dtype)).cpu() for one in latents.split(1)])
        )

    return decode(torch.cat([step.x for step in steps])), decode(torch.cat([step.x0 for step in steps]))


def strip(noisy: Sequence[Image.Image], clean: Sequence[Image.Image]) -> tuple[list[Image.Image], list[str]]:
    """Two rows of `COLUMNS` moments from the first step to the last, and what each is."""
    last = len(clean) - 1
    moments = sorted({round(last * i / (COLUMNS - 1)) for i in range(COLUMNS)})
    labels = [f"step {i + 1} of {len(clean)}" for i in moments]
    return [noisy[i] for i in moments] + [clean[i] for i in moments], labels + [f"{one}: estimate" for one in labels]


def write_still(file: Path, images: Sequence[Image.Image], captions: Sequence[str], columns: int = COLUMNS) -> None:
    captioned(images, captions, columns, ENLARGED * images[0].width).save(file, quality=QUALITY, method=6)


def write_animation(file: Path, frames: Sequence[Image.Image]) -> None:
    """Eight frames a second, the last one for two seconds, over and over."""
    large = [
        frame.resize((ENLARGED * frame.width, ENLARGED * frame.height), Image.Resampling.LANCZOS) for frame in frames
    ]
    durations = [125] * (len(large) - 1) + [2000]
    large[0].save(file, save_all=True, append_images=large[1:], duration=durations, loop=0, quality=QUALITY, method=6)


def write_gallery(pipe: TextToImagePipeline, prompts: Sequence[str], out: Path) -> None:
    """All files of the gallery, in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_still(out / "prompts.webp", render(pipe, prompts), prompts)

    noisy, clean = watch(pipe, prompts[0])
    images, labels = strip(noisy, clean)
    write_still(out / "denoising.webp", images, labels, columns=len(images) // 2)
    write_animation(out / "denoising-animated.webp", clean)

    some = prompts[: COLUMNS - 1]
    images = [image for scale in SCALES for image in render(pipe, some, guidance_scale=scale)]
    labels = [f"guidance {scale:g}: {prompt}" for scale in SCALES for prompt in some]
    write_still(out / "guidance.webp", images, labels, columns=len(some))

    images = [render(pipe, prompts[:1], sampler=name)[0] for name in SAMPLERS]
    write_still(out / "samplers.webp", images, list(SAMPLERS), columns=len(SAMPLERS) // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="model folder or file; by default the built-in model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gallery", help="folder")
    parser.add_argument("--prompts", type=Path, help="file of prompts for a model of another world, one a line")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    with one_line_errors():
        prompts = read_prompts(args.prompts)
        pipe = TextToImagePipeline.from_pretrained(args.model, args.device, args.dtype)
        write_gallery(pipe, prompts, args.out)
    for file in sorted(args.out.glob("*.webp")):
        print(file)


if __name__ == "__main__":
    main()
