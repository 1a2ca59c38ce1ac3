"""The bound and the density against Gaussian data, whose every term is known, and against integrals by brute force."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ldm import posterior
from ldm.denoiser import Estimate, make_denoiser
from ldm.likelihood import bound, ode_log_density
from ldm.loss import bound_term, variational_bound
from ldm.schedule import VPSDE, NoiseSchedule

LN2 = math.log(2)
MEAN, STD = 0.7, 0.4
LONG = VPSDE(0.1, 80)
"""A process that ends at alpha 2e-9, so that its noisiest data are unit noise."""


def linear(steps):
    """The linear schedule of Ho et al. 2020 at any number of steps (Nichol and Dhariwal 2021)."""
    return NoiseSchedule("linear", steps, 0.1 / steps, 20 / steps)


def signs(shape):
    """In place of unit noise, +1 for half a batch and -1 for the other half: a quadratic has the same mean."""
    half = torch.ones(shape[0] // 2, *shape[1:], dtype=torch.float64)
    return torch.cat([half, -half])


def gaussian(schedule, mean=MEAN, std=STD):
    """E[x0 | x_t] where x0 is N(mean, std^2)."""

    def denoise(x_t, t):
        alpha, sigma = schedule.coefficients(t, like=x_t)
        return Estimate(mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean))

    return denoise


def share_of_beta(schedule, std, t, s):
    """w such that beta^w beta-tilde^(1 - w) is the variance of q(x_s | x_t) where x0 is N(mean, std^2)."""
    (alpha_t, sigma_t), (alpha_s, _) = schedule.at(t), schedule.at(s)
    beta = posterior.beta(schedule, t, s)
    given_x_t = std**2 * sigma_t**2 / (alpha_t**2 * std**2 + sigma_t**2)
    true = posterior.beta_tilde(schedule, t, s) + (alpha_s * beta / sigma_t**2) ** 2 * given_x_t
    lower = posterior.learned_variance(torch.full_like(beta, -1.0), schedule, t, s)
    return (true / lower).log() / (beta / lower).log()


def with_exact_variance(schedule, std):
    """`gaussian` with the v of that variance, for the chain of all T steps."""

    def denoise(x_t, t):
        weight = share_of_beta(schedule, std, t, t - 1).reshape((-1,) + (1,) * (x_t.ndim - 1))
        return Estimate(gaussian(schedule, std=std)(x_t, t).x0, (2 * weight - 1).expand_as(x_t))

    return denoise


def all_steps(denoise, x0, schedule, variance):
    """`bound(...).total` over all T steps, for x0 [B] and the noise `signs`, in one call for all times."""
    t = torch.arange(schedule.steps).repeat_interleave(len(x0))
    values = x0.repeat(schedule.steps).reshape(-1, 1)
    x_t = schedule.add_noise(values, signs((len(x0),)).repeat(schedule.steps).reshape(-1, 1), t)
    terms = bound_term(denoise(x_t, t), values, schedule, t, t - 1, variance, "continuous")
    return terms.reshape(schedule.steps, len(x0)).sum(0) + prior_bits(schedule, x0)


def prior_bits(schedule, x0):
    alpha, sigma = schedule.at(torch.tensor(schedule.steps - 1))
    prior = torch.distributions.Normal(torch.zeros(1, dtype=torch.float64), 1)
    return torch.distributions.kl_divergence(torch.distributions.Normal(alpha * x0, sigma), prior) / LN2


def gaussian_bits(x, mean, std):
    """-log2 of the density of N(mean, std^2)."""
    return -torch.distributions.Normal(torch.as_tensor(mean, dtype=torch.float64), std).log_prob(x) / LN2


def four_points(std):
    """x0 whose mean over a quadratic is that of N(MEAN, std^2), each with both signs of the noise."""
    return torch.tensor([MEAN - std, MEAN + std], dtype=torch.float64).repeat(2)


@pytest.mark.parametrize("std", [0.05, STD, 1.0])
@pytest.mark.parametrize("steps", [1000, 2000, 4000])
def test_the_exact_variance_lies_between_the_bounds_of_a_learned_one(steps, std):
    t = torch.arange(steps)
    weight = share_of_beta(linear(steps), std, t, t - 1)
    assert weight.min() >= 0
    assert weight.max() <= 1 + 1e-8


@pytest.mark.parametrize("steps", [1000, 2000, 4000])
def test_with_the_exact_variance_the_bound_is_the_density(steps):
    """For every x0; all that remains is that the noisiest data are not quite unit noise."""
    schedule = linear(steps)
    x0 = torch.tensor([-0.5, 0.3, 0.7, 2.0], dtype=torch.float64).repeat(2)
    total = all_steps(with_exact_variance(schedule, STD), x0, schedule, "learned").reshape(2, -1).mean(0)
    exact = gaussian_bits(x0[:4], MEAN, STD)
    assert (total - exact).abs().max() < 1e-3
    alpha, sigma = schedule.at(torch.tensor(steps - 1))
    std = (alpha**2 * STD**2 + sigma**2).sqrt()
    off = (alpha * (x0[:4] - MEAN)).square() + sigma**2
    remainder = -(off / std**2 + 2 * std.log() - (alpha * x0[:4]).square() - sigma**2) / 2 / LN2
    torch.testing.assert_close(total - exact, remainder, rtol=0, atol=1e-9)


def test_with_no_signal_left_the_bound_is_the_density_to_the_last_digits():
    schedule = NoiseSchedule("linear", 60, 2e-3, 0.3, zero_terminal_snr=True)
    x0 = torch.tensor([[-0.5, 0.3], [0.7, 2.0]], dtype=torch.float64).repeat(2, 1)
    denoise = with_exact_variance(schedule, STD)
    grid = schedule.timesteps(60, "leading")
    result = bound(denoise, x0, schedule, grid, variance="learned", data="continuous", randn=signs)
    assert result.data == "continuous"
    assert result.terms.shape == result.x0_mse.shape == result.eps_mse.shape == (60, 4)
    assert (result.prior == 0).all()
    total = result.total.reshape(2, 2).mean(0)
    torch.testing.assert_close(total, gaussian_bits(x0[:2], MEAN, STD).mean(1), rtol=0, atol=1e-9)


def test_beta_costs_a_gap_that_falls_as_the_number_of_steps_rises_and_beta_tilde_one_that_stays():
    gaps = {"beta": [], "beta_tilde": []}
    x0 = four_points(STD)
    entropy = (math.log(2 * math.pi * STD**2) + 1) / 2 / LN2
    for steps in (1000, 2000, 4000):
        schedule = linear(steps)
        for variance, found in gaps.items():
            found.append(float(all_steps(gaussian(schedule), x0, schedule, variance).mean()) - entropy)
    beta, beta_tilde = gaps["beta"], gaps["beta_tilde"]
    assert 0.001 < beta[0] < 0.01
    assert [beta[0] / beta[1], beta[1] / beta[2]] == pytest.approx([2, 2], rel=0.05)
    # At the kth of many equal steps beta / beta-tilde is 1 + 1/k, and 2 for the stand-in at the first.
    limit = (np.euler_gamma + 1 - LN2) / (2 * LN2)
    assert beta_tilde[0] > beta_tilde[1] > beta_tilde[2] > limit
    assert beta_tilde[2] < limit + 0.1


def test_a_grid_of_all_times_gives_the_terms_of_training():
    """The mean over t of what `variational_bound` trains on, and the prior, are the bound."""
    schedule, steps = NoiseSchedule("cosine", 40), 40
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (2, 3, 4, 4), generator=generator).double() / 127.5 - 1
    noises = torch.randn(steps, *x0.shape, generator=generator, dtype=torch.float64)

    def network(x_t, t, context):
        return torch.cat([0.8 * x_t.sin(), (x_t + t.reshape(-1, 1, 1, 1)).cos()], 1)

    context = torch.zeros(2, 1, 1)
    denoise = make_denoiser(network, schedule, "v")
    replay = iter(noises)
    grid = schedule.timesteps(steps, "leading")
    result = bound(
        lambda x_t, t: denoise(x_t, t, context),
        x0,
        schedule,
        grid,
        variance="learned",
        data="8-bit",
        randn=lambda shape: next(replay),
    )
    assert torch.equal(result.times, torch.arange(steps - 1, -2, -1).double())
    for index, time in enumerate(reversed(range(steps))):
        t = torch.full((2,), time)
        trained = variational_bound(network, x0, noises[index], t, context, schedule, "v", "learned", "8-bit")
        torch.testing.assert_close(trained / steps, result.terms[index], rtol=1e-9, atol=0)
        x_t = schedule.add_noise(x0, noises[index], t)
        alpha, sigma = schedule.coefficients(t, like=x0)
        estimate = denoise(x_t, t, context).x0
        eps = (x_t - alpha * estimate) / sigma
        torch.testing.assert_close(result.x0_mse[index], (estimate - x0).square().mean((1, 2, 3)))
        torch.testing.assert_close(
            result.eps_mse[index], (eps - noises[index]).square().mean((1, 2, 3)), rtol=1e-7, atol=0
        )
    torch.testing.assert_close(result.prior, prior_bits(schedule, x0).mean((1, 2, 3)), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.total, result.prior + result.terms.sum(0))


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_sub_sequence_is_a_chain_of_its_own(variance):
    """That of a schedule which has these times only."""
    schedule = NoiseSchedule("scaled_linear")
    grid = schedule.timesteps(8, "trailing")
    coarse = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod[grid[:-1].long().flip(0)])
    x0 = torch.tensor([[0.1, -0.4], [0.8, 0.2]], dtype=torch.float64)

    def denoise(x_t, t):
        return Estimate(0.9 * x_t.tanh())

    found, expected = (
        bound(denoise, x0, process, times, variance=variance, data="continuous", randn=signs)
        for process, times in [(schedule, grid), (coarse, coarse.timesteps(8, "leading"))]
    )
    torch.testing.assert_close(found.prior, expected.prior)
    torch.testing.assert_close(found.x0_mse, expected.x0_mse)
    torch.testing.assert_close(found.eps_mse, expected.eps_mse)
    # beta-tilde of the last step has a stand-in, which is that of the whole schedule.
    terms = slice(None) if variance == "beta" else slice(None, -1)
    torch.testing.assert_close(found.terms[terms], expected.terms[terms])


def test_continuous_time_has_chains_too():
    """With ever more steps the bound of Gaussian data comes down to their entropy."""
    x0 = four_points(STD).reshape(4, 1)
    entropy = (math.log(2 * math.pi * STD**2) + 1) / 2 / LN2
    gaps = []
    for steps in (50, 100):
        grid = LONG.timesteps(steps, "exponential", least_noisy=1e-4)
        result = bound(gaussian(LONG), x0, LONG, grid, variance="beta", data="continuous", randn=signs)
        gaps.append(result.total.mean().item() - entropy)
    assert 0 < gaps[1] < 0.6 * gaps[0]


COARSE = NoiseSchedule("linear", 4, 0.02, 0.6)
AXIS = torch.linspace(-7, 7, 701, dtype=torch.float64)
SPACING = 0.02
LEVELS = torch.arange(256).double() / 127.5 - 1


def tanh_denoise(x_t, t):
    return Estimate(0.9 * (1.5 * x_t).tanh(), 0.5 * x_t.cos())


def normal(x, mean, std):
    return ((x - mean) / std).square().mul(-0.5).exp() / (std * math.sqrt(2 * math.pi))


def reverse_step(t, variance):
    """Mean and standard deviation of p(x_s | x_t) over AXIS, from the paper's formulas."""
    alphas_cumprod = COARSE.alphas_cumprod
    now, before = alphas_cumprod[t], alphas_cumprod[t - 1] if t > 0 else torch.ones(()).double()
    beta, alpha = 1 - now / before, now / before
    estimate = tanh_denoise(AXIS, t)
    mean = before.sqrt() * beta / (1 - now) * estimate.x0 + alpha.sqrt() * (1 - before) / (1 - now) * AXIS
    first_beta_tilde = (1 - alphas_cumprod[0]) / (1 - alphas_cumprod[1]) * (1 - alphas_cumprod[1] / alphas_cumprod[0])
    lower = (1 - before) / (1 - now) * beta if t > 0 else first_beta_tilde
    weight = {"beta": torch.ones(()), "beta_tilde": torch.zeros(()), "learned": (estimate.v + 1) / 2}[variance]
    return mean, (weight * beta.log() + (1 - weight) * lower.log()).div(2).exp().expand_as(AXIS)


def level_edges():
    lower, upper = LEVELS - 1 / 255, LEVELS + 1 / 255
    lower[0], upper[-1] = -math.inf, math.inf
    return lower, upper


def mass(lower, upper, mean, std):
    """Of a Gaussian, between two edges, from the tail that they lie in."""
    lower, upper = ((edge - mean) / (std * math.sqrt(2)) for edge in (lower, upper))
    return torch.where(lower > 0, lower.erfc() - upper.erfc(), (-upper).erfc() - (-lower).erfc()) / 2


def brute_force_terms(level, variance):
    """E of each term, in bits, by sums over AXIS of the definitions; the noisiest first, then the prior."""
    x0 = LEVELS[level]
    terms = []
    for t in reversed(range(4)):
        alpha, sigma = (value.item() for value in COARSE.at(torch.tensor(t)))
        weights = normal(AXIS, alpha * x0, sigma) * SPACING
        mean, std = reverse_step(t, variance)
        if t == 0:
            lower, upper = (edge[level] for edge in level_edges())
            values = -mass(lower, upper, mean, std).log2()
        else:
            # q(x_s | x_t, x0) by Bayes' rule, from the forward process alone.
            alpha_s, sigma_s = (value.item() for value in COARSE.at(torch.tensor(t - 1)))
            step_alpha = alpha / alpha_s
            joint = normal(AXIS[:, None], step_alpha * AXIS, math.sqrt(1 - step_alpha**2)) * normal(
                AXIS, alpha_s * x0, sigma_s
            )
            q = joint / (joint.sum(1, keepdim=True) * SPACING)
            log_p = (
                -((AXIS - mean[:, None]) / std[:, None]).square() / 2 - (std[:, None] * math.sqrt(2 * math.pi)).log()
            )
            values = torch.where(q > 0, q * (q.log() - log_p), 0).sum(1) * SPACING / LN2
        terms.append(torch.where(weights > 1e-18, weights * values, 0).sum())
    alpha, sigma = (value.item() for value in COARSE.at(torch.tensor(3)))
    q = normal(AXIS, alpha * x0, sigma)
    return torch.stack(terms), (q * (q / normal(AXIS, 0, 1)).log2()).sum() * SPACING


def brute_force_probabilities(variance):
    """p of all 256 levels: the chain's law, pushed along AXIS step by step."""
    density = normal(AXIS, 0, 1)
    for t in (3, 2, 1):
        mean, std = reverse_step(t, variance)
        density = (density[:, None] * normal(AXIS, mean[:, None], std[:, None])).sum(0) * SPACING
    mean, std = reverse_step(0, variance)
    lower, upper = (edge[:, None] for edge in level_edges())
    return (mass(lower, upper, mean, std) * density).sum(1) * SPACING


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned"])
def test_the_bound_of_8_bit_data_is_that_of_brute_force(variance):
    """x_t runs over the nodes of Gauss and Hermite, so that there is no chance in it."""
    nodes, weights = (torch.from_numpy(value) for value in np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()
    probabilities = brute_force_probabilities(variance)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)
    for level in (0, 90, 255):
        result = bound(
            tanh_denoise,
            LEVELS[level].expand(80, 1),
            COARSE,
            COARSE.timesteps(4, "leading"),
            variance=variance,
            data="8-bit",
            randn=lambda shape: nodes.reshape(shape),
        )
        terms, prior = brute_force_terms(level, variance)
        torch.testing.assert_close((result.terms * weights).sum(1), terms, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close((result.prior * weights).sum(), prior, rtol=1e-7, atol=1e-9)
        total = (result.total * weights).sum()
        torch.testing.assert_close(total, terms.sum() + prior, rtol=1e-5, atol=0)
        assert total > -probabilities[level].log2()


def test_the_bound_keeps_no_graph_and_computes_in_single_precision_at_least():
    x0 = torch.zeros(2, 1, 4, 4, dtype=torch.float16)
    schedule = NoiseSchedule("cosine", 10)
    gain = torch.ones((), requires_grad=True)
    result = bound(
        lambda x_t, t: Estimate(gain * x_t),
        x0,
        schedule,
        schedule.timesteps(10, "leading"),
        variance="beta",
        data="continuous",
    )
    assert not result.total.requires_grad
    assert result.total.dtype == torch.float32


def test_a_chain_that_does_not_end_clean_is_refused():
    with pytest.raises(ValueError, match="timesteps ends at 0, but the bound is on x0: end at the clean time -1"):
        bound(tanh_denoise, LEVELS[:1, None], COARSE, torch.tensor([3.0, 0.0]), variance="beta", data="8-bit")


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_chain_of_one_step_is_the_prior_and_the_decoder(variance):
    x0 = torch.tensor([[0.3]], dtype=torch.float64)
    grid = torch.tensor([3.0, -1.0])
    result = bound(tanh_denoise, x0, COARSE, grid, variance=variance, data="continuous", randn=torch.zeros)
    alpha, sigma = COARSE.at(torch.tensor(3))
    estimate = tanh_denoise((alpha * x0).flatten(), None).x0
    expected = gaussian_bits(x0.flatten(), estimate, sigma) + prior_bits(COARSE, x0).flatten()
    torch.testing.assert_close(result.total, expected)


def test_data_off_the_levels_are_refused_as_8_bit():
    grid = COARSE.timesteps(4, "leading")
    for x0 in (torch.zeros(1, 1), torch.full((1, 1), 1 + 2 / 255)):
        with pytest.raises(ValueError, match="not on the 256 levels"):
            bound(tanh_denoise, x0, COARSE, grid, variance="beta", data="8-bit")
    for levels in (LEVELS[:, None], LEVELS[:, None].float()):
        assert bound(tanh_denoise, levels, COARSE, grid, variance="beta", data="8-bit").total.isfinite().all()


def test_a_grid_that_does_not_decrease_is_refused():
    grid, x = torch.tensor([3.0, 3.0, -1.0]), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="strictly decreasing"):
        bound(tanh_denoise, x, COARSE, grid, variance="beta", data="continuous")
    with pytest.raises(ValueError, match="strictly decreasing"):
        ode_log_density(tanh_denoise, x, COARSE, grid, torch.ones(1, 1, 1))


def test_estimates_that_are_not_finite_are_refused():
    def denoise(x_t, t):
        return Estimate(x_t / 0)

    grid, x = COARSE.timesteps(4, "leading"), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="the estimate at t = 3 has 1 of 1 values that are not finite"):
        bound(denoise, x, COARSE, grid, variance="beta", data="continuous")
    with pytest.raises(ValueError, match="the estimate at t = 0 has 1 of 1 values that are not finite"):
        ode_log_density(denoise, x, COARSE, grid[:-1], torch.ones(1, 1, 1))


# The probability-flow ODE.


def grid_to(schedule, steps, least_noisy=1e-3):
    return schedule.timesteps(steps, "exponential", least_noisy=least_noisy)[:-1]


def noisy_gaussian_log_density(x, schedule, time, mean=MEAN, std=STD):
    alpha, sigma = schedule.at(time)
    law = torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt())
    return law.log_prob(x).flatten(1).sum(1)


def random_signs(*shape, seed=0):
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def test_the_density_of_gaussian_data_is_exact_in_one_dimension():
    grid = grid_to(LONG, 240)
    x = torch.linspace(-1, 2.5, 9, dtype=torch.float64).reshape(-1, 1)
    result = ode_log_density(gaussian(LONG), x, LONG, grid, random_signs(2, 9, 1))
    exact = noisy_gaussian_log_density(x, LONG, grid[-1])
    assert result.nats.dtype == torch.float64
    torch.testing.assert_close(result.nats, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.bits_per_dimension, -exact / LN2, rtol=0, atol=2e-6)
    assert (result.standard_error < 1e-12).all()


def test_on_a_table_the_density_is_that_of_the_flow_of_unit_noise():
    """alpha at the noisiest time is 6e-3 there: the flow, which is affine, starts from unit noise all the same."""
    schedule = linear(1000)
    grid = schedule.timesteps(200, "exponential")[:-1]
    x = torch.linspace(-1, 2.5, 9, dtype=torch.float64).reshape(-1, 1)
    (alpha, sigma), (alpha_end, sigma_end) = schedule.at(grid[-1]), schedule.at(grid[0])
    std, std_end = ((a**2 * STD**2 + s**2).sqrt() for a, s in [(alpha, sigma), (alpha_end, sigma_end)])
    noise = alpha_end * MEAN + std_end / std * (x - alpha * MEAN)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(noise).flatten() + (std_end / std).log()
    result = ode_log_density(gaussian(schedule), x, schedule, grid, random_signs(1, 9, 1))
    torch.testing.assert_close(result.nats, exact, rtol=0, atol=1e-6)
    assert result.standard_error.isnan().all()


def test_the_error_falls_as_the_fourth_power_of_the_step():
    x = torch.tensor([[0.2], [1.1]], dtype=torch.float64)
    errors = []
    for steps in (41, 81):
        grid = grid_to(LONG, steps)
        result = ode_log_density(gaussian(LONG), x, LONG, grid, random_signs(1, 2, 1))
        errors.append((result.nats - noisy_gaussian_log_density(x, LONG, grid[-1])).abs().max().item())
    assert 12 < errors[0] / errors[1] < 20


@pytest.mark.parametrize("law", ["signs", "gaussian"])
def test_the_density_of_correlated_data_lies_within_hutchinsons_interval(law):
    schedule, generator = VPSDE(0.1, 40), torch.Generator().manual_seed(3)
    factor = 0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    covariance = factor @ factor.T + 0.05 * torch.eye(6)
    mean = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def denoise(x_t, t):
        alpha, sigma = schedule.at(t[0])
        noisy = alpha**2 * covariance + sigma**2 * torch.eye(6)
        return Estimate(mean + alpha * torch.linalg.solve(noisy, (x_t - alpha * mean).T).T @ covariance)

    grid = grid_to(schedule, 40)
    alpha, sigma = schedule.at(grid[-1])
    exact_law = torch.distributions.MultivariateNormal(alpha * mean, alpha**2 * covariance + sigma**2 * torch.eye(6))
    x = mean + torch.randn(5, 6, generator=generator, dtype=torch.float64) @ factor.T
    shape = (12, 5, 6)
    probes = random_signs(*shape) if law == "signs" else torch.randn(shape, generator=generator, dtype=torch.float64)
    result = ode_log_density(denoise, x, schedule, grid, probes)
    z = (result.nats - exact_law.log_prob(x)) / result.standard_error
    assert (result.standard_error > 0.01).all()
    assert z.abs().max() < 3.5
    assert z.square().mean() > 0.02


def test_the_density_of_a_mixture_is_exact():
    """A flow that is not affine: two bumps, the denoiser by Bayes' rule."""
    means, std = torch.tensor([-0.8, 0.9]).double(), 0.25
    shares = torch.tensor([0.3, 0.7]).double()

    def denoise(x_t, t):
        alpha, sigma = LONG.coefficients(t, like=x_t)
        variance = alpha**2 * std**2 + sigma**2
        posterior_share = (shares.log() - (x_t - alpha * means).square() / (2 * variance)).softmax(1)
        each = means + alpha * std**2 / variance * (x_t - alpha * means)
        return Estimate((posterior_share * each).sum(1, keepdim=True))

    grid = grid_to(LONG, 250)
    alpha, sigma = LONG.at(grid[-1])
    x = torch.linspace(-1.6, 1.7, 12, dtype=torch.float64).reshape(-1, 1)
    exact = (shares * normal(x, alpha * means, (alpha**2 * std**2 + sigma**2).sqrt())).sum(1).log()
    result = ode_log_density(denoise, x, LONG, grid, random_signs(1, 12, 1))
    torch.testing.assert_close(result.nats, exact, rtol=0, atol=1e-5)


def test_the_density_of_any_denoiser_integrates_to_1():
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64).reshape(-1, 1)
    result = ode_log_density(tanh_denoise, x, VPSDE(), grid_to(VPSDE(), 100, 0.01), random_signs(1, 1001, 1))
    assert torch.trapezoid(result.nats.exp(), x.flatten()).item() == pytest.approx(1, abs=1e-5)


def test_all_signs_together_give_the_density_of_the_flow():
    """Over all 2^4 vectors of signs the mean of e J e is the trace. The flow is that of x / alpha, as samplers have it,
    and its density comes from the determinant of its Jacobian, so that neither has a divergence in it."""
    schedule, grid = VPSDE(), grid_to(VPSDE(), 50, 0.01)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 1, 3, padding=1)).double()
    conditional, context = make_denoiser(lambda x_t, t, context: layers(x_t), schedule, "v"), torch.zeros(1, 1, 1)

    def denoise(x_t, t):
        return conditional(x_t, t, context.expand(len(x_t), 1, 1))

    def noise_of(x):
        """x [4] at the grid's first time."""
        log_noise = -schedule.log_snr(grid.flip(0)) / 2
        y = x / schedule.at(grid[-1])[0]
        for start, step in zip(log_noise, log_noise.diff(), strict=False):

            def rate(ahead, y, start=start):
                t = schedule.time_at(-2 * (start + ahead))
                return y - denoise((schedule.at(t)[0] * y).reshape(1, 1, 2, 2), t).x0.flatten()

            first = rate(0, y)
            second = rate(step / 2, y + step / 2 * first)
            third = rate(step / 2, y + step / 2 * second)
            y = y + step / 6 * (first + 2 * second + 2 * third + rate(step, y + step * third))
        return schedule.at(grid[0])[0] * y

    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise, jacobian = noise_of(x.flatten()), torch.autograd.functional.jacobian(noise_of, x.flatten())
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum() + jacobian.slogdet().logabsdet
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double().reshape(16, 1, 1, 2, 2)
    result = ode_log_density(denoise, x, schedule, grid, every)
    assert result.nats.item() == pytest.approx(expected.item(), abs=3e-4)
    assert 0.001 < result.standard_error.item() < 1


def test_the_standard_error_is_that_of_the_mean_over_probes():
    schedule, grid = VPSDE(), grid_to(VPSDE(), 8, 0.01)
    turn = torch.tensor([[0.9, 0.4], [-0.2, 0.5]], dtype=torch.float64)
    x, probes = torch.tensor([[0.3, -0.5]], dtype=torch.float64), random_signs(5, 1, 2)

    def denoise(x_t, t):
        return Estimate((x_t @ turn).tanh())

    together = ode_log_density(denoise, x, schedule, grid, probes)
    alone = torch.stack([ode_log_density(denoise, x, schedule, grid, probe[None]).nats for probe in probes])
    torch.testing.assert_close(together.nats, alone.mean(0))
    torch.testing.assert_close(together.standard_error, alone.std(0) / math.sqrt(5))
    assert together.standard_error > 0


def test_the_density_differentiates_under_no_grad_and_leaves_x_as_it_was():
    x = torch.zeros(2, 1)
    with torch.no_grad():
        result = ode_log_density(gaussian(LONG), x, LONG, grid_to(LONG, 10), torch.ones(1, 2, 1))
    assert not result.nats.requires_grad
    assert not x.requires_grad
    assert (x == 0).all()


def test_a_denoiser_without_gradients_is_refused():
    with pytest.raises(ValueError, match="does not depend on x_t by autograd"):
        ode_log_density(
            torch.no_grad()(gaussian(LONG)), torch.zeros(1, 1), LONG, grid_to(LONG, 10), torch.ones(1, 1, 1)
        )


def test_ends_without_noise_or_without_signal_are_refused():
    x, probes = torch.zeros(1, 1), torch.ones(1, 1, 1)
    zero_snr = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    for schedule, grid in [(LONG, [1.0, 0.0]), (COARSE, [3.0, -1.0]), (zero_snr, [999.0, 0.0])]:
        with pytest.raises(ValueError, match="where sigma or alpha is 0"):
            ode_log_density(gaussian(schedule), x, schedule, torch.tensor(grid), probes)


@pytest.mark.parametrize("shape", [(1, 2), (0, 2, 3), (1, 3, 2)])
def test_probes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[P, B, ...\] for x \(2, 3\)"):
        ode_log_density(gaussian(LONG), torch.zeros(2, 3), LONG, grid_to(LONG, 10), torch.ones(shape))
