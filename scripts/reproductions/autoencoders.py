"""Reconstruction by downsampling factor and discriminator (Rombach et al. 2022, table 8; Esser et al. 2021)."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from evaluation.measurements import from_pixels, to_pixels
from picturebook import UNITS
from torch import Tensor

from pipelines.loading import load_autoencoder
from reproductions.measure import REAL, fid, real_pictures
from reproductions.models import BATCH, PASSES_OF_A_STEP, configured, seconds_taken, trained
from reproductions.plot import bars
from reproductions.table import Cell, Claim, Paper, Results, Setup, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autoencoder import Autoencoder

CHANNELS = {"f = 4": [16, 32, 64], "f = 8": [16, 32, 64, 64]}
WITH, WITHOUT = "with discriminator", "without discriminator"
RFID, PSNR = "rFID", "PSNR (dB)"
JOINS_AT = 0.6  # of the training, the discriminator


def settings(cell: Cell, steps: int) -> dict[str, Any]:
    factor, adversary = cell
    channels = CHANNELS[factor]
    start = int(JOINS_AT * steps)
    return {
        "model.block_out_channels": channels,
        "model.down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "model.up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "adversary.start": start if adversary == WITH else None,
        "adversary.warmup": (steps - start) // 10,
    }


def measure(cell: Cell, setup: Setup) -> dict[str, float]:
    from train_autoencoder import psnr

    steps = setup.training_steps
    folder = setup.out / f"autoencoders-{'-'.join(cell).replace(' ', '')}-{steps}steps"
    made = trained(folder, "picturebook_autoencoder", UNITS, steps, settings(cell, steps))
    images = real_pictures(setup.pictures, UNITS, REAL).images
    decoded = reconstruct(load_autoencoder(made / "vae").float(), images)
    return {RFID: fid(decoded), PSNR: psnr(images, decoded).item()}


@torch.inference_mode()
def reconstruct(autoencoder: "Autoencoder", images: Tensor) -> Tensor:
    """Decoded modes of the posterior, rounded to 8 bits."""
    autoencoder.eval()
    decoded = torch.cat([autoencoder.decode(autoencoder.encode(some)) for some in images.split(BATCH)])
    return from_pixels(to_pixels(decoded))


def seconds(cells: Sequence[Cell], setup: Setup) -> float:
    from autoencoder import Autoencoder

    _, config = configured("picturebook_autoencoder", settings(cells[0], setup.training_steps))
    autoencoder, images = Autoencoder(config.model), torch.zeros(BATCH, 3, UNITS, UNITS)
    passes = setup.training_steps * BATCH * PASSES_OF_A_STEP + setup.pictures
    return len(cells) * passes * seconds_taken(lambda: autoencoder.decode(autoencoder.encode(images))) / BATCH


def panel(axes: "Axes", results: Results, metric: str) -> None:
    groups: dict[str, dict[str, float]] = {}
    for (factor, adversary), figures in results.items():
        if metric in figures:
            groups.setdefault(factor, {})[adversary] = figures[metric]
    if groups:
        bars(axes, groups, (WITHOUT, WITH))
        axes.set_ylabel(metric)


def _better(metric: str, better: str, other: str, results: Results) -> bool:
    """Whether a metric is better in the row or column `better` than in `other`, wherever both were measured."""
    sign = 1 if metric == PSNR else -1
    pairs = [
        (figures[metric], results[twin][metric])
        for cell, figures in results.items()
        if better in cell and (twin := tuple(other if each == better else each for each in cell)) in results
        if metric in figures and metric in results[twin]
    ]
    if not pairs:
        raise KeyError(metric)
    return all([sign * value > sign * other_value for value, other_value in pairs])


TABLE = Table(
    title="Reconstruction by downsampling factor and discriminator, small autoencoders",
    rows="factor",
    columns="adversary",
    metrics=(RFID, PSNR),
    cells=tuple(product(CHANNELS, (WITHOUT, WITH))),
    papers=(
        Paper(
            "LDM, KL",
            "Rombach et al. 2022, table 8 (ImageNet validation, 256 px)",
            {("f = 4", WITH): {RFID: 0.27, PSNR: 27.53}, ("f = 8", WITH): {RFID: 0.90, PSNR: 24.19}},
            "photographs, ten and more times the network, a perceptual loss, 3 and 4 latent channels where ours are 4 "
            "at either factor, and Inception's features of 50,000 pictures",
        ),
        Paper(
            "VQGAN, dVAE",
            "Esser et al. 2021 and their released models (ImageNet validation, f = 8, 8192 codes); without a "
            "discriminator it is the dVAE of Ramesh et al. 2021, as they measured it",
            {("f = 8", WITHOUT): {RFID: 32.01}, ("f = 8", WITH): {RFID: 1.49}},
            "photographs, codebooks, and two models that differ in more than the discriminator",
        ),
    ),
    claims=(
        Claim("f = 4 has a lower rFID than f = 8", partial(_better, RFID, "f = 4", "f = 8")),
        Claim("f = 4 has a higher PSNR than f = 8", partial(_better, PSNR, "f = 4", "f = 8")),
        Claim("the discriminator lowers rFID", partial(_better, RFID, WITH, WITHOUT)),
        Claim("the discriminator costs PSNR (Blau and Michaeli 2018)", partial(_better, PSNR, WITHOUT, WITH)),
    ),
    panels=(partial(panel, metric=RFID), partial(panel, metric=PSNR)),
    measure=measure,
    seconds=seconds,
    size=UNITS,
    pictures=1000,
    training_steps=1500,
    notes=(
        "rFID is of the reconstructions of the very pictures that they are compared with.",
        f"The discriminator joins after {JOINS_AT:.0%} of the training; it makes a step dearer than the estimate says.",
    ),
)
