import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ldm.loss import diffusion_loss
from ldm.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule("scaled_linear")
ZERO_SNR = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
T = torch.tensor([0, 200, 600, 999])
CONTEXT = torch.zeros(4, 1, 1)


@pytest.fixture
def data():
    """x0 and eps."""
    return torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def zero_network(x_t, t, context):
    return torch.zeros_like(x_t)


def mean_square(x):
    return x.square().mean((1, 2, 3))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_is_the_mean_squared_error_per_sample(prediction, data):
    x0, eps = data
    alpha, sigma = (value.float().reshape(4, 1, 1, 1) for value in SCHEDULE.at(T))
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]
    loss = diffusion_loss(zero_network, x0, eps, T, CONTEXT, SCHEDULE, prediction)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mean_square(target), rtol=1e-6, atol=1e-7)


def test_the_network_sees_the_noisy_sample_its_time_and_its_context(data):
    x0, eps = data
    seen = []

    def network(*arguments):
        seen.extend(arguments)
        return eps

    loss = diffusion_loss(network, x0, eps, T, CONTEXT, SCHEDULE, "eps")
    assert (loss == 0).all()
    x_t, t, context = seen
    assert torch.equal(x_t, SCHEDULE.add_noise(x0, eps, T))
    assert t is T
    assert context is CONTEXT


def test_half_precision_inputs_give_a_float32_loss(data):
    x0, eps = data.bfloat16()
    loss = diffusion_loss(zero_network, x0, eps, T, CONTEXT, SCHEDULE, "v")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, diffusion_loss(zero_network, x0.float(), eps.float(), T, CONTEXT, SCHEDULE, "v"), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_weights_are_those_of_the_paper_and_of_diffusers(prediction, gamma, data):
    x0, eps = data
    reference = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(reference, T)
    torch.testing.assert_close(SCHEDULE.snr(T).float(), snr, rtol=1e-4, atol=0)
    clamped = snr.clamp(max=gamma)
    weight = {"eps": clamped / snr, "x0": clamped, "v": clamped / (snr + 1)}[prediction]
    plain = diffusion_loss(zero_network, x0, eps, T, CONTEXT, SCHEDULE, prediction)
    weighted = diffusion_loss(zero_network, x0, eps, T, CONTEXT, SCHEDULE, prediction, min_snr_gamma=gamma)
    assert weighted.dtype == torch.float32
    torch.testing.assert_close(weighted, weight * plain, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_weights_are_finite_where_no_signal_is_left(prediction, data):
    x0, eps = data
    loss = diffusion_loss(zero_network, x0, eps, T, CONTEXT, ZERO_SNR, prediction, min_snr_gamma=5.0)
    assert loss.isfinite().all()
    assert loss[-1] == 0


def test_gradients_reach_the_network(data):
    x0, eps = data
    gain = torch.zeros(1, requires_grad=True)
    diffusion_loss(lambda x_t, t, context: gain * x_t, x0, eps, T, CONTEXT, SCHEDULE, "v", 5.0).mean().backward()
    assert gain.grad is not None
    assert gain.grad != 0


def test_eps_is_refused_under_zero_terminal_snr(data):
    with pytest.raises(ValueError, match="use v with zero terminal SNR"):
        diffusion_loss(zero_network, *data, T, CONTEXT, ZERO_SNR, "eps")


def test_an_unknown_prediction_is_refused(data):
    with pytest.raises(ValueError, match="prediction is 'epsilon'"):
        diffusion_loss(zero_network, *data, T, CONTEXT, SCHEDULE, "epsilon")


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_a_gamma_that_is_not_positive_is_refused(gamma, data):
    with pytest.raises(ValueError, match="min_snr_gamma is"):
        diffusion_loss(zero_network, *data, T, CONTEXT, SCHEDULE, "v", min_snr_gamma=gamma)
