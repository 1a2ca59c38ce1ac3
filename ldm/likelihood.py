"""How likely data is under a model: the variational bound, and the density by the probability-flow ODE."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoiser import Denoiser
from ldm.loss import Data, bound_term
from ldm.posterior import Variance
from ldm.schedule import ForwardProcess
from ldm.walk import Randn, estimate_at, levels_of, times_for


@dataclass(frozen=True)
class Bound:
    """An upper bound on -log p(x0) of each sample in bits per dimension, term by term (Ho et al. 2020, eq. 5).

    With `data` "8-bit" these are bits of a probability, with "continuous" bits of a density, which may be below 0: the
    two do not compare.
    """

    data: Data
    times: Tensor
    """The grid [n + 1], float64: step i goes from times[i] to times[i + 1]."""
    prior: Tensor
    """L_T, what the noisiest time still tells of x0: [B]."""
    terms: Tensor
    """Each step's term [n, B]; the last is L_0, the cost of x0 given its least noisy version."""
    x0_mse: Tensor
    """Mean squared error of the estimate at times[:-1]: [n, B]."""
    eps_mse: Tensor
    """That of the noise that the estimate stands for, SNR times as large: [n, B]."""

    @property
    def total(self) -> Tensor:
        """The bound [B]."""
        return self.prior + self.terms.sum(0)


@torch.no_grad()
def bound(
    denoise: Denoiser,
    x0: Tensor,
    schedule: ForwardProcess,
    timesteps: Tensor,
    *,
    variance: Variance,
    data: Data,
    randn: Randn | None = None,
) -> Bound:
    """The variational bound on -log p(x0) of the chain whose times are `timesteps`, with one draw of x_t per step.

    Args:
        x0: [B, ...]; for 8-bit data on the 256 levels from -1 to 1.
        timesteps: strictly decreasing times [n + 1] down to the clean one: all T, or some, which make a coarser chain
            with steps, variances and a bound of its own.
        variance: that of p; "learned" takes the denoiser's v.
        randn: shape -> unit noise; called once per step.

    Raises:
        ValueError: unknown variance or data, a learned variance that the denoiser lacks, 8-bit data off its levels, a
            time grid that does not decrease or end at the clean time, or estimates that are not finite (on the CPU).
    """
    levels = levels_of(schedule, timesteps)
    if levels[-1].t != schedule.clean:
        raise ValueError(
            f"timesteps ends at {levels[-1].t:g}, but the bound is on x0: end at the clean time {schedule.clean:g}"
        )
    if data == "8-bit" and not _on_levels(x0):
        raise ValueError("x0 is not on the 256 levels -1 + 2k/255 of 8-bit data: round it, or call it 'continuous'")
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    randn = torch.randn if randn is None else randn
    alpha, sigma = levels[0].alpha, levels[0].sigma
    prior = ((alpha * x0).square() + sigma**2 - 1 - 2 * math.log(sigma)) / (2 * math.log(2))
    terms, errors = [], []
    for before, after in pairwise(levels):
        t, s = times_for(x0, before.t), times_for(x0, after.t)
        estimate = estimate_at(denoise, schedule.add_noise(x0, randn(x0.shape).to(x0), t), before.t)
        terms.append(bound_term(estimate, x0, schedule, t, s, variance, data))
        errors.append((x0 - estimate.x0).square().flatten(1).mean(1))
    x0_mse = torch.stack(errors)
    times = torch.tensor([level.t for level in levels], dtype=torch.float64)
    snr = schedule.snr(times[:-1]).to(x0_mse).unsqueeze(1)
    return Bound(data, times, prior.flatten(1).mean(1), torch.stack(terms), x0_mse, snr * x0_mse)


@dataclass(frozen=True)
class LogDensity:
    """log p(x) of each sample, in nats, and how well its probes know it: float64 [B]."""

    nats: Tensor
    standard_error: Tensor
    """Of `nats`, over the probes; not a number where there is one only."""
    dimensions: int

    @property
    def bits_per_dimension(self) -> Tensor:
        """-log2 p(x) per dimension: bits of a density."""
        return -self.nats / (self.dimensions * math.log(2))


def ode_log_density(
    denoise: Denoiser, x: Tensor, schedule: ForwardProcess, timesteps: Tensor, probes: Tensor
) -> LogDensity:
    """log p(x) by the probability-flow ODE from unit noise (Song et al. 2021, eq. 39), with Hutchinson's trace.

    What is measured is the density of *slightly noisy* data, x = alpha x0 + sigma eps at the grid's last time, under
    the flow of unit noise from its first time; for noisy data x / alpha, on the scale of x0, add d log alpha nats.

    In l = log(sigma / alpha) the flow is dx/dl = alpha (alpha x - x0(x, t)): that of x / alpha (Song et al. 2020, eq.
    14) brought back to x itself, so that no change of variables remains. Classical fourth-order Runge-Kutta takes each
    step of the grid, from the last time to the first, in l, for x and for the divergence together: four evaluations
    of the denoiser, differentiated once for each probe.

    Args:
        x: [B, ...] at the grid's last time.
        timesteps: strictly decreasing times, from one with signal left down to one above the clean time, such as
            `schedule.timesteps(50, "exponential")[:-1]`.
        probes: [P, B, ...], draws of zero mean and unit covariance: Gaussian, or random signs, which vary less
            (Hutchinson 1990). They stay the same along the flow (Grathwohl et al. 2019, section 3).

    Raises:
        ValueError: a time grid that does not decrease, leaves the range or has an infinite log-SNR, probes that do not
            fit x, or a denoiser that cannot be differentiated or gives what is not finite (on the CPU).
    """
    times = torch.tensor([level.t for level in reversed(levels_of(schedule, timesteps))], dtype=torch.float64)
    log_noise = -schedule.log_snr(times) / 2
    if not bool(log_noise.isfinite().all()):
        raise ValueError(
            f"timesteps span {times[-1].item():g} to {times[0].item():g}, where sigma or alpha is 0: "
            "leave out the clean time, and the noisiest one under zero terminal SNR"
        )
    if probes.ndim != x.ndim + 1 or probes.shape[1:] != x.shape or len(probes) == 0:
        raise ValueError(f"probes is {tuple(probes.shape)}, but must be [P, B, ...] for x {tuple(x.shape)}")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    probes = probes.to(x)

    def flow(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """dx/dl and its divergence by each probe, [P, B]."""
        alpha, _ = schedule.coefficients(t, like=x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = estimate_at(denoise, x, t.item()).x0
            if not x0.requires_grad:
                raise ValueError(
                    "the denoiser's estimate does not depend on x_t by autograd: run it without no_grad and "
                    "inference_mode"
                )
            velocity = alpha * (alpha * x - x0)
            products = [p * torch.autograd.grad(velocity, x, p, retain_graph=True)[0] for p in probes]
        return velocity.detach(), torch.stack([product.double().flatten(1).sum(1) for product in products])

    middles = schedule.time_at(-(log_noise[:-1] + log_noise[1:]))
    change = x.new_zeros(len(probes), len(x), dtype=torch.float64)
    for (start, end), middle, step in zip(pairwise(times), middles, log_noise.diff().tolist(), strict=True):
        first, divergence_1 = flow(x, start)
        second, divergence_2 = flow(x + step / 2 * first, middle)
        third, divergence_3 = flow(x + step / 2 * second, middle)
        fourth, divergence_4 = flow(x + step * third, end)
        x = x + step / 6 * (first + 2 * second + 2 * third + fourth)
        change += step / 6 * (divergence_1 + 2 * divergence_2 + 2 * divergence_3 + divergence_4)
    dimensions = x[0].numel()
    noise = -(x.double().square().flatten(1).sum(1) + dimensions * math.log(2 * math.pi)) / 2
    densities = noise + change
    error = densities.std(0) / math.sqrt(len(probes)) if len(probes) > 1 else torch.full_like(noise, math.nan)
    return LogDensity(densities.mean(0), error, dimensions)


def _on_levels(x0: Tensor) -> bool:
    """Whether all of x0 is 8-bit data, up to the rounding of single precision."""
    index = (x0.double() + 1) * 127.5
    return bool(((index - index.round()).abs() < 1e-3).all()) and bool(((index > -0.5) & (index < 255.5)).all())
