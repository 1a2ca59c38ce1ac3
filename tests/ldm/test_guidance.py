import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from ldm.denoiser import Estimate, make_denoiser
from ldm.guidance import classifier_free
from ldm.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule("scaled_linear")
BATCH = 3


class RecordingNetwork(nn.Module):
    """A cheap nonlinear function of all three arguments, which keeps what it was called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.calls = []

    def forward(self, x_t, t, context):
        self.calls.append((x_t, t, context))
        return torch.tanh(self.gain * x_t + context.mean((1, 2)).reshape(-1, 1, 1, 1)) + (t / 1000).reshape(
            -1, 1, 1, 1
        ).to(x_t.dtype)


@pytest.fixture
def inputs():
    """x_t, t, cond, uncond."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(BATCH, 4, 8, 8, generator=generator)
    cond, uncond = torch.randn(2, BATCH, 5, 6, generator=generator)
    return x_t, torch.full((BATCH,), 400.0, dtype=torch.float64), cond, uncond


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_guiding_x0_is_guiding_the_output(prediction, scale, inputs):
    x_t, t, cond, uncond = inputs
    network = RecordingNetwork()
    denoise = make_denoiser(network, SCHEDULE, prediction)
    guided = classifier_free(denoise, cond, uncond, scale)(x_t, t)
    output_uncond, output_cond = network(x_t, t, uncond), network(x_t, t, cond)
    expected = denoise.to_x0(output_uncond + scale * (output_cond - output_uncond), x_t, t)
    torch.testing.assert_close(guided.x0, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scale_one_runs_the_conditional_half_alone(inputs):
    x_t, t, cond, uncond = inputs
    network = RecordingNetwork()
    denoise = make_denoiser(network, SCHEDULE, "eps")
    estimate = classifier_free(denoise, cond, uncond, 1.0, rescale=0.7)(x_t, t)
    assert len(network.calls) == 1
    assert network.calls[0][0].shape == x_t.shape
    assert torch.equal(estimate.x0, denoise(x_t, t, cond).x0)


@torch.no_grad()
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("t", [torch.tensor(400.0), torch.tensor([400.0, 3.0, 900.0])])
def test_both_halves_are_one_batch_unconditional_first(rescale, t, inputs):
    x_t, _, cond, uncond = inputs
    network = RecordingNetwork()
    classifier_free(make_denoiser(network, SCHEDULE, "v"), cond, uncond, 7.5, rescale)(x_t, t)
    assert len(network.calls) == 1
    x_seen, t_seen, context_seen = network.calls[0]
    assert torch.equal(x_seen, torch.cat([x_t, x_t]))
    assert torch.equal(t_seen, torch.cat([t.expand(BATCH)] * 2))
    assert torch.equal(context_seen, torch.cat([uncond, cond]))


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_is_that_of_diffusers(prediction, rescale, inputs):
    x_t, t, cond, uncond = inputs
    network = RecordingNetwork()
    denoise = make_denoiser(network, SCHEDULE, prediction)
    guided = classifier_free(denoise, cond, uncond, 7.5, rescale)(x_t, t)
    output_uncond, output_cond = network(x_t, t, uncond), network(x_t, t, cond)
    output = rescale_noise_cfg(output_uncond + 7.5 * (output_cond - output_uncond), output_cond, rescale)
    torch.testing.assert_close(guided.x0, denoise.to_x0(output, x_t, t), rtol=1e-5, atol=1e-5)


def test_the_learned_variance_comes_from_the_conditional_half(inputs):
    x_t, t, cond, uncond = inputs

    def denoise(x_t, t, context):
        return Estimate(x_t, v=context[:, 0, :1])

    for scale in (1.0, 3.0):
        assert torch.equal(classifier_free(denoise, cond, uncond, scale)(x_t, t).v, cond[:, 0, :1])


def test_contexts_of_different_shapes_are_refused(inputs):
    _, _, cond, uncond = inputs
    with pytest.raises(ValueError, match="give both the same shape"):
        classifier_free(make_denoiser(RecordingNetwork(), SCHEDULE, "eps"), cond, uncond[:, :4], 2.0)


@pytest.mark.parametrize("rescale", [-0.1, 1.1])
def test_rescale_out_of_range_is_refused(rescale, inputs):
    _, _, cond, uncond = inputs
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        classifier_free(make_denoiser(RecordingNetwork(), SCHEDULE, "eps"), cond, uncond, 2.0, rescale)


@torch.no_grad()
def test_the_network_runs_in_its_own_dtype_and_the_estimate_is_float32(inputs):
    x_t, t, cond, _ = inputs
    network = RecordingNetwork(torch.bfloat16)
    estimate = make_denoiser(network, SCHEDULE, "v")(x_t, t, cond)
    x_seen, t_seen, context_seen = network.calls[0]
    assert (x_seen.dtype, t_seen.dtype, context_seen.dtype) == (torch.bfloat16, torch.float64, torch.bfloat16)
    assert estimate.x0.dtype == torch.float32
    alpha, sigma = SCHEDULE.coefficients(t, like=x_t)
    expected = alpha * x_t - sigma * network(x_seen, t_seen, context_seen).float()
    torch.testing.assert_close(estimate.x0, expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_estimate_is_as_wide_as_x_and_one_time_serves_the_whole_batch(inputs):
    x_t, t, cond, _ = inputs
    network = RecordingNetwork(torch.float64)
    denoise = make_denoiser(network, SCHEDULE, "eps")
    estimate = denoise(x_t.double(), t[0], cond)
    assert estimate.x0.dtype == torch.float64
    assert network.calls[0][1].shape == (BATCH,)
    assert torch.equal(estimate.x0, denoise(x_t.double(), t, cond).x0)


def test_a_network_without_parameters_runs_in_the_dtype_of_x(inputs):
    x_t, t, cond, _ = inputs
    denoise = make_denoiser(lambda x_t, t, context: x_t * 2, SCHEDULE, "x0")
    torch.testing.assert_close(denoise(x_t, t, cond).x0, x_t * 2, rtol=0, atol=0)


def test_to_output_inverts_to_x0(inputs):
    x_t, t, _, _ = inputs
    for prediction in ("eps", "x0", "v"):
        denoise = make_denoiser(RecordingNetwork(), SCHEDULE, prediction)
        output = torch.ones_like(x_t)
        torch.testing.assert_close(denoise.to_output(denoise.to_x0(output, x_t, t), x_t, t), output)


def test_a_denoiser_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        make_denoiser(RecordingNetwork(), NoiseSchedule("scaled_linear", zero_terminal_snr=True), "eps")
    with pytest.raises(ValueError, match="prediction is 'epsilon'"):
        make_denoiser(RecordingNetwork(), SCHEDULE, "epsilon")
