"""Seconds, bytes and distances of the sides of a comparison, and what may be concluded from them."""

import ctypes
import os
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROUNDS, FEW_ROUNDS = 15, 5
LONG = 20.0  # seconds of a round, above which there are only a few
EXACT = 1e-4  # of the largest output: how far two float32 networks may be apart
CLOSE = 1.5  # times the rival's own distance from float32: how far ours may be in half precision
FAR = 0.25  # from float32: what is further off computes something else
MEGABYTE = 1e6
PROCESSES = Path("/proc")


def interleave(
    runs: Sequence[Callable[[], object]],
    rounds: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, ...]]:
    """Seconds of each run in each round. Every other round goes backwards, so that none always has the first place.

    `rounds` None: 15, or 5 where the first takes over 20 s. Nothing warms up here.
    """
    places = range(len(runs))
    found: list[tuple[float, ...]] = []
    with tqdm(total=rounds, desc="rounds", leave=False) as bar:
        while not found or len(found) < (rounds or (FEW_ROUNDS if sum(found[0]) > LONG else ROUNDS)):
            seconds = [0.0] * len(runs)
            for place in places if len(found) % 2 == 0 else reversed(places):
                began = clock()
                runs[place]()
                seconds[place] = clock() - began
            found.append(tuple(seconds))
            bar.update()
    return found


def speed_up(pairs: Sequence[tuple[float, ...]]) -> tuple[float, float, float]:
    """The median of the pairs' ratios theirs / ours, and its 95 % bootstrap interval; above 1 ours is the faster."""
    ratios = np.array([theirs / ours for ours, theirs in pairs])
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def power_law(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent b of the least-squares fit y = a x^b in the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def finish(run: Callable[[], object], device: torch.device | None) -> None:
    """Runs, and waits until the device is done; None is that of another process, which has ended."""
    run()
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


def largest_difference(output: Tensor, reference: Tensor) -> float:
    """Relative to the reference's largest value."""
    return ((output - reference).abs().max() / reference.abs().max()).item()


def distance(output: Tensor, reference: Tensor) -> float:
    """Relative Euclidean distance: sqrt 2 for what has nothing to do with each other."""
    return ((output - reference).norm() / reference.norm()).item()


def refuse_difference(outputs: Mapping[str, Sequence[Tensor]], exact: bool, tolerance: float = EXACT) -> None:
    """Outputs that differ are results of different work, of which no ratio may be given.

    Args:
        outputs: of one or more inputs, by side: "ours", the float32 reference "default", "tuned", and perhaps more of
            diffusers. In half precision what counts is the median over the inputs: a whole picture's rounding is chaos.
        exact: whether all ran in float32. If not, ours may be 1.5 times as far from the reference as "tuned" is.
        tolerance: of float32, relative to the largest output.

    Raises:
        ValueError: outputs differ by more than the tolerance.
    """
    measure, limit, over_all = (largest_difference, tolerance, np.max) if exact else (distance, FAR, np.median)
    far = {
        name: float(over_all([measure(*pair) for pair in zip(outputs[name], outputs["default"], strict=True)]))
        for name in outputs
        if name != "default"
    }
    for name, off in far.items():
        if not off <= limit:  # so that NaN is refused
            raise ValueError(f"no ratio: {name} differs from diffusers in float32 by {off:.2g}, over {limit:.2g}")
    if not exact and not far["ours"] <= CLOSE * far["tuned"]:
        raise ValueError(
            f"no ratio: ours differs from diffusers in float32 by {far['ours']:.2g}, over {CLOSE} times the"
            f" {far['tuned']:.2g} of diffusers tuned"
        )


def working_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a run needs beside what there was before; it should have run once already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        finish(run, device)
        return torch.cuda.max_memory_allocated(device) - before
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be used again, and not be seen
    (PROCESSES / "self" / "clear_refs").write_text("5")  # the peak is what there is now: man 5 proc_pid_clear_refs
    before = memory_of("self", "VmRSS")
    finish(run, device)
    return memory_of("self", "VmHWM") - before


def memory_of(process: int | str, *kinds: str) -> int:
    """Bytes of these kinds together, as `/proc/PROCESS/status` names them; 0 for a process that has ended."""
    try:
        lines = (PROCESSES / str(process) / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.split(":")[0] in kinds)


class MemoryPeaks:
    """The most memory that a process has meanwhile, in bytes; looked at every 3 ms.

    `resident` counts mapped files too, as the kernel's own high-water mark; `private` is anonymous and shared memory.
    """

    def __init__(self, process: int) -> None:
        self.resident = self.private = 0
        self._process = process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            # Not the peak that wait4 tells at the end: that begins with the memory of the process that started it.
            self.resident = max(self.resident, memory_of(self._process, "VmHWM"))
            self.private = max(self.private, memory_of(self._process, "RssAnon", "RssShmem"))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@dataclass(frozen=True)
class Finished:
    """A process that has ended well: its output, and its peaks of memory in bytes as `MemoryPeaks` tells them."""

    stdout: str
    resident: int
    private: int


def run_process(command: Sequence[str], folder: Path, threads: int | None) -> Finished:
    """Runs a command in a folder.

    Raises:
        ValueError: it failed; with the last line that it wrote.
    """
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=folder, env=environment)
        with MemoryPeaks(process.pid) as peaks:
            code = process.wait()
        for stream in (out, errors):
            stream.seek(0)
        if code:
            lines = errors.read().strip().splitlines() or [f"exit code {code}"]
            raise ValueError(f"{Path(command[0]).name} {Path(command[1]).name} failed: {lines[-1]}")
        return Finished(out.read(), peaks.resident, peaks.private)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of the same keys as text in columns under them; the first column is set left, the others right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))])
        for first, *others in lines
    )
