"""Freed memory is used again without a fault for each of its pages."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm import hardware

PROGRAM = """
import resource, sys
import torch
from ldm.hardware import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
    keep_freed_memory()
for _ in range(2):
    torch.ones(2**24)  # 64 MiB, 16,384 pages of 4 KiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_large_tensors_take_the_place_of_freed_ones() -> None:
    def faults(*arguments: str) -> int:
        return int(subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, check=True).stdout)

    assert 4 * faults("keep") < faults()


def test_without_mallopt_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda _: object())
    hardware.keep_freed_memory()
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    hardware.keep_freed_memory()


@pytest.mark.parametrize(
    ("quota", "threads"), [("150000 100000", 2), ("max 100000", 8), ("1200000 100000", 8), ("", 8)]
)
def test_a_quota_of_cpu_time_bounds_the_threads(
    quota: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    chosen = [8]
    monkeypatch.setattr(hardware, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    hardware.fit_threads_to_quota()
    assert chosen[-1] == threads


@pytest.mark.parametrize(
    ("flags", "expected"), [({"avx512_bf16"}, True), ({"avx512_bf16", "amx_bf16"}, False), ({"avx2"}, False)], ids=str
)
def test_a_cpu_that_multiplies_bfloat16_by_vectors(
    flags: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True))
    assert hardware.multiplies_bfloat16_by_vectors() == expected
