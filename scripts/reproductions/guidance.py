"""FID against an inception-style score, by guidance and share of empty captions (Ho and Salimans 2022, table 1)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from evaluation.metrics import inception_score

from ldm.samplers import sample_ddim
from pipelines import TextToImagePipeline
from pipelines.loading import DEFAULT_MODEL
from reproductions.measure import REAL, RIGHT, RIGHT_IS, THINGS, judged, kind_logits, real_pictures
from reproductions.models import (
    BATCH,
    PASSES_OF_A_STEP,
    SIDE,
    default_model,
    render,
    seconds_a_pass,
    seconds_a_pass_of,
    trained,
)
from reproductions.plot import curves
from reproductions.table import SAME_CAPTIONS, Cell, Claim, Paper, Results, Setup, Table, along, fingerprint, rises

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN = "0.1"
"""The share of empty captions that the default model was trained with."""
SHARES = (OWN, "0.2", "0.5")
W = ("0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1", "2", "3", "4")
SHOWN = ("0", "1", "4")  # the w written beside the curves
LITTLE = 0.5
STEPS = 20
SCORE = "inception-style score"
WEIGHTS = (DEFAULT_MODEL / "unet", DEFAULT_MODEL / "vae", DEFAULT_MODEL / "text_encoder")
SMALL_WEIGHTS = WEIGHTS[1:]
SMALL_PRESET = "picturebook_unet"
SMALL_SETTINGS: dict[str, Any] = {
    "autoencoder": str(DEFAULT_MODEL),
    "text_encoder": str(DEFAULT_MODEL),
    "model.block_out_channels": [32, 64, 96],
    "loop.ema_decay": 0.995,
}


def model(share: str, setup: Setup) -> TextToImagePipeline:
    """The default model, or what it becomes when it goes on training with another share of empty captions."""
    if share == OWN:
        return default_model()
    folder = setup.out / f"guidance-{share}-{setup.training_steps}steps-from-{fingerprint(*WEIGHTS)}"
    settings = {
        "init": str(DEFAULT_MODEL),
        "autoencoder": str(DEFAULT_MODEL),
        "train_text_encoder": False,
        "cache_contexts": True,
        "whiten_contexts": True,
        "objective.times": "logit_normal",
        "objective.caption_dropout": float(share),
        "loop.learning_rate": 2e-4,
    }
    return TextToImagePipeline.from_pretrained(trained(folder, "own_128_unet", SIDE, setup.training_steps, settings))


def small_model(share: str, setup: Setup) -> TextToImagePipeline:
    """A small U-Net that has learned from nothing, with that share of empty captions, the default model's latents."""
    folder = setup.out / f"guidance-small-{share}-{setup.training_steps}steps-from-{fingerprint(*SMALL_WEIGHTS)}"
    settings = {**SMALL_SETTINGS, "objective.caption_dropout": float(share)}
    return TextToImagePipeline.from_pretrained(trained(folder, SMALL_PRESET, SIDE, setup.training_steps, settings))


def measure(cell: Cell, setup: Setup) -> dict[str, float]:
    return figures_of(model(cell[1], setup), cell, setup)


def measure_small(cell: Cell, setup: Setup) -> dict[str, float]:
    return figures_of(small_model(cell[1], setup), cell, setup)


def figures_of(pipe: TextToImagePipeline, cell: Cell, setup: Setup) -> dict[str, float]:
    w, _ = cell
    real = real_pictures(setup.pictures, SIDE, REAL)
    images = render(pipe, real.captions, sample_ddim, pipe.schedule.timesteps(STEPS, "trailing"), scale=float(w) + 1)
    return {**judged(images, real), SCORE: inception_score(kind_logits(images))}


def passes(cells: Sequence[Cell], setup: Setup, models: int) -> int:
    """Of rendering the cells and of training so many models."""
    rendering = sum(setup.pictures * STEPS * (1 if w == "0" else 2) for w, _ in cells)
    return rendering + models * setup.training_steps * BATCH * PASSES_OF_A_STEP


def seconds(cells: Sequence[Cell], setup: Setup) -> float:
    return passes(cells, setup, len({share for _, share in cells} - {OWN})) * seconds_a_pass(default_model())


def seconds_of_small(cells: Sequence[Cell], setup: Setup) -> float:
    a_pass = seconds_a_pass_of(SMALL_PRESET, SMALL_SETTINGS, default_model().unet.config.sample_size)
    return passes(cells, setup, len({share for _, share in cells})) * a_pass


def panel(axes: "Axes", results: Results, worth: str, fid: str) -> None:
    """A FID over what guidance is to raise, a curve for each share, along which w rises."""
    from matplotlib.ticker import MaxNLocator

    at: dict[str, dict[str, tuple[float, float]]] = {share: {} for share in SHARES}
    for (w, share), figures in results.items():
        if worth in figures:
            at[share][w] = figures[worth], figures[fid]
    curves(axes, {f"p_uncond {share}": list(points.values()) for share, points in at.items()})
    for w, point in at[OWN].items():
        if w in SHOWN:
            axes.annotate(f"w={w}", point, textcoords="offset points", xytext=(5, 4))
    axes.set(xlabel=worth, ylabel=fid)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # where the scores hardly differ, each has many digits


def _a_little_is_best(results: Results, fid: str) -> bool:
    """Whether that FID is lowest at a w of 0.1 to 0.5, at every share."""
    return all(0 < _best_w(results, share, fid) <= LITTLE for share in _shares(results))


def _best_w(results: Results, share: str, fid: str) -> float:
    along(results, fid, column=share)
    return min((figures[fid], float(w)) for (w, column), figures in results.items() if column == share)[1]


def _largest(results: Results) -> str:
    return max((w for w, _ in results), key=float)


def _shares(results: Results) -> list[str]:
    """Those that were measured at two w or more. Raises KeyError if none was."""
    counts = [column for _, column in results]
    if found := [share for share in SHARES if counts.count(share) >= 2]:
        return found
    raise KeyError(SHARES)


def _half_is_worst(results: Results) -> bool:
    values = [[results[w, share][SCORE] for share in SHARES] for w in dict.fromkeys(w for w, _ in results)]
    if not values:
        raise KeyError(SCORE)
    return all(half < min(others) for *others, half in values)


def _imagenet() -> Results:
    """FID and inception score of each w, each at the three shares."""
    rows = """1.8 1.8 2.21 53.71 52.9 47.61
              1.55 1.62 1.91 66.11 64.58 56.1
              2.04 2.1 2.08 78.91 76.99 65.6
              3.03 2.93 2.65 92.8 88.64 74.92
              4.3 4 3.44 106.2 101.11 84.27
              5.74 5.19 4.34 119.3 112.15 92.95
              7.19 6.48 5.27 131.1 122.13 102
              8.62 7.73 6.23 141.8 131.6 109.8
              10.08 8.9 7.25 151.6 140.82 116.9
              11.41 10.09 8.21 161 150.26 124.6
              12.6 11.21 9.13 170.1 158.29 131.1
              21.03 18.79 16.16 225.5 212.98 183
              24.83 22.36 19.75 250.4 237.65 208.9
              26.22 23.84 21.48 260.2 248.97 225.1""".splitlines()
    numbers = [[float(number) for number in row.split()] for row in rows]
    return {
        (w, share): {"FID": row[place], SCORE: row[place + 3]}
        for w, row in zip(W, numbers, strict=True)
        for place, share in enumerate(SHARES)
    }


TABLE = Table(
    title="FID against an inception-style score over guidance, default model",
    rows="w",
    columns="p_uncond",
    metrics=("FID", SCORE, THINGS, RIGHT),
    cells=tuple(product(W, SHARES)),
    papers=(
        Paper(
            "ImageNet 64x64",
            "Ho and Salimans 2022, table 1",
            _imagenet(),
            "another world, classes for captions, models trained from nothing at each p_uncond, Inception's features "
            "and 1000 classes where ours are the judge's kinds of things, and 50,000 pictures where ours are N",
        ),
    ),
    claims=(
        Claim(
            "the score rises with w",
            lambda r: all(rises(along(r, SCORE, column=share)) for share in _shares(r)),
        ),
        Claim(
            "FID is lowest at a little guidance, w of 0.1 to 0.5",
            partial(_a_little_is_best, fid="FID"),
        ),
        Claim(
            "much guidance costs FID: more at the largest w than at 0",
            lambda r: all(r[_largest(r), share]["FID"] > r["0", share]["FID"] for share in _shares(r)),
        ),
        Claim("p_uncond 0.5 has the lowest score at every w", _half_is_worst),
        Claim(
            "more captions are right at w = 1 than at 0",
            lambda r: all(r["1", share][RIGHT] > r["0", share][RIGHT] for share in _shares(r)),
        ),
        Claim("FID of things is lowest at a little guidance", partial(_a_little_is_best, fid=THINGS)),
    ),
    panels=(partial(panel, worth=SCORE, fid="FID"), partial(panel, worth=RIGHT, fid=THINGS)),
    measure=measure,
    seconds=seconds,
    size=SIDE,
    pictures=500,
    training_steps=500,
    notes=(
        f"The {SCORE} is exp(mean KL(p(y|x) || p(y))), where y is the judge's kind of the thing that it is surest of; "
        "in the paper it is the inception score.",
        RIGHT_IS,
        SAME_CAPTIONS,
        f"p_uncond {OWN} is the default model as it is; the others are the default model after that much more training "
        "with their share of empty captions, so they also know that much more. "
        f"w is guidance - 1; sampling takes {STEPS} steps of DDIM. All cells have the same captions and noise, so what "
        "differs between them is surer than what differs from real pictures.",
    ),
    weights=WEIGHTS,
)
SMALL = replace(
    TABLE,
    title="FID against an inception-style score over guidance, small models trained from nothing",
    measure=measure_small,
    seconds=seconds_of_small,
    training_steps=2000,
    notes=(
        *TABLE.notes[:3],
        "Each p_uncond has a model of its own, with the default model's autoencoder and text encoder. "
        f"w is guidance - 1; sampling takes {STEPS} steps of DDIM.",
    ),
    weights=SMALL_WEIGHTS,
)
