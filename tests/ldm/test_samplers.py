import math

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.denoiser import Estimate, make_denoiser
from ldm.samplers import SAMPLERS, sample_ddim, sample_ddpm
from ldm.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule("scaled_linear")
DIFFUSERS_NAMES = {"eps": "epsilon", "v": "v_prediction"}
SHAPE = (2, 4, 8, 8)


def network(x_t, t, context):
    """A smooth nonlinear function of x_t and t that keeps trajectories bounded."""
    return torch.sin(x_t) * 0.8 + 0.1 * (t / 1000).reshape(-1, 1, 1, 1).to(x_t.dtype)


def denoiser(prediction, schedule=SCHEDULE):
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


def test_on_step_sees_every_step_and_the_last_x0_is_the_result():
    x, grid = noises(1)[0], SCHEDULE.timesteps(4, "trailing")
    seen = []
    result = sample_ddim(denoiser("eps"), x, SCHEDULE, grid, on_step=seen.append)
    assert [info.index for info in seen] == [0, 1, 2, 3]
    assert [info.t for info in seen] == [999, 749, 499, 249]
    torch.testing.assert_close(seen[-1].x0, result, rtol=0, atol=1e-14)
    torch.testing.assert_close(seen[0].x0, denoiser("eps")(x, grid[0]).x0, rtol=0, atol=0)


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
    for sample in SAMPLERS.values():
        assert sample(denoiser("v", schedule), x, schedule, grid).isfinite().all()


def test_float32_is_close_to_float64():
    x, grid = noises(1)[0], SCHEDULE.timesteps(50, "trailing")
    exact = sample_ddim(denoiser("v"), x, SCHEDULE, grid)
    torch.testing.assert_close(
        sample_ddim(denoiser("v"), x.float(), SCHEDULE, grid).double(), exact, rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta is"):
        sample_ddim(denoiser("eps"), noises(1)[0], SCHEDULE, SCHEDULE.timesteps(2, "trailing"), eta=eta)


@pytest.mark.parametrize("times", [[999], [1, 500, -1], [5, 5, -1], [[999, -1]]])
@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_a_grid_that_does_not_decrease_is_refused(sample, times):
    with pytest.raises(ValueError, match="two or more strictly decreasing times"):
        sample(denoiser("eps"), noises(1)[0], SCHEDULE, torch.tensor(times))


def test_a_grid_out_of_range_is_refused():
    with pytest.raises(ValueError, match="this schedule has times"):
        sample_ddim(denoiser("eps"), noises(1)[0], SCHEDULE, torch.tensor([1000, -1]))
