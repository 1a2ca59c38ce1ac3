"""What a network predicts, and how to pass from one prediction to another; nothing else knows their names.

With x_t = alpha x0 + sigma eps and alpha^2 + sigma^2 = 1, a network's output is one of
    eps   the noise (Ho et al. 2020)
    x0    the clean signal
    v     alpha eps - sigma x0, the velocity (Salimans and Ho 2022, section 4 and appendix D)
    score grad log q(x_t) = -eps / sigma (Song et al. 2021)
Any of them, together with x_t, gives the others. alpha and sigma are numbers or tensors that broadcast with x_t.

A division by zero raises ValueError. Tensors on an accelerator are not looked at, because that would make the host wait
for the device: there the result is not finite.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from torch import Tensor

Prediction = Literal["eps", "x0", "v", "score"]
Coefficient = Tensor | float

PREDICTIONS: Mapping[str, Prediction] = MappingProxyType({"epsilon": "eps", "sample": "x0", "v_prediction": "v"})
"""Our names by those that diffusers gives them in `prediction_type`; it has none for the score."""

_NO_SCORE = "the score is not defined"


def check(prediction: Prediction, zero_terminal_snr: bool) -> None:
    """Refuse a prediction that is unknown, or that says nothing about x0 where no signal is left.

    Raises:
        ValueError: in both cases.
    """
    if prediction not in get_args(Prediction):
        raise _unknown(prediction)
    if prediction in ("eps", "score") and zero_terminal_snr:
        raise ValueError(
            f"{prediction} prediction cannot find x0 where no signal is left: use v with zero terminal SNR"
        )


def target(prediction: Prediction, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The output that a perfect network would give for x_t = alpha x0 + sigma eps; x0's shape.

    Raises:
        ValueError: unknown prediction, or the score where sigma is 0.
    """
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case "score":
            _refuse_zero("sigma", sigma, _NO_SCORE)
            return -eps / sigma
        case _:
            raise _unknown(prediction)


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The estimate of x0 that `output` stands for; x_t's shape.

    Raises:
        ValueError: unknown prediction, or eps or the score where alpha is 0.
    """
    match prediction:
        case "eps":
            _refuse_zero("alpha", alpha, "x0 does not follow from eps")
            return (x_t - sigma * output) / alpha
        case "x0":
            return output
        case "v":
            return alpha * x_t - sigma * output
        case "score":
            _refuse_zero("alpha", alpha, "x0 does not follow from the score")
            return (x_t + sigma**2 * output) / alpha
        case _:
            raise _unknown(prediction)


def to_eps(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The estimate of eps that `output` stands for; x_t's shape.

    Raises:
        ValueError: unknown prediction, or x0 where sigma is 0.
    """
    match prediction:
        case "eps":
            return output
        case "x0":
            _refuse_zero("sigma", sigma, "eps does not follow from x0")
            return (x_t - alpha * output) / sigma
        case "v":
            return alpha * output + sigma * x_t
        case "score":
            return -sigma * output
        case _:
            raise _unknown(prediction)


def to_v(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The estimate of v that `output` stands for; x_t's shape.

    Raises:
        ValueError: unknown prediction, eps or the score where alpha is 0, or x0 where sigma is 0.
    """
    match prediction:
        case "eps":
            _refuse_zero("alpha", alpha, "v does not follow from eps")
            return (output - sigma * x_t) / alpha
        case "x0":
            _refuse_zero("sigma", sigma, "v does not follow from x0")
            return (alpha * x_t - output) / sigma
        case "v":
            return output
        case "score":
            _refuse_zero("alpha", alpha, "v does not follow from the score")
            return -sigma * (output + x_t) / alpha
        case _:
            raise _unknown(prediction)


def to_score(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The estimate of grad log q(x_t) = -eps / sigma (Song et al. 2021) that `output` stands for; x_t's shape.

    Raises:
        ValueError: unknown prediction, or sigma 0 for an output other than the score.
    """
    if prediction == "score":
        return output
    _refuse_zero("sigma", sigma, _NO_SCORE)
    return -to_eps(prediction, output, x_t, alpha, sigma) / sigma


def from_x0(prediction: Prediction, x0: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The output that stands for the estimate `x0`: the inverse of `to_x0`; x_t's shape.

    Raises:
        ValueError: unknown prediction, or sigma 0 for an output other than x0.
    """
    match prediction:
        case "eps":
            return to_eps("x0", x0, x_t, alpha, sigma)
        case "x0":
            return x0
        case "v":
            return to_v("x0", x0, x_t, alpha, sigma)
        case "score":
            return to_score("x0", x0, x_t, alpha, sigma)
        case _:
            raise _unknown(prediction)


def loss_weight(prediction: Prediction, weight: Tensor, snr: Tensor) -> Tensor:
    """The weight on the output's squared error that puts `weight` on x0's squared error, at SNR alpha^2 / sigma^2.

    An error in eps is 1 / sqrt(snr) as large in x0, one in v is 1 / sqrt(snr + 1) as large (Hang et al. 2023,
    section 3.4), one in the score sigma^2 / alpha as large.

    Raises:
        ValueError: unknown prediction, or eps or the score where the SNR is 0.
    """
    match prediction:
        case "eps":
            _refuse_zero("SNR", snr, "the error of x0 does not follow from that of eps")
            return weight / snr
        case "x0":
            return weight
        case "v":
            return weight / (snr + 1)
        case "score":
            _refuse_zero("SNR", snr, "the error of x0 does not follow from that of the score")
            return weight / (snr * (snr + 1))
        case _:
            raise _unknown(prediction)


def _refuse_zero(name: str, value: Coefficient, consequence: str) -> None:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    if bool((value == 0).any() if isinstance(value, Tensor) else value == 0):
        raise ValueError(f"{consequence} where {name} is 0")


def _unknown(prediction: str) -> ValueError:
    return ValueError(f"prediction is {prediction!r}, but must be 'eps', 'x0', 'v' or 'score'")
