"""A small classifier of noisy latents, and the log-probability of one label, for classifier guidance.

    classifier, labels = load_classifier("runs/classifier/classifier")
    guided = ldm.guidance.classifier(denoise, log_prob(classifier, labels.index("night")), schedule, scale=2.0)

It is the way down of a U-Net (Dhariwal and Nichol 2021, section 4), with a mean over positions for the paper's
attention pooling. `train_classifier.py` trains it, for the noise schedule of one model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from ldm.blocks import ResidualBlock
from ldm.guidance import LogProb
from ldm.layers import Downsample, TimeEmbedding
from pipelines.json_files import naming_file, read_json, write_json
from pipelines.weights import fill, find_weights, read_weights, write_weights

WEIGHTS_STEM = "classifier"


class ClassifierConfig(BaseModel, frozen=True, extra="forbid"):
    """The classifier's own sizes; what goes in and comes out is the data's affair."""

    block_out_channels: tuple[int, ...] = Field((64, 128, 128), min_length=1)
    """Width of each level; there are half as many rows and columns on each next one."""
    layers_per_block: int = Field(1, ge=1)
    norm_num_groups: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        for width in self.block_out_channels:
            if width < 2 or width % 2 or width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels holds {width}, but must hold even multiples of norm_num_groups"
                    f" {self.norm_num_groups}"
                )
        return self


class ClassifierCard(BaseModel, frozen=True, extra="forbid"):
    """`config.json` beside the weights."""

    classifier: ClassifierConfig
    in_channels: int = Field(ge=1)
    labels: tuple[str, ...] = Field(min_length=2)
    scheduler: dict[str, Any]
    """The noise schedule whose times the classifier knows, as in `scheduler_config.json`."""
    accuracy: tuple[dict[str, float], ...]
    """Share of held-out rows right at each time `t`, where the signal's factor is `alpha`."""


class NoisyClassifier(nn.Module):
    """Noisy latents x_t [B,C,h,w] and their times t [B] -> logits [B,K]; any h and w will do."""

    def __init__(self, config: ClassifierConfig, in_channels: int, classes: int) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        features = 4 * widths[0]
        self.time_embedding = TimeEmbedding(widths[0], features, cosine_first=True, shift=0.0)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.layers = nn.ModuleList()
        for level, width in enumerate(widths):
            if level > 0:
                self.layers.append(Downsample(widths[level - 1]))
            for layer in range(config.layers_per_block):
                source = widths[max(level - 1, 0)] if layer == 0 else width
                self.layers.append(ResidualBlock(source, width, features, groups, eps=1e-5, scale_shift=True))
        self.norm_out = nn.GroupNorm(groups, widths[-1])
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        like = self.conv_in.weight
        emb = F.silu(self.time_embedding(t.to(like.device)))
        x = self.conv_in(x_t.to(like))
        for layer in self.layers:
            x = layer(x, emb) if isinstance(layer, ResidualBlock) else layer(x)
        logits: Tensor = self.out(F.silu(self.norm_out(x)).mean((2, 3)))
        return logits


def log_prob(classifier: NoisyClassifier, label_index: int) -> LogProb:
    """(x_t [B,C,h,w], t [B]) -> log p(label | x_t) [B], float32, for `ldm.guidance`.

    Raises:
        ValueError: no such label.
    """
    classes = classifier.out.out_features
    if not 0 <= label_index < classes:
        raise ValueError(f"label_index is {label_index}, but the classifier knows labels 0 to {classes - 1}")
    return lambda x_t, t: classifier(x_t, t).float().log_softmax(1)[:, label_index]


def save_classifier(folder: Path, classifier: nn.Module, card: ClassifierCard) -> None:
    """Write `config.json` and `classifier.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / f"{WEIGHTS_STEM}.safetensors", classifier.state_dict(), torch.float32)
    write_json(folder / "config.json", card.model_dump(mode="json"))


def load_classifier(folder: str | Path) -> tuple[NoisyClassifier, Sequence[str]]:
    """The classifier that `train_classifier.py` wrote, frozen, float32, on the CPU; and its labels in order.

    Raises:
        ValueError: one line that names the file and what is wrong in it.
    """
    path = Path(folder) / "config.json"
    content = read_json(path)
    card = naming_file(path, lambda: ClassifierCard.model_validate(content))
    classifier = NoisyClassifier(card.classifier, card.in_channels, len(card.labels))
    fill(classifier, read_weights(find_weights(Path(folder), WEIGHTS_STEM)))
    return classifier.eval().requires_grad_(False), card.labels
