"""The training objectives: the squared error, the variational bound, their hybrid, and what a student owes its teacher.

Each takes (network, x0, eps, t, context, schedule, prediction, ...) with x0 and eps [B, C, ...], t int64 [B] and
context [B, L, D], runs the network once, and returns one loss per sample: [B], float32 or wider. A network with a
learned variance gives 2C channels: what it predicts, then the variance's v.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ldm import posterior
from ldm import prediction as predictions
from ldm.denoiser import Denoiser, Estimate, Network
from ldm.posterior import Variance
from ldm.prediction import Prediction
from ldm.schedule import ForwardProcess, NoiseSchedule

Data = Literal["8-bit", "continuous"]
"""What x0 is. "8-bit": pictures of 256 levels from -1 to 1, which have a probability. "continuous": anything else, such
as latents, which has a density. Bits of the one say nothing about bits of the other, which may well be below 0."""

BOUND_SHARE = 0.001
"""Weight of the bound in the hybrid (Nichol and Dhariwal 2021, eq. 16): small, so that the squared error guides."""


def diffusion_loss(
    network: Network,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    context: Tensor,
    schedule: ForwardProcess,
    prediction: Prediction,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """L_simple, the squared error of the network's output at x_t (Ho et al. 2020, eq. 14), averaged over a sample.

    With `min_snr_gamma` the error of x0 has weight min(SNR, gamma) (Hang et al. 2023, eq. 8); without, the output's
    has 1.

    Raises:
        ValueError: unknown prediction, eps prediction under zero terminal SNR, min_snr_gamma <= 0, t out of range, or a
            network with a learned variance, which this loss would leave untrained.
    """
    predictions.check(prediction, schedule.zero_terminal_snr)
    _check_gamma(min_snr_gamma)
    output, v = _run(network, schedule.add_noise(x0, eps, t), t, context)
    _refuse_untrained(v, x0, "train it with hybrid_loss or variational_bound")
    return _squared_error(output, x0, eps, t, schedule, prediction, min_snr_gamma)


def variational_bound(
    network: Network,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    context: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
    variance: Variance,
    data: Data,
) -> Tensor:
    """L_vlb by its term at t: T times `bound_term`, whose mean over uniform t is the bound in bits per dimension.

    The prior's term, which no network changes, is left out (Ho et al. 2020, eq. 5; Nichol and Dhariwal 2021, eqs. 4-7).

    Raises:
        ValueError: unknown prediction, variance or data, eps prediction under zero terminal SNR, t out of range, or a
            variance that is learned though the network has none to give, or not learned though it has one.
    """
    predictions.check(prediction, schedule.zero_terminal_snr)
    x_t = schedule.add_noise(x0, eps, t)
    output, v = _run(network, x_t, t, context)
    if variance != "learned":
        _refuse_untrained(v, x0, f"choose the variance 'learned' instead of {variance!r}")
    return _whole_bound(output, v, x_t, x0, t, schedule, prediction, variance, data)


def hybrid_loss(
    network: Network,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    context: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
    data: Data,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """L_simple + 0.001 L_vlb for a network with a learned variance (Nichol and Dhariwal 2021, eq. 16).

    `diffusion_loss` alone trains what the network predicts, `variational_bound` alone its variance: the bound sees the
    prediction as a constant.

    Raises:
        ValueError: as `diffusion_loss` and `variational_bound`, or a network without a learned variance.
    """
    predictions.check(prediction, schedule.zero_terminal_snr)
    _check_gamma(min_snr_gamma)
    x_t = schedule.add_noise(x0, eps, t)
    output, v = _run(network, x_t, t, context)
    bound = _whole_bound(output.detach(), v, x_t, x0, t, schedule, prediction, "learned", data)
    return _squared_error(output, x0, eps, t, schedule, prediction, min_snr_gamma) + BOUND_SHARE * bound


def distillation_loss(
    network: Network,
    teacher: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    context: Tensor,
    schedule: ForwardProcess,
    prediction: Prediction,
) -> Tensor:
    """The squared error of the network's output at x_t, where the teacher's estimate stands for the truth.

    A teacher that is guided leaves a student that needs no guidance (Meng et al. 2023, arXiv 2210.03142, section 3.1,
    at one fixed scale). The teacher is run without gradients, and its context is its own affair.

    Raises:
        ValueError: unknown prediction, eps prediction under zero terminal SNR, t out of range, or a network with a
            learned variance, which this loss would leave untrained.
    """
    predictions.check(prediction, schedule.zero_terminal_snr)
    x_t = schedule.add_noise(x0, eps, t)
    output, v = _run(network, x_t, t, context)
    _refuse_untrained(v, x0, "distil a network with a fixed variance")
    alpha, sigma = schedule.coefficients(t, like=x0)
    with torch.no_grad():
        target = predictions.from_x0(prediction, teacher(x_t, t).x0, x_t.to(alpha.dtype), alpha, sigma)
    return _mean_square(output, target)


def bound_term(
    estimate: Estimate, x0: Tensor, schedule: ForwardProcess, t: Tensor, s: Tensor, variance: Variance, data: Data
) -> Tensor:
    """The bound's term for the step from t to s, both [B], given the estimate at x_t: bits per dimension [B].

    KL(q(x_s | x_t, x0) || p(x_s | x_t)) (Ho et al. 2020, eqs. 5 and 8), with q's mean at the estimate for p's and
    `variance` for its variance. Where s is clean it is -log p(x0 | x_t) instead, of a Gaussian about the estimate: for
    8-bit data the probability of x0's level (eq. 13), for continuous data the density. There "beta_tilde", which would
    be 0, is what `posterior.learned_variance` has for it, as in Nichol and Dhariwal's code; "beta" is beta, as in eq.
    13, where that code takes the other.

    Raises:
        ValueError: unknown variance or data, a learned variance that the estimate lacks, or a time out of range.
    """
    ones = x0.new_ones((len(x0),) + (1,) * (x0.ndim - 1))
    q_variance = posterior.learned_variance(-ones, schedule, t, s)
    match variance:
        case "beta_tilde":
            p_variance = q_variance
        case "beta":
            p_variance = posterior.learned_variance(ones, schedule, t, s)
        case "learned":
            if estimate.v is None:
                raise ValueError(
                    f"a learned variance needs {2 * x0.shape[1]} output channels for x0 {tuple(x0.shape)}, but the "
                    f"network gave {x0.shape[1]}: set its out_channels, or train and measure with a fixed variance"
                )
            p_variance = posterior.learned_variance(estimate.v, schedule, t, s)
        case _:
            raise ValueError(f"variance is {variance!r}, but must be 'beta_tilde', 'beta' or 'learned'")
    # The means are linear in (x0, x_t): their difference is the mean at the difference, without cancellation.
    error = posterior.mean_from_x0(x0 - estimate.x0, torch.zeros_like(x0), schedule, t, s)
    log_ratio = (q_variance / p_variance).log()
    divergence = (log_ratio.expm1() - log_ratio + error.square() / p_variance) / 2
    to_data = (s == schedule.clean).to(x0.device).reshape(ones.shape)
    match data:
        case "8-bit":
            # Where the term is the divergence, an estimate far off would make the other's gradient 0 times infinity.
            near = torch.where(to_data, estimate.x0, x0)
            decoder = -_log_probability_of_level(x0, near, p_variance.sqrt())
        case "continuous":
            decoder = ((2 * math.pi * p_variance).log() + (x0 - estimate.x0).square() / p_variance) / 2
        case _:
            raise ValueError(f"data is {data!r}, but must be '8-bit' or 'continuous'")
    return torch.where(to_data, decoder, divergence).flatten(1).mean(1) / math.log(2)


def eps_weight(variance: Tensor, schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """lambda_t, the weight of eps' mean squared error in the KL divergence of the step from t to s, in nats.

    beta_t^2 / (2 variance alpha_t (1 - alpha-bar_t)) in the letters of Ho et al. 2020, eq. 12: float64, of the shape of
    `variance`, t and s. For bits divide by log 2. Infinite where no signal is left.

    Raises:
        ValueError: a time out of range.
    """
    (alpha_t, sigma_t), (alpha_s, _) = schedule.at(t), schedule.at(s)
    return (alpha_s / alpha_t * posterior.beta(schedule, t, s) / sigma_t) ** 2 / (2 * variance)


def _run(network: Network, x_t: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the network predicts, like x_t, and its v where it has twice the channels."""
    output = network(x_t, t, context)
    if output.shape == x_t.shape:
        return output, None
    if output.ndim == x_t.ndim and output.shape == (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:]):
        output, v = output.chunk(2, dim=1)
        return output, v
    raise ValueError(
        f"the network's output is {tuple(output.shape)}, but for x0 {tuple(x_t.shape)} it must have that shape, or "
        "twice the channels for a learned variance"
    )


def _refuse_untrained(v: Tensor | None, x0: Tensor, mend: str) -> None:
    if v is not None:
        raise ValueError(
            f"the network gives {2 * x0.shape[1]} channels for x0 {tuple(x0.shape)}, so it has a learned variance, "
            f"which this loss would leave untrained: {mend}"
        )


def _check_gamma(min_snr_gamma: float | None) -> None:
    if min_snr_gamma is not None and min_snr_gamma <= 0:
        raise ValueError(f"min_snr_gamma is {min_snr_gamma}, but must be above 0 (5 is usual), or None for no weights")


def _squared_error(
    output: Tensor,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    schedule: ForwardProcess,
    prediction: Prediction,
    min_snr_gamma: float | None,
) -> Tensor:
    alpha, sigma = schedule.coefficients(t, like=x0)
    target = predictions.target(prediction, x0.to(alpha.dtype), eps.to(alpha.dtype), alpha, sigma)
    error = _mean_square(output, target)
    if min_snr_gamma is None:
        return error
    snr = schedule.snr(t)
    return error * predictions.loss_weight(prediction, snr.clamp(max=min_snr_gamma), snr).to(error.dtype)


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    """The squared error of each sample, averaged over it: [B], in the target's dtype."""
    return (output.to(target.dtype) - target).square().flatten(1).mean(1)


def _whole_bound(
    output: Tensor,
    v: Tensor | None,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
    variance: Variance,
    data: Data,
) -> Tensor:
    alpha, sigma = schedule.coefficients(t, like=x_t)
    estimate = predictions.to_x0(prediction, output.to(alpha.dtype), x_t.to(alpha.dtype), alpha, sigma)
    return schedule.steps * bound_term(Estimate(estimate, v), x0.to(alpha.dtype), schedule, t, t - 1, variance, data)


def _log_probability_of_level(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log of the Gaussian's mass in the bin of 2/255 about x0; the first and the last bin go on for ever.

    Ho et al. 2020, eq. 13, with the exact normal distribution, by its logarithm, which does not vanish in the tails.
    """
    upper, lower = (x0 + 1 / 255 - mean) / std, (x0 - 1 / 255 - mean) / std
    # Bins above the mean are mirrored to below it, where the distribution's logarithm keeps its digits.
    above = upper + lower > 0
    near, far = torch.where(above, -lower, upper), torch.where(above, -upper, lower)
    log_near = torch.special.log_ndtr(near)
    inside = log_near + (-(torch.special.log_ndtr(far) - log_near).expm1()).log()
    log_first, log_last = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(x0 < -0.999, log_first, torch.where(x0 > 0.999, log_last, inside))
