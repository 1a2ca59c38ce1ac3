"""Samplers: pure functions that walk a denoiser down a time grid.

All take `(denoise, x, schedule, timesteps, *, randn=None, on_step=None)`:
    denoise    (x_t [B, ...], t [B] float64) -> Estimate
    x          [B, ...] at the grid's first time; unit noise when that is (nearly) the noisiest
    timesteps  strictly decreasing times [n + 1], as from the schedule's `timesteps`; sampling ends at the last
    randn      shape -> unit noise; called once per step that adds noise, and never at one that adds none
    on_step    called after each step with a StepInfo; may raise to cancel
and return x at the last time. They compute without gradients, in float32 or x's wider dtype, with coefficients from the
schedule's float64 tables, and are written with x0 and ratios of noise levels so that nothing large cancels where alpha
is small.

All raise ValueError for a grid that does not decrease or leaves the schedule's range, and for estimates that are not
finite. On an accelerator looking at each estimate would make the host wait: there only the result is looked at.
"""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from ldm import posterior
from ldm.denoiser import Denoiser
from ldm.posterior import Variance
from ldm.schedule import SMALLEST_SIGNAL, ForwardProcess
from ldm.walk import Level, Step, StepHook, estimate_at, finite, levels_of, times_for, walk
from ldm.walk import Randn as Randn
from ldm.walk import StepInfo as StepInfo

MeanShift = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> gradient, like x_t; it must record gradients by itself, since samplers run without."""
Sampler = Callable[..., Tensor]
"""(denoise, x, schedule, timesteps, *, randn=None, on_step=None) -> x at the last time."""


def sample_ddpm(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    variance: Variance | None = None,
    mean_shift: MeanShift | None = None,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, eqs. 6 and 7), on any sub-sequence of the times.

    Each step draws from q(x' | x, x0), the forward process's own posterior, at the estimate of x0. One that ends clean
    adds no noise.

    Args:
        variance: that of each step. "beta_tilde" is the posterior's own ("small"), "beta" the process's ("large"),
            "learned" the network's (Nichol and Dhariwal 2021, eq. 15). None is "learned" where there is one, else
            "beta_tilde".
        mean_shift: the gradient of log p(y | x_t) times its scale; each step's mean moves by variance * gradient
            (Dhariwal and Nichol 2021, algorithm 1; taken at x_t, as by the released code). So does the last one's,
            though where it ends clean beta-tilde is 0.

    Raises:
        ValueError: unknown variance, or "learned" for a network that learned none.
    """

    def ancestral(step: Step) -> tuple[Tensor, Tensor | float]:
        t, s = (torch.tensor(level.t, dtype=torch.float64) for level in (step.before, step.after))
        mean = posterior.mean_from_x0(step.x0, step.x, schedule, t, s)
        step_variance = _variance(variance, step.estimate.v, schedule, t, s)
        if mean_shift is not None:
            mean = mean + step_variance * mean_shift(step.x, times_for(step.x, step.before.t)).to(mean)
        return mean, step_variance**0.5 if step.after.sigma > 0 else 0.0

    return walk(denoise, x, levels_of(schedule, timesteps), ancestral, randn, on_step)


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
        ValueError: eta outside [0, 1], or eta above 0 for a network that learned a variance.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must be from 0 (deterministic) to 1 (DDPM)")

    def implicit(step: Step) -> tuple[Tensor, float]:
        if eta > 0:
            _refuse_learned_variance("ddim with eta above 0", step)
        before, after = step.before, step.after
        std = eta * after.sigma / before.sigma * math.sqrt(1 - (before.alpha / after.alpha) ** 2)
        # x' = alpha' x0 + direction eps + std noise, with eps = (x - alpha x0) / sigma.
        direction = math.sqrt(after.sigma**2 - std**2)
        on_x0 = after.alpha - direction * before.alpha / before.sigma
        return on_x0 * step.x0 + direction / before.sigma * step.x, std

    return walk(denoise, x, levels_of(schedule, timesteps), implicit, randn, on_step)


@torch.no_grad()
def invert_ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """DDIM backwards (Song et al. 2020, section 4.3): data to noise, up the grid that `sample_ddim` comes down.

    x is at the grid's last time; returned is x at its first. Each step takes its noise from the estimate at the time
    that it goes to, for the x that it comes from, whatever the network predicts; as diffusers' DDIMInverseScheduler
    where it predicts eps. So the first step, from sigma 0, is like any other, the network runs at the same times as in
    sampling, and where alpha is 0 at the top the last step changes nothing. `randn` is not called.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for index, (before, after) in enumerate(pairwise(reversed(levels_of(schedule, timesteps)))):
        x0 = estimate_at(denoise, x, after.t).x0
        noise = (x - after.alpha * x0) / after.sigma
        x = after.alpha / before.alpha * (x - before.sigma * noise) + after.sigma * noise
        if on_step is not None:
            on_step(StepInfo(index, before.t, x, x0))
    return finite(x, "the result")


sample_invert_ddim = invert_ddim  # the name that begins like all others'


def sample_euler(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Euler's method on x / alpha over sigma / alpha (Karras et al. 2022, section 3): DDIM at eta 0 by another name."""

    def euler(step: Step) -> tuple[Tensor, float]:
        return _straight(step, step.after, step.x0), 0.0

    return walk(denoise, x, levels_of(schedule, timesteps), euler, randn, on_step)


def sample_euler_ancestral(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Euler steps below the next noise level and noise back up to it, as in k-diffusion: DDPM by another name.

    Raises:
        ValueError: a network that learned a variance.
    """

    def ancestral(step: Step) -> tuple[Tensor, float]:
        _refuse_learned_variance("euler_ancestral", step)
        return _ancestral(step, step.x0)

    return walk(denoise, x, levels_of(schedule, timesteps), ancestral, randn, on_step)


def sample_heun(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1): second order, two evaluations per step, one where it ends clean.

    Under zero terminal SNR it starts from alpha^2 = 2^-24, as in diffusers.
    """

    def heun(step: Step) -> tuple[Tensor, float]:
        if step.after.sigma == 0:
            return _straight(step, step.after, step.x0), 0.0
        return _bent(step, step.after, _bend(denoise, step, step.after, 0.0) / 2), 0.0

    return walk(denoise, x, levels_of(schedule, timesteps, SMALLEST_SIGNAL), heun, randn, on_step)


def sample_ode(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """The probability-flow ODE (Song et al. 2021, eq. 13) by the classical fourth-order Runge-Kutta method.

    Four evaluations per step over sigma / alpha, two of them half-way, and one where the grid ends clean. Under zero
    terminal SNR it starts from alpha^2 = 2^-24.
    """

    def runge_kutta(step: Step) -> tuple[Tensor, float]:
        if step.after.sigma == 0:
            return _straight(step, step.after, step.x0), 0.0
        noise = (step.before.noise + step.after.noise) / 2
        time = schedule.time_at(torch.tensor(-2 * math.log(noise), dtype=torch.float64)).item()
        middle = Level(time, 1 / math.hypot(1, noise), noise / math.hypot(1, noise))
        second = _bend(denoise, step, middle, 0.0)
        third = _bend(denoise, step, middle, second)
        fourth = _bend(denoise, step, step.after, third)
        return _bent(step, step.after, (2 * second + 2 * third + fourth) / 6), 0.0

    return walk(denoise, x, levels_of(schedule, timesteps, SMALLEST_SIGNAL), runge_kutta, randn, on_step)


def sample_dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, one evaluation per step.

    Under zero terminal SNR it starts from alpha^2 = 2^-24, as in diffusers.
    """

    def multistep(step: Step) -> tuple[Tensor, float]:
        return _straight(step, step.after, _extrapolated(step)), 0.0

    return walk(denoise, x, levels_of(schedule, timesteps, SMALLEST_SIGNAL), multistep, randn, on_step)


def sample_dpmpp_2m_sde(
    denoise: Denoiser,
    x: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    randn: Randn | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): DDPM's steps with the x0 of 2M.

    Under zero terminal SNR it starts from alpha^2 = 2^-24, as in diffusers.

    Raises:
        ValueError: a network that learned a variance.
    """

    def multistep(step: Step) -> tuple[Tensor, float]:
        _refuse_learned_variance("dpmpp_2m_sde", step)
        return _ancestral(step, _extrapolated(step))

    return walk(denoise, x, levels_of(schedule, timesteps, SMALLEST_SIGNAL), multistep, randn, on_step)


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": sample_ddim,
        "ddpm": sample_ddpm,
        "dpm++": sample_dpmpp_2m,
        "dpm++sde": sample_dpmpp_2m_sde,
        "euler": sample_euler,
        "euler_ancestral": sample_euler_ancestral,
        "heun": sample_heun,
        "ode": sample_ode,
    }
)
"""The samplers by their command-line names."""


def _straight(step: Step, level: Level, x0: Tensor) -> Tensor:
    """x at `level`, where x0 stays as it is on the way: Euler's step over sigma / alpha."""
    kept = _noise_ratio(step.before, level)
    return level.sigma / step.before.sigma * step.x + level.alpha * (1 - kept) * x0


def _bent(step: Step, level: Level, bend: Tensor | float) -> Tensor:
    """x at `level`, where the slope of x / alpha over sigma / alpha is on average `bend` above that of `_straight`."""
    return _straight(step, level, step.x0) + level.alpha * (level.noise - step.before.noise) * bend


def _bend(denoise: Denoiser, step: Step, level: Level, bend: Tensor | float) -> Tensor:
    """By how much the slope at `level`, when reached with `bend`, is above that at the step's start.

    The slope is the noise estimate, (x - alpha x0) / sigma; its change is written with that of x0.
    """
    x0 = estimate_at(denoise, _bent(step, level, bend), level.t).x0
    return (step.x0 - x0) / level.noise + (1 - step.before.noise / level.noise) * bend


def _ancestral(step: Step, x0: Tensor) -> tuple[Tensor, float]:
    """Mean and standard deviation of x after the step of the reverse SDE in which x0 stays as it is."""
    kept = _noise_ratio(step.before, step.after) ** 2
    # To the noise level kept * before.noise by Euler's step, and from there to after.noise by noise.
    on_x = step.after.sigma / step.before.sigma * math.sqrt(kept)
    return on_x * step.x + step.after.alpha * (1 - kept) * x0, step.after.sigma * math.sqrt(1 - kept)


def _extrapolated(step: Step) -> Tensor:
    """x0 in the middle of the step, extrapolated linearly in log(alpha / sigma) from where it and the last began."""
    if step.previous is None or step.after.sigma == 0:
        return step.x0
    level, x0 = step.previous
    ratio = math.log(_noise_ratio(step.before, step.after)) / math.log(_noise_ratio(level, step.before))
    return step.x0 + ratio / 2 * (step.x0 - x0)


def _noise_ratio(before: Level, after: Level) -> float:
    """after.noise / before.noise, also where the latter is infinite."""
    return after.sigma * before.alpha / (after.alpha * before.sigma)


def _variance(
    kind: Variance | None, v: Tensor | None, schedule: ForwardProcess, t: Tensor, s: Tensor
) -> Tensor | float:
    """The variance of DDPM's step from t to s."""
    match kind or ("beta_tilde" if v is None else "learned"):
        case "beta_tilde":
            return posterior.beta_tilde(schedule, t, s).item()
        case "beta":
            return posterior.beta(schedule, t, s).item()
        case "learned":
            if v is None:
                raise ValueError("this model has not learned a variance: choose 'beta_tilde' or 'beta'")
            return posterior.learned_variance(v, schedule, t, s)
        case _:
            raise ValueError(f"variance is {kind!r}, but must be 'beta_tilde', 'beta' or 'learned'")


def _refuse_learned_variance(sampler: str, step: Step) -> None:
    if step.estimate.v is not None:
        raise ValueError(
            f"{sampler} adds noise of its own variance, but this model has learned one: "
            "use ddpm, or a sampler that adds no noise, such as ddim with eta 0"
        )
