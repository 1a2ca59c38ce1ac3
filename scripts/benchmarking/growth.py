"""How time and memory grow with resolution, batch and steps: measured, fitted with power laws, drawn."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reproductions.plot import PALETTE, figure
from torch import Tensor
from tqdm import tqdm

from autoencoder.tiling import decode_tiled
from benchmarking import rivals
from benchmarking.timing import MEGABYTE, finish, interleave, power_law, table, working_memory
from benchmarking.workloads import Setup
from pipelines import TextToImagePipeline
from pipelines.text_to_image import BATCH, OVERLAP, TILE

RUNS = 3
STEPS = 2  # of the pictures whose size or number is varied
NOTES = {"batch": f"ours makes a batch in blocks of {BATCH}, which bounds its memory; diffusers makes all at once"}
"""What is to be known of an axis to read its figures."""
BELOW, ABOVE = 1.5, 4  # times farther than its curves a y axis goes: what does not grow looks so, a legend has room
Axis = list[float]
Curves = dict[str, dict[str, Axis]]
"""By side: its "seconds" and "bytes" at each value of an axis; bytes beside those of the weights."""


def measure_growth(
    setup: Setup,
    model: Path,
    prompt: str,
    axes: Mapping[str, Sequence[int]],
    runs: int | None,
    plot: Path | None,
) -> list[dict[str, Any]]:
    """Renders with the model in a folder along each of `axes` ("size", "batch" and "steps"), the others as `setup` has
    them, and decodes along "size", whole and in tiles. Prints tables, draws `plot`, returns a row for each axis.
    """
    pipe = TextToImagePipeline.from_pretrained(model, setup.device, setup.dtype)
    sides: dict[str, Callable[..., object]] = {"ours": partial(_render, pipe, prompt)}
    if setup.against:
        theirs = rivals.load_tuned_pipeline(model, setup.device, setup.dtype)
        sides["diffusers tuned"] = partial(_render, theirs, prompt)
    base = {"size": setup.size, "batch": 1, "steps": STEPS}
    rows = []
    for axis, values in axes.items():
        points = [{side: partial(run, **{**base, axis: value}) for side, run in sides.items()} for value in values]
        rows.append(_measured(axis, values, points, setup.device, runs))
    points = [_decoders(pipe, setup, size) for size in axes["size"]]
    rows.append(_measured("size, decoding", axes["size"], points, setup.device, runs))
    for row in rows:
        _show(row)
    if plot is not None:
        _draw(plot, rows)
    return rows


@torch.inference_mode()
def _render(pipe: Any, prompt: str, size: int, batch: int, steps: int) -> None:
    pipe([prompt] * batch, height=size, width=size, num_inference_steps=steps, output_type="pt")


def _decoders(pipe: TextToImagePipeline, setup: Setup, size: int) -> dict[str, Callable[[], Tensor]]:
    cells = size // pipe.autoencoder.downsampling_factor
    latents = setup.noise(pipe.autoencoder.config.latent_channels, cells, cells).to(setup.dtype)

    def whole() -> Tensor:
        return pipe.autoencoder.decode(latents)

    def tiled() -> Tensor:
        return decode_tiled(pipe.autoencoder, latents, TILE, OVERLAP)

    return {"whole": torch.inference_mode()(whole), "tiled": torch.inference_mode()(tiled)}


def _measured(
    axis: str,
    values: Sequence[int],
    points: Sequence[Mapping[str, Callable[[], object]]],
    device: torch.device,
    runs: int | None,
) -> dict[str, Any]:
    curves: Curves = {side: {"seconds": [], "bytes": []} for side in points[0]}
    for point in tqdm(points, desc=axis, unit="value"):
        for side, run in point.items():
            run()
            curves[side]["bytes"].append(max(1, working_memory(run, device)))
        rounds = torch.tensor(interleave([partial(finish, run, device) for run in point.values()], runs or RUNS))
        for side, seconds in zip(point, rounds.median(0).values.tolist(), strict=True):
            curves[side]["seconds"].append(seconds)
    exponents = {
        side: {key: power_law(values, measured) for key, measured in curve.items()} for side, curve in curves.items()
    }
    row = {"what": axis, "values": list(values), "curves": curves, "exponents": exponents}
    return row | ({"note": NOTES[axis]} if axis in NOTES else {})


def _show(row: Mapping[str, Any]) -> None:
    units = (("seconds", "s", 1), ("bytes", "MB", MEGABYTE))
    lines = []
    for i, value in enumerate(row["values"]):
        line = {row["what"]: str(value)}
        for side, curve in row["curves"].items():
            line |= {f"{side} {unit}": f"{curve[key][i] / scale:.3g}" for key, unit, scale in units}
        lines.append(line)
    exponents = [f"{each[key]:z.2f}" for each in row["exponents"].values() for key, *_ in units]
    print(f"\nover {row['what']}")
    print(table([*lines, dict(zip(lines[0], ["exponent", *exponents], strict=True))]))
    if "note" in row:
        print(row["note"])


def _draw(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator

    with figure(file, "Time and memory beside the weights, with the exponents of fitted power laws", 6.5) as drawn:
        grid = drawn.subplots(2, len(rows), sharex="col")
        for column, row in zip(grid.T, rows, strict=True):
            column[0].set_title(row["what"], pad=12)
            for axes, key, unit, scale in zip(column, ("seconds", "bytes"), ("s", "MB"), (1, MEGABYTE), strict=True):
                for color, (side, curve) in zip(PALETTE, row["curves"].items(), strict=False):
                    label = f"{side}: {row['exponents'][side][key]:z.2f}"
                    axes.plot(row["values"], [each / scale for each in curve[key]], "o-", color=color, label=label)
                axes.set(xscale="log", yscale="log")
                axes.set_xticks(row["values"], labels=row["values"], rotation=90)
                axes.set_xticks([], minor=True)
                low, high = axes.get_ylim()
                axes.set_ylim(low / BELOW, high * ABOVE)
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
                axes.legend(loc="upper left", fontsize=9)
                if axes is grid[0, 0] or axes is grid[1, 0]:
                    axes.set_ylabel(unit)
