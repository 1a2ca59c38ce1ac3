"""Times are drawn as often as p says, weighted so that nothing changes in the mean, and the state is all there is."""

import io

import pytest
import torch

from ldm.schedule import NoiseSchedule
from ldm.time_sampling import TimeSampler, draw, logit_normal
from ldm.training import randomness

STEPS = 7


def filled(steps=STEPS, rounds=10, seed=0):
    """A sampler that has seen `rounds` losses at every time, and those losses [rounds, steps]."""
    size = torch.linspace(0.1, 3, steps, dtype=torch.float64)
    losses = size * torch.randn(rounds, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sampler = TimeSampler(steps)
    for row in losses:
        sampler.update(torch.arange(steps), row)
    return sampler, losses


def test_without_losses_times_are_uniform_and_those_of_the_counter():
    positions = range(3000)
    t, weights = TimeSampler(1000).sample(randomness.uniform(3, "t", 5, positions))
    assert t.dtype == torch.int64
    assert torch.equal(t, randomness.timesteps(1000, 3, 5, positions))
    torch.testing.assert_close(weights, torch.ones(3000, dtype=torch.float64), rtol=1e-12, atol=0)


def test_probabilities_are_those_of_the_paper_once_every_time_has_ten():
    sampler, losses = filled(rounds=9)
    one_more = torch.arange(STEPS).double()
    assert (sampler.probabilities() == 1 / STEPS).all()
    sampler.update(torch.arange(STEPS - 1), one_more[:-1])
    assert (sampler.probabilities() == 1 / STEPS).all()
    sampler.update(torch.tensor([STEPS - 1]), one_more[-1:])
    size = torch.cat([losses, one_more[None]]).square().mean(0).sqrt()
    expected = 0.999 * size / size.sum() + 0.001 / STEPS  # as in LossSecondMomentResampler
    torch.testing.assert_close(sampler.probabilities(), expected, rtol=1e-12, atol=0)


def test_only_the_last_ten_losses_count():
    sampler, losses = filled(rounds=23)
    size = losses[-10:].square().mean(0).sqrt()
    expected = 0.999 * size / size.sum() + 0.001 / STEPS
    torch.testing.assert_close(sampler.probabilities(), expected, rtol=1e-12, atol=0)


def test_a_time_twice_in_a_batch_counts_twice():
    sampler, losses = filled()
    at_once, _ = filled()
    for loss in (4.0, 5.0, 6.0):
        sampler.update(torch.tensor([2]), torch.tensor([loss]))
    at_once.update(torch.tensor([2, 2, 2]), torch.tensor([4.0, 5.0, 6.0]))
    assert torch.equal(at_once.probabilities(), sampler.probabilities())
    latest = torch.cat([losses[3:, 2], torch.tensor([4.0, 5.0, 6.0])])
    torch.testing.assert_close(sampler.state_dict()["losses"][2].sort().values, latest.sort().values)


def test_the_weighted_mean_is_the_uniform_one():
    """By enumeration: each time's probability times its weight is 1 / T."""
    sampler, _ = filled()
    probabilities = sampler.probabilities()
    middles = probabilities.cumsum(0) - probabilities / 2
    t, weights = sampler.sample(middles)
    assert torch.equal(t, torch.arange(STEPS))
    loss = torch.randn(STEPS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close((probabilities * weights * loss).sum(), loss.mean(), rtol=1e-13, atol=1e-15)


def test_losses_of_known_size_are_estimated_without_variance():
    """Where L_t is always the same p is proportional to it: every draw gives the mean, up to the uniform thousandth."""
    size = torch.linspace(0.5, 3, STEPS, dtype=torch.float64)
    sampler = TimeSampler(STEPS)
    for _ in range(10):
        sampler.update(torch.arange(STEPS), size)
    t, weights = sampler.sample(torch.linspace(0, 0.999, 200, dtype=torch.float64))
    torch.testing.assert_close(weights * size[t], size.mean().expand(200), rtol=3e-3, atol=0)


def test_times_come_as_often_as_their_probability():
    sampler, _ = filled()
    count = 100_000
    t, _ = sampler.sample((torch.arange(count).double() + 0.5) / count)
    frequencies = t.bincount(minlength=STEPS) / count
    assert (frequencies - sampler.probabilities()).abs().max() <= 1 / count
    on_the_borders, _ = TimeSampler(4).sample(torch.arange(4) / 4)
    assert on_the_borders.tolist() == [0, 1, 2, 3]
    first_and_last, _ = sampler.sample(torch.tensor([0, 1 - 2**-53], dtype=torch.float64))
    assert first_and_last.tolist() == [0, STEPS - 1]


def test_a_restored_sampler_goes_on_as_the_first():
    first, _ = filled(rounds=13)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = TimeSampler(STEPS)
    second.load_state_dict(torch.load(file, weights_only=True))
    for sampler in (first, second):
        sampler.update(torch.tensor([1, 1, 6]), torch.tensor([9.0, 8.0, 7.0]))
    assert torch.equal(first.probabilities(), second.probabilities())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_losses_that_are_not_finite_are_passed_over():
    sampler, _ = filled()
    before = sampler.probabilities()
    sampler.update(torch.tensor([0, 1]), torch.tensor([float("nan"), float("inf")]))
    assert torch.equal(sampler.probabilities(), before)


def test_no_times_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        TimeSampler(0)


@pytest.mark.parametrize("number", [-0.1, 1.0, float("nan")])
def test_numbers_outside_0_to_1_are_refused(number):
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\)"):
        TimeSampler(STEPS).sample(torch.tensor([0.5, number]))


def test_losses_that_do_not_fit_their_times_are_refused():
    with pytest.raises(ValueError, match=r"t is \(2,\) and losses \(3,\)"):
        TimeSampler(STEPS).update(torch.tensor([0, 1]), torch.zeros(3))


def test_times_out_of_range_are_refused():
    with pytest.raises(ValueError, match="t holds 7, but times are from 0 to 6"):
        TimeSampler(STEPS).update(torch.tensor([7]), torch.zeros(1))


def test_the_state_of_another_number_of_times_is_refused():
    with pytest.raises(ValueError, match="that of 3 times, but this sampler has 7"):
        TimeSampler(STEPS).load_state_dict(TimeSampler(3).state_dict())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_logit_normal_times_are_those_of_a_straight_path_at_equal_snr(mean, std):
    """On the straight path x = (1 - s) x0 + s eps, log-SNR is -2 logit(s); logit(s) is normal."""
    schedule = NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True)
    probabilities = logit_normal(schedule, mean, std)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = schedule.log_snr(draw((probabilities - 0.25 / 1000) / 0.75, uniforms))  # without the uniform quarter
    straight = torch.distributions.Normal(mean, std).icdf(uniforms)
    expected = -2 * straight
    # Where the schedule begins and ends it has no times for the tails.
    inner = (uniforms > 0.02) & (uniforms < 0.98)
    torch.testing.assert_close(drawn[inner], expected[inner], atol=0.06, rtol=0)


def test_every_time_keeps_a_quarter_of_its_uniform_share():
    assert logit_normal(NoiseSchedule("cosine", 100)).min() >= 0.25 / 100


def test_draw_inverts_the_distribution_function():
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76, 0.999], dtype=torch.float64)
    assert draw(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="numbers in"):
        draw(probabilities, torch.tensor([1.0]))
