import pytest
import torch
from diffusers import DDPMScheduler

from ldm import posterior
from ldm.schedule import VPSDE, NoiseSchedule

SCHEDULES = {
    "linear": NoiseSchedule("linear"),
    "scaled_linear": NoiseSchedule("scaled_linear"),
    "cosine": NoiseSchedule("cosine"),
    "cosine of 4000": NoiseSchedule("cosine", steps=4000),
    "zero terminal SNR": NoiseSchedule("scaled_linear", zero_terminal_snr=True),
}
DIFFUSERS_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def one_step(schedule):
    """t and s = t - 1, from 0 to T - 1."""
    t = torch.arange(schedule.steps)
    return t, t - 1


def any_step(schedule):
    """Every pair of some times s < t, clean and noisiest included."""
    times = torch.tensor([-1, -0.5, 0, 0.25, 1, 200, 700.5, schedule.last - 1, schedule.last], dtype=torch.float64)
    later, earlier = torch.tril_indices(len(times), len(times), offset=-1)
    return times[later], times[earlier]


def vpsde_step(schedule):
    times = torch.tensor([0, 1e-5, 1e-3, 0.1, 0.5, 0.999, 1], dtype=torch.float64)
    later, earlier = torch.tril_indices(len(times), len(times), offset=-1)
    return times[later], times[earlier]


CASES = [
    *((schedule, steps) for schedule in SCHEDULES.values() for steps in (one_step, any_step)),
    (VPSDE(), vpsde_step),
]
IDS = [f"{name}, {steps}" for name in SCHEDULES for steps in ("s = t - 1", "any s")] + ["VPSDE"]
every_case = pytest.mark.parametrize(("schedule", "steps"), CASES, ids=IDS)


def pairs(count):
    """x0 and eps, float64 [count, 5]."""
    return torch.randn(2, count, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_close(actual, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@every_case
def test_the_posterior_is_bayes_rule(schedule, steps):
    """Precisions add, and the mean is theirs: prior N(alpha_s x0, sigma_s^2), likelihood N(x_t; ratio x_s, added)."""
    t, s = steps(schedule)
    t, s = t[s > schedule.clean], s[s > schedule.clean]
    x0, eps = pairs(len(t))
    x_t = schedule.add_noise(x0, eps, t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    ratio = alpha_t / alpha_s
    added = sigma_t**2 - (ratio * sigma_s) ** 2
    precision = 1 / sigma_s**2 + ratio**2 / added
    assert_close(posterior.beta_tilde(schedule, t, s), 1 / precision)
    weights = [(weight / precision).unsqueeze(1) for weight in (alpha_s / sigma_s**2, ratio / added)]
    assert_close(posterior.mean_from_x0(x0, x_t, schedule, t, s), weights[0] * x0 + weights[1] * x_t)


@every_case
def test_both_forms_of_the_mean_agree(schedule, steps):
    t, s = steps(schedule)
    has_signal = schedule.at(t)[0] > 0
    t, s = t[has_signal], s[has_signal]
    x0, eps = pairs(len(t))
    x_t = schedule.add_noise(x0, eps, t)
    from_eps = posterior.mean_from_eps(eps, x_t, schedule, t, s)
    # Where little signal is left, eps / alpha has lost the digits that the quotient is large by.
    lost = posterior.per_sample(schedule.at(s)[0] / schedule.at(t)[0], x_t).clamp(min=1)
    assert_close(from_eps / lost, posterior.mean_from_x0(x0, x_t, schedule, t, s) / lost)


@every_case
def test_a_step_forwards_and_its_posterior_keep_the_marginal(schedule, steps):
    """Drawing x_s by the posterior leaves q(x_s | x0): alpha_s as the mean's share of x0, sigma_s^2 as the variance."""
    t, s = steps(schedule)
    alpha_s, sigma_s = schedule.at(s)
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    alpha_t, sigma_t = schedule.coefficients(t, like=one)
    mean = posterior.mean_from_x0(one, alpha_t, schedule, t, s)
    spread = posterior.mean_from_x0(zero, sigma_t, schedule, t, s)
    assert_close(mean.flatten(), alpha_s)
    assert_close(spread.flatten() ** 2 + posterior.beta_tilde(schedule, t, s), sigma_s**2)


@pytest.mark.parametrize("n", [None, 20], ids=["all steps", "20 steps"])
@pytest.mark.parametrize("kind", DIFFUSERS_KINDS)
def test_variances_are_those_of_diffusers(kind, n):
    schedule = SCHEDULES[kind]
    scheduler = DDPMScheduler(beta_schedule=DIFFUSERS_KINDS[kind], timestep_spacing="trailing")
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # float64, so that agreement is about the formulas
    times = torch.tensor([999, 700, 5, 1]) if n is None else schedule.timesteps(n, "trailing")[:-2].long()
    if n is not None:
        scheduler.set_timesteps(n)
    for t in times:
        s = scheduler.previous_timestep(t)
        small, large = (scheduler._get_variance(t, variance_type=name) for name in ("fixed_small", "fixed_large"))
        assert_close(posterior.beta_tilde(schedule, t, s), small, rtol=1e-11)
        assert_close(posterior.beta(schedule, t, s), large, rtol=1e-11)
        v = torch.linspace(-1.2, 1.2, 25, dtype=torch.float64).reshape(1, -1)
        log_variance = scheduler._get_variance(t, predicted_variance=v, variance_type="learned_range")
        assert_close(posterior.learned_variance(v, schedule, t, s), log_variance.exp(), rtol=1e-11)


def test_a_learned_variance_lies_between_the_two_fixed_ones():
    schedule = SCHEDULES["scaled_linear"]
    t, s = torch.tensor([20, 999]), torch.tensor([0, 980])
    v = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).expand(2, 3)
    lower, upper = posterior.beta_tilde(schedule, t, s), posterior.beta(schedule, t, s)
    expected = torch.stack([lower, (lower * upper).sqrt(), upper], dim=1)
    assert_close(posterior.learned_variance(v, schedule, t, s), expected)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_last_learned_variance_is_that_of_the_released_code(schedule):
    """log(append(posterior_variance[1], posterior_variance[1:])): at t = 0 the lower bound is that of t = 1."""
    t, s = torch.tensor([0]), torch.tensor([-1])
    assert posterior.beta_tilde(schedule, t, s) == 0
    lower, upper = posterior.beta_tilde(schedule, t + 1, t), posterior.beta(schedule, t, s)
    v = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.stack([lower, (lower * upper).sqrt(), upper], dim=1)
    assert_close(posterior.learned_variance(v, schedule, t, s), expected, atol=0)


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule("linear", steps=1), SCHEDULES["cosine"], SCHEDULES["zero terminal SNR"], VPSDE()]
)
def test_a_single_step_from_the_last_time_has_the_variance_beta(schedule):
    t, s = (torch.tensor([time], dtype=torch.float64) for time in (schedule.last, schedule.clean))
    v = torch.tensor([[-1.0, 0.3, 1.0]], dtype=torch.float64)
    expected = schedule.at(t)[1].square().reshape(1, 1).expand(1, 3)
    assert_close(posterior.learned_variance(v, schedule, t, s), expected)


def test_the_last_step_in_continuous_time_has_a_variance_between_zero_and_beta():
    t, s = torch.tensor([1e-3, 0.5], dtype=torch.float64), torch.tensor([0.0, 0.0], dtype=torch.float64)
    variance = posterior.learned_variance(torch.tensor([[-1.0], [-1.0]]).double(), VPSDE(), t, s)
    assert_close(variance.flatten(), posterior.beta_tilde(VPSDE(), torch.ones(2).double(), t))
    assert (variance.flatten() < posterior.beta(VPSDE(), t, s)).all()


@pytest.mark.parametrize("schedule", [SCHEDULES["zero terminal SNR"], VPSDE()])
def test_the_step_to_the_clean_end_gives_x0(schedule):
    x0, eps = pairs(1)
    for time in (schedule.last, schedule.last / 2):
        t, s = torch.tensor([time], dtype=torch.float64), torch.tensor([schedule.clean], dtype=torch.float64)
        assert_close(posterior.mean_from_x0(x0, schedule.add_noise(x0, eps, t), schedule, t, s), x0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float32_for_narrower_tensors_and_one_time_serves_the_batch(dtype):
    schedule = SCHEDULES["scaled_linear"]
    x0, eps = (values.to(dtype) for values in pairs(3))
    t, s = torch.tensor(400), torch.tensor(380)
    for step in (posterior.mean_from_x0, posterior.mean_from_eps):
        mean = step(x0, eps, schedule, t, s)
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), step(x0.double(), eps.double(), schedule, t, s), rtol=1e-5, atol=1e-5)
    variance = posterior.learned_variance(x0, schedule, t, s)
    assert (variance.dtype, variance.shape) == (torch.float32, (3, 5))
    assert posterior.beta(schedule, t, s).dtype == torch.float64


def test_results_lie_where_the_tensors_lie():
    x, schedule = torch.zeros(3, 5, device="meta"), SCHEDULES["zero terminal SNR"]
    for device in ("cpu", "meta"):
        t, s = torch.tensor([400, 5, 0], device=device), torch.tensor([380, 2, -1], device=device)
        for result in (
            posterior.mean_from_x0(x, x, schedule, t, s),
            posterior.mean_from_eps(x, x, schedule, t, s),
            posterior.learned_variance(x, schedule, t, s),
        ):
            assert (result.device.type, result.shape) == ("meta", (3, 5))


def test_impossible_steps_are_refused():
    x, schedule = torch.zeros(2, 5), SCHEDULES["zero terminal SNR"]
    t, s = torch.tensor([20, 30]), torch.tensor([19, 31])
    for step in (
        lambda: posterior.beta(schedule, t, s),
        lambda: posterior.beta_tilde(schedule, t, s),
        lambda: posterior.mean_from_x0(x, x, schedule, t, s),
        lambda: posterior.mean_from_eps(x, x, schedule, t, s),
        lambda: posterior.learned_variance(x, schedule, t, s),
    ):
        with pytest.raises(ValueError, match=r"s \(\[19, 31\]\) is after t \(\[20, 30\]\)"):
            step()
    with pytest.raises(ValueError, match="does not follow from eps where alpha is 0: use mean_from_x0"):
        posterior.mean_from_eps(x, x, schedule, torch.tensor([999]), torch.tensor([998]))
    with pytest.raises(ValueError, match="give one time, or one for each of 2 samples"):
        posterior.mean_from_x0(x, x, schedule, torch.tensor([3, 2, 1]), torch.tensor([2, 1, 0]))
    with pytest.raises(ValueError, match="this schedule has times"):
        posterior.beta_tilde(schedule, torch.tensor([1000]), torch.tensor([999]))
