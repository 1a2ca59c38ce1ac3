"""The judge: reads a picturebook picture back from its pixels and says which stated attributes are right.

A small fully convolutional detector in the manner of CenterNet (Zhou et al. 2019, "Objects as Points"): on a grid of
one cell per four pixels it predicts whether a thing's centre lies there, and that thing's kind, colour and size; the
background comes from the mean over the grid. It is local and knows nothing of captions, so it cannot prefer familiar
combinations, and where it finds nothing it answers nothing. `train_judge.py` made the weights beside this file; they
are frozen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from picturebook import KINDS, SIZES, UNITS
from picturebook_drawing import BACKGROUNDS, COLORS
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "judge.safetensors"
CELL = 4  # pixels of a 64-pixel picture per grid cell
GRID = UNITS // CELL
THRESHOLD = 0.35  # least probability of a thing's centre
_COLORS, _SIZES, _BACKGROUNDS = list(COLORS), list(SIZES), list(BACKGROUNDS)


@dataclass(frozen=True)
class Detection:
    kind: str
    color: str
    size: str
    x: float  # centre, in grid cells
    y: float


@dataclass(frozen=True)
class Reading:
    background: str
    things: tuple[Detection, ...]


class _Residual(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def _step(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Judge(nn.Module):
    """images [B,3,H,W] in [-1,1] -> centre, kind, colour and size logits [B,*,16,16] and background logits [B,8].

    Of other sizes than 64 it sees the area average of 64.
    """

    def __init__(self, width: int = 112) -> None:
        super().__init__()
        self.stem = nn.Sequential(_step(3, 32, 1), _step(32, 64, 2), _Residual(64, 1), _step(64, width, 2))
        self.body = nn.Sequential(*[_Residual(width, dilation) for dilation in (1, 2, 4, 1)])
        self.heads = nn.Conv2d(width, 1 + len(KINDS) + len(COLORS) + len(SIZES), 1)
        self.background = nn.Linear(width, len(BACKGROUNDS))
        nn.init.constant_(self.heads.bias[:1], -4.0)  # type: ignore[index]  # centres are rare

    def features(self, images: Tensor) -> Tensor:
        """What it sees in each cell: [B,width,16,16]."""
        if images.shape[-2:] != (UNITS, UNITS):
            images = F.interpolate(images, (UNITS, UNITS), mode="area")
        return self.body(self.stem(images))

    def answers(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The logits, of what `features` made."""
        center, kind, color, size = self.heads(features).split([1, len(KINDS), len(COLORS), len(SIZES)], dim=1)
        return center[:, 0], kind, color, size, self.background(features.mean((2, 3)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.answers(self.features(images))

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[Reading]:
        """What each picture shows."""
        center, kind, color, size, background = self(images)
        probability = center.sigmoid()
        peaks = (F.max_pool2d(probability[:, None], 3, 1, 1)[:, 0] == probability) & (probability > THRESHOLD)
        readings = []
        for i in range(len(images)):
            things = tuple(
                Detection(
                    KINDS[int(kind[i, :, y, x].argmax())],
                    _COLORS[int(color[i, :, y, x].argmax())],
                    _SIZES[int(size[i, :, y, x].argmax())],
                    x,
                    y,
                )
                for y, x in peaks[i].nonzero().tolist()
            )
            readings.append(Reading(_BACKGROUNDS[int(background[i].argmax())], things))
        return readings


def load_judge() -> Judge:
    """The frozen judge, in float32 on the CPU. Raises FileNotFoundError if its weights are not there."""
    if not WEIGHTS.exists():
        raise FileNotFoundError(f"{WEIGHTS} is missing: train the judge with scripts/train_judge.py")
    judge = Judge()
    counters = {name: tensor for name, tensor in judge.state_dict().items() if not tensor.is_floating_point()}
    judge.load_state_dict(counters | {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return judge.eval()


def _relation_holds(relation: str, first: Sequence[Detection], second: Sequence[Detection]) -> bool:
    if relation in ("right of", "below"):
        first, second = second, first
    axis = "x" if relation in ("left of", "right of") else "y"
    return max(getattr(d, axis) for d in first) < min(getattr(d, axis) for d in second)


def score(stated: Mapping[str, Any], reading: Reading) -> dict[str, bool]:
    """Right or wrong for each attribute that a caption states.

    `stated` is a picture's line of `metadata.jsonl`. Sizes count unless medium, the background if it is stated.
    "nothing else" asks that no thing of another kind is there. The picture is right if every value is true.
    """
    groups = stated["things"]
    found = [[d for d in reading.things if d.kind == group["kind"]] for group in groups]
    right: dict[str, bool] = {}
    for i, (group, members) in enumerate(zip(groups, found, strict=True), 1):
        right[f"kind {i}"] = bool(members)
        right[f"count {i}"] = len(members) == group["count"]
        right[f"color {i}"] = bool(members) and all(d.color == group["color"] for d in members)
        if group["size"] != "medium":
            right[f"size {i}"] = bool(members) and all(d.size == group["size"] for d in members)
    if stated["relation"] is not None:
        right["relation"] = all(found) and _relation_holds(stated["relation"], found[0], found[1])
    if stated["background_stated"]:
        right["background"] = reading.background == stated["background"]
    right["nothing else"] = sum(map(len, found)) == len(reading.things)
    return right
