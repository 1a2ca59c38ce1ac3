"""The statistics of comparisons against closed forms, what is refused, and every command on tiny shapes."""

import io
import json
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import benchmark
import diffusers
import numpy as np
import pytest
import torch
from benchmarking import rivals, shortcuts, timing, training_step, workloads
from benchmarking.timing import (
    distance,
    interleave,
    largest_difference,
    power_law,
    refuse_difference,
    run_process,
    speed_up,
)
from diffusers import StableDiffusionPipeline
from evaluation.real_pictures import from_picturebook
from torch import Tensor, nn

from pipelines import TextToImagePipeline
from pipelines.text_to_image import BATCH

Json = dict[str, Any]


class Clock:
    """Seconds that pass only while something runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measure(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> list[Json]:
    """What the command wrote of two measurements on tiny shapes."""
    file = folder / "result.json"
    command, *others = arguments
    given = [command, "--preset", "tiny", "--pairs", "2", "--device", "cpu", "--json", str(file), *others]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *given])
    benchmark.main()
    written = json.loads(file.read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["threads"] == torch.get_num_threads()
    rows: list[Json] = written["results"]
    return rows


def refused(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line in which the command refuses."""
    with pytest.raises(SystemExit) as stopped:
        measure(monkeypatch, folder, *arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "speed-up" not in printed.out
    return line


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Commands that would start a process run here, which saves them their imports; they are listed."""
    seen: list[Sequence[str]] = []

    def run(command: Sequence[str], folder: Path, threads: int | None) -> timing.Finished:
        seen.append(command)
        out = io.StringIO()
        with monkeypatch.context() as patch, redirect_stdout(out):
            if command[1] == "-c":
                patch.setattr(sys, "argv", ["-c", *command[3:]])
                exec(command[2], {})
            else:
                patch.setattr(sys, "argv", list(command[1:]))
                runpy.run_path(command[1])
        return timing.Finished(out.getvalue(), resident=300, private=100 * len(seen))

    monkeypatch.setattr(benchmark, "run_process", run)
    return seen


def test_order_alternates_and_every_side_has_its_own_seconds() -> None:
    clock, order = Clock(), ""

    def run(name: str, seconds: float) -> None:
        nonlocal order
        clock.now += seconds
        order += name

    found = interleave([lambda: run("a", 1), lambda: run("b", 2)], 4, clock)
    assert order == "abbaabba"
    assert found == [(1, 2)] * 4


@pytest.mark.parametrize(("seconds", "rounds"), [(10.0, 15), (10.1, 5)])
def test_long_pairs_are_measured_five_times_and_others_fifteen(seconds: float, rounds: int) -> None:
    clock = Clock()

    def run() -> None:
        clock.now += seconds

    assert len(interleave([run, run], None, clock)) == rounds


def test_speed_up_of_constant_ratios_has_no_width() -> None:
    assert speed_up([(1.0, 3.0), (2.0, 6.0), (10.0, 30.0)]) == (3, 3, 3)


def test_speed_up_is_the_median_of_the_ratios_not_the_ratio_of_medians() -> None:
    median, low, high = speed_up([(1.0, 1.0), (2.0, 4.0), (1.0, 10.0)])
    assert (median, low, high) == (2, 1, 10)


def test_interval_of_the_speed_up_is_that_of_a_median() -> None:
    """The median of n normal numbers has a standard deviation of sqrt(pi / 2 n) sigma."""
    ratios = np.random.default_rng(1).normal(2, 0.1, 900)
    _, low, high = speed_up([(1.0, ratio) for ratio in ratios])
    assert low < np.median(ratios) < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(np.pi / 1800) * 0.1, rel=0.25)


def test_power_law() -> None:
    assert power_law([1, 2, 4, 8], [3 * x**1.7 for x in (1, 2, 4, 8)]) == pytest.approx(1.7)


def test_differences_are_relative_to_the_reference() -> None:
    reference, output = torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.0])
    assert largest_difference(output, reference) == pytest.approx(1 / 4)
    assert distance(output, reference) == pytest.approx(1 / 5)


def outputs(**off: float) -> dict[str, Tensor]:
    """A reference and sides that are off by so much of it."""
    reference = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    return {"default": reference, **{name: reference * (1 + far) for name, far in off.items()}}


@pytest.mark.parametrize(
    ("exact", "off", "fault"),
    [
        (True, {"ours": 0.9e-4, "tuned": 0.9e-4}, None),
        (True, {"ours": 1.1e-4, "tuned": 0}, "ours differs from diffusers in float32 by 0.00011, over 0.0001"),
        (True, {"ours": 0, "tuned": 1.1e-4}, "tuned differs"),
        (True, {"ours": float("nan"), "tuned": 0}, "ours differs from diffusers in float32 by nan"),
        (False, {"ours": 0.0149, "tuned": 0.01}, None),
        (False, {"ours": 0.0151, "tuned": 0.01}, "0.015, over 1.5 times the 0.01 of diffusers tuned"),
        (False, {"ours": 0.01, "tuned": 0.26}, "tuned differs from diffusers in float32 by 0.26, over 0.25"),
        (False, {"ours": 0.01, "tuned": 0.01, "compiled": 0.3}, "compiled differs"),
    ],
)
def test_ratios_of_different_work_are_refused(exact: bool, off: dict[str, float], fault: str | None) -> None:
    if fault is None:
        refuse_difference({name: [value] for name, value in outputs(**off).items()}, exact)
    else:
        with pytest.raises(ValueError, match=f"^no ratio: .*{fault}"):
            refuse_difference({name: [value] for name, value in outputs(**off).items()}, exact)


def test_of_several_pictures_in_half_precision_the_median_counts() -> None:
    many = [outputs(ours=far, tuned=0.01) for far in (0.2, 0.012, 0.01)]
    refuse_difference({name: [each[name] for each in many] for name in many[0]}, exact=False)
    with pytest.raises(ValueError, match=r"by 0\.2, over 0\.0001"):  # in float32 each does
        refuse_difference({name: [each[name] for each in many] for name in many[0]}, exact=True)


def test_working_memory_is_what_a_run_needs_at_most() -> None:
    """In a process of its own: what other tests have freed and `ldm.hardware` keeps would be used again, unseen."""
    code = """
import torch
from benchmarking.timing import working_memory

def run(*sizes):
    for size in sizes:
        torch.ones(size)

run(60_000_000)  # an earlier peak must not count
print(working_memory(lambda: run(20_000_000, 10_000_000), torch.device("cpu")))
"""
    finished = run_process([sys.executable, "-c", code], Path(benchmark.__file__).parent, threads=1)
    assert float(finished.stdout) == pytest.approx(80e6, rel=0.05)


def test_a_process_is_watched() -> None:
    code = "import time; kept = bytearray(b'x') * 60_000_000; time.sleep(0.05); print('done')"
    finished = run_process([sys.executable, "-c", code], Path(), threads=1)
    assert finished.stdout == "done\n"
    assert 60e6 < finished.private < finished.resident < 100e6


def test_threads_reach_a_process() -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert run_process([sys.executable, "-c", code], Path(), threads=3).stdout == "3\n"


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(ValueError, match="failed: RuntimeError: no reason"):
        run_process([sys.executable, "-c", "raise RuntimeError('no reason')"], Path(), None)


def test_table() -> None:
    rows = [{"name": "a", "s": "1"}, {"name": "long one", "s": "22.5"}]
    assert timing.table(rows) == "name         s\na            1\nlong one  22.5"


@pytest.mark.parametrize(
    "command",
    ["inference", "autoencoder", "autoencoder --encode", "train --batch 2", "train --batch 2 --preset default"],
)
def test_same_work_in_float32(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ["--steps", "3"] if command == "inference" else []
    rows = measure(monkeypatch, tmp_path, *command.split(), *steps, "--against", "diffusers", "--dtype", "float32")
    assert [row["against"] for row in rows] == ["default", "tuned"] * (2 if steps else 1)
    for row in rows:
        assert 0 < row["ours"]["distance from float32"] < 1e-4
        assert row["largest difference"] < 1e-4
        assert row["rounds"] == 2
        ratio = row["speed-up"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        for side in (row["ours"], row["theirs"]):
            assert 0 < side["seconds"]["min"] <= side["seconds"]["median"] <= side["seconds"]["max"]
            assert side["peak bytes"] > 10_000


def test_the_gradient_that_is_compared_is_that_of_the_step_that_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(network: nn.Module, *arguments: Any) -> Tensor:
        weights = [each.weight for each in network.modules() if isinstance(each, nn.Conv2d)]
        layouts.append({each.is_contiguous(memory_format=torch.channels_last) for each in weights})
        return gradient_of(network, *arguments)

    gradient_of, layouts = training_step.gradient_of, list[set[bool]]()
    monkeypatch.setattr(training_step, "gradient_of", watched)
    measure(monkeypatch, tmp_path, "train", "--batch", "2", "--against", "diffusers", "--dtype", "float32")
    ours, default, tuned = layouts
    assert ours == tuned == {True}
    assert False in default  # as diffusers' example has it


@pytest.mark.parametrize("command", ["inference", "train --batch 2"])
def test_same_work_in_bfloat16(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default, tuned = measure(monkeypatch, tmp_path, *command.split(), "--against", "diffusers", "--dtype", "bfloat16")
    assert default["theirs"]["distance from float32"] == 0
    for side in (tuned["ours"], tuned["theirs"]):
        assert 1e-4 < side["distance from float32"] < 0.1


def test_a_rival_with_other_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
        copy = tuned(module, dtype)
        copy.conv_in.weight.mul_(1.01)
        return copy

    tuned = rivals.tuned
    monkeypatch.setattr(rivals, "tuned", changed)
    line = refused(monkeypatch, tmp_path, capsys, "inference", "--against", "diffusers", "--dtype", "float32")
    assert line.startswith("error: no ratio: tuned differs")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_with_other_weights_is_refused(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(kind: Any, theirs: Any) -> nn.Module:
        ours: nn.Module = ours_like(kind, theirs)
        with torch.no_grad():
            ours.conv_in.weight.mul_(2)
        return ours

    ours_like = workloads.ours_like
    monkeypatch.setattr(workloads, "ours_like", changed)
    line = refused(monkeypatch, tmp_path, capsys, "inference", "--against", "diffusers", "--dtype", dtype)
    assert line.startswith("error: no ratio: ours differs")


def test_tuned_is_another_copy_in_half_precision_and_channels_last() -> None:
    module = nn.Conv2d(8, 8, 3)
    tuned = rivals.tuned(module, torch.bfloat16)
    assert (module.weight.dtype, tuned.weight.dtype) == (torch.float32, torch.bfloat16)
    assert tuned.weight.is_contiguous(memory_format=torch.channels_last)
    assert module.weight.is_contiguous()


def test_compiling_is_timed_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for command in ("inference", "autoencoder"):
        *others, last = measure(monkeypatch, tmp_path, command, "--against", "diffusers", "--compile")
        assert [row["compile seconds"] for row in others] == [None, None]
        assert (last["against"], last["compile seconds"] > 0) == ("compiled", True)


def test_alone_and_where_the_time_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = measure(monkeypatch, tmp_path, "inference", "--batch", "2", "--profile")
    assert row["against"] is None
    assert "theirs" not in row
    printed = capsys.readouterr().out
    assert "where the time goes: ours" in printed
    assert "aten::mkldnn_convolution" in printed


def test_startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: list[Sequence[str]]) -> None:
    given = "startup", "--against", "diffusers", "--steps", "2", "--dtype", "float32", "--pairs", "1"
    default, tuned, helped = measure(monkeypatch, tmp_path, *given)
    # Each renders once to be compared and once to warm up; then ours with each of the others, and help alone.
    assert len(in_this_process) == 3 + 3 + 2 * 2 + 2
    assert default["largest difference"] <= tuned["largest difference"] + 1e-6 < 2 / 255
    assert helped["what"] == "ldm --help"
    assert helped["ours"]["peak bytes"] is None


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: list[Sequence[str]]) -> None:
    class Watched(StableDiffusionPipeline):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            weights = [self.unet.conv_in.weight, self.vae.decoder.conv_in.weight]
            ran.append([(each.dtype, each.is_contiguous(memory_format=torch.channels_last)) for each in weights])
            return super().__call__(*arguments, **options)

    ran: list[list[tuple[torch.dtype, bool]]] = []
    monkeypatch.setattr(diffusers, "StableDiffusionPipeline", Watched)
    monkeypatch.setattr(benchmark, "SEEDS", 3)
    given = "memory", "--against", "diffusers", "--steps", "2", "--dtype", "bfloat16"
    rows = measure(monkeypatch, tmp_path, *given)
    default, tuned = [(torch.float32, False)] * 2, [(torch.bfloat16, True)] * 2
    assert ran == [default, tuned] * 3 + [default] * 2 + [tuned] * 2
    compared, measured = in_this_process[:9], in_this_process[9:]
    assert [command[command.index("--seed") + 1] for command in compared[::3]] == ["0", "1", "2"]
    assert all("--seed" not in command or command[command.index("--seed") + 1] == "0" for command in measured)
    assert [row["side"] for row in rows] == ["ours", "default", "tuned"]
    assert [row["private"]["median"] for row in rows] == [1050, 1250, 1450]
    assert rows[2]["times ours"] == pytest.approx(1450 / 1050)
    assert rows[0]["accelerator"]["max"] == 0


def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plots" / "growth.png"
    axes = "--sizes", "32", "64", "--batches", "1", "2", "--step-counts", "1", "2"
    rows = measure(monkeypatch, tmp_path, "growth", "--against", "diffusers", *axes, "--plot", str(plot))
    assert [row["what"] for row in rows] == ["size", "batch", "steps", "size, decoding"]
    assert [("note" in row) for row in rows] == [False, True, False, False]
    assert f"blocks of {BATCH}" in rows[1]["note"]
    assert rows[1]["note"] in capsys.readouterr().out
    for row in rows:
        for side, curve in row["curves"].items():
            for key, values in curve.items():
                assert row["exponents"][side][key] == pytest.approx(
                    np.log(values[1] / values[0]) / np.log(row["values"][1] / row["values"][0])
                )
    assert rows[0]["curves"].keys() == {"ours", "diffusers tuned"}
    assert rows[3]["curves"].keys() == {"whole", "tiled"}
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ("inference --size 36", "--size is 36; give a multiple of 8"),
        ("inference --batch 0", "--batch is 0; give at least 1"),
        ("inference --compile", "--compile compiles diffusers' networks; give --against diffusers with it"),
        ("train --dtype float16", "--dtype is torch.float16; training is measured in float32 or bfloat16"),
        ("startup --dtype float", "dtype 'float' is unknown"),
        ("growth --sizes 64 36", "--sizes has 36; give multiples of 8, 4096 at most"),
        ("growth --sizes 64 8192", "--sizes has 8192; give multiples of 8, 4096 at most"),
        ("growth --batches 0 1", "--batches has 0; give numbers from 1 to 10000"),
        ("growth --step-counts 1 2000", "--step-counts has 2000; give numbers from 1 to 1000"),
        ("growth --sizes 32", "--sizes has the one value 32, along which nothing grows; give two or more"),
        ("growth --batches 2 2", "--batches has the one value 2, along which nothing grows; give two or more"),
        ("growth --step-counts 1", "--step-counts has the one value 1, along which nothing grows; give two or more"),
        ("growth --plot growth", "--plot growth is no name for a picture; give one that ends in .png"),
        ("inference --json none/x.json", "--json: folder none does not exist; make it first"),
        ("inference --json .", "--json: . is a folder; give the name of a file in it"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    arguments: str,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("it is refused too late")

    monkeypatch.chdir(tmp_path)
    for name in ("compare", "measure_growth"):
        monkeypatch.setattr(benchmark, name, measured)
    assert fault in refused(monkeypatch, tmp_path, capsys, *arguments.split())


def test_memory_needs_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "PROCESSES", tmp_path)
    assert "run this on Linux" in refused(monkeypatch, tmp_path, capsys, "inference")


@pytest.mark.parametrize("name", workloads.PRESETS)
def test_presets_name_real_models(name: str) -> None:
    preset = workloads.PRESETS[name]()
    parameters = {"sd15": 859_520_964, "sd21": 865_910_724}
    if name in parameters:
        with torch.device("meta"):
            assert sum(each.numel() for each in preset.make("unet").parameters()) == parameters[name]
            assert sum(each.numel() for each in preset.make("vae").parameters()) == 83_653_863
    assert preset.size == {"default": 128, "sd15": 512, "sd21": 768, "tiny": 32}[name]


def test_shortcuts_are_judged_on_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: shortcuts.SHORTCUTS[name] for name in ("none", "guidance interval 0.28 to 2.9", "ddim, 5 steps")}
    monkeypatch.setattr(shortcuts, "SHORTCUTS", few)
    monkeypatch.setattr(
        sys,
        "argv",
        ["benchmark.py", "shortcuts", "--pictures", "2", "--pairs", "1", "--json", str(tmp_path / "result.json")],
    )
    benchmark.main()
    exact, limited, short = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [exact["evaluations"], short["evaluations"]] == [40, 10]
    pipe = TextToImagePipeline.from_pretrained()
    alpha, sigma = pipe.schedule.at(pipe.schedule.timesteps(20, "trailing")[:-1])
    inside = ((sigma / alpha > 0.28) & (sigma / alpha <= 2.9)).sum().item()
    assert limited["evaluations"] == 20 + inside
    assert exact["psnr"] is None
    prompts = from_picturebook(2, shortcuts.SEED, 64).prompts
    pictures = [
        np.stack(pipe(prompts, **{"sampler": "ddim", **options}).images).astype(float) for options in few.values()
    ]
    for row, made in zip((limited, short), pictures[1:], strict=True):
        assert 5 < row["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean((made - pictures[0]) ** 2)), rel=1e-3)
    assert {"kind", "color"} <= exact["per attribute"].keys()


def test_shortcuts_of_other_models_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "default model alone" in refused(monkeypatch, tmp_path, capsys, "shortcuts")
