"""Samplers: pure functions that walk a denoiser down a time grid.

All take `(denoise, x, schedule, timesteps, *, randn=None, on_step=None)`:
    denoise    (x_t [B, ...], t [B] float64) -> Estimate
    x          [B, ...] at the grid's first time; unit noise when that is (nearly) T - 1
    timesteps  strictly decreasing times [n + 1], as from `NoiseSchedule.timesteps`; sampling ends at the last
    randn      shape -> unit noise; called once per step that adds noise, and never at one that adds none
    on_step    called after each step with a StepInfo; may raise to cancel
and return x at the last time. They compute without gradients, in float32 or x's wider dtype, with coefficients from the
schedule's float64 tables, and divide by sigma only, so that a start at zero SNR (alpha 0) is like any other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from ldm.denoiser import Denoiser
from ldm.schedule import ForwardProcess


@dataclass(frozen=True)
class StepInfo:
    """One step done: its `index` from 0, the time `t` that it started from, `x` after it, and its estimate `x0`."""

    index: int
    t: float
    x: Tensor
    x0: Tensor


Randn = Callable[[torch.Size], Tensor]
StepHook = Callable[[StepInfo], None]
NoiseLevel = tuple[float, float]
"""(alpha, sigma)."""

StepRule = Callable[[NoiseLevel, NoiseLevel], tuple[float, float, float]]
"""Noise levels before and after a step -> (a, b, std) of x' = a x0 + b x + std noise."""


def sample_ddpm(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, eqs. 6 and 7), on any sub-sequence of the times.

    Each step draws from q(x' | x, x0), the forward process's own posterior ("small" variance), at the estimate of x0.

    Raises:
        ValueError: a time grid that does not decrease or leaves the schedule's range.
    """

    def posterior(before: NoiseLevel, after: NoiseLevel) -> tuple[float, float, float]:
        (alpha, sigma), (alpha_next, sigma_next) = before, after
        step_alpha = alpha / alpha_next
        step_variance = 1 - step_alpha**2
        kept = (sigma_next / sigma) ** 2
        return alpha_next * step_variance / sigma**2, step_alpha * kept, math.sqrt(kept * step_variance)

    return _walk(denoise, x, schedule, timesteps, posterior, randn, on_step)


def sample_ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    eta: float = 0.0,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """DDIM (Song et al. 2020, eqs. 12 and 16): deterministic at eta 0, DDPM at eta 1.

    Raises:
        ValueError: eta outside [0, 1], or a time grid that does not decrease or leaves the schedule's range.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must be from 0 (deterministic) to 1 (DDPM)")

    def implicit(before: NoiseLevel, after: NoiseLevel) -> tuple[float, float, float]:
        (alpha, sigma), (alpha_next, sigma_next) = before, after
        std = eta * sigma_next / sigma * math.sqrt(1 - (alpha / alpha_next) ** 2)
        # x' = alpha' x0 + direction eps + std noise, with eps = (x - alpha x0) / sigma.
        direction = math.sqrt(sigma_next**2 - std**2)
        return alpha_next - direction * alpha / sigma, direction / sigma, std

    return _walk(denoise, x, schedule, timesteps, implicit, randn, on_step)


SAMPLERS: Mapping[str, Callable[..., Tensor]] = MappingProxyType({"ddim": sample_ddim, "ddpm": sample_ddpm})
"""The samplers by their command-line names."""


@torch.no_grad()
def _walk(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    rule: StepRule,
    randn: Randn | None,
    on_step: StepHook | None,
) -> Tensor:
    times = timesteps.to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
        raise ValueError("timesteps must be two or more strictly decreasing times, the last of which ends the sampling")
    alphas, sigmas = schedule.at(times)
    levels = zip(alphas.tolist(), sigmas.tolist(), strict=True)
    # The grid goes to the device once: reading it there costs no transfer per step.
    times_there = times.to(x.device)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    randn = torch.randn if randn is None else randn
    for index, (before, after) in enumerate(pairwise(levels)):
        x0 = denoise(x, times_there[index].expand(len(x))).x0.to(x.dtype)
        on_x0, on_x, std = rule(before, after)
        x = on_x0 * x0 + on_x * x
        if std > 0:
            x = x + std * randn(x.shape).to(x)
        if on_step is not None:
            on_step(StepInfo(index, times[index].item(), x, x0))
    return x
