"""Freed memory is used again without a fault for each of its pages."""

import platform
import subprocess
import sys

import pytest

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
    from ldm import memory

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    memory.keep_freed_memory()
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    memory.keep_freed_memory()
