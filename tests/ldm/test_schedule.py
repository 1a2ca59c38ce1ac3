import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ldm.schedule import NoiseSchedule

DIFFUSERS_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("kind", DIFFUSERS_KINDS)
def test_alphas_cumprod_are_those_of_diffusers(kind, scheduler_class, zero_terminal_snr):
    reference = scheduler_class(
        beta_schedule=DIFFUSERS_KINDS[kind],
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    ours = NoiseSchedule(kind, zero_terminal_snr=zero_terminal_snr)
    assert ours.alphas_cumprod.dtype == torch.float64
    assert ours.zero_terminal_snr == zero_terminal_snr
    # diffusers accumulates its product in float32, under zero terminal SNR twice.
    torch.testing.assert_close(
        ours.alphas_cumprod.float(), reference.alphas_cumprod, rtol=2e-3 if zero_terminal_snr else 5e-5, atol=1e-6
    )


def test_beta_bounds_and_steps_are_used():
    schedule = NoiseSchedule("linear", steps=3, beta_start=0.1, beta_end=0.3)
    expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-14, atol=0)
    assert schedule.steps == 3


@pytest.mark.parametrize("kind", DIFFUSERS_KINDS)
def test_zero_terminal_snr_is_that_of_diffusers_computed_in_float64(kind):
    plain, rescaled = NoiseSchedule(kind), NoiseSchedule(kind, zero_terminal_snr=True)
    alphas = plain.alphas_cumprod / torch.cat([torch.ones(1), plain.alphas_cumprod[:-1]])
    expected = (1 - rescale_zero_terminal_snr(1 - alphas)).cumprod(0)
    torch.testing.assert_close(rescaled.alphas_cumprod, expected, rtol=1e-8, atol=1e-14)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-14)


def test_from_alphas_cumprod_keeps_the_values_in_its_own_copy():
    values = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    schedule = NoiseSchedule.from_alphas_cumprod(values)
    values[0] = 0.7
    torch.testing.assert_close(
        schedule.alphas_cumprod, torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=0
    )
    assert schedule.zero_terminal_snr


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_at_is_exact_at_integers(dtype, zero_terminal_snr):
    schedule = NoiseSchedule("cosine", steps=50, zero_terminal_snr=zero_terminal_snr)
    alpha, sigma = schedule.at(torch.arange(-1, 50).to(dtype))
    assert alpha.dtype == sigma.dtype == torch.float64
    assert (alpha[0], sigma[0]) == (1, 0)
    assert torch.equal(alpha[1:], schedule.alphas_cumprod.sqrt())
    assert torch.equal(sigma[1:], (1 - schedule.alphas_cumprod).sqrt())


def test_at_interpolates_the_log_snr_between_integers_for_any_shape():
    schedule = NoiseSchedule("scaled_linear")
    t = torch.tensor([[0.25, 499.5], [998.75, 3.0]], dtype=torch.float64)
    alpha, sigma = schedule.at(t)
    assert alpha.shape == sigma.shape == (2, 2)
    log_snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).log()
    expected = log_snr[t.floor().long()] * (1 - t.frac()) + log_snr[t.ceil().long()] * t.frac()
    torch.testing.assert_close((alpha / sigma).log() * 2, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2, 2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_at_is_finite_and_monotone_where_the_log_snr_is_infinite_at_an_end():
    schedule = NoiseSchedule("scaled_linear", steps=10, zero_terminal_snr=True)
    for low in (-1.0, 8.0):
        t = torch.linspace(low, low + 1, 1001, dtype=torch.float64)
        alpha, sigma = schedule.at(t)
        assert (alpha.diff() < 0).all()
        assert (sigma.diff() >= 0).all()
    alpha, sigma = schedule.at(torch.tensor([-0.5, 0.0, 8.5, 8.0], dtype=torch.float64))
    assert (sigma / alpha)[0].item() == pytest.approx((sigma / alpha)[1].item() / 2, rel=1e-12)
    assert (alpha / sigma)[2].item() == pytest.approx((alpha / sigma)[3].item() / 2, rel=1e-12)


def test_coefficients_broadcast_over_samples_in_float32_or_wider():
    schedule = NoiseSchedule("scaled_linear")
    t = torch.tensor([3, 900])
    alpha, sigma = schedule.coefficients(t, like=torch.zeros(2, 4, 8, 8, dtype=torch.float16))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha.flatten(), schedule.at(t)[0].float(), rtol=0, atol=0)
    assert schedule.coefficients(t[0], like=torch.zeros(2, 4, dtype=torch.float64))[0].dtype == torch.float64
    assert schedule.coefficients(t[0], like=torch.zeros(2, 4))[1].shape == (1, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.float16, 5e-3)])
def test_add_noise_is_that_of_diffusers_in_the_dtype_of_x0(dtype, tolerance):
    schedule = NoiseSchedule("scaled_linear")
    reference = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator).to(dtype)
    t = torch.tensor([0, 500, 999])
    x_t = schedule.add_noise(x0, eps, t)
    assert x_t.dtype == dtype
    torch.testing.assert_close(x_t, reference.add_noise(x0, eps, t), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(schedule.add_noise(x0, eps, torch.tensor(-1)), x0, rtol=0, atol=0)


def test_add_noise_rounds_only_its_result():
    schedule = NoiseSchedule("scaled_linear")
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 4096, generator=generator).half()
    alpha, sigma = schedule.at(torch.tensor(400))
    exact = (alpha * x0.double() + sigma * eps.double()).half()
    assert (schedule.add_noise(x0, eps, torch.tensor([400])) != exact).float().mean() < 1e-3


def test_snr_is_the_ratio_of_the_powers():
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    snr = schedule.snr(torch.tensor([-1, 0, 999]))
    assert snr.tolist() == [math.inf, pytest.approx((1 - 0.00085) / 0.00085), 0]


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_are_those_of_diffusers(spacing, offset, steps):
    schedule = NoiseSchedule("linear", steps=steps)
    reference = DDIMScheduler(num_train_timesteps=steps, timestep_spacing=spacing, steps_offset=offset)
    for n in range(1, steps + 1):
        if spacing == "leading" and (n - 1) * (steps // n) + offset >= steps:
            continue  # diffusers gives a time that its own tables do not have
        grid = schedule.timesteps(n, spacing, offset=offset)
        reference.set_timesteps(n)
        # For some n its trailing grid has one time too many, -1.
        assert grid.tolist() == [*reference.timesteps[:n].tolist(), -1]
        assert grid.dtype == torch.float64
        assert (grid.diff() < 0).all()


def test_a_grid_may_end_at_the_first_noisy_time():
    assert NoiseSchedule("linear").timesteps(4, "leading", offset=1, end=0).tolist() == [751, 501, 251, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "quadratic"}, "kind is 'quadratic'"),
        ({"kind": "linear", "steps": 0}, "steps is 0"),
        ({"kind": "linear", "beta_start": 0.02, "beta_end": 0.01}, "beta_start 0.02 and beta_end 0.01"),
        ({"kind": "linear", "beta_start": 0.0}, "beta_start 0.0"),
        ({"kind": "scaled_linear", "beta_end": 1.0}, "beta_end 1.0"),
        ({"kind": "linear", "steps": 1, "zero_terminal_snr": True}, "steps of at least 2"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "has shape"),
        ([[0.5]], "has shape"),
        ([0.9, 0.9], "decrease strictly"),
        ([1.0, 0.9], "decrease strictly"),
        ([0.0], "decrease strictly"),
        ([0.5, -0.1], "decrease strictly"),
        ([0.5, math.nan], "decrease strictly"),
    ],
)
def test_impossible_tables_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_alphas_cumprod(torch.tensor(values))


@pytest.mark.parametrize("t", [-2.0, -1.01, 999.5, 1000.0, math.nan])
def test_times_out_of_range_are_refused(t):
    with pytest.raises(ValueError, match=r"has times -1 \(clean\) to 999"):
        NoiseSchedule("linear").at(torch.tensor([5.0, t]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "spacing": "leading"}, "choose 1 to 1000"),
        ({"n": 1001, "spacing": "trailing"}, "choose 1 to 1000"),
        ({"n": 10, "spacing": "karras"}, "spacing is 'karras'"),
        ({"n": 1000, "spacing": "leading", "offset": 1}, "at 1000, but the last time is 999"),
        ({"n": 10, "spacing": "leading", "end": 0}, "comes down to 0 cannot end at 0"),
        ({"n": 10, "spacing": "leading", "offset": -1}, "comes down to -1 cannot end at -1"),
        ({"n": 10, "spacing": "leading", "end": -2}, "cannot end at -2"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule("linear").timesteps(**arguments)
