"""Where and how a module runs: device, dtype, memory layout."""

from collections.abc import Mapping

import torch
from torch import nn

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The named device, or the accelerator if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use cpu, cuda, cuda:1, mps or xpu") from None
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device.type:
        raise ValueError(f"device {str(device)!r} is not available here; use {found.type if found else 'cpu'}")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise ValueError(f"device {str(device)!r} does not exist; there are {torch.accelerator.device_count()}")
    return device


def pick_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named dtype, or the fastest that renders well on the device.

    bfloat16 wherever the hardware multiplies it natively, else float32 (float16 on an accelerator without bfloat16).

    Raises:
        ValueError: no such dtype.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name is not None:
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} is unknown; use {', '.join(sorted(set(DTYPES)))}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16 if device.type in ("cuda", "xpu") else torch.float32


def prepare(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Readies a module for rendering in place: moved, cast, channels last, no dropout, no gradients."""
    module.to(device=device, dtype=dtype)
    module.to(memory_format=torch.channels_last)
    module.eval().requires_grad_(False)


def _cpu_multiplies_bfloat16() -> bool:
    # torch before 2.11 cannot tell; float32 is then slower but right
    capabilities: Mapping[str, bool | int] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
