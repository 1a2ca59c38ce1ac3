"""NLL and FID by noise schedule and objective (Nichol and Dhariwal 2021, tables 1 and 2)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator

from ldm.likelihood import bound
from ldm.samplers import sample_ddpm
from pipelines import TextToImagePipeline
from pipelines.loading import DEFAULT_MODEL
from reproductions.measure import OTHERS, fid, real_pictures
from reproductions.models import BATCH, PASSES_OF_A_STEP, denoiser, render, seconds_a_pass_of, trained
from reproductions.plot import bars
from reproductions.table import Cell, Claim, Paper, Results, Setup, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "simple": {"loss": "simple"},
    "hybrid": {"loss": "hybrid"},
    "bound": {"loss": "bound", "times": "importance"},
}
CELLS: tuple[Cell, ...] = (
    ("linear", "simple"),
    ("linear", "hybrid"),
    ("cosine", "simple"),
    ("cosine", "hybrid"),
    ("cosine", "bound"),
)
*OTHER_CELLS, BOUND = CELLS
HYBRID_TO_SIMPLE = [((schedule, "hybrid"), (schedule, "simple")) for schedule in SCHEDULES]
COSINE_TO_LINEAR = [(("cosine", objective), ("linear", objective)) for objective in ("simple", "hybrid")]
NLL = "NLL (bits/dim)"
PRESET = "picturebook_iddpm"
T = 1000
STEPS = 100
MOST_BOUNDED = 32  # pictures whose NLL is measured: it takes T passes each, and varies little
SIZE = 32


def settings(cell: Cell) -> dict[str, Any]:
    """Of a small unconditional model of pixels; the L_simple one does not learn its variance."""
    schedule, objective = cell
    learns_variance = objective != "simple"
    return {
        "text_encoder": str(DEFAULT_MODEL),
        "data.caption_column": "background",  # all are dropped, and these are but eight to encode
        "objective.caption_dropout": 1.0,
        "model.block_out_channels": [32, 64, 64],
        "model.layers_per_block": 1,
        "model.down_block_types": ["DownBlock2D"] * 3,
        "model.up_block_types": ["UpBlock2D"] * 3,
        "model.out_channels": 6 if learns_variance else 3,
        "loop.optimizer": "muon",  # after 300 steps a third of the loss that AdamW has
        "loop.learning_rate": 5e-3,
        "loop.ema_decay": 0.995,
        "scheduler.num_train_timesteps": T,
        "scheduler.variance_type": "learned_range" if learns_variance else None,
        "settings.steps": STEPS,
        "settings.guidance": 0.0,
        **{f"scheduler.{name}": value for name, value in SCHEDULES[schedule].items()},
        **{f"objective.{name}": value for name, value in OBJECTIVES[objective].items()},
    }


def model(cell: Cell, setup: Setup) -> TextToImagePipeline:
    folder = setup.out / f"pixels-{'-'.join(cell)}-{setup.training_steps}steps"
    made = trained(folder, PRESET, SIZE, setup.training_steps, settings(cell))
    return TextToImagePipeline.from_pretrained(made, dtype="float32")


def measure(cell: Cell, setup: Setup) -> dict[str, float]:
    pipe = model(cell, setup)
    images = render(pipe, [""] * setup.pictures, sample_ddpm, pipe.schedule.timesteps(STEPS, "linspace"))
    return {NLL: nll(pipe, setup), "FID": fid(images)}


def nll(pipe: TextToImagePipeline, setup: Setup) -> float:
    """The mean bound in bits per dimension of pictures that the model was not trained on, over all T of its steps."""
    images = real_pictures(min(setup.pictures, MOST_BOUNDED), SIZE, OTHERS[0]).images
    totals = []
    for start, some in enumerate(images.split(BATCH)):
        generator = Generator().manual_seed(start)
        bits = bound(
            denoiser(pipe, [""] * len(some)),
            some.to(pipe.device),
            pipe.schedule,
            pipe.schedule.timesteps(pipe.schedule.steps, "linspace"),
            variance="learned" if pipe.model.scheduler.learns_variance else "beta_tilde",
            data="8-bit",
            randn=partial(torch.randn, generator=generator),
        )
        totals.append(bits.total)
    return torch.cat(totals).mean().item()


def seconds_a_pass(cell: Cell) -> float:
    return seconds_a_pass_of(PRESET, settings(cell), SIZE, torch.float32)


def seconds(cells: Sequence[Cell], setup: Setup) -> float:
    training = setup.training_steps * BATCH * PASSES_OF_A_STEP
    passes = training + setup.pictures * STEPS + min(setup.pictures, MOST_BOUNDED) * T
    return len(cells) * passes * seconds_a_pass(cells[0])


def panel(axes: "Axes", results: Results, metric: str) -> None:
    groups: dict[str, dict[str, float]] = {}
    for (schedule, objective), figures in results.items():
        groups.setdefault(schedule, {})[objective] = figures[metric]
    bars(axes, groups, list(OBJECTIVES))
    axes.set_ylabel(metric)


def _lower(metric: str, *pairs: tuple[Cell, Cell]) -> Callable[[Results], bool]:
    """Whether each pair's first cell has the lower figure."""
    return lambda results: all([results[one][metric] < results[other][metric] for one, other in pairs])


def _paper(name: str, table: int, iterations: str, figures: dict[Cell, tuple[float, float]]) -> Paper:
    return Paper(
        name,
        f"Nichol and Dhariwal 2021, table {table}, T = 4000, {iterations} iterations",
        {cell: {NLL: bits, "FID": distance} for cell, (bits, distance) in figures.items()},
        f"another world, a hundred times the network, T = 4000 where ours is {T}, Inception's features, and 50,000 "
        f"pictures of all T steps where ours are N of {STEPS} steps",
    )


TABLE = Table(
    title="NLL and FID by noise schedule and objective, small models of pixels",
    rows="schedule",
    columns="objective",
    metrics=(NLL, "FID"),
    cells=CELLS,
    papers=(
        _paper(
            "ImageNet 64x64",
            1,
            "200K",
            {
                ("linear", "simple"): (3.77, 31.3),
                ("linear", "hybrid"): (3.66, 32.2),
                ("cosine", "simple"): (3.68, 27.0),
                ("cosine", "hybrid"): (3.62, 28.0),
                ("cosine", "bound"): (3.57, 56.7),
            },
        ),
        _paper(
            "CIFAR-10",
            2,
            "500K",
            {
                ("linear", "simple"): (3.37, 2.90),
                ("linear", "hybrid"): (3.26, 3.07),
                ("cosine", "simple"): (3.26, 3.05),
                ("cosine", "hybrid"): (3.17, 3.19),
                ("cosine", "bound"): (2.94, 11.47),
            },
        ),
    ),
    claims=(
        Claim("the hybrid has a lower NLL than L_simple, on either schedule", _lower(NLL, *HYBRID_TO_SIMPLE)),
        Claim("the bound has the lowest NLL", _lower(NLL, *((BOUND, other) for other in OTHER_CELLS))),
        Claim("the bound has the highest FID", _lower("FID", *((other, BOUND) for other in OTHER_CELLS))),
        Claim("cosine has a lower NLL than linear, by L_simple and the hybrid", _lower(NLL, *COSINE_TO_LINEAR)),
        Claim("cosine has a lower FID than linear, by L_simple and the hybrid", _lower("FID", *COSINE_TO_LINEAR)),
    ),
    panels=(partial(panel, metric=NLL), partial(panel, metric="FID")),
    measure=measure,
    seconds=seconds,
    size=SIZE,
    pictures=500,
    training_steps=2000,
    notes=(
        f"NLL is the bound of at most {MOST_BOUNDED} pictures over all T = {T} steps, with the variance that was "
        f"learned, or beta-tilde after L_simple; FID is of {STEPS} steps of ancestral sampling with that variance. "
        f"The bound is trained with importance-sampled times. Pictures of {SIZE} px are enlarged for the judge. All "
        "are trained by Muon, and x0 is clipped to what pixels can be, in sampling as in the bound.",
    ),
)
