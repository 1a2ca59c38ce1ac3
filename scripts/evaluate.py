"""Measure a model in the picturebook world: does the picture show what the prompt says, read back from the pixels?

    python scripts/evaluate.py [MODEL] [--prompts 500] [--guidance 3 1] [--json FILE] [--record] [--sheet FILE]

Prompts are the captions of held-out scenes in order; picture i has seed i; nothing is chosen or tried twice. A picture
is right if every attribute that its caption states is. Beside the score stand four controls of the judge, the
autoencoder's reconstruction, and FID in the judge's feature space.
"""

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import WEIGHTS, Judge, Reading, load_judge, score
from picturebook import UNITS, WORLD, Scene, pictures
from PIL import Image
from sheet import to_images, write_sheet
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from autoencoder import Autoencoder
from pipelines import TextToImagePipeline
from pipelines.errors import one_line_errors
from pipelines.json_files import write_json

SEED = 2_000_001  # of the scenes that models are scored on; settings are chosen on other seeds
RENDERED_AT_ONCE = 50
Scores = list[dict[str, bool]]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> float32 [N,3,H,W] in [-1,1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def interval(values: Sequence[float]) -> list[float]:
    """95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(0).choice(np.asarray(values, dtype=float), (2000, len(values)))
    return [round(float(v), 4) for v in np.quantile(draws.mean(1), (0.025, 0.975))]


def accuracy(scores: Scores) -> dict[str, Any]:
    """Share of pictures with every stated attribute right; also per attribute, and per number of attributes."""
    right = [all(each.values()) for each in scores]
    attributes: dict[str, list[bool]] = defaultdict(list)
    numbers: dict[int, list[bool]] = defaultdict(list)
    for each, whole in zip(scores, right, strict=True):
        numbers[len(each)].append(whole)
        for name, value in each.items():
            attributes[name.rstrip(" 12")].append(value)
    return {
        "accuracy": round(float(np.mean(right)), 4),
        "interval": interval(right),
        "per attribute": {name: round(float(np.mean(v)), 4) for name, v in sorted(attributes.items())},
        "per number of attributes": {n: [round(float(np.mean(v)), 4), len(v)] for n, v in sorted(numbers.items())},
    }


def judged(scenes: Sequence[Scene], readings: Sequence[Reading]) -> Scores:
    return [score(scene.metadata("", UNITS), reading) for scene, reading in zip(scenes, readings, strict=True)]


def read(judge: Judge, images: Tensor) -> list[Reading]:
    return [reading for some in images.split(100) for reading in judge.read(some)]


@torch.inference_mode()
def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Decoded modes of the posterior, clamped and rounded to 8 bits, [-1,1]."""
    like = next(autoencoder.parameters())
    decoded = torch.cat([autoencoder.decode(autoencoder.encode(some.to(like))).cpu() for some in images.split(50)])
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def reconstruction_psnr(scenes: Sequence[Scene], images: Tensor, decoded: Tensor) -> dict[str, float]:
    """Mean over pictures of the PSNR in dB, over all pixels and over the pixels of the things' boxes."""
    squared = (images - decoded).square().mean(1)
    whole, boxes = [], []
    for scene, error in zip(scenes, squared, strict=True):
        inside = torch.zeros_like(error, dtype=torch.bool)
        scale = error.shape[-1] / UNITS
        for group in scene.things:
            for x0, y0, x1, y1 in group.boxes:
                inside[round(y0 * scale) : round(y1 * scale), round(x0 * scale) : round(x1 * scale)] = True
        whole.append(10 * torch.log10(4 / error.mean()).item())
        boxes.append(10 * torch.log10(4 / error[inside].mean()).item())
    return {"all pixels": round(float(np.mean(whole)), 2), "boxes": round(float(np.mean(boxes)), 2)}


class _Features(nn.Module):
    """The judge's features, as torchmetrics wants a feature network."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge
        self.num_features = judge.background.in_features

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.judge.features(some) for some in images.split(100)])


@torch.inference_mode()
def frechet(judge: Judge, real: Tensor, other: Tensor) -> float:
    """Frechet distance (Heusel et al. 2017) of two sets of pictures in the judge's 112 features."""
    metric = FrechetInceptionDistance(feature=_Features(judge))
    metric.update(real, real=True)
    metric.update(other, real=False)
    return round(float(metric.compute()), 4)


def render(
    pipe: TextToImagePipeline, prompts: Sequence[str], steps: int | None, guidance: float | None
) -> list[Image.Image]:
    """One picture a prompt; picture i has seed i."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), RENDERED_AT_ONCE), desc="rendering", unit="batch"):
        some = list(prompts[start : start + RENDERED_AT_ONCE])
        made = pipe(some, seed=start, num_inference_steps=steps, guidance_scale=guidance).images
        assert isinstance(made, list)
        images += made
    return images


def evaluate(
    pipe: TextToImagePipeline,
    count: int,
    *,
    seed: int = SEED,
    steps: int | None = None,
    guidances: Sequence[float | None] = (None,),
    sheet: Path | None = None,
) -> dict[str, Any]:
    """All figures of a model, from `count` held-out scenes of the world's `seed`; None is the model's own default."""
    judge = load_judge()
    pairs = list(pictures(count, seed, "heldout", UNITS))
    scenes, real = [scene for scene, _ in pairs], to_tensor([image for _, image in pairs])
    decoded = reconstruct(pipe.autoencoder, real)
    readings = read(judge, real)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    result: dict[str, Any] = {
        "world": WORLD,
        "seed": seed,
        "pictures": count,
        "two things and a relation": round(float(np.mean([s.relation is not None for s in scenes])), 3),
        "controls": {
            "real pictures": accuracy(judged(scenes, readings))["accuracy"],
            "reconstructions": accuracy(judged(scenes, read(judge, decoded)))["accuracy"],
            "another picture's caption": accuracy(judged(scenes, readings[1:] + readings[:1]))["accuracy"],
            "noise": accuracy(judged(scenes, read(judge, noise)))["accuracy"],
        },
        "reconstruction psnr": reconstruction_psnr(scenes, real, decoded),
        "fid": {
            "feature network": WEIGHTS.name,
            "real against real": frechet(judge, real[::2], real[1::2]),
            "real against reconstructions": frechet(judge, real, decoded),
        },
    }
    for guidance in guidances:
        images = render(pipe, [scene.text for scene in scenes], steps, guidance)
        pixels = to_tensor(images)
        name = f"guidance {pipe.settings.guidance if guidance is None else guidance:g}"
        result[name] = accuracy(judged(scenes, read(judge, pixels)))
        result["fid"][f"real against generated, {name}"] = frechet(judge, real, pixels)
        if sheet is not None and guidance is guidances[0]:
            write_sheet(sheet, images[:24], columns=8)
            shown = torch.stack([real[:12], decoded[:12]], 1).flatten(0, 1)
            write_sheet(sheet.with_stem(sheet.stem + "-reconstructions"), to_images(shown), columns=8)
    result["steps"] = pipe.settings.steps if steps is None else steps
    result["versions"] = {"torch": torch.__version__, "python": platform.python_version(), "dtype": str(pipe.dtype)}
    return result


def record(pipe: TextToImagePipeline, result: dict[str, Any]) -> None:
    """Write a result into the `scores` of the model's `ldm.json`."""
    assert pipe.model.folder is not None
    settings = pipe.settings.model_copy(update={"scores": result})
    write_json(pipe.model.folder / "ldm.json", settings.model_dump(mode="json", exclude_none=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="model folder; by default the built-in model")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED, help="of the world; choose settings on another one")
    parser.add_argument("--steps", type=int, help="by default the model's own")
    parser.add_argument("--guidance", type=float, nargs="+", help="one or more scales; by default the model's own")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--record", action="store_true", help="also write the result into the model's ldm.json")
    parser.add_argument("--sheet", type=Path, help="PNG with the first 24 pictures")
    args = parser.parse_args()
    with one_line_errors():
        if args.prompts < 4:
            raise ValueError(f"--prompts is {args.prompts}; give at least 4")
        pipe = TextToImagePipeline.from_pretrained(args.model, args.device, args.dtype)
        if args.record and pipe.model.folder is None:
            raise ValueError(f"--record writes into a model folder, but {args.model} is a file; write --json instead")
        guidances = args.guidance or [None]
        result = evaluate(pipe, args.prompts, seed=args.seed, steps=args.steps, guidances=guidances, sheet=args.sheet)
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
        if args.record:
            record(pipe, result)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
