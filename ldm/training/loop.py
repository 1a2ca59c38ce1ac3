"""The loop that every training script drives: resume, order, learning rate, EMA, logs, checkpoints, hooks.

A script gives `fit` one function, `train_step(batch) -> {name: scalar}`, that does forward, backward and the
optimizer's step itself.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from pydantic import BaseModel, Field
from torch import Tensor, nn
from tqdm import tqdm

from ldm.hardware import fastest_dtype, fit_threads_to_quota, keep_freed_memory
from ldm.training import checkpoint
from ldm.training.data import Batch, CaptionedDataset, Share, micro_batches
from ldm.training.ema import EMA
from ldm.training.muon import Muon, matrices

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
"""accelerate's names for the dtypes that networks multiply in."""
LONGEST = timedelta(days=1)
"""That processes wait for the main one, which encodes all data; NCCL itself would give up after 10 minutes."""
NORM = "gradient_norm"  # how the names of gradients' norms end among what a step returns
MOST_SKIPPED = 10  # steps in a row whose gradient is not finite, before training gives up


class LoopConfig(BaseModel, frozen=True, extra="forbid"):
    """How long, how fast and where to."""

    out: str
    """Folder for checkpoints, logs, sample sheets and the model."""
    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(32, ge=1)
    """Pictures per step, over all processes and accumulation steps together."""
    gradient_accumulation: int = Field(1, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon needs fewer steps to train a small network from nothing, at a higher rate (`ldm/training/muon.py`)."""
    learning_rate: float = Field(1e-4, gt=0)
    warmup: int = Field(100, ge=0)
    """Steps of linear warm-up; from there a cosine falls to zero at `steps`."""
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Per step."""
    ema_every: int = Field(1, ge=1)
    """Steps from one update of the average to the next; of 10, an average of 1000 steps hardly differs."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Auto: what `accelerate launch` was told; else bf16 where the hardware multiplies it, fp16 on a GPU without it,
    and no, which is float32, on a CPU without it."""
    seed: int = Field(0, ge=0)
    log_every: int = Field(20, ge=1)
    sample_every: int = Field(1000, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    """Checkpoints to keep."""
    minutes: float | None = Field(None, gt=0)
    """Stop at a checkpoint after this time; the same command goes on from there."""


def learning_rate_factor(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero; a function of the step alone, so a resumed run has the same."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_accelerator(config: LoopConfig) -> Accelerator:
    """An accelerator that logs to tensorboard under `out`; on a machine without a GPU it trains on the CPU."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    # accelerate joins processes on CPUs only where it is told that they are
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or torch.accelerator.current_accelerator(True) is None
    device = PartialState(on_cpu, timeout=LONGEST).device
    precision: str = config.mixed_precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # which it also says where it was told nothing
        precision = PRECISIONS[fastest_dtype(device)] if launched == "no" else launched
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with="tensorboard",
        project_dir=config.out,
    )
    accelerator.init_trackers("logs")
    if device.type == "cpu":
        fit_threads_to_quota()
        keep_freed_memory()
    return accelerator


def make_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices and AdamW for the rest. What has one dimension (norms, biases) is not decayed."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        weights = matrices(model)
        optimizers.append(Muon(weights, config.learning_rate, config.weight_decay))
        taken = set(weights)
        learning = [p for p in learning if p not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learning if p.ndim > 1]},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rest = torch.optim.AdamW(groups, config.learning_rate, (0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    return [*optimizers, rest]


def make_ema(model: nn.Module, config: LoopConfig, device: torch.device) -> EMA:
    """The average of the model's weights that forgets `ema_decay` per step, though it is updated every few."""
    return EMA(model, config.ema_decay**config.ema_every, device)


@dataclass
class Training:
    """What `fit` drives: the accelerator, what it prepared, and the script's own functions."""

    accelerator: Accelerator
    config: LoopConfig
    dataset: CaptionedDataset
    optimizers: list[torch.optim.Optimizer]
    train_step: Callable[[Batch], dict[str, Tensor]]
    averaged: list[tuple[EMA, nn.Module]] = field(default_factory=list)
    """Each EMA and the module that it follows."""
    on_sample: Callable[[Path], None] | None = None
    """Writes a sample sheet to the given file; called by the main process."""
    measure: Callable[[], dict[str, float]] | None = None
    """What to log before the first step and with each sample sheet; called by the main process."""


def apply_gradients(training: Training, model: nn.Module, optimizers: Sequence[AcceleratedOptimizer]) -> Tensor:
    """At the end of an accumulation, clip and step, unless the gradient is not finite. Returns the gradient's norm.

    `optimizers` are the model's own, as prepared: fused ones or Muon, which leave a step out where `found_inf` is 1. To
    read the norm here instead would have the host wait for the accelerator at every step.
    """
    accelerator, clip = training.accelerator, training.config.gradient_clip
    if not accelerator.sync_gradients:
        return torch.zeros(())
    # accelerate's own `step` changes the scale of fp16 after each optimizer, so that a second one's gradients would be
    # scaled down twice, and never after a step that is left out.
    if (scaler := accelerator.scaler) is None:
        norm = accelerator.clip_grad_norm_(model.parameters(), clip)
        assert norm is not None
    else:
        for optimizer in optimizers:
            scaler.unscale_(optimizer.optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = torch.as_tensor(norm).detach().float()
    found_inf = 1 - norm.isfinite().float()
    for optimizer in optimizers:
        assert getattr(optimizer.optimizer, "_step_supports_amp_scaling", False), "it would not heed found_inf"
        optimizer.optimizer.found_inf = found_inf
        optimizer.optimizer.step()
        optimizer.zero_grad()
    if scaler is not None:
        scaler.update()
    return norm


class _Log:
    """Means over steps and processes of what `train_step` returns: to tensorboard, `log.jsonl` and the progress bar."""

    def __init__(self, training: Training, start: int) -> None:
        self.training, self.last = training, start
        self.file = Path(training.config.out) / "log.jsonl"
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.since = time.monotonic()
        accelerator = training.accelerator
        self.bar = tqdm(
            total=training.config.steps,
            initial=start,
            disable=not accelerator.is_main_process,
            unit="step",
            smoothing=0.05,
        )
        if accelerator.is_main_process and self.file.exists():
            self._forget_after(start)

    def _forget_after(self, start: int) -> None:
        """Leaves out what a run that was cut short had logged since the checkpoint that this one goes on from."""
        lines = self.file.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n") and start > 0]
        self.file.write_text("".join(line for line in whole if json.loads(line)["step"] <= start))

    def add(self, values: dict[str, Tensor]) -> None:
        # Summed where they are: to read them here would make an accelerator wait at every step.
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.float() if name in self.sums else value.float()
        self.counts.update(values.keys())

    def write(self, step: int) -> None:
        device = self.training.accelerator.device
        own = torch.stack([total.to(device) / self.counts[name] for name, total in self.sums.items()])
        over_all = self.training.accelerator.reduce(own, reduction="mean")
        means = dict(zip(self.sums, over_all.tolist(), strict=True))
        seconds = time.monotonic() - self.since
        seen = (step - self.last) * self.training.config.batch_size
        means["images_per_second"] = seen / seconds if seconds else 0.0
        means["learning_rate"] = self.training.optimizers[0].param_groups[0]["lr"]
        self.append(step, means)
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in means.items() if k in ("loss", "images_per_second")})
        self.sums, self.counts, self.since, self.last = {}, Counter(), time.monotonic(), step

    def append(self, step: int, values: dict[str, float]) -> None:
        """A line of the log, and the same to tensorboard; the main process' alone."""
        self.training.accelerator.log(values, step=step)
        if self.training.accelerator.is_main_process:
            with self.file.open("a") as lines:
                lines.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n")


def _steps(training: Training, start: int) -> Iterator[list[Batch]]:
    """This process' micro-batches of each step from `start` on."""
    config, accelerator = training.config, training.accelerator
    share = Share(config.batch_size, config.gradient_accumulation, accelerator.num_processes, accelerator.process_index)
    batches = micro_batches(training.dataset, config.seed, start, config.steps, share)
    while group := [batch for _, batch in zip(range(config.gradient_accumulation), batches, strict=False)]:
        yield group


def _count_skipped(before: Tensor, values: dict[str, Tensor]) -> Tensor:
    """Steps in a row, the last one with `values`, in which a gradient was not finite; counted where the norms are."""
    norms = torch.stack([value for name, value in values.items() if name.endswith(NORM)])
    return (before + 1) * ~norms.isfinite().all()


def _agree_to_stop(training: Training, deadline: float) -> bool:
    """Whether time is up by the main process' clock."""
    answer = [time.monotonic() > deadline]
    if training.accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return answer[0]


def _groups(training: Training) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers; loading a checkpoint replaces them."""
    return [group for optimizer in training.optimizers for group in optimizer.param_groups]


def fit(training: Training) -> int:
    """Train from the newest checkpoint, or the start, to `steps` or until `minutes` are over. Returns the step reached.

    Raises ValueError if the gradient was not finite for ten steps in a row when the log is written, as it is at the end
    too, or what `load_newest` raises.
    """
    accelerator, config = training.accelerator, training.config
    folder = Path(config.out)
    for ema, _ in training.averaged:
        accelerator.register_for_checkpointing(ema)
    asked = [(group["lr"], group["weight_decay"]) for group in _groups(training)]
    start = checkpoint.load_newest(accelerator, folder)
    accelerator.step = 0  # it counts micro-batches, of which a step may have had another number
    # What a checkpoint holds is the run's past: rate and decay are what is asked for now.
    groups = _groups(training)
    for group, (_, decay) in zip(groups, asked, strict=True):
        group["weight_decay"] = decay
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    log = _Log(training, start)
    skipped, done, saved = torch.zeros((), dtype=torch.int64, device=accelerator.device), start, start
    if start == 0 and accelerator.is_main_process and training.measure:
        log.append(0, training.measure())
    for batches in _steps(training, start):
        for group, (rate, _) in zip(groups, asked, strict=True):
            group["lr"] = rate * learning_rate_factor(config, done)
        values: dict[str, Tensor] = {}
        for batch in batches:
            values = training.train_step(batch)
            whole = batch is batches[-1]  # before that there is no gradient of the step
            log.add({name: value for name, value in values.items() if whole or not name.endswith(NORM)})
        done += 1
        is_last = done == config.steps
        skipped = _count_skipped(skipped, values)
        if done % min(config.ema_every, config.steps) == 0:
            for ema, model in training.averaged:
                ema.update_parameters(accelerator.unwrap_model(model))
        log.bar.update()
        if done % config.log_every == 0 or is_last:
            log.write(done)
            if (in_a_row := int(skipped)) >= MOST_SKIPPED:
                raise ValueError(
                    f"the gradient was not finite for {in_a_row} steps up to step {done}: lower loop.learning_rate"
                )
        stop = done % config.log_every == 0 and _agree_to_stop(training, deadline)
        if done % config.checkpoint_every == 0 or stop:
            checkpoint.save_checkpoint(accelerator, folder, done, config.keep)
            saved = done
        if accelerator.is_main_process and (done % config.sample_every == 0 or is_last):
            if training.measure:
                log.append(done, training.measure())
            if training.on_sample:
                training.on_sample(folder / "samples" / f"{done:08}.png")
        if stop:
            break
    log.bar.close()
    if saved != done:
        checkpoint.save_checkpoint(accelerator, folder, done, config.keep)
    return done
