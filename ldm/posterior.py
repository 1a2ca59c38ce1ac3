"""One step of the process backwards: q(x_s | x_t, x0) for any earlier time s < t, and the variances one may give it.

With s = t - 1 these are Ho et al. 2020, eqs. 6 and 7, and Nichol and Dhariwal 2021, eqs. 10, 11 and 15. Times are [B]
or 0-d tensors as in `ldm.schedule`; variances are float64, of the times' shape. All is written with 1 - SNR_t / SNR_s,
which is beta_t / sigma_t^2 (Kingma et al. 2021, appendix A) and keeps all digits where there is little noise.
"""

from typing import Literal

import torch
from torch import Tensor

from ldm.schedule import ForwardProcess, per_sample

Variance = Literal["beta_tilde", "beta", "learned"]


def beta(schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """beta_t = 1 - (alpha_t / alpha_s)^2, the variance that the process adds from s to t (Ho et al. 2020, eq. 2).

    Raises:
        ValueError: a time out of range, or s after t (on the CPU).
    """
    return schedule.at(t)[1] ** 2 * _snr_lost(schedule, t, s)


def beta_tilde(schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """The variance of q(x_s | x_t, x0): (sigma_s / sigma_t)^2 beta_t (Ho et al. 2020, eq. 7).

    Raises:
        ValueError: as `beta`.
    """
    return schedule.at(s)[1] ** 2 * _snr_lost(schedule, t, s)


def mean_from_x0(x0: Tensor, x_t: Tensor, schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """The mean of q(x_s | x_t, x0) (Ho et al. 2020, eq. 7): like x_t, in float32 or wider.

    alpha_s beta_t / sigma_t^2 x0 + (alpha_t / alpha_s) (sigma_s / sigma_t)^2 x_t

    Raises:
        ValueError: as `beta`, or times that do not fit x_t.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.at(time) for time in (t, s))
    on_x0 = alpha_s * _snr_lost(schedule, t, s)
    on_x_t = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
    return per_sample(on_x0, x_t) * x0 + per_sample(on_x_t, x_t) * x_t


def mean_from_eps(eps: Tensor, x_t: Tensor, schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """The same mean by the noise in x_t (Ho et al. 2020, eq. 11): like x_t, in float32 or wider.

    (alpha_s / alpha_t) (x_t - beta_t / sigma_t eps)

    Raises:
        ValueError: as `mean_from_x0`, or alpha 0 at t.
    """
    (alpha_t, sigma_t), (alpha_s, _) = (schedule.at(time) for time in (t, s))
    if t.device.type == "cpu" and bool((alpha_t == 0).any()):
        raise ValueError("the mean does not follow from eps where alpha is 0: use mean_from_x0")
    on_eps = sigma_t * _snr_lost(schedule, t, s)
    return per_sample(alpha_s / alpha_t, x_t) * (x_t - per_sample(on_eps, x_t) * eps)


def learned_variance(v: Tensor, schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """exp(w log beta_t + (1 - w) log beta-tilde_t) with w = (v + 1) / 2: like v [B, ...], in float32 or wider.

    Nichol and Dhariwal 2021, eq. 15, whose v is w; networks give it as v in about [-1, 1], as the released code does.
    Where s is clean beta-tilde is 0; that of the step from t + 1 (at most the last time) to t stands in for it, as in
    the released code. If t is the last time itself there is no such step, and the variance is beta_t.

    Raises:
        ValueError: as `beta`, or times that do not fit v.
    """
    upper, lower = beta(schedule, t, s), beta_tilde(schedule, t, s)
    lower = torch.where(lower > 0, lower, beta_tilde(schedule, (t + 1).clamp(max=schedule.last), t))
    lower = torch.where(lower > 0, lower, upper)
    weight = (v.to(torch.promote_types(v.dtype, torch.float32)) + 1) / 2
    return torch.lerp(per_sample(lower.log(), v).expand_as(v), per_sample(upper.log(), v).expand_as(v), weight).exp()


def _snr_lost(schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """1 - SNR_t / SNR_s."""
    if t.device.type == "cpu" and bool((s > t).any()):
        raise ValueError(f"s ({s.tolist()}) is after t ({t.tolist()}): give the noisier time as t")
    return -(schedule.log_snr(t) - schedule.log_snr(s)).expm1()
