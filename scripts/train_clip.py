"""Train a small CLIP (Radford et al. 2021) on captioned images with open_clip, for its text tower.

    accelerate launch scripts/train_clip.py --config scripts/configs/picturebook_clip.yaml

Writes `OUT/clip`, which open_clip loads as `local-dir:OUT/clip`, and `OUT/model/text_encoder` and `OUT/model/tokenizer`
in the published layout: the tower without its last block, because a contrastive loss gives that block's outputs no
gradient at any position but the end token. The same command again resumes.
"""

import json
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.training.command_line import parse_config
from ldm.training.data import Batch, CaptionedImages, DataConfig
from ldm.training.loop import LoopConfig, Training, apply_gradients, fit, make_accelerator, make_ema, make_optimizers
from pipelines.errors import one_line_errors
from pipelines.loading import save_part
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer
from text_encoder.clip import from_open_clip
from text_encoder.tokenizer import write_tokenizer

POSITIONS = 77  # of the text encoder that is saved, as in every published model


class ClipConfig(BaseModel, frozen=True, extra="forbid"):
    """Two transformers and the space where they meet."""

    embedding: int = Field(192, ge=8)
    text_width: int = Field(192, ge=8)
    text_layers: int = Field(5, ge=2)
    """One more than the text encoder that is saved."""
    image_width: int = Field(192, ge=8)
    image_layers: int = Field(4, ge=1)
    patch_size: int = Field(8, ge=1)
    head_width: int = Field(32, ge=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("text_width", "image_width"):
            if (width := getattr(self, name)) % self.head_width:
                raise ValueError(f"{name} is {width}, but must be a multiple of head_width {self.head_width}")
        return self

    def open_clip_config(self, image_size: int, vocab_size: int, context_length: int) -> dict[str, Any]:
        """The JSON with which open_clip builds this model."""
        image = {
            "image_size": image_size,
            "patch_size": self.patch_size,
            "width": self.image_width,
            "layers": self.image_layers,
            "head_width": self.head_width,
        }
        text = {
            "context_length": context_length,
            "vocab_size": vocab_size,
            "width": self.text_width,
            "heads": self.text_width // self.head_width,
            "layers": self.text_layers,
        }
        return {"embed_dim": self.embedding, "vision_cfg": image, "text_cfg": text}


class ClipTrainingConfig(BaseModel, frozen=True, extra="forbid"):
    data: DataConfig
    loop: LoopConfig
    model: ClipConfig = ClipConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.patch_size > self.data.size:
            raise ValueError(
                f"model.patch_size is {self.model.patch_size}, but pictures of data.size are {self.data.size} pixels "
                "wide: make it smaller"
            )
        return self


def survey(tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, int]:
    """Which tokens any caption has, bool [vocabulary], and how many tokens the longest caption has."""
    seen, longest = torch.zeros(tokenizer.vocab_size, dtype=torch.bool), 0
    for start in range(0, len(captions), 1000):
        ids = tokenizer(captions[start : start + 1000]).ids
        seen[ids.unique()] = True
        longest = max(longest, int((ids == tokenizer.end_id).int().argmax(1).max()) + 1)
    return seen, longest


def save(out: Path, clip: nn.Module, config: dict[str, Any], seen: Tensor) -> None:
    """Write the whole CLIP for open_clip, and its text tower for the U-Net.

    The tower's rows of tokens and positions that no caption reached are zero: they hold nothing learned, and compress
    away.
    """
    weights = {name: tensor.float().cpu().contiguous() for name, tensor in clip.state_dict().items()}
    (out / "clip").mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "clip" / "open_clip_model.safetensors")
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}  # pixels in [-1,1]
    (out / "clip" / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    text = config["text_cfg"]
    tower = TextEncoder(
        TextEncoderConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["layers"] - 1,
            num_attention_heads=text["heads"],
            max_position_embeddings=POSITIONS,
            hidden_act="gelu",
            projection_dim=text["width"],
        )
    )
    weights["token_embedding.weight"][~seen] = 0
    weights["positional_embedding"] = F.pad(
        weights["positional_embedding"], (0, 0, 0, POSITIONS - text["context_length"])
    )
    tower.load_state_dict(from_open_clip(weights, text["layers"] - 1))
    save_part(out / "model" / "text_encoder", tower)


def train(config: ClipTrainingConfig) -> None:
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP

    accelerator = make_accelerator(config.loop)
    out = Path(config.loop.out)
    folder = out / "model" / "tokenizer"
    if accelerator.is_main_process:
        write_tokenizer(folder, POSITIONS)
    accelerator.wait_for_everyone()
    tokenizer = Tokenizer.from_folder(folder)
    dataset = CaptionedImages(config.data, config.loop.seed)
    seen, longest = survey(tokenizer, dataset.captions())
    shape = config.model.open_clip_config(config.data.size, tokenizer.vocab_size, longest)
    torch.manual_seed(config.loop.seed)  # initial weights; all later randomness is counted
    clip = CLIP(**shape)
    ema = make_ema(clip, config.loop, accelerator.device)
    model, *optimizers = accelerator.prepare(clip, *make_optimizers(clip, config.loop))
    loss_of = ClipLoss(
        local_loss=True, gather_with_grad=True, rank=accelerator.process_index, world_size=accelerator.num_processes
    )

    def train_step(batch: Batch) -> dict[str, Tensor]:
        ids = tokenizer(batch.captions).ids[:, :longest]
        with accelerator.accumulate(model):
            images, texts, scale = model(*(v.to(accelerator.device, non_blocking=True) for v in (batch.inputs, ids)))
            loss = loss_of(images, texts, scale)
            accelerator.backward(loss)
            norm = apply_gradients(training, model, optimizers)
            with torch.no_grad():
                accelerator.unwrap_model(model).logit_scale.clamp_(0, 4.6052)  # at most 100, as published
        own = torch.arange(len(images), device=images.device) + accelerator.process_index * len(images)
        right = ((images @ accelerator.gather(texts.detach()).T).argmax(1) == own).float().mean()
        return {"loss": loss.detach(), "retrieved": right, "gradient_norm": norm}

    training = Training(accelerator, config.loop, dataset, optimizers, train_step)
    training.averaged.append((ema, model))
    if fit(training) == config.loop.steps and accelerator.is_main_process:
        save(out, ema.module, shape, seen)
    accelerator.end_training()


def main() -> None:
    config = parse_config(ClipTrainingConfig, (__doc__ or "").split("\n")[0])
    with one_line_errors():
        train(config)


if __name__ == "__main__":
    main()
