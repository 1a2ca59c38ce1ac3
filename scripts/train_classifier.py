"""Train a classifier of noisy latents, for classifier guidance of a model.

    accelerate launch scripts/train_classifier.py --config scripts/configs/picturebook_classifier.yaml

Learns one column of the data's metadata (`label`) from the latents of a model's autoencoder, noised by that model's
schedule. Writes `OUT/classifier`, which `noisy_classifier.load_classifier` reads, and prints the accuracy on held-out
rows at several noise levels. The same command again resumes.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from cached_encodings import CaptionedLatents, cached_latents, sample_posterior
from noisy_classifier import ClassifierCard, ClassifierConfig, NoisyClassifier, save_classifier
from pydantic import BaseModel, Field
from torch import Tensor

from autoencoder.bottleneck import DiagonalGaussian
from ldm.schedule import NoiseSchedule
from ldm.training import randomness
from ldm.training.command_line import parse_config
from ldm.training.data import Batch, CaptionedImages, DataConfig
from ldm.training.loop import LoopConfig, Training, apply_gradients, fit, make_accelerator, make_ema, make_optimizers
from pipelines.errors import one_line_errors
from pipelines.json_files import naming_file, read_json
from pipelines.loading import find_model
from pipelines.scheduler_config import SchedulerConfig

LEVELS = 11  # times at which the accuracy is measured, from the least noisy to the noisiest


class ClassifierTrainingConfig(BaseModel, frozen=True, extra="forbid"):
    data: DataConfig
    """The caption column is not read."""
    loop: LoopConfig
    model: str | None = None
    """A model folder: its `vae` and `scheduler` are used. None is the default model."""
    label: str
    """Column of the metadata that is learned: text or whole numbers."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the rows, the last ones, that the accuracy is measured on and nothing is learned from."""
    classifier: ClassifierConfig = ClassifierConfig()


def split_labels(images: CaptionedImages, held_out: float) -> tuple[list[str], int]:
    """Every row's label, from the caption column of `images`, and how many rows to learn from.

    Raises:
        ValueError: labels that are neither text nor whole numbers, fewer than two, or one in held-out rows only.
    """
    column, path = images.config.caption_column, images.config.path
    values = list(images.rows[column])
    for row, value in enumerate(values):
        if not isinstance(value, str | int):
            found = "nothing" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"row {row} of {path} has {found} in column {column!r}: labels are text or whole numbers")
    labels = [str(value) for value in values]
    if len(set(labels)) < 2:
        raise ValueError(f"column {column!r} of {path} holds {labels[0]!r} only: a classifier needs two labels or more")
    learned = len(labels) - max(1, round(held_out * len(labels)))
    if unseen := set(labels) - set(labels[:learned]):
        raise ValueError(
            f"label {min(unseen)!r} of column {column!r} is in none of the first {learned} rows of {path}, and the "
            f"other {len(labels) - learned} are held out: shuffle the rows, or choose a column of fewer labels"
        )
    return labels, learned


@torch.no_grad()
def accuracy_by_noise(
    classifier: NoisyClassifier, x0: Tensor, targets: Tensor, schedule: NoiseSchedule, seed: int
) -> list[dict[str, float]]:
    """Share of rows right at each noise level: time `t`, signal's factor `alpha`, `accuracy`. x0 [N,C,h,w]."""
    device = next(classifier.parameters()).device
    report = []
    for t in torch.linspace(0, schedule.steps - 1, LEVELS).round().long():
        eps = torch.randn(x0.shape, generator=randomness.generator(seed, "held-out noise", int(t)))
        right = 0
        for x_t, wanted in zip(schedule.add_noise(x0, eps, t).split(256), targets.split(256), strict=True):
            found = classifier(x_t.to(device), t.expand(len(x_t))).argmax(1).cpu()
            right += int((found == wanted).sum())
        report.append({"t": float(t), "alpha": float(schedule.at(t)[0]), "accuracy": right / len(x0)})
    return report


def train(config: ClassifierTrainingConfig) -> None:
    folder = find_model(config.model)
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = naming_file(path, lambda: SchedulerConfig.from_diffusers_config(read_json(path)))
    schedule = scheduler.make_schedule()
    labelled = config.data.model_copy(update={"caption_column": config.label})
    images = CaptionedImages(labelled, config.loop.seed)
    labels, learned = split_labels(images, config.held_out)
    names = sorted(set(labels))
    targets = torch.tensor([names.index(label) for label in labels])

    accelerator = make_accelerator(config.loop)
    out = Path(config.loop.out)
    with accelerator.main_process_first():
        moments = cached_latents(images, folder / "vae", out, accelerator.device)
    dataset = CaptionedLatents(moments[:learned], labels[:learned])
    torch.manual_seed(config.loop.seed)  # initial weights; all later randomness is counted
    channels = moments.shape[1] // 2
    classifier = NoisyClassifier(config.classifier, channels, len(names))
    ema = make_ema(classifier, config.loop, accelerator.device)
    model, *optimizers = accelerator.prepare(classifier, *make_optimizers(classifier, config.loop))

    def train_step(batch: Batch) -> dict[str, Tensor]:
        seed = config.loop.seed
        x0 = sample_posterior(batch, seed)
        eps = randomness.normal(x0.shape[1:], seed, "noise", batch.step, batch.positions)
        t = randomness.timesteps(schedule.steps, seed, batch.step, batch.positions)
        x_t = schedule.add_noise(x0, eps, t)
        x_t, t, wanted = (v.to(accelerator.device, non_blocking=True) for v in (x_t, t, targets[batch.indices]))
        with accelerator.accumulate(model):
            logits = model(x_t, t).float()
            loss = F.cross_entropy(logits, wanted)
            accelerator.backward(loss)
            norm = apply_gradients(training, model, optimizers)
        right = (logits.argmax(1) == wanted).float().mean()
        return {"loss": loss.detach(), "accuracy": right, "gradient_norm": norm}

    training = Training(accelerator, config.loop, dataset, optimizers, train_step, [(ema, model)])
    fit(training)
    if accelerator.is_main_process:
        averaged = ema.module.eval()
        held_out = DiagonalGaussian.from_moments(moments[learned:].float()).mean
        accuracy = accuracy_by_noise(averaged, held_out, targets[learned:], schedule, config.loop.seed)
        card = ClassifierCard(
            classifier=config.classifier,
            in_channels=channels,
            labels=names,
            scheduler=scheduler.to_diffusers_config(),
            accuracy=accuracy,
        )
        save_classifier(out / "classifier", averaged, card)
        print(json.dumps({"classifier": str(out / "classifier"), "accuracy": accuracy}))
    accelerator.end_training()


def main() -> None:
    config = parse_config(ClassifierTrainingConfig, (__doc__ or "").split("\n")[0])
    with one_line_errors():
        train(config)


if __name__ == "__main__":
    main()
