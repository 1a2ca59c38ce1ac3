import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from ldm import posterior, samplers
from ldm.denoiser import Estimate, make_denoiser
from ldm.samplers import (
    SAMPLERS,
    invert_ddim,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_ode,
)
from ldm.schedule import VPSDE, NoiseSchedule
from ldm.walk import levels_of

SCHEDULE = NoiseSchedule("scaled_linear")
DIFFUSERS_NAMES = {"eps": "epsilon", "v": "v_prediction"}
SHAPE = (2, 4, 8, 8)


def network(x_t, t, context):
    """A smooth nonlinear function of x_t and t that keeps trajectories bounded."""
    return torch.sin(x_t) * 0.8 + 0.1 * (t / 1000).reshape(-1, 1, 1, 1).to(x_t.dtype)


def learned(x_t, t, context):
    """The same network with a learned variance: twice the channels."""
    return torch.cat([network(x_t, t, context), torch.cos(3 * x_t)], dim=1)


def denoiser(prediction, schedule=SCHEDULE, network=network):
    denoise = make_denoiser(network, schedule, prediction)
    return lambda x_t, t: denoise(x_t, t, torch.zeros(len(x_t), 1, 1))


def noises(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count)]


class Replay:
    """A `randn` that plays back given noises and counts its calls."""

    def __init__(self, noises):
        self.noises, self.calls = noises, 0

    def __call__(self, shape):
        noise = self.noises[self.calls]
        self.calls += 1
        assert noise.shape == shape
        return noise


def diffusers_trajectory(scheduler, x, n, eta, noises):
    # In float64, so that agreement is about the method and not about rounding.
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.final_alpha_cumprod = (
        torch.tensor(1.0, dtype=torch.float64) if scheduler.config.set_alpha_to_one else SCHEDULE.alphas_cumprod[0]
    )
    scheduler.set_timesteps(n)
    states = []
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        output = network(x, t.double().expand(len(x)), None)
        x = scheduler.step(output, int(t), x, eta=eta, variance_noise=noise if eta > 0 else None).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "offset", "set_alpha_to_one"),
    [("leading", 0, True), ("leading", 1, True), ("leading", 1, False), ("trailing", 0, True), ("trailing", 0, False)],
)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_is_that_of_diffusers(prediction, spacing, offset, eta, set_alpha_to_one):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=DIFFUSERS_NAMES[prediction],
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=False,
    )
    x, *steps = noises(11)
    expected = diffusers_trajectory(scheduler, x, 10, eta, steps)
    seen = []
    grid = SCHEDULE.timesteps(10, spacing, offset=offset, end=-1 if set_alpha_to_one else 0)
    result = sample_ddim(
        denoiser(prediction), x, SCHEDULE, grid, eta=eta, randn=Replay(steps), on_step=lambda info: seen.append(info.x)
    )
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert torch.equal(result, seen[-1])


SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
THEIRS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}, sample_ddim, {}),
    "ddpm-beta_tilde": (DDPMScheduler, {"clip_sample": False}, sample_ddpm, {}),
    "ddpm-beta": (
        DDPMScheduler,
        {"clip_sample": False, "variance_type": "fixed_large"},
        sample_ddpm,
        {"variance": "beta"},
    ),
    "ddpm-learned": (
        DDPMScheduler,
        {"clip_sample": False, "variance_type": "learned_range"},
        sample_ddpm,
        {"variance": "learned"},
    ),
    "euler": (EulerDiscreteScheduler, {}, sample_euler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}, sample_euler_ancestral, {}),
    "heun": (HeunDiscreteScheduler, {}, sample_heun, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}, sample_dpmpp_2m, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, sample_dpmpp_2m_sde, {}),
}


def distance_from_diffusers(name, n=20):
    """Largest difference from the scheduler's result, as a share of its largest value."""
    scheduler_class, settings, sample, arguments = THEIRS[name]
    scheduler = scheduler_class(**SETTINGS, **settings)
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)
    scheduler.set_timesteps(n)
    grid = schedule.timesteps(n, "trailing")
    assert sorted(set(scheduler.timesteps.tolist()), reverse=True) == grid[:-1].tolist()
    times = scheduler.timesteps
    if scheduler_class is DDPMScheduler:
        # It adds noise at all times but 0, and so at the end of trailing ones too: compared are all steps but the last.
        grid, times = grid[:-1], times[:-1]
    output = learned if name == "ddpm-learned" else network
    start = noises(1)[0]
    # Some step x / alpha, and multiply by alpha before each evaluation.
    x = start / scheduler.scale_model_input(torch.ones((), dtype=torch.float64), scheduler.timesteps[0])
    draws = {} if name == "heun" else {"generator": torch.Generator().manual_seed(7)}
    for t in times:
        x_t = scheduler.scale_model_input(x, t)
        x = scheduler.step(output(x_t, t.double().expand(len(x)), None), t, x, **draws).prev_sample
    generator = torch.Generator().manual_seed(7)
    # In the dtype that each draws in, on which a generator's numbers depend.
    dtype = torch.float32 if name == "dpmpp_2m_sde" else torch.float64
    result = sample(
        denoiser("eps", schedule, output),
        start,
        schedule,
        grid,
        randn=lambda shape: torch.randn(shape, generator=generator, dtype=dtype),
        **arguments,
    )
    return ((result - x).abs().max() / x.abs().max()).item()


@pytest.mark.parametrize("name", THEIRS)
def test_each_sampler_is_that_of_diffusers_on_its_own_table(name):
    assert distance_from_diffusers(name) < 1e-5


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_inversion_is_that_of_diffusers(set_alpha_to_one):
    scheduler = DDIMInverseScheduler(**SETTINGS, clip_sample=False, set_alpha_to_one=set_alpha_to_one)
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)
    scheduler.set_timesteps(20)
    x = start = noises(1)[0]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double().expand(len(x)), None), t, x).prev_sample
    seen = []
    grid = schedule.timesteps(20, "trailing", end=-1 if set_alpha_to_one else 0)
    result = invert_ddim(denoiser("eps", schedule), start, schedule, grid, on_step=seen.append)
    torch.testing.assert_close(result, x, rtol=0, atol=1e-5 * x.abs().max().item())
    assert [info.index for info in seen] == list(range(20))
    assert [info.t for info in seen] == grid.flip(0)[:-1].tolist()
    assert torch.equal(seen[-1].x, result)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    "grid",
    [
        SCHEDULE.timesteps(7, "linspace"),
        SCHEDULE.timesteps(1000, "leading"),
        SCHEDULE.timesteps(5, "leading", offset=1, end=0),
        torch.tensor([999, 998.75, 333.3, 0.5, -1]),
    ],
    ids=["linspace", "all", "to-zero", "fractional"],
)
def test_ddpm_is_ddim_at_eta_one(grid, zero_terminal_snr):
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=zero_terminal_snr)
    x, *steps = noises(len(grid))
    ddpm = sample_ddpm(denoiser("v", schedule), x, schedule, grid, randn=Replay(steps))
    ddim = sample_ddim(denoiser("v", schedule), x, schedule, grid, eta=1.0, randn=Replay(steps))
    torch.testing.assert_close(ddpm, ddim, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_euler_is_ddim_and_its_ancestral_form_is_ddpm(zero_terminal_snr):
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=zero_terminal_snr)
    grid = torch.tensor([999, 998.75, 700, 333.3, 0.5, -1])
    x, *steps = noises(len(grid))
    euler = sample_euler(denoiser("v", schedule), x, schedule, grid)
    torch.testing.assert_close(euler, sample_ddim(denoiser("v", schedule), x, schedule, grid), rtol=1e-10, atol=1e-10)
    ancestral = sample_euler_ancestral(denoiser("v", schedule), x, schedule, grid, randn=Replay(steps))
    ddpm = sample_ddpm(denoiser("v", schedule), x, schedule, grid, randn=Replay(steps))
    torch.testing.assert_close(ancestral, ddpm, rtol=1e-10, atol=1e-10)


GRIDS = {
    "down": (SCHEDULE, SCHEDULE.timesteps(5, "trailing")),
    "to-zero": (SCHEDULE, SCHEDULE.timesteps(5, "leading", offset=1, end=0)),
    "between": (SCHEDULE, torch.tensor([700.5, 600, 420.25, 99.9])),
    "vpsde": (VPSDE(), VPSDE().timesteps(5)),
    "vpsde-between": (VPSDE(), torch.tensor([0.9, 0.5, 0.2])),
}


@pytest.mark.parametrize(("schedule", "grid"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm++", "ode"])
def test_a_known_x0_is_reached_along_its_straight_line(name, schedule, grid):
    """x / alpha is then linear in sigma / alpha, so that every method is exact, whatever the grid and its end."""
    noise, x0 = noises(2)
    (first, last), (first_sigma, last_sigma) = (values.tolist() for values in schedule.at(grid[[0, -1]]))
    x = first * x0 + first_sigma * noise
    result = SAMPLERS[name](lambda x_t, t: Estimate(x0), x, schedule, grid)
    torch.testing.assert_close(result, last * x0 + last_sigma * noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["heun", "dpm++", "dpm++sde", "ode"])
def test_log_snr_samplers_start_at_the_smallest_signal(name):
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    noise, x0, draw = noises(3)
    x = 2**-12 * x0 + math.sqrt(1 - 2**-24) * noise
    alpha, sigma = (value.item() for value in schedule.at(torch.tensor(500)))
    result = SAMPLERS[name](
        lambda x_t, t: Estimate(x0), x, schedule, torch.tensor([999, 500]), randn=lambda shape: draw
    )
    if name == "dpm++sde":
        # Bayes' rule on q(x' | x0) and q(x | x').
        kept = (2**-12 / alpha * sigma / math.sqrt(1 - 2**-24)) ** 2
        noise = math.sqrt(kept) * noise + math.sqrt(1 - kept) * draw
    torch.testing.assert_close(result, alpha * x0 + sigma * noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_start_without_signal_is_noisier_than_times_of_next_to_none(name):
    """Four of this schedule's times are noisier than the level at which others begin."""
    schedule = NoiseSchedule("linear", beta_start=1e-4, beta_end=0.02, zero_terminal_snr=True)
    assert schedule.alphas_cumprod[-4] < 2**-24
    grid = torch.tensor([999.0, 998, 997, 996, 995, 500, 0, -1])
    starts = []

    def denoise(x_t, t):
        starts.append(t[0].item())
        return Estimate(torch.tanh(x_t))

    result = SAMPLERS[name](denoise, noises(1)[0], schedule, grid)
    assert result.isfinite().all()
    assert set(starts) >= set(grid[:-1].tolist())
    levels = levels_of(schedule, grid, 2**-24)
    assert all(before.noise > after.noise for before, after in pairwise(levels))


def test_one_step_of_ddpm_is_the_posterior_of_the_forward_process():
    """Bayes' rule on q(x' | x0) and q(x | x'), written with precisions."""
    x, noise = noises(2)
    x0 = torch.full_like(x, 0.3)
    (alpha, alpha_next), (_, sigma_next) = (values.tolist() for values in SCHEDULE.at(torch.tensor([600, 350])))
    ratio = alpha / alpha_next
    precision = 1 / sigma_next**2 + ratio**2 / (1 - ratio**2)
    mean = (alpha_next * x0 / sigma_next**2 + ratio * x / (1 - ratio**2)) / precision
    result = sample_ddpm(lambda x_t, t: Estimate(x0), x, SCHEDULE, torch.tensor([600, 350]), randn=lambda shape: noise)
    torch.testing.assert_close(result, mean + noise / math.sqrt(precision), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta", "learned", None])
@pytest.mark.parametrize("s", [350, 0, -1])
def test_the_variance_of_ddpm_is_the_chosen_one(variance, s):
    """The draw is taken apart: with and without noise."""
    x, noise = noises(2)
    v = torch.cos(x)
    t, s = torch.tensor(600.0), torch.tensor(float(s))
    expected = {
        "beta_tilde": posterior.beta_tilde(SCHEDULE, t, s),
        "beta": posterior.beta(SCHEDULE, t, s),
        "learned": posterior.learned_variance(v, SCHEDULE, t, s),
        None: posterior.learned_variance(v, SCHEDULE, t, s),
    }[variance]
    drawn, mean = (
        sample_ddpm(
            lambda x_t, t: Estimate(0.3 * x_t, v),
            x,
            SCHEDULE,
            torch.stack([t, s]),
            variance=variance,
            randn=lambda shape, scale=scale: scale * noise,
        )
        for scale in (1, 0)
    )
    expected = torch.zeros_like(expected) if s == -1 else expected
    torch.testing.assert_close(drawn - mean, expected.sqrt() * noise, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean, posterior.mean_from_x0(0.3 * x, x, SCHEDULE, t, s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta", "learned"])
def test_a_mean_shift_moves_every_mean_by_the_variance_times_the_gradient(variance):
    """On a single step, and on the last, which adds no noise; at x_t and the step's own time."""
    x, v = noises(1)[0], 0.5 * torch.ones(SHAPE, dtype=torch.float64)
    seen = []

    def shift(x_t, t):
        seen.append((x_t, t))
        return 2 * x_t

    def run(grid, mean_shift):
        return sample_ddpm(
            lambda x_t, t: Estimate(0.3 * x_t, v),
            x,
            SCHEDULE,
            grid,
            variance=variance,
            mean_shift=mean_shift,
            randn=torch.zeros,
        )

    for grid in (torch.tensor([600.0, 350.0]), torch.tensor([600.0, -1.0])):
        t, s = grid
        spread = {
            "beta_tilde": posterior.beta_tilde(SCHEDULE, t, s),
            "beta": posterior.beta(SCHEDULE, t, s),
            "learned": posterior.learned_variance(v, SCHEDULE, t, s),
        }[variance]
        moved = run(grid, shift) - run(grid, None)
        torch.testing.assert_close(moved, (2 * spread * x).expand_as(x), rtol=1e-10, atol=1e-12)
        assert torch.equal(seen[-1][0], x)
        assert seen[-1][1].tolist() == [600, 600]
    assert len(seen) == 2


def gaussian_error(schedule, n):
    """Largest distance of DDIM's end from the exact flow, for data N(1.5, 0.4^2) and its closed-form denoiser."""
    mean, std = 1.5, 0.4

    def denoise(x_t, t):
        alpha, sigma = schedule.coefficients(t, like=x_t)
        return Estimate((mean * sigma**2 + alpha * std**2 * x_t) / (alpha**2 * std**2 + sigma**2))

    z = torch.linspace(-3, 3, 101, dtype=torch.float64).reshape(-1, 1)
    grid = schedule.timesteps(n, "trailing")
    alpha, sigma = schedule.at(grid[0])
    # From the exact marginal: the published schedules leave some signal at T - 1, so unit noise would be off.
    x = alpha * mean + (alpha**2 * std**2 + sigma**2).sqrt() * z
    return (sample_ddim(denoise, x, schedule, grid) - (mean + std * z)).abs().max().item()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_ddim_with_the_exact_denoiser_returns_the_law_of_the_data(zero_terminal_snr):
    """The flow keeps quantiles, so that every z comes back as mean + std z; the error of the method is of order one."""
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=zero_terminal_snr)
    assert gaussian_error(schedule, 1000) < 1e-2
    assert gaussian_error(schedule, 250) / gaussian_error(schedule, 500) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("name", "arguments", "end", "calls"),
    [
        ("ddim", {}, -1, 0),
        ("ddim", {"eta": 0.3}, -1, 4),
        ("ddim", {"eta": 0.3}, 0, 5),
        ("ddpm", {}, -1, 4),
        ("ddpm", {}, 0, 5),
        ("ddpm", {"variance": "beta"}, -1, 4),
        ("euler", {}, 0, 0),
        ("euler_ancestral", {}, -1, 4),
        ("euler_ancestral", {}, 0, 5),
        ("heun", {}, 0, 0),
        ("dpm++", {}, 0, 0),
        ("dpm++sde", {}, -1, 4),
        ("dpm++sde", {}, 0, 5),
        ("ode", {}, 0, 0),
    ],
)
def test_randn_is_called_once_per_step_that_adds_noise(name, arguments, end, calls):
    x, *steps = noises(6, torch.float32)
    randn = Replay(steps)
    grid = SCHEDULE.timesteps(5, "leading", offset=1, end=end)
    SAMPLERS[name](denoiser("eps"), x, SCHEDULE, grid, randn=randn, **arguments)
    assert randn.calls == calls


def test_default_noise_is_the_float32_noise_of_torch():
    x, grid = noises(1)[0], SCHEDULE.timesteps(4, "trailing")
    torch.manual_seed(5)
    default = sample_ddpm(denoiser("eps"), x, SCHEDULE, grid)
    torch.manual_seed(5)
    given = [torch.randn(SHAPE, dtype=torch.float32) for _ in range(3)]
    assert torch.equal(default, sample_ddpm(denoiser("eps"), x, SCHEDULE, grid, randn=Replay(given)))


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_on_step_sees_every_step_and_the_last_x0_is_the_result(sample):
    """The step to sigma 0 is of first order in every sampler: it ends at the estimate itself."""
    x, grid = noises(1)[0], SCHEDULE.timesteps(4, "trailing")
    seen = []
    result = sample(denoiser("eps"), x, SCHEDULE, grid, on_step=seen.append)
    assert [info.index for info in seen] == [0, 1, 2, 3]
    assert [info.t for info in seen] == [999, 749, 499, 249]
    torch.testing.assert_close(seen[-1].x0, result, rtol=0, atol=1e-14)
    torch.testing.assert_close(seen[0].x0, denoiser("eps")(x, grid[0]).x0, rtol=0, atol=0)
    assert torch.equal(seen[-1].x, result)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("ddim", 4),
        ("ddpm", 4),
        ("euler", 4),
        ("euler_ancestral", 4),
        ("dpm++", 4),
        ("dpm++sde", 4),
        ("heun", 7),
        ("ode", 13),
    ],
)
def test_evaluations_per_sampling(name, calls):
    times = []

    def denoise(x_t, t):
        times.append(t[0].item())
        return denoiser("eps")(x_t, t)

    SAMPLERS[name](denoise, noises(1)[0], SCHEDULE, SCHEDULE.timesteps(4, "trailing"))
    assert len(times) == calls
    assert times == sorted(times, reverse=True)


def test_the_denoiser_gets_float64_times_and_x_in_float32_or_wider():
    seen = []

    def denoise(x_t, t):
        seen.append((x_t.dtype, t.dtype, tuple(t.shape)))
        return Estimate(torch.zeros_like(x_t))

    x = noises(1)[0]
    for dtype, expected in [(torch.float16, torch.float32), (torch.float64, torch.float64)]:
        result = sample_ddim(denoise, x.to(dtype), SCHEDULE, SCHEDULE.timesteps(2, "trailing").float())
        assert result.dtype == expected
        assert seen == [(expected, torch.float64, (2,))] * 2
        seen.clear()


def test_sampling_leaves_its_input_alone_and_keeps_no_graph():
    x = noises(1)[0].requires_grad_()
    before = x.detach().clone()
    result = sample_ddpm(denoiser("eps"), x, SCHEDULE, SCHEDULE.timesteps(2, "trailing"))
    assert torch.equal(x, before)
    assert not result.requires_grad


def test_a_start_without_signal_is_finite():
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    x, grid = noises(1)[0].float(), schedule.timesteps(10, "trailing")
    assert grid[0] == 999
    for sample in (*SAMPLERS.values(), invert_ddim):
        assert sample(denoiser("v", schedule), x, schedule, grid).isfinite().all()


def test_inversion_has_its_own_name_and_that_of_samplers():
    assert samplers.sample_invert_ddim is invert_ddim


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("sample", [*SAMPLERS.values(), invert_ddim], ids=[*SAMPLERS, "invert"])
def test_float32_is_close_to_float64(sample, zero_terminal_snr):
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=zero_terminal_snr)
    x, *steps = noises(20, torch.float32)
    grid = schedule.timesteps(20, "trailing")

    def run(x):
        return sample(denoiser("v", schedule), x, schedule, grid, randn=Replay(steps)).double()

    torch.testing.assert_close(run(x), run(x.double()), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta is"):
        sample_ddim(denoiser("eps"), noises(1)[0], SCHEDULE, SCHEDULE.timesteps(2, "trailing"), eta=eta)


@pytest.mark.parametrize("times", [[999], [1, 500, -1], [5, 5, -1], [[999, -1]]])
@pytest.mark.parametrize("sample", [*SAMPLERS.values(), invert_ddim], ids=[*SAMPLERS, "invert"])
def test_a_grid_that_does_not_decrease_is_refused(sample, times):
    with pytest.raises(ValueError, match="two or more strictly decreasing times"):
        sample(denoiser("eps"), noises(1)[0], SCHEDULE, torch.tensor(times))


def test_a_grid_out_of_range_is_refused():
    with pytest.raises(ValueError, match="this schedule has times"):
        sample_ddim(denoiser("eps"), noises(1)[0], SCHEDULE, torch.tensor([1000, -1]))


@pytest.mark.parametrize(
    ("sample", "arguments", "name"),
    [
        (sample_ddim, {"eta": 0.5}, "ddim with eta above 0"),
        (sample_euler_ancestral, {}, "euler_ancestral"),
        (sample_dpmpp_2m_sde, {}, "dpmpp_2m_sde"),
    ],
)
def test_noise_of_another_variance_than_the_learned_one_is_refused(sample, arguments, name):
    with pytest.raises(ValueError, match=f"^{name} adds noise of its own variance.* use ddpm"):
        sample(denoiser("eps", network=learned), noises(1)[0], SCHEDULE, SCHEDULE.timesteps(2, "trailing"), **arguments)


@pytest.mark.parametrize("sample", [sample_ddim, sample_euler, sample_heun, sample_dpmpp_2m, sample_ode, invert_ddim])
def test_samplers_without_noise_ignore_a_learned_variance(sample):
    x, grid = noises(1)[0], SCHEDULE.timesteps(3, "trailing")
    result = sample(denoiser("eps", network=learned), x, SCHEDULE, grid)
    assert torch.equal(result, sample(denoiser("eps"), x, SCHEDULE, grid))


@pytest.mark.parametrize(
    ("variance", "fault"), [("learned", "this model has not learned a variance"), ("small", "variance is 'small'")]
)
def test_a_variance_that_is_not_there_is_refused(variance, fault):
    with pytest.raises(ValueError, match=fault):
        sample_ddpm(denoiser("eps"), noises(1)[0], SCHEDULE, SCHEDULE.timesteps(2, "trailing"), variance=variance)


def broken_below(t_broken):
    """A denoiser that gives three values that are no numbers below a time."""

    def denoise(x_t, t):
        x0 = torch.zeros_like(x_t)
        if t[0] < t_broken:
            x0[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        return Estimate(x0)

    return denoise


@pytest.mark.parametrize("sample", [*SAMPLERS.values(), invert_ddim], ids=[*SAMPLERS, "invert"])
def test_an_estimate_that_is_not_finite_is_named_with_its_time(sample):
    """Found at once and not at the end of the grid, in second evaluations too."""
    first = 30 if sample is invert_ddim else 249
    fault = f"t = {first} has 3 of 512 values that are not finite: try the network in float32"
    with pytest.raises(ValueError, match=fault):
        sample(broken_below(250), noises(1)[0], SCHEDULE, torch.tensor([749, 499, 249, 30, -1]))


def test_a_result_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="the result has 512 of 512 values that are not finite"):
        sample_ddpm(
            denoiser("eps"),
            noises(1)[0],
            SCHEDULE,
            torch.tensor([500, 400]),
            mean_shift=lambda x_t, t: torch.full_like(x_t, math.inf),
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sample", [*SAMPLERS.values(), invert_ddim], ids=[*SAMPLERS, "invert"])
def test_on_an_accelerator_the_host_waits_once_and_the_result_is_that_of_the_cpu(sample):
    x, *steps = noises(5, torch.float32)
    grid = SCHEDULE.timesteps(4, "trailing")

    def run(x, denoise):
        return sample(denoise, x, SCHEDULE, grid, randn=Replay(steps))

    torch.testing.assert_close(run(x.cuda(), denoiser("eps")).cpu(), run(x, denoiser("eps")), rtol=1e-4, atol=1e-4)
    seen = []

    def broken(x_t, t):
        seen.append(t)
        return Estimate(x_t / 0)

    with pytest.raises(ValueError, match="the result has 512 of 512"):
        run(x.cuda(), broken)
    assert len(seen) >= 4
