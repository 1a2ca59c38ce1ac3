"""FID over the number of steps and the noise of each (Song et al. 2020, table 1): of latents, and of pixels."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from torch import Tensor

from ldm.samplers import Sampler, sample_ddim, sample_ddpm
from pipelines import TextToImagePipeline
from pipelines.loading import DEFAULT_MODEL
from reproductions import objectives
from reproductions.measure import REAL, RIGHT, RIGHT_IS, THINGS, fid, judged, real_pictures
from reproductions.models import BATCH, PASSES_OF_A_STEP, SIDE, default_model, render, seconds_a_pass
from reproductions.plot import curves
from reproductions.table import SAME_CAPTIONS, Cell, Claim, Paper, Results, Setup, Table, along, falls, rises

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGE = "sigma-hat"
"""The process's own beta for the variance of each step, larger than that of eta 1 (the paper, below eq. 16)."""
ETAS = ("0", "0.2", "0.5", "1", LARGE)
STEPS = ("10", "20", "50", "100", "1000")
DDPM = ("linear", "simple")
"""The small model of pixels: as the paper's, but for its size."""


def sampler(eta: str) -> Sampler:
    return partial(sample_ddpm, variance="beta") if eta == LARGE else partial(sample_ddim, eta=float(eta))


def rendered(pipe: TextToImagePipeline, cell: Cell, captions: Sequence[str]) -> Tensor:
    eta, steps = cell
    return render(pipe, captions, sampler(eta), pipe.schedule.timesteps(int(steps), "linspace"))


def measure_latents(cell: Cell, setup: Setup) -> dict[str, float]:
    real = real_pictures(setup.pictures, SIDE, REAL)
    return judged(rendered(default_model(), cell, real.captions), real)


def measure_pixels(cell: Cell, setup: Setup) -> dict[str, float]:
    return {"FID": fid(rendered(objectives.model(DDPM, setup), cell, [""] * setup.pictures))}


def passes(cells: Sequence[Cell], setup: Setup) -> int:
    return setup.pictures * sum(int(steps) for _, steps in cells)


def seconds_of_latents(cells: Sequence[Cell], setup: Setup) -> float:
    return passes(cells, setup) * seconds_a_pass(default_model())


def seconds_of_pixels(cells: Sequence[Cell], setup: Setup) -> float:
    training = setup.training_steps * BATCH * PASSES_OF_A_STEP
    return (passes(cells, setup) + training) * objectives.seconds_a_pass(DDPM)


def panel(axes: "Axes", results: Results, metric: str) -> None:
    """A metric over the steps, a curve for each eta."""
    from matplotlib.ticker import LogLocator

    curves(axes, {f"eta {eta}" if eta != LARGE else LARGE: _row(results, eta, metric) for eta in ETAS})
    axes.set(xscale="log", xlabel="steps", ylabel=metric)
    steps = sorted({int(column) for _, column in results})
    axes.set_xticks(steps, labels=[str(each) for each in steps])
    if metric != RIGHT:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _row(results: Results, eta: str, metric: str) -> list[tuple[float, float]]:
    here = {int(steps): figures for (row, steps), figures in results.items() if row == eta}
    return [(steps, figures[metric]) for steps, figures in here.items() if metric in figures]


def _fewest(results: Results) -> str:
    return min((steps for _, steps in results), key=int, default="")


def _gain(results: Results, metric: str, eta: str) -> float:
    """How many times as large a FID is at the fewest steps as at the most."""
    figures = along(results, metric, row=eta)
    return figures[0] / figures[-1]


def _claims(metric: str) -> tuple[Claim, ...]:
    """What the paper's table shows, of that FID."""
    by = "" if metric == "FID" else f", by {metric}"

    def at_fewest_steps(results: Results) -> list[float]:
        return along(results, metric, column=_fewest(results))

    return (
        Claim(f"at eta 0 FID falls with the steps{by}", lambda r: falls(along(r, metric, row="0"))),
        Claim(
            f"at the fewest steps FID rises with eta, of which sigma-hat counts as the last{by}",
            lambda r: rises(at_fewest_steps(r)),
        ),
        Claim(
            f"at the fewest steps sigma-hat is worst{by}",
            lambda r: r[LARGE, _fewest(r)][metric] == max(at_fewest_steps(r)),
        ),
        Claim(
            f"sigma-hat gains most from more steps{by}",
            lambda r: _gain(r, metric, LARGE) == max(_gain(r, metric, eta) for eta in ETAS),
        ),
        Claim(
            f"at 1000 steps sigma-hat is best{by}",
            lambda r: r[LARGE, "1000"][metric] == min(along(r, metric, column="1000")),
        ),
    )


def _paper(name: str, figures: str) -> Paper:
    numbers = [float(number) for number in figures.split()]
    return Paper(
        name,
        "Song et al. 2020, table 1",
        {cell: {"FID": number} for cell, number in zip(product(ETAS, STEPS), numbers, strict=True)},
        "another world and a larger model, unconditional and of pixels, Inception's features, and 50,000 pictures "
        "where ours are N; CIFAR-10's times are spaced by their squares there",
    )


PAPERS = (
    _paper(
        "CIFAR-10",
        """ 13.36   6.84   4.67   4.16   4.04
            14.04   7.11   4.77   4.25   4.09
            16.66   8.35   5.25   4.46   4.29
            41.07  18.36   8.01   5.78   4.73
           367.43 133.37  32.72   9.99   3.17""",
    ),
    _paper(
        "CelebA",
        """ 17.33  13.73   9.17   6.53   3.51
            17.66  14.11   9.51   6.79   3.64
            19.86  16.06  11.01   8.09   4.28
            33.12  26.03  18.48  13.93   5.98
           299.71 183.83  71.71  45.20   3.26""",
    ),
)

TIMES = (
    "The times are evenly spaced from T - 1 to 0, both included: like the paper's, they end with a step from next to "
    "no noise, in which sigma-hat's surplus stays."
)
LATENTS = Table(
    title="FID by the steps of sampling and the noise of each, default model",
    rows="eta",
    columns="steps",
    metrics=("FID", THINGS, RIGHT),
    cells=tuple(product(ETAS, STEPS)),
    papers=PAPERS,
    claims=_claims("FID") + _claims(THINGS),
    panels=tuple(partial(panel, metric=metric) for metric in ("FID", THINGS, RIGHT)),
    measure=measure_latents,
    seconds=seconds_of_latents,
    size=SIDE,
    pictures=500,
    notes=(f"{SAME_CAPTIONS} There is no guidance.", RIGHT_IS, TIMES),
    weights=(DEFAULT_MODEL / "unet", DEFAULT_MODEL / "vae", DEFAULT_MODEL / "text_encoder"),
)
PIXELS = replace(
    LATENTS,
    title="FID by the steps of sampling and the noise of each, a small model of pixels",
    metrics=("FID",),
    claims=_claims("FID"),
    panels=LATENTS.panels[:1],
    measure=measure_pixels,
    seconds=seconds_of_pixels,
    size=objectives.SIZE,
    training_steps=2000,
    notes=("The model is unconditional and was trained by L_simple on the linear schedule of T = 1000.", TIMES),
    weights=(),
)
