"""Where and how a module runs: device, dtype, memory layout, compiled or as a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoencoder.model import AttentionBlock
from ldm.denoiser import Denoiser, Estimate
from ldm.hardware import fastest_dtype, multiplies_bfloat16_by_vectors
from ldm.transformer import TransformerBlock, attend
from pipelines.doubling import use_doubling
from pipelines.winograd import use_winograd

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
    """The named dtype, or the fastest that renders well on the device (`ldm.hardware`).

    Raises:
        ValueError: no such dtype.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name is not None:
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} is unknown; use {', '.join(sorted(set(DTYPES)))}")
        return DTYPES[name]
    return fastest_dtype(device)


def prepare(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Readies a module for rendering in place: moved, cast, channels last, no dropout, no gradients, weights joined."""
    module.to(device=device, dtype=dtype)
    module.to(memory_format=torch.channels_last)
    module.eval().requires_grad_(False)
    for part in module.modules():
        if isinstance(part, TransformerBlock):
            part.attn1.join()
        if isinstance(part, AttentionBlock):
            part.attend = attend
    if device.type == "cpu":
        if dtype == torch.float32:
            use_winograd(module)
        if dtype == torch.float32 or multiplies_bfloat16_by_vectors():
            use_doubling(module)  # what multiplies whole matrices would wait for the sums


@contextmanager
def full_float32() -> Iterator[None]:
    """Within, a GPU convolves float32 as it is. By default cuDNN first rounds it to TF32, which has 10 bits."""
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolution.fp32_precision = convolution.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision = before


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Has the module compiled at its first call with each shape. Its name, weights and state dict stay as they are."""
    module.compile(dynamic=False, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else "default")


class CudaGraph:
    """A denoiser whose kernels a GPU is given all at once: below a batch of about 4 it is faster than its host.

    The first evaluation runs as always and warms up; the second is recorded, and it and all others are replayed. So
    shapes may not change, nor anything but x_t and t: make one for each run of a sampler. Without gradients only.
    """

    def __init__(self, denoise: Denoiser) -> None:
        self._denoise, self._calls = denoise, 0

    def __call__(self, x_t: Tensor, t: Tensor) -> Estimate:
        self._calls += 1
        if self._calls == 1:
            return self._denoise(x_t, t)
        if self._calls == 2:
            self._x_t, self._t, self._graph = x_t.clone(), t.clone(), torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(x_t.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(self._graph, stream=stream):
                self._estimate = self._denoise(self._x_t, self._t)
        self._x_t.copy_(x_t)
        self._t.copy_(t)
        with torch.cuda.device(x_t.device):
            self._graph.replay()
        # The next replay overwrites the recorded estimate, and samplers look back.
        x0, v = self._estimate.x0, self._estimate.v
        return Estimate(x0.clone(), None if v is None else v.clone())
