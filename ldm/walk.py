"""The walk of a denoiser along a time grid: noise levels, steps, the hook and the checks, which all samplers share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoiser import Denoiser, Estimate
from ldm.schedule import ForwardProcess


@dataclass(frozen=True)
class StepInfo:
    """One step done: its `index` from 0, the time `t` that it started from, `x` after it, and its estimate `x0`."""

    index: int
    t: float
    x: Tensor
    x0: Tensor


Randn = Callable[[torch.Size], Tensor]
"""shape -> unit noise."""
StepHook = Callable[[StepInfo], None]


@dataclass(frozen=True)
class Level:
    """A time and its alpha and sigma."""

    t: float
    alpha: float
    sigma: float

    @property
    def noise(self) -> float:
        """sigma / alpha, over which Euler, Heun and Runge-Kutta integrate (the sigma of Karras et al. 2022)."""
        return self.sigma / self.alpha


@dataclass(frozen=True)
class Step:
    """One step from `x` [B, ...] at `before` to `after`, with the `estimate` at `before`."""

    before: Level
    after: Level
    x: Tensor
    estimate: Estimate
    previous: tuple[Level, Tensor] | None
    """Level and x0 at which the step before this one began."""

    @property
    def x0(self) -> Tensor:
        return self.estimate.x0


StepRule = Callable[[Step], tuple[Tensor, Tensor | float]]
"""Mean and standard deviation of x after the step; the latter is a float, or a tensor like x."""


def levels_of(schedule: ForwardProcess, timesteps: Tensor, smallest_signal: float = 0.0) -> list[Level]:
    """The levels of a time grid [n + 1]. One without any signal gets alpha^2 of `smallest_signal`, as in diffusers, or
    less, so that it stays noisier than the next.

    Raises:
        ValueError: times that do not decrease strictly, fewer than two of them, or one out of the schedule's range.
    """
    times = timesteps.to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
        raise ValueError("timesteps must be two or more strictly decreasing times, the last of which ends the sampling")
    levels = [Level(*values) for values in zip(times.tolist(), *map(Tensor.tolist, schedule.at(times)), strict=True)]
    for index in reversed(range(len(levels) - 1)):
        if levels[index].alpha == 0:
            signal = min(smallest_signal, levels[index + 1].alpha ** 2 / 2)
            levels[index] = Level(levels[index].t, math.sqrt(signal), math.sqrt(1 - signal))
    return levels


@torch.no_grad()
def walk(
    denoise: Denoiser,
    x: Tensor,
    levels: list[Level],
    rule: StepRule,
    randn: Randn | None,
    on_step: StepHook | None,
) -> Tensor:
    """x [B, ...] at the last of `levels`, by one step of `rule` from each to the next; float32 or x's wider dtype.

    Raises:
        ValueError: values that are not finite, or what the rule raises.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    randn = torch.randn if randn is None else randn
    previous = None
    for index, (before, after) in enumerate(pairwise(levels)):
        estimate = estimate_at(denoise, x, before.t)
        x, std = rule(Step(before, after, x, estimate, previous))
        if isinstance(std, Tensor) or std > 0:
            x = x + std * randn(x.shape).to(x)
        previous = before, estimate.x0
        if on_step is not None:
            on_step(StepInfo(index, before.t, x, estimate.x0))
    return finite(x, "the result")


def estimate_at(denoise: Denoiser, x: Tensor, t: float) -> Estimate:
    """The denoiser's estimate for x [B, ...] at time t, with x0 in x's dtype.

    Raises:
        ValueError: values that are not finite; on the CPU only, because on an accelerator looking makes the host wait.
    """
    estimate = denoise(x, times_for(x, t))
    x0 = estimate.x0.to(x.dtype)
    return Estimate(finite(x0, f"the estimate at t = {t:g}") if x0.device.type == "cpu" else x0, estimate.v)


def times_for(x: Tensor, t: float) -> Tensor:
    """t once for each of x [B, ...]: float64 [B], on its device; on the CPU for an Apple GPU, which has no float64."""
    return torch.full((len(x),), t, dtype=torch.float64, device="cpu" if x.device.type == "mps" else x.device)


def finite(values: Tensor, name: str) -> Tensor:
    """`values`, if they are.

    Raises:
        ValueError: how many of them are not.
    """
    wrong = int((~values.isfinite()).sum())
    if wrong > 0:
        raise ValueError(
            f"{name} has {wrong} of {values.numel()} values that are not finite: "
            "try the network in float32, less guidance, or another model"
        )
    return values
