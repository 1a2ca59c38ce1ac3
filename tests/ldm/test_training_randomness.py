"""Every draw of training is a function of (seed, stream, step, position) and of nothing else."""

import hashlib

import torch

from ldm.training import randomness


def test_a_draw_depends_on_its_own_counters_alone() -> None:
    whole = randomness.normal((2, 3), 0, "noise", 7, range(4))
    assert whole.shape == (4, 2, 3)
    torch.manual_seed(123)  # the global generator has no part
    torch.rand(5)
    assert torch.equal(randomness.normal((2, 3), 0, "noise", 7, [2, 3]), whole[2:])
    assert torch.equal(randomness.normal((2, 3), 0, "noise", 7, [1]), whole[1:2])
    uniform = randomness.uniform(0, "caption", 7, range(4))
    assert torch.equal(randomness.uniform(0, "caption", 7, [3]), uniform[3:])
    assert uniform.dtype == torch.float64


def test_every_counter_matters() -> None:
    places = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (0, "a", 1, 1)]
    draws = {float(randomness.uniform(seed, stream, step, [p])) for seed, stream, step, p in places}
    assert len(draws) == len(places)
    assert len({randomness.generator(0, "a", *counters).initial_seed() for counters in [(1, 11), (11, 1), (111,)]}) == 3


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    number = int.from_bytes(hashlib.blake2b(b"3/noise/5/2", digest_size=8).digest(), "little") >> 1
    assert randomness.generator(3, "noise", 5, 2).initial_seed() == number


def test_draws_have_their_law() -> None:
    noise = randomness.normal((64,), 0, "noise", 0, range(256))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    t = torch.cat([randomness.timesteps(10, 0, step, range(64)) for step in range(32)])
    assert t.dtype == torch.int64
    counts = t.bincount(minlength=10)
    assert len(counts) == 10
    assert 140 < counts.min() <= counts.max() < 270  # 205 expected


def test_permutation() -> None:
    order = randomness.permutation(50, 0, 3)
    assert sorted(order.tolist()) == list(range(50))
    assert torch.equal(order, randomness.permutation(50, 0, 3))
    assert not torch.equal(order, randomness.permutation(50, 0, 4))
    assert not torch.equal(order, randomness.permutation(50, 1, 3))
