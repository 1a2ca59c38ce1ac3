"""Counter-based randomness: every draw of training is a function of (seed, stream, step, position in the global batch).

So a resumed run draws what the uninterrupted one would have drawn, and the number of processes, of workers and of
micro-batches changes nothing.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, stream: str, *counters: int) -> torch.Generator:
    """The generator of one place in training; `stream` names what is drawn, so that draws are independent."""
    key = "/".join(map(str, (seed, stream, *counters))).encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(number >> 1)  # manual_seed takes 63 bits


def normal(shape: Sequence[int], seed: int, stream: str, step: int, positions: Sequence[int]) -> Tensor:
    """Unit noise [B, *shape], one draw for each position of the global batch."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, step, p)) for p in positions])


def uniform(seed: int, stream: str, step: int, positions: Sequence[int]) -> Tensor:
    """Numbers in [0, 1), float64 [B], one draw for each position of the global batch."""
    draws = [torch.rand((), generator=generator(seed, stream, step, p), dtype=torch.float64) for p in positions]
    return torch.stack(draws)


def timesteps(count: int, seed: int, step: int, positions: Sequence[int]) -> Tensor:
    """Uniform t in {0, ..., count - 1}, int64 [B]."""
    return (uniform(seed, "t", step, positions) * count).long()


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's samples, int64 [count]."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))
