"""How fast the samplers converge, on Gaussian data: its denoiser, flow and marginals are known in closed form."""

import math

import numpy as np
import pytest
import torch

from ldm.denoiser import make_denoiser
from ldm.samplers import (
    SAMPLERS,
    invert_ddim,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_euler,
    sample_heun,
    sample_ode,
)
from ldm.schedule import VPSDE, NoiseSchedule

MEAN, STD = 1.5, 0.4
PROCESSES = {"discrete": NoiseSchedule("scaled_linear"), "vpsde": VPSDE()}
STEPS = (20, 40, 80, 160, 320)


def exact(schedule, t, z):
    """What the flow carries quantile z to at time t: alpha mean + (alpha^2 std^2 + sigma^2)^(1/2) z."""
    alpha, sigma = schedule.at(t)
    return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z


def gaussian(schedule):
    """The denoiser E[x0 | x_t], through a network that predicts the score."""

    def network(x_t, t, context):
        alpha, sigma = schedule.coefficients(t, like=x_t)
        return (alpha * MEAN - x_t) / (alpha**2 * STD**2 + sigma**2)

    denoise = make_denoiser(network, schedule, "score")
    return lambda x_t, t: denoise(x_t, t, torch.zeros(len(x_t), 1, 1))


def quantiles():
    return torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(-1, 1)


def flow_errors(sample, schedule):
    """Largest distance from the flow for each of `STEPS`, on times uniform in log-SNR from -4 to 6."""
    errors = []
    for n in STEPS:
        grid = schedule.time_at(torch.linspace(-4, 6, n + 1, dtype=torch.float64))
        result = sample(gaussian(schedule), exact(schedule, grid[0], quantiles()), schedule, grid)
        errors.append((result - exact(schedule, grid[-1], quantiles())).abs().max().item())
    return errors


def slope(errors):
    """The order: of the least-squares line through log error over log step."""
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


@pytest.mark.parametrize("schedule", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(
    ("sample", "order"),
    [(sample_euler, 1), (sample_ddim, 1), (sample_heun, 2), (sample_dpmpp_2m, 2), (sample_ode, 4)],
)
def test_orders(sample, order, schedule):
    assert slope(flow_errors(sample, schedule)) == pytest.approx(order, abs=0.1)


def moments(sample, schedule, grid, **options):
    """Mean and standard deviation that a sampler ends with from the exact marginal at the grid's first time.

    With this denoiser x is affine in the start and in every draw, so its variance is the sum over unit sources of the
    squared responses to each; one row carries one source.
    """
    calls = 0

    def randn(shape):
        nonlocal calls
        calls += 1
        return torch.eye(shape[0], dtype=torch.float64)[:, [calls + 1]]

    rows = len(grid) + 1
    z = torch.zeros(rows, 1, dtype=torch.float64)
    z[1] = 1
    end = sample(gaussian(schedule), exact(schedule, grid[0], z), schedule, grid, randn=randn, **options)
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


def law_error(sample, schedule, n, **options):
    """Distances of mean and standard deviation from the data's, at the clean end of a grid."""
    spacing = "trailing" if isinstance(schedule, NoiseSchedule) else "exponential"
    mean, std = moments(sample, schedule, schedule.timesteps(n, spacing), **options)
    return abs(mean - MEAN), abs(std - STD)


LAWS = {
    **{name: (sample, {}) for name, sample in SAMPLERS.items()},
    "ddim-half": (sample_ddim, {"eta": 0.5}),
    "ddpm-beta": (sample_ddpm, {"variance": "beta"}),
}


@pytest.mark.parametrize("schedule", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("sample", "options"), LAWS.values(), ids=LAWS)
def test_every_sampler_converges_to_the_law_of_the_data(sample, options, schedule):
    coarse, fine = (max(law_error(sample, schedule, n, **options)) for n in (50, 200))
    # The last step of the continuous grid, from 1e-3 to clean, leaves 1.4e-4 whatever n is.
    assert fine < max(coarse / 2, 2e-4)
    assert fine < 0.03


def test_moments_are_those_of_a_large_sample():
    """The bookkeeping above, against 2^16 draws: standard errors are STD / 256 = 0.0016 and 0.0011."""
    schedule = PROCESSES["vpsde"]
    grid = schedule.timesteps(20, "exponential")
    generator = torch.Generator().manual_seed(0)

    def randn(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = exact(schedule, grid[0], randn((2**16, 1)))
    result = sample_dpmpp_2m_sde(gaussian(schedule), x, schedule, grid, randn=randn)
    mean, std = moments(sample_dpmpp_2m_sde, schedule, grid)
    assert result.mean().item() == pytest.approx(mean, abs=5 * STD / 256)
    assert result.std().item() == pytest.approx(std, abs=5 * STD / 256 / math.sqrt(2))


def round_trip_errors(schedule):
    """Largest distance between data and what its inversion is sampled back to, for each of `STEPS`."""
    errors = []
    for n in STEPS:
        grid = schedule.timesteps(n, "trailing" if isinstance(schedule, NoiseSchedule) else "linspace")
        x0 = MEAN + STD * quantiles()
        x = invert_ddim(gaussian(schedule), x0, schedule, grid)
        errors.append((sample_ddim(gaussian(schedule), x, schedule, grid) - x0).abs().max().item())
    return errors


@pytest.mark.parametrize("schedule", PROCESSES.values(), ids=PROCESSES)
def test_sampling_undoes_inversion(schedule):
    errors = round_trip_errors(schedule)
    assert errors[-1] < 0.03
    assert slope(errors) == pytest.approx(1, abs=0.1)


def test_inversion_finds_the_noise_of_the_flow():
    schedule = PROCESSES["vpsde"]
    errors = []
    for n in (160, 320):
        grid = schedule.timesteps(n)
        x = invert_ddim(gaussian(schedule), MEAN + STD * quantiles(), schedule, grid)
        errors.append((x - exact(schedule, grid[0], quantiles())).abs().max().item())
    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
