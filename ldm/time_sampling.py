"""Which times to train at: uniform ones, more of those where the loss is large, or more of the middle of the path."""

import math

import torch
from torch import Tensor

from ldm.schedule import NoiseSchedule

HISTORY = 10
"""Losses remembered of each time."""
UNIFORM_SHARE = 0.001
"""Share of the draws that stays uniform, so that no time is forgotten and no weight exceeds 1000."""
LARGE = 16.0
"""Log-SNR beyond which the normal density is nothing; zero terminal SNR is minus infinity."""
LOGIT_UNIFORM_SHARE = 0.25
"""The same for the logit-normal distribution, which would all but forget the first times and the last."""


def logit_normal(schedule: NoiseSchedule, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Probabilities of times, float64 [T], under which log-SNR is normal: mean -2 `mean`, standard deviation 2 `std`.

    That is the logit-normal distribution of a straight path's time (Esser et al. 2024, arXiv 2403.03206, equation 19),
    carried over to `schedule` at equal signal-to-noise ratios: the larger the mean, the more noise. A quarter stays
    uniform. Losses are not weighed against it: to stress a part of the path is its purpose.
    """
    log_snr = schedule.log_snr(torch.arange(schedule.steps, dtype=torch.float64))
    finite = log_snr.clamp(min=-LARGE, max=LARGE)
    density = torch.exp(-((finite + 2 * mean) / (2 * std)).square() / 2) * torch.gradient(finite)[0].abs()
    uniform = torch.full_like(density, 1 / schedule.steps)
    return torch.lerp(density / density.sum(), uniform, LOGIT_UNIFORM_SHARE)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Times t, int64 [B], from numbers in [0, 1), float64 [B], by the inverse of the distribution function.

    Raises:
        ValueError: numbers outside [0, 1).
    """
    uniforms = uniforms.to("cpu", torch.float64)
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("times are drawn from numbers in [0, 1), but some are outside")
    cumulative = probabilities.cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], uniforms, right=True)


class TimeSampler:
    """Draws t with probability p_t proportional to sqrt(E[L_t^2]) (Nichol and Dhariwal 2021, eq. 18 and their code).

    E is over the last ten losses at t. Until every t has ten, and so as long as `update` is not called, t is uniform.
    Its state is on the CPU and changes in `update` alone.

    Args:
        steps: T.

    Raises:
        ValueError: steps < 1.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}: there must be at least 1 time to draw")
        self._losses = torch.zeros(steps, HISTORY, dtype=torch.float64)
        self._counts = torch.zeros(steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p_t: float64 [T]."""
        steps = len(self._counts)
        uniform = torch.full((steps,), 1 / steps, dtype=torch.float64)
        if self._counts.min() < HISTORY:
            return uniform
        size = self._losses.square().mean(1).sqrt()
        return torch.lerp(size / size.sum(), uniform, UNIFORM_SHARE)

    def sample(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Times t, int64 [B], from numbers in [0, 1), float64 [B], by the inverse of p's distribution function.

        And 1 / (p_t T), float64 [B]: with these weights the mean of the losses is in expectation that of uniform t.

        Raises:
            ValueError: numbers outside [0, 1).
        """
        probabilities = self.probabilities()
        t = draw(probabilities, uniforms)
        return t, 1 / (probabilities[t] * len(probabilities))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses, unweighted, at times t: both [B], of the whole global batch in order of position.

        Called once per step with the same values in every process, it leaves the same state in each. Losses that are
        not finite are passed over.

        Raises:
            ValueError: t and losses of different shapes or not [B], or a time out of range.
        """
        if t.ndim != 1 or t.shape != losses.shape:
            raise ValueError(f"t is {tuple(t.shape)} and losses {tuple(losses.shape)}: give both as [B]")
        for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if not 0 <= time < len(self._counts):
                raise ValueError(f"t holds {time}, but times are from 0 to {len(self._counts) - 1}")
            if math.isfinite(loss):
                self._losses[time, self._counts[time] % HISTORY] = loss
                self._counts[time] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """All that `update` changed: `losses` float64 [T, 10] and `counts` int64 [T]."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: the state of a sampler with another number of times.
        """
        if state["losses"].shape != self._losses.shape:
            raise ValueError(
                f"the state is that of {len(state['losses'])} times, but this sampler has {len(self._losses)}: "
                "load it with the number of steps that it was trained with"
            )
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()
