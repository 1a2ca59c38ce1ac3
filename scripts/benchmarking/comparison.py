"""Comparing the sides of a workload: what is measured in which order, what refuses a ratio, and how it is shown."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarking.timing import (
    MEGABYTE,
    distance,
    finish,
    interleave,
    largest_difference,
    refuse_difference,
    speed_up,
    spread,
    table,
    working_memory,
)
from benchmarking.workloads import Sides
from pipelines.runtime import full_float32

OPERATORS = 10
CPU_FLAGS = ("amx_tile", "amx_bf16", "avx512_fp16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
Row = dict[str, Any]


def compare(
    what: str,
    sides: Sides,
    device: torch.device | None,
    *,
    exact: bool,
    rounds: int | None,
) -> list[Row]:
    """Measures our side against each of diffusers', or alone; a row for each.

    On a device None the sides run in processes of their own, whose memory is not seen, and whose outputs the caller
    compares.

    Raises:
        ValueError: the outputs differ.
    """
    outputs: dict[str, Tensor] = {}
    memory: dict[str, int | None] = {}
    with full_float32():
        for name, side in sides.items():
            output = side.run()  # warms up, too
            outputs[name] = (side.probe() if side.probe else output).float().cpu()
            memory[name] = None if device is None else side.weights + working_memory(side.run, device)
    if len(sides) > 1 and device is not None:
        refuse_difference({name: [output] for name, output in outputs.items()}, exact)
    rows = []
    for name in [name for name in sides if name != "ours"] or [None]:
        both = ["ours"] if name is None else ["ours", name]
        seconds = interleave([partial(finish, sides[each].run, device) for each in both], rounds)
        row: Row = {"what": what, "against": name, "rounds": len(seconds)}
        for label, side, values in zip(("ours", "theirs"), both, zip(*seconds, strict=True), strict=False):
            row[label] = {"seconds": spread(values), "peak bytes": memory[side]}
            if name is not None:
                row[label]["distance from float32"] = distance(outputs[side], outputs["default"])
        if name is not None:
            row["speed-up"] = dict(zip(("median", "low", "high"), speed_up(seconds), strict=True))
            row["largest difference"] = largest_difference(outputs["ours"], outputs[name])
            row["compile seconds"] = sides[name].compile_seconds
        rows.append(row)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Prints rows as a table; seconds, and megabytes (10^6 bytes)."""

    def cells(row: Row) -> dict[str, str]:
        found = {"against": "nothing" if row["against"] is None else f"diffusers {row['against']}"}
        for label in ("ours", "theirs"):
            seconds = row[label]["seconds"] if label in row else None
            span = "" if seconds is None else f"{seconds['min']:.4g} to {seconds['max']:.4g}"
            found |= {f"{label} s": "" if seconds is None else f"{seconds['median']:.4g}", f"min to max {label}": span}
            peak = row[label]["peak bytes"] if label in row else None
            found[f"{label} MB"] = "" if peak is None else f"{peak / MEGABYTE:.0f}"
        ratio = row.get("speed-up")
        found["speed-up (95 %)"] = "" if ratio is None else "{median:.3f} ({low:.3f} to {high:.3f})".format(**ratio)
        found["rounds"] = str(row["rounds"])
        for name, key in (("difference", "largest difference"), ("compile s", "compile seconds")):
            found[name] = "" if row.get(key) is None else f"{row[key]:.2g}"
        off = [f"{row[label]['distance from float32']:.2g}" for label in ("ours", "theirs") if ratio is not None]
        found["ours, theirs off float32"] = ", ".join(off)
        return found

    print(f"\n{rows[0]['what']}")
    written = [cells(row) for row in rows]
    used = [name for name in written[0] if any(cell[name] for cell in written)]
    print(table([{name: cell[name] for name in used} for cell in written]))


def show_operators(sides: Sides, device: torch.device) -> None:
    """Prints the operators in which each side spends the most time of its own."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for name, side in sides.items():
        finish(side.run, device)
        with torch.profiler.profile(activities=activities) as profile:
            finish(side.run, device)
        own = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
        found = sorted(((getattr(each, own), each) for each in profile.key_averages()), key=lambda pair: -pair[0])
        total = sum(time for time, _ in found)
        rows = [
            {
                "operator": each.key[:60],
                "ms": f"{time / 1e3:.2f}",
                "%": f"{100 * time / total:.1f}",
                "calls": f"{each.count}",
            }
            for time, each in found[:OPERATORS]
        ]
        print(f"\nwhere the time goes: {name}")
        print(table(rows))


def machine() -> dict[str, Any]:
    """What the figures depend on. A load above 0 before the start means that the machine was not quiet."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": facts.get("model name", platform.processor()),
        "flags": [flag for flag in CPU_FLAGS if flag in facts.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    others = ("diffusers", "transformers", "accelerate")
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {name: importlib.metadata.version(name) for name in others}
