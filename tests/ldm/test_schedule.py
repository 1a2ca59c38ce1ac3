import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ldm.schedule import VPSDE, NoiseSchedule

DIFFUSERS_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PROCESSES = {
    "scaled linear": NoiseSchedule("scaled_linear"),
    "cosine of 4000": NoiseSchedule("cosine", steps=4000),
    "zero terminal SNR": NoiseSchedule("scaled_linear", zero_terminal_snr=True),
    "two steps": NoiseSchedule("linear", steps=2, zero_terminal_snr=True),
    "one step": NoiseSchedule("linear", steps=1),
    "VPSDE": VPSDE(),
    "constant VPSDE": VPSDE(3.0, 3.0),
    "VPSDE without any signal": VPSDE(0.1, 4000.0),
}
SOME_TIMES = [0, 1, 10, 500, 998, 999]
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual, expected, rtol=0.0, atol=0.0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("steps", [1000, 4000])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_linear_betas_and_their_product(kind, steps):
    power = {"linear": 1, "scaled_linear": 2}[kind]
    first, last = 0.00085 ** (1 / power), 0.012 ** (1 / power)
    betas = [(first + (last - first) * index / (steps - 1)) ** power for index in range(steps)]
    # Sums of logarithms, rounded once, so that 4000 factors cost no digits.
    expected = exact(
        [math.exp(math.fsum(map(math.log1p, [-beta for beta in betas[: index + 1]]))) for index in SOME_TIMES]
    )
    alphas_cumprod = NoiseSchedule(kind, steps).alphas_cumprod
    assert_close(alphas_cumprod[SOME_TIMES], expected, rtol=1e-12)
    assert_close(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], exact(betas[1:]), atol=1e-12)


@pytest.mark.parametrize("steps", [1000, 4000])
def test_the_cosine_schedule_is_equation_17(steps):
    """abar(t) = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), s = 0.008, beta <= 0.999 (Nichol and Dhariwal)."""

    def f(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    alphas_cumprod = NoiseSchedule("cosine", steps).alphas_cumprod
    # Only the last beta, that would be 1, is clipped.
    unclipped = [f(t) / f(0) for t in range(1, steps)]
    assert_close(alphas_cumprod, exact([*unclipped, unclipped[-1] * 0.001]), rtol=1e-11, atol=1e-12)
    betas = [*(1 - f(t) / f(t - 1) for t in range(2, steps)), 0.999]
    assert_close(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], exact(betas), atol=1e-12)


@pytest.mark.parametrize("steps", [1000, 4000])
@pytest.mark.parametrize("kind", DIFFUSERS_KINDS)
def test_alphas_cumprod_are_those_of_diffusers_to_the_precision_of_float32(kind, steps):
    reference = DDPMScheduler(steps, beta_schedule=DIFFUSERS_KINDS[kind], beta_start=0.00085, beta_end=0.012)
    assert_close(NoiseSchedule(kind, steps).alphas_cumprod, reference.alphas_cumprod.double(), atol=1e-6)


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


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_grids_with_a_spare_time_are_those_of_dpm_solver(spacing, offset, steps):
    schedule = NoiseSchedule("linear", steps=steps)
    reference = DPMSolverMultistepScheduler(num_train_timesteps=steps, timestep_spacing=spacing, steps_offset=offset)
    for n in range(1, steps):
        if spacing == "leading" and n * (steps // (n + 1)) + offset >= steps:
            continue  # diffusers gives a time that its own tables do not have
        reference.set_timesteps(n)
        assert schedule.timesteps(n, spacing, offset, spare=1).tolist() == [*reference.timesteps.tolist(), -1]


def test_linspace_without_rounding_is_that_of_euler():
    schedule, reference = NoiseSchedule("linear"), EulerDiscreteScheduler(timestep_spacing="linspace")
    for n in range(1, 1001):
        reference.set_timesteps(n)
        grid = schedule.timesteps(n, "linspace", rounded=False)
        assert_close(grid[:-1].float(), reference.timesteps, rtol=1e-6)


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
        ({"kind": "linear", "steps": 200_000}, "decrease strictly"),
        ({"kind": "linear", "beta_start": 1e-20}, "decrease strictly"),
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
        ({"n": 1000, "spacing": "linspace", "spare": 1}, "choose 1 to 999"),
        (
            {"n": 10, "spacing": "lognormal"},
            "spacing is 'lognormal', but must be one of leading, trailing, linspace, karras, exponential$",
        ),
        ({"n": 1000, "spacing": "leading", "offset": 1}, "at 1000, but the last time is 999"),
        ({"n": 10, "spacing": "leading", "end": 0}, "comes down to 0 cannot end at 0"),
        ({"n": 10, "spacing": "leading", "offset": -1}, "comes down to -1 cannot end at -1"),
        ({"n": 10, "spacing": "leading", "end": -2}, "cannot end at -2"),
        ({"n": 10, "spacing": "karras", "end": 0}, "comes down to 0.0 cannot end at 0"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule("linear").timesteps(**arguments)


@pytest.mark.parametrize("t", [torch.tensor([5, 6, 7]), torch.tensor([[5], [6]])])
def test_times_that_do_not_fit_the_samples_are_refused(t):
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="give one time, or one for each of 2 samples"):
        NoiseSchedule("linear").add_noise(x, x, t)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"x0 is \(2, 4\) and eps \(4,\)"):
        NoiseSchedule("linear").add_noise(torch.zeros(2, 4), torch.zeros(4), torch.tensor(5))


@every_process
def test_log_snr_is_the_logarithm_of_the_ratio_of_the_powers(process):
    t = torch.linspace(process.clean, process.last, 997, dtype=torch.float64)
    alpha, sigma = process.at(t)
    here = (alpha > 1e-150) & (sigma > 0)
    assert_close(process.log_snr(t)[here], 2 * (alpha / sigma).log()[here], rtol=1e-13, atol=1e-11)
    assert process.log_snr(t[0]) == math.inf
    assert process.log_snr(t).diff().max() < 0


@every_process
def test_time_at_inverts_log_snr(process):
    clean, last = process.clean, process.last
    near_the_ends = exact([clean, clean + 1e-6, clean + 1e-3, last - 1e-3, last - 1e-6, last])
    t = torch.cat([torch.linspace(clean, last, 3001, dtype=torch.float64), near_the_ends])
    assert_close(process.time_at(process.log_snr(t)), t, atol=1e-10)
    assert process.time_at(exact(math.inf)) == clean
    log_snr = torch.linspace(max(process.log_snr(exact(last)).item(), -20), 30, 3001, dtype=torch.float64)
    log_snr = log_snr[:3000].reshape(3, -1).t()
    assert_close(process.log_snr(process.time_at(log_snr)), log_snr, rtol=1e-10, atol=1e-10)


def test_the_log_snr_at_the_table_s_times_is_exact_and_minus_infinity_where_no_signal_is_left():
    schedule = PROCESSES["zero terminal SNR"]
    t = torch.arange(-1, 1000)
    assert torch.equal(schedule.time_at(schedule.log_snr(t)), t.double())
    assert torch.equal(schedule.log_snr(t), schedule.log_snr(t.double()))
    assert schedule.log_snr(t[-1]) == -math.inf


@pytest.mark.parametrize("process", [NoiseSchedule("linear"), VPSDE()])
def test_a_log_snr_below_the_last_is_refused(process):
    lowest = process.log_snr(exact(process.last)).item()
    for log_snr in (lowest - 1e-6, -math.inf, math.nan):
        with pytest.raises(ValueError, match=r"is below this .* last"):
            process.time_at(exact([0.0, log_snr]))


@every_process
@pytest.mark.parametrize("method", ["at", "log_snr", "time_at"])
def test_results_lie_where_the_times_lie(process, method):
    result = getattr(process, method)(torch.zeros(2, 3, device="meta"))
    for values in result if method == "at" else [result]:
        assert (values.device.type, values.dtype, values.shape) == ("meta", torch.float64, (2, 3))
    alpha, _ = process.coefficients(torch.tensor(0), like=torch.zeros(2, 4, device="meta"))
    assert alpha.device.type == "meta"


def noise_level(process, t):
    alpha, sigma = process.at(t)
    return sigma / alpha


def expected_levels(spacing, most, least, n):
    """Karras et al. 2022, eq. 5, with rho = 7; for exponential a geometric sequence."""
    ramp = [index / max(n - 1, 1) for index in range(n)]
    if spacing == "karras":
        return exact([(most ** (1 / 7) + i * (least ** (1 / 7) - most ** (1 / 7))) ** 7 for i in ramp])
    return exact([most * (least / most) ** i for i in ramp])


@pytest.mark.parametrize("n", [1, 2, 20, 1000])
@pytest.mark.parametrize("kind", DIFFUSERS_KINDS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_grids_spaced_by_noise_follow_their_formula(spacing, zero_terminal_snr, kind, n):
    schedule = NoiseSchedule(kind, zero_terminal_snr=zero_terminal_snr)
    grid = schedule.timesteps(n, spacing)
    assert grid.shape == (n + 1,)
    assert grid.dtype == torch.float64
    assert grid.diff().max() < 0
    assert grid[-1] == -1
    # alpha^2 of 2^-24 is sigma / alpha of sqrt(2^24 - 1).
    most = math.sqrt(2**24 - 1) if zero_terminal_snr else noise_level(schedule, exact(999)).item()
    least = noise_level(schedule, exact(0)).item()
    assert_close(noise_level(schedule, grid[:-1]), expected_levels(spacing, most, least, n), rtol=1e-10)
    if zero_terminal_snr:
        assert schedule.at(grid[0])[0].item() ** 2 == pytest.approx(2**-24, rel=1e-10)
    else:
        assert grid[0] == 999


@pytest.mark.parametrize("n", [1, 2, 20])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_grids_spaced_by_noise_between_two_times(spacing, n):
    schedule = NoiseSchedule("scaled_linear")
    grid = schedule.timesteps(n, spacing, between=(951.0, 0.5))
    most, least = noise_level(schedule, exact([951, 0.5])).tolist()
    assert_close(noise_level(schedule, grid[:-1]), expected_levels(spacing, most, least, n), rtol=1e-10)
    assert grid[0].item() == pytest.approx(951, abs=1e-9)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("kind", DIFFUSERS_KINDS)
@pytest.mark.parametrize("steps", [2, 3, 50, 333, 1000, 4000])
def test_grids_spaced_by_noise_never_leave_the_schedule(steps, kind, spacing):
    """Rounding must not push the first time beyond T - 1; whether it does depends on the schedule's last bits."""
    grid = NoiseSchedule(kind, steps).timesteps(min(steps, 7), spacing)
    assert grid[0] == steps - 1
    assert grid[-2] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [2, 10, 37])
@pytest.mark.parametrize("kind", DIFFUSERS_KINDS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_grids_spaced_by_noise_are_those_of_diffusers(spacing, zero_terminal_snr, kind, n):
    ours = NoiseSchedule(kind, zero_terminal_snr=zero_terminal_snr)
    reference = EulerDiscreteScheduler(
        beta_schedule=DIFFUSERS_KINDS[kind],
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=zero_terminal_snr,
        **{f"use_{spacing}_sigmas": True},
    )
    if kind == "cosine" or zero_terminal_snr:
        # Its float32 table is too coarse here: 1 - alpha^2 of 4e-5 in steps of 6e-8, and rounded twice under zero SNR.
        reference.alphas_cumprod = ours.alphas_cumprod.clamp(min=2**-24 if zero_terminal_snr else 0)
    reference.set_timesteps(n)
    grid = ours.timesteps(n, spacing)
    assert_close(noise_level(ours, grid), reference.sigmas.double(), rtol=1e-4)
    inside = slice(1, None) if zero_terminal_snr else slice(None)  # between T - 2 and T - 1 it interpolates otherwise
    assert_close(grid[:-1][inside], reference.timesteps.double()[inside], rtol=1e-3, atol=1e-3)


def test_the_vpsde_is_the_integral_of_its_beta():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    beta = 0.1 + t * (20 - 0.1)
    integral = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(beta, t)])  # exact, because beta is linear
    alpha, sigma = VPSDE().at(t)
    assert_close(alpha, (-integral / 2).exp(), atol=1e-12)
    assert_close(sigma, (1 - (-integral).exp()).sqrt(), atol=1e-12)
    assert (alpha[0], sigma[0]) == (1, 0)
    # Close to 0 sigma^2 is beta_min t, which 1 - alpha^2 would have lost.
    assert VPSDE().at(exact(1e-14))[1].item() == pytest.approx(math.sqrt(1e-15), rel=1e-12)
    assert not VPSDE().zero_terminal_snr


def test_the_linear_schedule_tends_to_the_vpsde():
    def distance(steps):
        table = NoiseSchedule("linear", steps, beta_start=0.1 / steps, beta_end=20 / steps).alphas_cumprod.sqrt()
        return (table - VPSDE().at(torch.arange(1, steps + 1) / steps)[0]).abs().max().item()

    errors = [distance(steps) for steps in (1000, 2000, 4000)]
    assert errors[0] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.02)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("n", [1, 2, 25])
@pytest.mark.parametrize("spacing", ["linspace", "karras", "exponential"])
def test_grids_in_continuous_time(spacing, n):
    process = VPSDE()
    grid = process.timesteps(n, spacing, least_noisy=1e-2)
    assert grid.shape == (n + 1,)
    assert grid.diff().max() < 0
    assert grid[0].item() == pytest.approx(1, abs=1e-12)
    assert grid[-1] == 0
    if spacing == "linspace":
        assert_close(grid[:-1], torch.linspace(1, 1e-2, n, dtype=torch.float64))
    else:
        most, least = noise_level(process, exact([1, 1e-2])).tolist()
        assert_close(noise_level(process, grid[:-1]), expected_levels(spacing, most, least, n), rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "0 steps asked"),
        ({"n": 5, "least_noisy": 0.0}, "least_noisy is 0.0"),
        ({"n": 5, "least_noisy": 1.0}, "least_noisy is 1.0"),
        ({"n": 5, "spacing": "trailing"}, "spacing is 'trailing', but must be one of linspace, karras, exponential$"),
    ],
)
def test_impossible_grids_in_continuous_time_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VPSDE().timesteps(**arguments)


@pytest.mark.parametrize("betas", [(0.0, 20.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1.0)])
def test_an_impossible_vpsde_is_refused(betas):
    with pytest.raises(ValueError, match="must satisfy 0 < beta_min <= beta_max"):
        VPSDE(*betas)


@pytest.mark.parametrize("t", [-0.1, 1.001, math.nan])
def test_continuous_times_out_of_range_are_refused(t):
    for method in (VPSDE().at, VPSDE().log_snr):
        with pytest.raises(ValueError, match=r"must be from 0 \(clean\) to 1"):
            method(torch.tensor([0.5, t]))


def test_the_tables_are_copied_to_an_accelerator_once(monkeypatch):
    schedule, copies = NoiseSchedule("cosine"), []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *to_what: copies.append(to_what) or to(self, *to_what))
    for _ in range(3):
        alpha, _ = schedule.at(torch.empty(2, dtype=torch.float64, device="meta"))
        schedule.log_snr(torch.empty(2, dtype=torch.float64, device="meta"))
        assert alpha.device.type == "meta"
    assert [arguments for arguments in copies if isinstance(arguments[0], torch.device)] == [(torch.device("meta"),)]
