"""One step of the process backwards: q(x_s | x_t, x0) for any earlier time s < t, and the variances one may give it.

With s = t - 1 these are Ho et al. 2020, eqs. 6 and 7, and Nichol and Dhariwal 2021, eqs. 10, 11 and 15. Times are [B]
or 0-d tensors as in `ldm.schedule`; variances and coefficients are float64, of the times' shape.
"""

from typing import Literal

import torch
from torch import Tensor

from ldm.schedule import ForwardProcess

Variance = Literal["beta_tilde", "beta", "learned"]


def beta(schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """beta_t = 1 - (alpha_t / alpha_s)^2, the variance that the process adds from s to t.

    Raises:
        ValueError: a time out of range.
    """
    return 1 - (schedule.at(t)[0] / schedule.at(s)[0]) ** 2


def beta_tilde(schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """The variance of q(x_s | x_t, x0): (sigma_s / sigma_t)^2 beta_t (Ho et al. 2020, eq. 7).

    Raises:
        ValueError: a time out of range.
    """
    return (schedule.at(s)[1] / schedule.at(t)[1]) ** 2 * beta(schedule, t, s)


def mean_from_x0(x0: Tensor, x_t: Tensor, schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """The mean of q(x_s | x_t, x0) (Ho et al. 2020, eq. 7): like x_t, in float32 or wider.

    alpha_s beta_t / sigma_t^2 x0 + (alpha_t / alpha_s) (sigma_s / sigma_t)^2 x_t

    Raises:
        ValueError: a time out of range.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.at(time) for time in (t, s))
    on_x0 = alpha_s * beta(schedule, t, s) / sigma_t**2
    on_x_t = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
    return _as_factor(on_x0, x_t) * x0 + _as_factor(on_x_t, x_t) * x_t


def mean_from_eps(eps: Tensor, x_t: Tensor, schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """The same mean by the noise in x_t (Ho et al. 2020, eq. 11): like x_t, in float32 or wider.

    (alpha_s / alpha_t) (x_t - beta_t / sigma_t eps)

    Raises:
        ValueError: a time out of range, or one where alpha is 0.
    """
    (alpha_t, sigma_t), (alpha_s, _) = (schedule.at(time) for time in (t, s))
    if t.device.type == "cpu" and bool((alpha_t == 0).any()):
        raise ValueError("the mean does not follow from eps where alpha is 0: use mean_from_x0")
    on_eps = beta(schedule, t, s) / sigma_t
    return _as_factor(alpha_s / alpha_t, x_t) * (x_t - _as_factor(on_eps, x_t) * eps)


def learned_variance(v: Tensor, schedule: ForwardProcess, t: Tensor, s: Tensor) -> Tensor:
    """exp(w log beta_t + (1 - w) log beta-tilde_t) with w = (v + 1) / 2: like v [B, ...], in float32 or wider.

    Nichol and Dhariwal 2021, eq. 15, whose v is w; networks give it as v in about [-1, 1], as the released code does.
    Where s is clean beta-tilde is 0; that of the next step, from the released code, stands in for it.

    Raises:
        ValueError: a time out of range.
    """
    upper, lower = beta(schedule, t, s), beta_tilde(schedule, t, s)
    lower = torch.where(lower > 0, lower, beta_tilde(schedule, (t + 1).clamp(max=schedule.last), t))
    weight = (v.to(torch.promote_types(v.dtype, torch.float32)) + 1) / 2
    return torch.lerp(_as_factor(lower.log(), v).expand_as(v), _as_factor(upper.log(), v).expand_as(v), weight).exp()


def _as_factor(values: Tensor, like: Tensor) -> Tensor:
    """Float64 values of the times' shape, ready to multiply `like` [B, ...] in float32 or its wider dtype."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(like.device, dtype).reshape((-1,) + (1,) * (like.ndim - 1))
