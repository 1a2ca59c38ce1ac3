import sys
from itertools import pairwise

import diffusers
import pytest
import torch

from ldm.denoiser import Estimate, make_denoiser
from ldm.diffusers_scheduler import diffusers_sampler
from ldm.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)
from ldm.schedule import VPSDE, NoiseSchedule

SCHEDULE = NoiseSchedule("scaled_linear")
SHAPE = (2, 4, 8, 8)
NAMES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    pytest.param(
        "LMSDiscreteScheduler", marks=pytest.mark.skipif(not diffusers.utils.is_scipy_available(), reason="scipy")
    ),
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]
OURS = {
    "DDIMScheduler": sample_ddim,
    "DDPMScheduler": sample_ddpm,
    "DPMSolverMultistepScheduler": sample_dpmpp_2m,
    "EulerAncestralDiscreteScheduler": sample_euler_ancestral,
    "EulerDiscreteScheduler": sample_euler,
    "HeunDiscreteScheduler": sample_heun,
}


def network(x_t, t, context):
    """A smooth nonlinear function of x_t and t that keeps trajectories bounded."""
    return torch.sin(x_t) * 0.8 + 0.1 * (t / 1000).reshape(-1, 1, 1, 1).to(x_t.dtype)


def denoiser(prediction="eps", schedule=SCHEDULE):
    denoise = make_denoiser(network, schedule, prediction)
    return lambda x_t, t: denoise(x_t, t, torch.zeros(len(x_t), 1, 1))


def noise(seed=1):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def draws(seed=7):
    """A `randn` that draws in turn what one generator gives."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def plain_loop(name, n):
    """The result of the scheduler on its own 1000 times, driven as diffusers' pipelines do; and the state before it."""
    scheduler_class = getattr(diffusers, name)
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    match name:
        case "DPMSolverSinglestepScheduler":
            scheduler = scheduler_class(**settings, lower_order_final=True)
            scheduler.set_timesteps(timesteps=SCHEDULE.timesteps(n, "trailing")[:-1].int().tolist())
        case "PNDMScheduler":
            scheduler = scheduler_class(
                **settings, timestep_spacing="trailing", skip_prk_steps=True, set_alpha_to_one=True
            )
            scheduler.set_timesteps(n)
        case "DDIMScheduler" | "DDPMScheduler":
            scheduler = scheduler_class(**settings, timestep_spacing="trailing", clip_sample=False)
            scheduler.set_timesteps(n)
        case _:
            scheduler = scheduler_class(**settings, timestep_spacing="trailing")
            scheduler.set_timesteps(n)
    takes_generator = name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
    options = {"generator": torch.Generator().manual_seed(7)} if takes_generator else {}
    x = noise() / scheduler.scale_model_input(torch.ones(()), scheduler.timesteps[0])
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(x_t, t.expand(len(x)), None), t, x, **options).prev_sample
    return x, x_t


def distance_from_plain_loop(name, n=20):
    """Largest difference between adapter and plain loop, as a share of the largest value."""
    result, before = plain_loop(name, n)
    seen = []
    ours = diffusers_sampler(name)(
        denoiser(), noise(), SCHEDULE, SCHEDULE.timesteps(n, "trailing"), randn=draws(), on_step=seen.append
    )
    if name == "DEISMultistepScheduler":
        # Its own last step goes to the noise of t = 0, and the adapter's to clean: all steps but that.
        ours, result = seen[-2].x, before
    return ((ours - result).abs().max() / result.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_does_what_the_scheduler_does_on_its_own_table(name):
    assert distance_from_plain_loop(name) < 1e-5


@pytest.mark.parametrize("schedule", [SCHEDULE, VPSDE()], ids=["discrete", "vpsde"])
@pytest.mark.parametrize("name", OURS)
def test_schedulers_that_we_have_too_agree_with_ours_on_any_grid(name, schedule):
    grid = torch.tensor([700.5, 600, 420.25, 99.9, 12, -1]) if schedule is SCHEDULE else schedule.timesteps(12)
    theirs = diffusers_sampler(name)(denoiser("v", schedule), noise(), schedule, grid, randn=draws())
    ours = OURS[name](denoiser("v", schedule), noise(), schedule, grid, randn=draws())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * ours.abs().max().item())


@pytest.mark.parametrize("name", OURS)
def test_schedulers_that_we_have_too_agree_with_ours_where_no_signal_is_left(name):
    """Theirs start from alpha 2^-12, where some round x / alpha to float32; Heun multiplies that error most."""
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    grid = schedule.timesteps(2, "trailing")
    theirs = diffusers_sampler(name)(denoiser("v", schedule), noise(), schedule, grid, randn=draws())
    ours = OURS[name](denoiser("v", schedule), noise(), schedule, grid, randn=draws())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-3 * ours.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_on_step_sees_every_step_once_and_x_at_the_schedules_own_scale(name):
    """With an x0 that does not change, x lies on one line whatever the method, unless it adds noise."""
    x0, seen = noise(2), []
    grid = SCHEDULE.timesteps(6, "trailing")
    alpha, sigma = SCHEDULE.at(grid)
    x = (alpha[0] * x0 + sigma[0] * noise()).float()
    result = diffusers_sampler(name)(lambda x_t, t: Estimate(x0), x, SCHEDULE, grid, on_step=seen.append)
    assert [info.index for info in seen] == list(range(6))
    assert [info.t for info in seen] == grid[:-1].tolist()
    assert torch.equal(seen[-1].x, result)
    assert all(torch.equal(info.x0, x0) for info in seen)
    if "Ancestral" not in name and name != "DDPMScheduler":
        for info, alpha_after, sigma_after in zip(seen, alpha[1:], sigma[1:], strict=True):
            line = (alpha_after * x0 + sigma_after * noise()).float()
            torch.testing.assert_close(info.x, line, rtol=0, atol=1e-4)
    torch.testing.assert_close(result, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_runs_at_the_times_of_the_grid_and_between_them(name):
    """Between only where the method's own noise levels lie there."""
    times, grid = [], torch.tensor([900.5, 640, 333, 101.25, 7, -1])

    def denoise(x_t, t):
        assert t.dtype == torch.float64
        assert t.shape == (2,)
        times.append(t[0].item())
        return denoiser("v")(x_t, t)

    diffusers_sampler(name)(denoise, noise(), SCHEDULE, grid)
    # The ancestral second-order method goes to the next time itself, but for its rounding.
    assert all(after < before + 1e-3 for before, after in pairwise(times))
    assert sorted(set(times) & set(grid.tolist()), reverse=True) == grid[:-1].tolist()
    if name == "KDPM2DiscreteScheduler":
        # Half-way in log(sigma / alpha).
        log_snr = SCHEDULE.log_snr(torch.tensor(times, dtype=torch.float64))
        torch.testing.assert_close(log_snr[1:-1:2], (log_snr[:-2:2] + log_snr[2::2]) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_law_of_gaussian_data_is_reached(name):
    """Quantiles where the method adds no noise, else mean and standard deviation of 4096 samples."""
    schedule, mean, std = VPSDE(), 1.5, 0.4

    def denoise(x_t, t):
        alpha, sigma = schedule.coefficients(t, like=x_t)
        return Estimate((mean * sigma**2 + alpha * std**2 * x_t) / (alpha**2 * std**2 + sigma**2))

    grid = schedule.timesteps(50, "exponential")
    z = torch.randn(4096, 1, generator=torch.Generator().manual_seed(3))
    result = diffusers_sampler(name)(denoise, z, schedule, grid, randn=draws())
    # At t = 1 alpha is 0.0066: unit noise is the marginal but for a hundredth.
    if "Ancestral" in name or name == "DDPMScheduler":
        assert result.mean().item() == pytest.approx(mean, abs=0.04)
        assert result.std().item() == pytest.approx(std, abs=0.06)
    else:
        torch.testing.assert_close(result, mean + std * z, rtol=0, atol=0.12)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_few_steps_and_a_start_without_signal_are_finite(name, n):
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    seen = []
    result = diffusers_sampler(name)(
        denoiser("v", schedule), noise(), schedule, schedule.timesteps(n, "trailing"), on_step=seen.append
    )
    assert result.isfinite().all()
    assert result.dtype == torch.float32
    assert len(seen) == n


def test_default_noise_is_that_of_torch():
    grid = SCHEDULE.timesteps(4, "trailing")
    torch.manual_seed(5)
    default = diffusers_sampler("DDPMScheduler")(denoiser(), noise(), SCHEDULE, grid)
    torch.manual_seed(5)
    assert torch.equal(
        default, diffusers_sampler("DDPMScheduler")(denoiser(), noise(), SCHEDULE, grid, randn=torch.randn)
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("UniPC", "UniPCMultistepScheduler"),
        ("EulerScheduler", "EulerDiscreteScheduler"),
        ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("EDMEulerScheduler", "EulerDiscreteScheduler"),
        ("DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"),
        ("StableDiffusionPipeline", "Scheduler"),
    ],
)
def test_what_is_no_such_scheduler_is_refused_with_its_nearest_names(name, near):
    with pytest.raises(ValueError, match=f"'{name}' is no variance-preserving scheduler of diffusers; .*{near}"):
        diffusers_sampler(name)


def test_a_missing_diffusers_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'DDIMScheduler needs diffusers: pip install "ldm-text-to-image\[train\]"'):
        diffusers_sampler("DDIMScheduler")


def test_what_a_scheduler_needs_beside_diffusers_is_named(monkeypatch):
    class Placeholder:
        _backends = ("torch", "scipy")

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", Placeholder)
    with pytest.raises(ValueError, match="LMSDiscreteScheduler needs what is not installed: pip install scipy"):
        diffusers_sampler("LMSDiscreteScheduler")


def test_a_grid_that_does_not_end_clean_is_refused_where_a_scheduler_cannot():
    with pytest.raises(ValueError, match="the grid ends at 0, but diffusers' EulerDiscreteScheduler ends clean"):
        diffusers_sampler("EulerDiscreteScheduler")(
            denoiser(), noise(), SCHEDULE, SCHEDULE.timesteps(4, "leading", 1, end=0)
        )


def test_an_estimate_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="t = 749 has 512 of 512 values that are not finite"):
        diffusers_sampler("DDIMScheduler")(
            lambda x_t, t: Estimate(x_t / (0 if t[0] < 800 else 1)),
            noise(),
            SCHEDULE,
            SCHEDULE.timesteps(4, "trailing"),
        )


def test_a_result_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="the result has 512 of 512 values that are not finite"):
        diffusers_sampler("DDPMScheduler")(
            lambda x_t, t: Estimate(torch.zeros_like(x_t)),
            noise(),
            SCHEDULE,
            SCHEDULE.timesteps(2, "trailing"),
            randn=lambda shape: torch.full(shape, torch.inf),
        )
