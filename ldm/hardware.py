"""What suits the machine: the number format that it multiplies, how many threads, what becomes of freed memory."""

import ctypes
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU time, or max, in a period of so many
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # in malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors on the CPU for the next ones, in all of the process.

    glibc would give large blocks back and take them anew, page by zeroed page, which lasts longer than most of what is
    then done in them: four times as long as a group norm in the decoder, and a quarter of a training step. Other
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def fit_threads_to_quota() -> None:
    """Runs no more threads than a container's quota of CPU time keeps busy; torch itself counts the machine's cores."""
    quota, period = CPU_QUOTA.read_text().split() if CPU_QUOTA.is_file() else ("max", "")
    if quota != "max":
        torch.set_num_threads(min(torch.get_num_threads(), math.ceil(int(quota) / int(period))))


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The fastest in which networks render and train well there: bfloat16 wherever the hardware multiplies it natively,
    else float32 (float16 on an accelerator without bfloat16). A CPU that only imitates bfloat16 takes 7 times as long.
    """
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16 if device.type in ("cuda", "xpu") else torch.float32


def multiplies_bfloat16_by_vectors() -> bool:
    """Whether the CPU multiplies bfloat16 natively, but has no instructions for whole matrices."""
    return _has("avx512_bf16") and not _has("amx_bf16")


def _cpu_multiplies_bfloat16() -> bool:
    return _has("amx_bf16") or _has("avx512_bf16")


def _has(capability: str) -> bool:
    # torch before 2.11 cannot tell; float32 is then slower but right
    capabilities: Mapping[str, bool | int] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(capability, False))
