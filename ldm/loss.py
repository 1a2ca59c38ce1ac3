"""The training objective."""

from torch import Tensor

from ldm import prediction as predictions
from ldm.denoiser import Network
from ldm.prediction import Prediction
from ldm.schedule import ForwardProcess


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
    """Squared error of the network's output at x_t (Ho et al. 2020, eq. 14), per sample: [B], float32 or wider.

    x0 and eps are [B, ...], t is int64 [B], context [B, L, D]; the mean is over everything but the batch. With
    `min_snr_gamma` the error of x0 has weight min(SNR, gamma) (Hang et al. 2023, eq. 8); without, the output's has 1.

    Raises:
        ValueError: unknown prediction, eps prediction under zero terminal SNR, min_snr_gamma <= 0, or t out of range.
    """
    predictions.check(prediction, schedule.zero_terminal_snr)
    if min_snr_gamma is not None and min_snr_gamma <= 0:
        raise ValueError(f"min_snr_gamma is {min_snr_gamma}, but must be above 0 (5 is usual), or None for no weights")
    alpha, sigma = schedule.coefficients(t, like=x0)
    target = predictions.target(prediction, x0.to(alpha.dtype), eps.to(alpha.dtype), alpha, sigma)
    output = network(schedule.add_noise(x0, eps, t), t, context)
    error = (output.to(target.dtype) - target).square().flatten(1).mean(1)
    if min_snr_gamma is None:
        return error
    snr = schedule.snr(t)
    return error * predictions.loss_weight(prediction, snr.clamp(max=min_snr_gamma), snr).to(error.dtype)
