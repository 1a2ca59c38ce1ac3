"""Train the judge on real pictures of both splits, and measure it on held-out ones.

    python scripts/train_judge.py [--steps 2000]

Writes `scripts/judge.safetensors` (fp16) and `scripts/judge.json` (recipe and measured controls). The judge is frozen
before any model that it judges is trained; train it again only with a new world.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from judge import GRID, WEIGHTS, Judge, load_judge, score
from picturebook import KINDS, SIZES, UNITS, WORLD, Scene, pictures
from picturebook_drawing import BACKGROUNDS, COLORS
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

BATCH = 64
TRAIN_SEED, TEST_SEED = 1_000_001, 1_000_002  # no other data uses these seeds
_INDEX = {word: i for words in (KINDS, COLORS, SIZES, BACKGROUNDS) for i, word in enumerate(words)}


def targets(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Heat map of centres [B,16,16]; kind, colour and size there [B,3,16,16], -1 for none; background [B]."""
    heat = torch.zeros(len(scenes), GRID, GRID)
    classes = torch.full((len(scenes), 3, GRID, GRID), -1)
    ys, xs = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    for i, scene in enumerate(scenes):
        for group in scene.things:
            for box in group.boxes:
                cx, cy = (box[0] + box[2]) / 2 * GRID / UNITS, (box[1] + box[3]) / 2 * GRID / UNITS
                distance = (xs - int(cx)) ** 2 + (ys - int(cy)) ** 2
                heat[i] = torch.maximum(heat[i], torch.exp(-distance / (2 * 0.7**2)))
                near = distance <= 1
                for j, word in enumerate((group.kind, group.color, group.size)):
                    classes[i, j][near] = _INDEX[word]
    return heat, classes, torch.tensor([_INDEX[scene.background] for scene in scenes])


def center_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's penalty-reduced focal loss (Zhou et al. 2019, equation 1), per thing."""
    positive = heat == 1
    p = logits.sigmoid().clamp(1e-5, 1 - 1e-5)
    loss = torch.where(positive, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p**2 * (1 - p).log())
    return -loss.sum() / positive.sum()


def roughen(images: Tensor, rng: torch.Generator) -> Tensor:
    """Blur, noise and slight colour shifts, so that the judge reads soft and imperfect pictures as a person would."""
    count = len(images)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur = torch.rand(count, 1, 1, 1, generator=rng)
    images = torch.where(torch.rand(count, 1, 1, 1, generator=rng) < 0.5, images + (soft - images) * blur, images)
    noise = 0.1 * torch.rand(count, 1, 1, 1, generator=rng)
    shift = 0.04 * torch.randn(count, 3, 1, 1, generator=rng)
    return images + noise * torch.randn(images.shape, generator=rng) + shift


def load(count: int, seed: int, split: str) -> tuple[list[Scene], Tensor]:
    """Scenes, and their pictures as uint8 [N,3,64,64]."""
    pairs = list(tqdm(pictures(count, seed, split, UNITS), total=count, desc=f"drawing {split}"))
    return [scene for scene, _ in pairs], torch.from_numpy(np.stack([np.asarray(im) for _, im in pairs])).permute(
        0, 3, 1, 2
    )


def train(steps: int, count: int) -> Judge:
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    scenes, images = load(count, TRAIN_SEED, "all")
    judge = Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="judge")
    for _ in progress:
        chosen = torch.randint(count, (BATCH,), generator=rng)
        batch = roughen(images[chosen].float() / 127.5 - 1, rng).contiguous(memory_format=torch.channels_last)
        heat, classes, background = targets([scenes[i] for i in chosen.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [output.float() for output in judge(batch)]
        loss = center_loss(outputs[0], heat) + F.cross_entropy(outputs[4], background)
        for i in range(3):
            loss = loss + F.cross_entropy(outputs[1 + i], classes[:, i], ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return judge


def controls(judge: Judge, count: int) -> dict[str, float]:
    """Share of pictures right in every stated attribute: real held-out ones, with another's caption, and noise."""
    scenes, images = load(count, TEST_SEED, "heldout")
    lines = [scene.metadata("", UNITS) for scene in scenes]
    readings = [r for chunk in images.split(100) for r in judge.read(chunk.float() / 127.5 - 1)]
    noise = judge.read(
        torch.randn(min(200, count), 3, UNITS, UNITS, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    )

    def share(pairs: list[bool]) -> float:
        return round(sum(pairs) / len(pairs), 4)

    return {
        "real held-out": share([all(score(s, r).values()) for s, r in zip(lines, readings, strict=True)]),
        "wrong caption": share(
            [all(score(s, r).values()) for s, r in zip(lines, readings[1:] + readings[:1], strict=True)]
        ),
        "noise": share([all(score(s, r).values()) for s, r in zip(lines[:200], noise, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--count", type=int, default=24_000, help="pictures to train on")
    parser.add_argument("--test", type=int, default=2000, help="held-out pictures to measure on")
    args = parser.parse_args()
    random.seed(0)
    start = time.time()
    judge = train(args.steps, args.count)
    save_file({k: v.half().contiguous() for k, v in judge.state_dict().items() if v.is_floating_point()}, WEIGHTS)
    result = {
        "world": WORLD,
        "recipe": {"steps": args.steps, "batch": BATCH, "pictures": args.count, "seed": TRAIN_SEED, "split": "all"},
        "parameters": sum(p.numel() for p in judge.parameters()),
        "minutes": round((time.time() - start) / 60, 1),
        "controls": {"pictures": args.test, "seed": TEST_SEED, **controls(load_judge(), args.test)},
    }
    Path(WEIGHTS).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
