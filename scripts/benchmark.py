"""Measure speed and memory, alone or against diffusers doing the same work in turn.

    python scripts/benchmark.py inference --preset sd15 --against diffusers [--steps 20] [--compile] [--profile]
    python scripts/benchmark.py autoencoder --preset sd15 --against diffusers [--encode]
    python scripts/benchmark.py train --against diffusers
    python scripts/benchmark.py startup --against diffusers
    python scripts/benchmark.py memory --against diffusers
    python scripts/benchmark.py growth [--against diffusers] [--plot growth.png]
    python scripts/benchmark.py shortcuts [--pictures 200]     what changes the picture: time against caption accuracy

Each also writes what it prints, the machine and the versions to `--json FILE`. diffusers runs twice: "default", as it
comes (float32), and "tuned" by its documentation (our dtype, channels_last). A speed-up is the median of the ratios of
at least 15 pairs (5 of over 20 s), with its 95 % bootstrap interval, whose lower bound is what counts. There is none
where the outputs differ: then one line says so, and the exit code is 2.

Two commands differ. Of `train`, "default" is the step of diffusers' example script in our mixed precision, and "tuned"
diffusers' U-Net in our own loop. In `growth` ours makes a batch in blocks of 8 pictures, and diffusers all at once.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarking import rivals, timing
from benchmarking.comparison import Row, compare, machine, show, show_operators, versions
from benchmarking.growth import measure_growth
from benchmarking.shortcuts import measure_shortcuts, show_shortcuts
from benchmarking.timing import MEGABYTE, refuse_difference, run_process, spread, table
from benchmarking.training_step import training_step
from benchmarking.workloads import PRESETS, PROMPT, Setup, Side, Sides, coding, guided_step, picture, write_model
from output_files import check_file, check_picture
from PIL import Image
from torch import Tensor

from pipelines import TextToImagePipeline
from pipelines.errors import one_line_errors
from pipelines.request import MAX_PICTURES, MAX_SIDE
from pipelines.runtime import pick_device, pick_dtype
from pipelines.text_to_image import BATCH

ROOT = Path(__file__).parents[1]
LDM = (
    "import sys; from pipelines.cli import main; main(sys.argv[1:]);"
    "import torch; print(torch.cuda.max_memory_allocated())"
)
HELP = "from pipelines.cli import main; main(['--help'])"
LEVEL = 1.5 / 255  # how far pixels of 8 bits may be apart
SEEDS = 5  # of pictures that are compared in half precision, where one alone may be far off by chance
MEMORY_RUNS = 3


def measure(args: argparse.Namespace, setup: Setup, works: Mapping[str, Callable[[], Sides]]) -> list[Row]:
    """Compares one work after the other, and shows each; only one has its modules in memory at a time."""
    rows = []
    for what, make in works.items():
        sides = make()
        found = compare(what, sides, setup.device, exact=setup.dtype == torch.float32, rounds=args.pairs)
        show(found)
        if args.profile:
            show_operators(sides, setup.device)
        rows += found
    return rows


def described(args: argparse.Namespace, setup: Setup, what: str) -> str:
    dtype = str(setup.dtype).removeprefix("torch.")
    return f"{what}: {args.preset}, {setup.size} px, batch {setup.batch}, {dtype}"


def inference(args: argparse.Namespace, setup: Setup) -> list[Row]:
    works = {described(args, setup, "a guided step"): lambda: guided_step(setup)}
    if args.steps is not None:
        works[described(args, setup, f"pictures of {args.steps} steps")] = lambda: picture(setup, args.steps)
    return measure(args, setup, works)


def autoencoder(args: argparse.Namespace, setup: Setup) -> list[Row]:
    what = described(args, setup, "encoding" if args.encode else "decoding")
    return measure(args, setup, {what: lambda: coding(setup, args.encode)})


def train(args: argparse.Namespace, setup: Setup) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        what = described(args, setup, "a training step")
        return measure(args, setup, {what: lambda: training_step(setup, Path(folder))})


def commands(args: argparse.Namespace, setup: Setup, model: Path, folder: Path, seed: int = 0) -> dict[str, list[str]]:
    """What renders one picture in a process of its own, to `SIDE.png` in the folder, by side.

    The last word on stdout is the number of bytes of an accelerator that it had at most.
    """
    dtype = str(setup.dtype).removeprefix("torch.")
    steps = str(args.steps or setup.preset.settings.steps)
    guidance, size, device = str(setup.preset.settings.guidance), str(setup.size), str(setup.device)
    ours = [sys.executable, "-c", LDM, "render", PROMPT, "-o", str(folder / "ours.png"), "--model", str(model)]
    ours += ["--steps", steps, "--guidance", guidance, "--sampler", "ddim", "--width", size, "--height", size]
    found = {"ours": [*ours, "--seed", str(seed), "--device", device, "--dtype", dtype]}
    if setup.against:
        script = folder / "diffusers_render.py"
        rivals.write_script(script)
        for name, *how in (("default", "float32", "contiguous"), ("tuned", dtype, "channels_last")):
            asked = [PROMPT, str(seed), size, steps, guidance, device, *how]
            found[name] = [sys.executable, str(script), str(model), str(folder / f"{name}.png"), *asked]
    return found


def read_picture(file: Path) -> Tensor:
    """[H,W,3] in [0,1]."""
    return torch.from_numpy(np.array(Image.open(file), dtype=np.float32) / 255)


def prepare_processes(args: argparse.Namespace, setup: Setup, folder: Path) -> dict[str, list[str]]:
    """Writes the model, and returns the commands of all sides. Raises ValueError if their pictures differ."""
    model = write_model(setup.preset, folder / "model")
    exact = setup.dtype == torch.float32
    pictures: dict[str, list[Tensor]] = defaultdict(list)
    for seed in range((1 if exact else SEEDS) if setup.against else 0):
        for side, command in commands(args, setup, model, folder, seed).items():
            run_process(command, ROOT, args.threads)
            pictures[side].append(read_picture(folder / f"{side}.png"))
    if pictures:
        refuse_difference(pictures, exact, LEVEL)
    return commands(args, setup, model, folder)


def startup(args: argparse.Namespace, setup: Setup) -> list[Row]:
    """Processes from start to end; their memory is the other command's business."""
    exact = setup.dtype == torch.float32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def side(name: str, command: Sequence[str]) -> Side:
            def run() -> Tensor:
                run_process(command, ROOT, args.threads)
                return read_picture(folder / f"{name}.png")

            return Side(run)

        sides = {name: side(name, command) for name, command in prepare_processes(args, setup, folder).items()}
        what = described(args, setup, "ldm render, from start to file")
        rows = compare(what, sides, None, exact=exact, rounds=args.pairs)
    show(rows)

    def ask_for_help() -> Tensor:
        run_process([sys.executable, "-c", HELP], ROOT, args.threads)
        return torch.zeros(1)

    helped = compare("ldm --help", {"ours": Side(ask_for_help)}, None, exact=exact, rounds=args.pairs)
    show(helped)
    return rows + helped


def memory(args: argparse.Namespace, setup: Setup) -> list[Row]:
    """Peaks of whole processes that render one picture each; medians of three."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side, command in prepare_processes(args, setup, folder).items():
            runs = [run_process(command, ROOT, args.threads) for _ in range(args.pairs or MEMORY_RUNS)]
            peaks = {
                "private": [each.private for each in runs],
                "resident": [each.resident for each in runs],
                "accelerator": [int(each.stdout.split()[-1]) for each in runs],
            }
            rows.append({"what": "memory", "side": side, **{key: spread(values) for key, values in peaks.items()}})
    kinds = ("private", "resident", "accelerator")
    written = []
    for row in rows:
        row["times ours"] = row["private"]["median"] / rows[0]["private"]["median"]
        medians = {kind: f"{row[kind]['median'] / MEGABYTE:.0f}" for kind in kinds}
        written.append({"side": row["side"], **medians, "private / ours": f"{row['times ours']:.3f}"})
    print(f"\n{described(args, setup, 'peak memory of a process that renders, MB')}")
    print(table(written))
    return rows


def growth(args: argparse.Namespace, setup: Setup) -> list[Row]:
    axes = {"size": args.sizes, "batch": args.batches, "steps": args.step_counts}
    with tempfile.TemporaryDirectory() as folder:
        return measure_growth(
            setup, write_model(setup.preset, Path(folder) / "model"), PROMPT, axes, args.pairs, args.plot
        )


def shortcuts(args: argparse.Namespace, setup: Setup) -> list[Row]:
    if args.preset != "default" or setup.against:
        raise ValueError("shortcuts are judged on the default model alone; leave out --preset and --against")
    rows = measure_shortcuts(
        TextToImagePipeline.from_pretrained(None, setup.device, setup.dtype), args.pictures, args.pairs
    )
    show_shortcuts(rows)
    return rows


def check_axes(axes: Mapping[str, tuple[Sequence[int], int, int]]) -> None:
    """Raises ValueError unless each option's values, of which the multiple and the most are given, have a slope."""
    for option, (values, multiple, most) in axes.items():
        for value in values:
            if not 0 < value <= most or value % multiple:
                allowed = f"multiples of {multiple}, {most} at most" if multiple > 1 else f"numbers from 1 to {most}"
                raise ValueError(f"{option} has {value}; give {allowed}")
        if len(set(values)) < 2:
            raise ValueError(f"{option} has the one value {values[0]}, along which nothing grows; give two or more")


def make_setup(args: argparse.Namespace) -> Setup:
    """Raises ValueError for what cannot be measured, or not be written."""
    check_file("--json", args.json)
    check_picture("--plot", getattr(args, "plot", None))
    for name in ("size", "batch", "pairs", "steps", "threads", "pictures"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; give at least 1")
    if not (timing.PROCESSES / "self" / "clear_refs").exists():
        raise ValueError("memory is measured through /proc; run this on Linux")
    compiled = getattr(args, "compile", False)
    if compiled and args.against is None:
        raise ValueError("--compile compiles diffusers' networks; give --against diffusers with it")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]()
    size = args.size or preset.size
    multiple = max(8, preset.configs.vae.downsampling_factor)
    if size % multiple:
        raise ValueError(f"--size is {size}; give a multiple of {multiple}")
    if args.run is growth:
        times = preset.scheduler.num_train_timesteps
        sizes, batches = (args.sizes, multiple, MAX_SIDE), (args.batches, 1, MAX_PICTURES)
        check_axes({"--sizes": sizes, "--batches": batches, "--step-counts": (args.step_counts, 1, times)})
    device = pick_device(args.device)
    batch = getattr(args, "batch", 1)
    return Setup(preset, size, batch, pick_dtype(args.dtype, device), device, args.against is not None, compiled)


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--against", choices=["diffusers"], help="by default nothing")
    shared.add_argument("--preset", choices=PRESETS, default="default", help="tiny is for trying the benchmark itself")
    shared.add_argument("--size", type=int, help="pixels of a side; by default the model's own")
    shared.add_argument("--dtype", help="of ours, and of diffusers tuned; by default the device's fastest")
    shared.add_argument("--device")
    shared.add_argument("--threads", type=int)
    shared.add_argument("--pairs", type=int, help="how often to measure; fewer than the default prove little")
    shared.add_argument("--json", type=Path, help="also write all figures to this file")
    repeated = argparse.ArgumentParser(add_help=False)
    repeated.add_argument("--profile", action="store_true", help="also print where the time goes")
    compiling = argparse.ArgumentParser(add_help=False)
    compiling.add_argument("--batch", type=int, default=1, help="pictures at once")
    compiling.add_argument("--compile", action="store_true", help="diffusers also with torch.compile")
    whole = argparse.ArgumentParser(parents=[shared, repeated, compiling], add_help=False)

    found = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    kinds = found.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def add(run: Callable[..., list[Row]], about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made = kinds.add_parser(run.__name__, parents=parents, help=about, description=about)
        made.set_defaults(run=run)
        return made

    one = add(inference, "a guided step of the U-Net; with --steps also whole pictures", whole)
    one.add_argument("--steps", type=int, help="also measure pictures of so many steps, from noise to pixels")
    add(autoencoder, "decoding pictures", whole).add_argument("--encode", action="store_true", help="encode instead")
    learning = add(train, "a training step of the U-Net with cached latents and contexts", shared, repeated)
    learning.add_argument("--batch", type=int, default=64, help="latents in a step")
    for run, about in ((startup, "a whole process that renders"), (memory, "peak memory of such a process")):
        add(run, about, shared).add_argument("--steps", type=int, help="by default the model's own number")
    growing = add(growth, "time and memory over resolution, batch and steps", shared)
    growing.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512, 768, 1024], help="pixels")
    about = f"pictures that are asked for at once; ours makes {BATCH} of them at a time"
    growing.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help=about)
    growing.add_argument("--step-counts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    growing.add_argument("--plot", type=Path, help="PNG to draw")
    about = "what the options that change a picture save and cost, on the default model"
    add(shortcuts, about, shared).add_argument("--pictures", type=int, default=200, help="held-out captions to render")
    return found


def main() -> None:
    args = parser().parse_args()
    with one_line_errors():
        setup = make_setup(args)
        facts = {"machine": machine(), "versions": versions()}
        rows = args.run(args, setup)
        print("\n" + "; ".join(f"{key} {value}" for each in facts.values() for key, value in each.items()))
        if args.json is not None:
            given = {key: str(value) for key, value in vars(args).items() if key != "run" and value is not None}
            args.json.write_text(json.dumps({"arguments": given, **facts, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
