"""What the shortcuts that change a picture save, and what they cost, on the default model in its own world."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from evaluation.caption_accuracy import accuracy, read_all
from evaluation.real_pictures import from_picturebook
from torch import Tensor
from tqdm import tqdm

from benchmarking.timing import finish, interleave, speed_up, spread, table
from pipelines import TextToImagePipeline

SEED = 2_000_001  # of the scenes, as in evaluate.py
SHORTCUTS: dict[str, dict[str, Any]] = {
    "none": {},
    "guidance interval 0.28 to 5.42": {"guidance_interval": (0.28, 5.42)},
    "guidance interval 0.28 to 2.9": {"guidance_interval": (0.28, 2.9)},
    "reuse 2": {"reuse": 2},
    "reuse 3": {"reuse": 3},
    "reuse 5": {"reuse": 5},
    "merge tokens 0.25": {"merge_tokens": 0.25},
    "merge tokens 0.5": {"merge_tokens": 0.5},
    "dpm++, 20 steps": {"sampler": "dpm++"},
    "dpm++, 10 steps": {"sampler": "dpm++", "num_inference_steps": 10},
    "dpm++, 5 steps": {"sampler": "dpm++", "num_inference_steps": 5},
    "ddim, 5 steps": {"sampler": "ddim", "num_inference_steps": 5},
}
"""Options of the pipeline by name; the intervals are those of Kynkaanniemi et al. 2024."""


@torch.inference_mode()
def measure_shortcuts(pipe: TextToImagePipeline, pictures: int, rounds: int | None) -> list[dict[str, Any]]:
    """Renders the captions of held-out scenes with each shortcut, and times one picture of each against none.

    A row has the network's evaluations of a picture, the speed-up, the caption accuracy (and that of the kinds alone),
    and the PSNR in dB against the exact pictures, over all of them.
    """
    side = pipe.own_size[0]
    real = from_picturebook(pictures, SEED, side)
    assert real.scenes is not None
    exact: Tensor | None = None
    # Without noise in its steps, so that there is one picture to come near.
    render = partial(pipe, output_type="pt", sampler="ddim")
    one = partial(render, real.prompts[0])
    rows = []
    for name, options in tqdm(SHORTCUTS.items(), desc="shortcuts", leave=False):
        with evaluations(pipe) as counted:
            made = render(real.prompts, **options).images
        assert isinstance(made, Tensor)
        made = (made * 255).round().cpu() / 255
        exact = made if exact is None else exact
        found = accuracy(read_all(real.scenes, made * 2 - 1).scores)
        runs = [partial(finish, partial(one, **each), pipe.device) for each in (options, {})]
        seconds = interleave(runs, rounds)
        row: dict[str, Any] = {"shortcut": name, "options": options, "pictures": pictures}
        row["evaluations"] = sum(counted) / pictures
        row["seconds"] = spread([each for each, _ in seconds])
        row["speed-up"] = dict(zip(("median", "low", "high"), speed_up(seconds), strict=True))
        row |= {key: found[key] for key in ("accuracy", "interval", "per attribute")}
        error = (made - exact).square().mean().item()
        row["psnr"] = None if error == 0 else -10 * torch.tensor(error).log10().item()
        rows.append(row)
    return rows


@contextmanager
def evaluations(pipe: TextToImagePipeline) -> Iterator[list[int]]:
    """Outputs of each call of the U-Net meanwhile, shallow calls of reused features too."""
    sizes: list[int] = []
    hook = pipe.unet.conv_out.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def show_shortcuts(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table; accuracies in per cent."""

    def cells(row: dict[str, Any]) -> dict[str, str]:
        low, high = row["interval"]
        return {
            "shortcut": row["shortcut"],
            "evaluations": f"{row['evaluations']:g}",
            "seconds": f"{row['seconds']['median']:.3f}",
            "speed-up (95 %)": "{median:.2f} ({low:.2f} to {high:.2f})".format(**row["speed-up"]),
            "captions right, %": f"{100 * row['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            "kinds right, %": f"{100 * row['per attribute']['kind']:.1f}",
            "dB to exact": "" if row["psnr"] is None else f"{row['psnr']:.1f}",
        }

    print(f"\nshortcuts on the default model, {rows[0]['pictures']} held-out captions")
    print(table([cells(row) for row in rows]))
