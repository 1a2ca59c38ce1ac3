import pytest
import torch
from diffusers import DDIMScheduler

from ldm import prediction
from ldm.schedule import NoiseSchedule

KINDS = ["eps", "x0", "v", "score"]


@pytest.fixture
def example():
    """x0, eps, x_t, alpha, sigma for three times, in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    alpha, sigma = NoiseSchedule("scaled_linear").coefficients(torch.tensor([0, 400, 999]), like=x0)
    return x0, eps, alpha * x0 + sigma * eps, alpha, sigma


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_every_conversion_of_the_target_is_exact(kind, example):
    x0, eps, x_t, alpha, sigma = example
    output = prediction.target(kind, x0, eps, alpha, sigma)
    assert_equal(prediction.to_x0(kind, output, x_t, alpha, sigma), x0)
    assert_equal(prediction.to_eps(kind, output, x_t, alpha, sigma), eps)
    assert_equal(prediction.to_v(kind, output, x_t, alpha, sigma), alpha * eps - sigma * x0)
    assert_equal(prediction.to_score(kind, output, x_t, alpha, sigma), -eps / sigma)
    assert_equal(prediction.from_x0(kind, x0, x_t, alpha, sigma), output)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_and_any_other_output_give_each_other(kind, example):
    """Of any output, not only of a perfect network's."""
    x0, _, x_t, alpha, sigma = example
    output = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    score = prediction.to_score(kind, output, x_t, alpha, sigma)
    back = {"eps": prediction.to_eps, "x0": prediction.to_x0, "v": prediction.to_v, "score": prediction.to_score}[kind]
    torch.testing.assert_close(back("score", score, x_t, alpha, sigma), output, rtol=1e-10, atol=1e-10)
    x0_of_output = prediction.to_x0(kind, output, x_t, alpha, sigma)
    assert_equal(prediction.to_x0("score", score, x_t, alpha, sigma), x0_of_output)
    torch.testing.assert_close(
        prediction.from_x0(kind, x0_of_output, x_t, alpha, sigma), output, rtol=1e-10, atol=1e-10
    )


def test_the_score_is_the_gradient_of_the_log_density(example):
    x0, eps, x_t, alpha, sigma = example
    x_t.requires_grad_()
    torch.distributions.Normal(alpha * x0, sigma).log_prob(x_t).sum().backward()
    assert_equal(prediction.target("score", x0, eps, alpha, sigma), x_t.grad)


def test_numbers_serve_as_coefficients():
    x0, eps = torch.tensor([2.0]), torch.tensor([-1.0])
    x_t = 0.6 * x0 + 0.8 * eps
    for kind in KINDS:
        output = prediction.target(kind, x0, eps, 0.6, 0.8)
        torch.testing.assert_close(prediction.to_x0(kind, output, x_t, 0.6, 0.8), x0)


def test_the_target_of_v_is_that_of_diffusers(example):
    x0, eps, _, alpha, sigma = example
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    expected = scheduler.get_velocity(x0, eps, torch.tensor([0, 400, 999]))
    torch.testing.assert_close(prediction.target("v", x0, eps, alpha, sigma), expected, rtol=1e-5, atol=1e-5)


def test_v_and_x0_give_x0_where_no_signal_is_left(example):
    x0, eps, *_ = example
    for kind in ("v", "x0"):
        output = prediction.target(kind, x0, eps, 0.0, 1.0)
        assert_equal(prediction.to_x0(kind, output, eps, 0.0, 1.0), x0)


def test_predictions_translates_the_names_of_diffusers():
    assert dict(prediction.PREDICTIONS) == {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_weighted_output_error_is_the_weighted_x0_error(kind, example):
    x0, eps, x_t, alpha, sigma = example
    output = prediction.target(kind, x0, eps, alpha, sigma) + torch.randn_like(x0)
    error_x0 = (prediction.to_x0(kind, output, x_t, alpha, sigma) - x0) ** 2
    error_output = (output - prediction.target(kind, x0, eps, alpha, sigma)) ** 2
    weight = torch.tensor([1.0, 5.0, 0.3], dtype=torch.float64).reshape(3, 1, 1, 1)
    assert_equal(prediction.loss_weight(kind, weight, alpha**2 / sigma**2) * error_output, weight * error_x0)


@pytest.mark.parametrize("alpha", [0.0, torch.tensor([0.5, 0.0]).reshape(2, 1)])
@pytest.mark.parametrize(("convert", "name"), [(prediction.to_x0, "x0"), (prediction.to_v, "v")])
@pytest.mark.parametrize(("kind", "called"), [("eps", "eps"), ("score", "the score")])
def test_eps_and_the_score_say_nothing_where_alpha_is_zero(kind, called, convert, name, alpha):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=f"{name} does not follow from {called} where alpha is 0"):
        convert(kind, x, x, alpha, 1.0)


@pytest.mark.parametrize("sigma", [0.0, torch.tensor([0.5, 0.0]).reshape(2, 1)])
@pytest.mark.parametrize(("convert", "name"), [(prediction.to_eps, "eps"), (prediction.to_v, "v")])
def test_x0_says_nothing_of_the_noise_where_sigma_is_zero(convert, name, sigma):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=f"{name} does not follow from x0 where sigma is 0"):
        convert("x0", x, x, 1.0, sigma)


@pytest.mark.parametrize("sigma", [0.0, torch.tensor([0.5, 0.0]).reshape(2, 1)])
def test_there_is_no_score_where_sigma_is_zero(sigma):
    x = torch.ones(2, 3)
    calls = [
        *(lambda kind=kind: prediction.to_score(kind, x, x, 1.0, sigma) for kind in ("eps", "x0", "v")),
        lambda: prediction.target("score", x, x, 1.0, sigma),
        lambda: prediction.from_x0("score", x, x, 1.0, sigma),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="score is not defined where sigma is 0"):
            call()


def test_a_score_says_what_it_can_where_sigma_is_zero():
    score, x_t = torch.full((1,), 5.0), torch.full((1,), 3.0)
    assert prediction.to_x0("score", score, x_t, 1.0, 0.0) == x_t
    assert prediction.to_eps("score", score, x_t, 1.0, 0.0) == 0
    assert prediction.to_score("score", score, x_t, 1.0, 0.0) == score


@pytest.mark.parametrize("kind", ["eps", "score"])
def test_an_error_of_the_noise_has_no_weight_where_the_snr_is_zero(kind):
    with pytest.raises(ValueError, match=f"does not follow from that of (the )?{kind} where SNR is 0"):
        prediction.loss_weight(kind, torch.ones(2), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("kind", ["eps", "v", "score"])
def test_an_output_error_weighs_nothing_where_the_snr_is_infinite(kind):
    assert prediction.loss_weight(kind, torch.ones(1), torch.tensor([torch.inf])) == 0


def test_unknown_predictions_are_refused_everywhere():
    x = torch.ones(1)
    calls = [
        lambda: prediction.check("epsilon", False),
        lambda: prediction.target("epsilon", x, x, 0.6, 0.8),
        lambda: prediction.to_x0("epsilon", x, x, 0.6, 0.8),
        lambda: prediction.to_eps("epsilon", x, x, 0.6, 0.8),
        lambda: prediction.to_v("epsilon", x, x, 0.6, 0.8),
        lambda: prediction.to_score("epsilon", x, x, 0.6, 0.8),
        lambda: prediction.from_x0("epsilon", x, x, 0.6, 0.8),
        lambda: prediction.loss_weight("epsilon", x, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="prediction is 'epsilon', but must be 'eps', 'x0', 'v' or 'score'"):
            call()


@pytest.mark.parametrize("kind", ["eps", "score"])
def test_eps_and_the_score_are_refused_under_zero_terminal_snr(kind):
    with pytest.raises(ValueError, match=f"{kind} prediction cannot find x0 .* use v with zero terminal SNR"):
        prediction.check(kind, True)
    prediction.check("v", True)
    prediction.check("x0", True)
    prediction.check(kind, False)
