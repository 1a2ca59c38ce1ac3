"""The schedules' figures: the numbers behind them against closed forms, and the command."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import reproduce
import torch
from PIL import Image
from reproductions import schedules
from reproductions.schedules import curves, drowning_frequency, noised_spectrum, radial_spectrum, schedule
from torch import Tensor

from ldm.schedule import ScheduleKind

SIDE = 32


def ring_sizes(size: int) -> Tensor:
    """How many frequencies of the discrete transform lie in each ring, by hand."""
    counts = [0] * (size // 2 + 1)
    for x in range(-(size // 2), (size + 1) // 2):
        for y in range(-(size // 2), (size + 1) // 2):
            if round(math.hypot(x, y)) <= size // 2:
                counts[round(math.hypot(x, y))] += 1
    return torch.tensor(counts, dtype=torch.float64)


def wave(x: int, y: int, amplitude: float) -> Tensor:
    """One picture [1,1,SIDE,SIDE] of x cycles across and y down."""
    place = 2 * math.pi * torch.arange(SIDE, dtype=torch.float64) / SIDE
    return (amplitude * (y * place[:, None] + x * place + 0.4).cos())[None, None]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    reproduce.main()


def test_curves_are_those_of_the_papers() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    signal = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], signal[:-1]])
    found = {name: values.numpy() for name, values in curves(schedule("linear")).items()}
    np.testing.assert_allclose(found["alpha_bar"], signal, rtol=1e-12)
    np.testing.assert_allclose(found["log10_snr"], np.log10(signal / (1 - signal)), atol=1e-10)
    np.testing.assert_allclose(found["beta"], betas, rtol=1e-9)
    np.testing.assert_allclose(found["beta_tilde"], (1 - before) / (1 - signal) * betas, rtol=1e-9)
    np.testing.assert_allclose(found["ratio"], (1 - before) / (1 - signal), rtol=1e-9)


def test_zero_terminal_snr_ends_in_nothing_but_noise() -> None:
    for kind in schedules.BETAS:
        end = {name: values[-1].item() for name, values in curves(schedule(kind, zero_terminal_snr=True)).items()}
        assert (end["alpha_bar"], end["log10_snr"], end["beta"]) == (0, -math.inf, 1)
        assert end["beta_tilde"] == end["ratio"] < 1


@pytest.mark.parametrize("kind", schedules.BETAS)
def test_lengths_keep_the_signal_over_time(kind: ScheduleKind) -> None:
    usual = schedule(kind).alphas_cumprod
    torch.testing.assert_close(schedule(kind, 4000).alphas_cumprod[3::4], usual, rtol=0, atol=1e-3)
    torch.testing.assert_close(schedule(kind, 100).alphas_cumprod, usual[9::10], rtol=0, atol=0.01)


@pytest.mark.parametrize(("x", "y", "ring"), [(5, 0, 5), (0, 11, 11), (3, 4, 5), (-6, 8, 10), (2, 2, 3)])
def test_a_wave_has_its_power_in_its_ring(x: int, y: int, ring: int) -> None:
    expected = torch.zeros(SIDE // 2 + 1, dtype=torch.float64)
    expected[ring] = 2 * (0.7 * SIDE / 2) ** 2 / ring_sizes(SIDE)[ring]  # two frequencies, +k and -k
    torch.testing.assert_close(radial_spectrum(wave(x, y, 0.7)), expected, rtol=1e-12, atol=1e-12)


def test_spectrum_is_the_mean_over_pictures_and_channels() -> None:
    images = torch.cat([torch.cat([wave(4, 0, 1), wave(0, 9, 2)], 1), torch.cat([wave(4, 0, 3), wave(2, 0, 1)], 1)])
    each = torch.stack([radial_spectrum(image[None, None]) for image in images.flatten(0, 1)])
    torch.testing.assert_close(radial_spectrum(images), each.mean(0))


@pytest.mark.parametrize("size", [31, 32])
def test_white_noise_is_flat_at_its_variance(size: int) -> None:
    noise = 0.3 * torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))
    spread = (2 / (64 * 3 * ring_sizes(size))).sqrt()  # of a ring's mean, at most: k and -k have the same power
    assert ((radial_spectrum(noise) / 0.3**2 - 1).abs() < 4 * spread).all()


def test_rings_hold_all_the_energy_below_nyquist() -> None:
    images = sum((wave(x, y, 1 / (1 + x + y)) for x in range(9) for y in range(9)), torch.tensor(0.5))
    energy = (radial_spectrum(images) * ring_sizes(SIDE)).sum()
    torch.testing.assert_close(energy, images.square().sum())  # Parseval


@pytest.mark.parametrize("t", [-1, 0, 250, 999])
def test_spectrum_of_x_t(t: int) -> None:
    """Exact: an impulse is as flat as white noise in the mean, and over both its signs it is independent of x_0."""
    clean = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    impulse = torch.zeros_like(clean)
    impulse[..., 7, 20] = SIDE
    process = schedule("linear")
    x_t = [process.add_noise(clean, sign * impulse, torch.tensor(t)) for sign in (1, -1)]
    expected = noised_spectrum(radial_spectrum(clean), process, torch.tensor(t))
    torch.testing.assert_close(radial_spectrum(torch.cat(x_t)), expected, rtol=1e-10, atol=1e-10)


def test_noise_drowns_a_power_law_where_it_says() -> None:
    frequency = torch.arange(65, dtype=torch.float64)
    clean = 50 * frequency**-2.5
    snr = torch.tensor([[0.03, 0.7], [12.3, 600.0]], dtype=torch.float64)
    torch.testing.assert_close(drowning_frequency(clean, snr), (50 * snr) ** (1 / 2.5), rtol=1e-10, atol=0)


def test_nothing_drowns_or_everything() -> None:
    clean = torch.tensor([1e9, 8.0, 4.0, 2.0, 1.0])  # the mean, at 0, plays no part
    assert drowning_frequency(clean, torch.tensor([math.inf, 1.01, 0.12, 0.0])).isnan().all()
    assert drowning_frequency(clean, torch.tensor([0.25, 1.0])).tolist() == pytest.approx([2, 4])


def test_the_lowest_frequency_that_drowns_counts() -> None:
    clean = torch.tensor([0.0, 16.0, 4.0, 9.0, 1.0])
    assert drowning_frequency(clean, torch.tensor(1 / 8)).item() == pytest.approx(math.sqrt(2))
    assert drowning_frequency(clean, torch.tensor(1 / 2)).item() == pytest.approx(3 * (4 / 3) ** 0.5)


def test_numbers_are_plain() -> None:
    numbers = {"a": torch.tensor([1 / 3, math.inf]), "b": {2: [torch.tensor(math.nan), 4, "c"]}}
    assert reproduce.plain(numbers) == {"a": [0.333333, None], "b": {2: [None, 4, "c"]}}


def test_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(schedules, "PICTURES", 8)
    monkeypatch.setattr(schedules, "SIZE", SIDE)
    run(monkeypatch, "schedules", "--out", str(tmp_path / "new" / "out"), "--json")
    *files, last = capsys.readouterr().out.splitlines()
    assert files == [str(tmp_path / "new" / "out" / name) for name in ("schedules.png", "spectrum.png")]
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.width) == ("PNG", 1600)
            assert image.convert("L").getextrema()[0] < 100
    numbers = json.loads(last)
    assert len(numbers["schedules"]["curves"]) == 6
    assert numbers["schedules"]["curves"]["cosine, zero terminal SNR"]["log10_snr"][-1] is None
    assert {len(values) for values in numbers["schedules"]["linear ratio by length"].values()} == {100, 1000, 4000}
    spectra = numbers["spectrum"]["linear at t/T"]
    assert spectra["0"]["measured"] == pytest.approx(numbers["spectrum"]["clean"])
    for at_t in spectra.values():
        assert at_t["measured"][4:] == pytest.approx(at_t["expected"][4:], rel=0.25)
    reached = [each["drowned_from"] for each in spectra.values() if each["drowned_from"] is not None]
    assert len(reached) >= 3
    assert reached == sorted(reached, reverse=True)
    for kind, curve in numbers["spectrum"]["drowned_from"].items():
        defined = [each for each in curve if each is not None]
        assert len(curve) == 1000
        assert defined == sorted(defined, reverse=True), kind
        assert defined[0] > SIDE / 2 - 1
        assert defined[-1] < 1.5


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "schedules", "--out", str(tmp_path / "file"))
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "schedules", "--out", str(tmp_path / "out"))
    assert left.value.code == 2
    assert capsys.readouterr().err == 'error: plots need matplotlib: pip install -e ".[train]"\n'
    assert not (tmp_path / "out").exists()
