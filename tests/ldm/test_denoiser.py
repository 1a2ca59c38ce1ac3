import pytest
import torch
from torch import nn

from ldm.denoiser import make_denoiser
from ldm.schedule import VPSDE, NoiseSchedule

SCHEDULE = NoiseSchedule("scaled_linear")


class Doubling(nn.Module):
    """A network with a learned variance: twice the channels of x_t, its halves told apart."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, x_t, t, context):
        return torch.cat([self.gain * x_t, self.gain * x_t.sin()], dim=1)


@pytest.fixture
def inputs():
    """x_t, t, context."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 400, 999]), torch.zeros(3, 5, 6)


def refuse_to_run(x_t, t, context):
    pytest.fail("the network ran")


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_the_second_half_of_twice_the_channels_is_the_learned_variance(prediction, inputs):
    x_t, t, context = inputs
    estimate = make_denoiser(Doubling(), SCHEDULE, prediction)(x_t, t, context)
    expected = make_denoiser(lambda x_t, t, context: 0.5 * x_t, SCHEDULE, prediction)(x_t, t, context)
    torch.testing.assert_close(estimate.x0, expected.x0, rtol=0, atol=0)
    torch.testing.assert_close(estimate.v, 0.5 * x_t.sin(), rtol=0, atol=0)
    assert expected.v is None


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "x", "estimate"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_the_learned_variance_is_as_wide_as_x0(network, x, estimate, inputs):
    x_t, t, context = inputs
    result = make_denoiser(Doubling(network), SCHEDULE, "v")(x_t.to(x), t, context)
    assert result.x0.dtype == result.v.dtype == estimate


def test_a_context_of_another_batch_is_refused(inputs):
    x_t, t, context = inputs
    for wrong in (context[:0], context[:1], context[:2], torch.cat([context, context[:1]])):
        with pytest.raises(ValueError, match=f"context has a batch of {len(wrong)}, but x_t one of 3"):
            make_denoiser(refuse_to_run, SCHEDULE, "v")(x_t, t, wrong)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([1, 2], "give one time, or one for each of 3 samples"),
        ([[1, 2, 3]], "give one time, or one for each of 3 samples"),
        ([1, 2, 1000], "this schedule has times"),
    ],
)
def test_times_that_do_not_fit_are_refused_before_the_network_runs(t, message, inputs):
    x_t, _, context = inputs
    with pytest.raises(ValueError, match=message):
        make_denoiser(refuse_to_run, SCHEDULE, "v")(x_t, torch.tensor(t), context)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (3, 4, 8), (3,), (6, 4, 8, 8), (3, 12, 8, 8), (3, 8, 4, 8)])
def test_an_output_of_another_shape_is_refused(shape, inputs):
    x_t, t, context = inputs
    denoise = make_denoiser(lambda x_t, t, context: torch.zeros(shape), SCHEDULE, "v")
    expected = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"the network's output is \({expected},?\), which does not fit x_t \(3, 4"):
        denoise(x_t, t, context)


def test_the_score_of_a_gaussian_gives_its_posterior_mean_in_continuous_time():
    """Data N(m, c^2): the score of q(x_t) is (alpha m - x_t) / (alpha^2 c^2 + sigma^2), and E[x0 | x_t] is known."""
    process, mean, std = VPSDE(), 1.5, 0.4
    seen = []

    def network(x_t, t, context):
        seen.append(t)
        alpha, sigma = process.coefficients(t, like=x_t)
        return (alpha * mean - x_t) / (alpha**2 * std**2 + sigma**2)

    x_t = torch.linspace(-3, 3, 20, dtype=torch.float64).reshape(4, 5)
    t = torch.tensor([0, 1e-3, 0.5, 1], dtype=torch.float64)
    denoise = make_denoiser(network, process, "score")
    alpha, sigma = process.coefficients(t, like=x_t)
    expected = (mean * sigma**2 + alpha * std**2 * x_t) / (alpha**2 * std**2 + sigma**2)
    estimate = denoise(x_t, t, torch.zeros(4, 1, 1))
    torch.testing.assert_close(estimate.x0, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(seen[0], t)
    output = network(x_t, t, None)
    torch.testing.assert_close(denoise.to_output(expected[1:], x_t[1:], t[1:]), output[1:], rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="score is not defined where sigma is 0"):
        denoise.to_output(expected, x_t, t)


def test_the_score_is_refused_under_zero_terminal_snr():
    for process in (NoiseSchedule("scaled_linear", zero_terminal_snr=True), VPSDE(0.1, 4000.0)):
        with pytest.raises(ValueError, match="score prediction cannot find x0 where no signal is left"):
            make_denoiser(refuse_to_run, process, "score")
