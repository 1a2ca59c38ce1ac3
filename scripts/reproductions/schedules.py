"""The noise schedules and their posterior variances side by side, and the Fourier spectrum of x_t over t."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.posterior import beta, beta_tilde
from ldm.schedule import NoiseSchedule, ScheduleKind
from reproductions.measure import real_pictures
from reproductions.plot import FAINT, INK, PALETTE, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 1000
LENGTHS = (100, 1000, 4000)  # 4000 is what Nichol and Dhariwal 2021 train with
BETAS: dict[ScheduleKind, dict[str, float]] = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {},
}
"""Each schedule's first and last beta at 1000 steps, where it has them."""
PICTURES, SIZE = 48, 128
SHARES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
"""The t/T at which x_t and its spectrum are shown."""

COLORS = dict(zip(BETAS, PALETTE, strict=False))
Numbers = dict[str, Any]


def schedule(kind: ScheduleKind, steps: int = STEPS, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """A paper's schedule at any length: betas go with 1000 / T, so that alpha-bar over t/T stays nearly the same.

    That is the scaling in the released code of Nichol and Dhariwal 2021.

    Raises:
        ValueError: steps < 1, or so few that a beta reaches 1.
    """
    betas = {name: value * 1000 / steps for name, value in BETAS[kind].items()}
    return NoiseSchedule(kind, steps, zero_terminal_snr=zero_terminal_snr, **betas)


def curves(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """What a schedule does at t = 0 ... T - 1: float64 [T] each.

    alpha_bar is alpha^2; log10_snr that of alpha^2 / sigma^2; beta and beta_tilde are the two variances of a step from
    t to t - 1 (Ho et al. 2020, eqs. 2 and 7), and ratio is beta_tilde / beta (Nichol and Dhariwal 2021, section 3.1).
    """
    t = torch.arange(schedule.steps)
    upper, lower = beta(schedule, t, t - 1), beta_tilde(schedule, t, t - 1)
    return {
        "alpha_bar": schedule.alphas_cumprod,
        "log10_snr": schedule.log_snr(t) / math.log(10),
        "beta": upper,
        "beta_tilde": lower,
        "ratio": lower / upper,
    }


def radial_spectrum(images: Tensor) -> Tensor:
    """The mean power of images [B,C,N,N] at each spatial frequency of 0 ... N/2 cycles per picture: [N/2 + 1].

    A ring of the unitary discrete Fourier transform holds the frequencies that round to its radius; the corners beyond
    N/2 belong to none. White noise of variance s^2 has power s^2 in every ring (Parseval).
    """
    size = images.shape[-1]
    power = torch.fft.fft2(images, norm="ortho").abs().square().mean((0, 1))
    frequency = torch.fft.fftfreq(size) * size
    ring = torch.hypot(frequency[:, None], frequency).round().long().flatten()
    return (torch.bincount(ring, power.flatten()) / torch.bincount(ring))[: size // 2 + 1]


def noised_spectrum(clean: Tensor, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The expected power spectrum of x_t, alpha^2 S_0 + sigma^2, from that of x_0, `clean` [F]; t is 0-d.

    Signal and noise are independent and the transform is linear and unitary (x_t is Ho et al. 2020, eq. 4).

    Raises:
        ValueError: t out of range.
    """
    alpha, sigma = schedule.at(t)
    return alpha**2 * clean + sigma**2


def drowning_frequency(clean: Tensor, snr: Tensor) -> Tensor:
    """The lowest frequency, in cycles per picture, at which alpha^2 S_0 falls to sigma^2: like snr.

    `clean` [F] is S_0 at 0 ... F - 1 cycles per picture, of which 0 is left out; `snr` is alpha^2 / sigma^2, of any
    shape. Interpolated linearly in the logarithms; nan where all frequencies stand above the noise, or none does.
    """
    depth = -clean[1:].cummin(0).values.log()
    wanted = snr.to(depth).log()
    first = torch.searchsorted(depth, wanted)  # the first frequency below the noise
    upper = first.clamp(1, len(depth) - 1)
    weight = (wanted - depth[upper - 1]) / (depth[upper] - depth[upper - 1])
    frequency = torch.lerp(upper.to(depth).log(), (upper + 1).to(depth).log(), weight).exp()
    return frequency.where((first > 0) & (first < len(depth)), math.nan)


def draw_schedules(file: Path) -> Numbers:
    """Alpha-bar, SNR and the two variances of every schedule over t/T, with and without zero terminal SNR."""
    table = {(kind, zero): curves(schedule(kind, zero_terminal_snr=zero)) for kind in BETAS for zero in (False, True)}
    ratios = {steps: curves(schedule("linear", steps))["ratio"] for steps in LENGTHS}

    def plot(axes: "Axes", name: str, title: str) -> None:
        for (kind, zero), values in table.items():
            line, label = ("--", None) if zero else ("-", kind.replace("_", " "))
            axes.plot(over_time(STEPS), values[name], line, color=COLORS[kind], label=label)
        axes.set_title(title)

    title = (
        "Noise schedules: linear (Ho et al. 2020), scaled linear (Rombach et al. 2022),\n"
        "cosine (Nichol & Dhariwal 2021), with and without zero terminal SNR (Lin et al. 2023)"
    )
    with figure(file, title, height=11.5) as drawn:
        ((signal, snr), (forward, posterior), (ratio, lengths)) = drawn.subplots(3, 2)
        plot(signal, "alpha_bar", r"signal left, $\bar\alpha_t$")
        plot(snr, "log10_snr", r"$\log_{10}$ SNR, $\bar\alpha_t\,/\,(1-\bar\alpha_t)$")
        snr.set_ylim(-6.5, 4.5)
        plot(forward, "beta", r"variance of a step forwards, $\beta_t$")
        plot(posterior, "beta_tilde", r"variance of the posterior, $\tilde\beta_t$")
        for axes in (forward, posterior):
            axes.set_yscale("log", nonpositive="mask")
            axes.set_ylim(2e-5, 1.4)
        plot(ratio, "ratio", rf"$\tilde\beta_t\,/\,\beta_t$ for $T={STEPS}$")
        shades = ("#89C2E8", COLORS["linear"], "#003A5C")
        for (steps, values), shade in zip(ratios.items(), shades, strict=True):
            lengths.plot(over_time(steps), values, color=shade, label=f"$T={steps}$")
        lengths.set_title(r"$\tilde\beta_t\,/\,\beta_t$ by length, linear (Nichol & Dhariwal 2021)")
        lengths.legend(loc="lower right")
        for axes in (ratio, lengths):
            axes.set_xscale("log")
        for axes in drawn.axes:
            axes.set_xlabel("$t\\,/\\,T$")
        signal.plot([], [], "--", color=FAINT, label="zero terminal SNR")
        drawn.legend(*signal.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS) + 1)
    return {
        "curves": {f"{kind}, zero terminal SNR" if zero else kind: values for (kind, zero), values in table.items()},
        "linear ratio by length": ratios,
    }


def draw_spectrum(file: Path) -> Numbers:
    """The power spectrum of x_t at several t of the linear schedule, and the frequency that noise has reached."""
    process, images = schedule("linear"), real_pictures(PICTURES, SIZE, seed=0).images
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    clean = radial_spectrum(images)
    frequency = torch.arange(1, len(clean))
    octaves = [2**i for i in range(len(clean).bit_length())]
    all_t = torch.arange(STEPS)
    drowned = {kind: drowning_frequency(clean, schedule(kind).snr(all_t)) for kind in BETAS}
    spectra: Numbers = {}
    title = (
        f"The forward process (Ho et al. 2020, eq. 4) in the Fourier domain, {PICTURES} picturebook pictures:\n"
        "white noise drowns high frequencies first"
    )
    with figure(file, title, height=7.2) as drawn:
        from matplotlib import colormaps

        strip, plots = drawn.subfigures(2, 1, height_ratios=(1, 2.9))
        power, reach = plots.subplots(1, 2, width_ratios=(1.25, 1))
        colors = colormaps["viridis"](torch.linspace(0, 0.88, len(SHARES)).numpy())
        for share, color, axes in zip(SHARES, colors, strip.subplots(1, len(SHARES)), strict=True):
            t = torch.tensor(round(share * STEPS) - 1)  # the papers' t minus one
            x_t = process.add_noise(images, noise, t)
            measured, expected = radial_spectrum(x_t), noised_spectrum(clean, process, t)
            crossing = drowning_frequency(clean, process.snr(t))
            spectra[f"{share:g}"] = {"measured": measured, "expected": expected, "drowned_from": crossing}
            axes.imshow((x_t[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())
            axes.set_title(f"$t/T={share:g}$", loc="center", fontsize=11)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=color, linewidth=3)
            power.plot(frequency, expected[1:], color=color, linewidth=1)
            power.plot(frequency, measured[1:], ".", color=color)
            power.plot(crossing, 2 * process.at(t)[1] ** 2, "o", color=color, markeredgecolor=INK, markersize=9)
        power.set(xscale="log", yscale="log", xlabel="cycles per picture")
        power.set_xticks(octaves, labels=octaves)
        power.set_title(r"power of $x_t$: $\alpha^2 S_0 + \sigma^2$ (lines), measured (dots)")
        for kind, reached in drowned.items():
            reach.plot(over_time(STEPS), reached, color=COLORS[kind], label=kind.replace("_", " "))
        reach.set(yscale="log", ylim=(1, SIZE / 2), xlabel="$t\\,/\\,T$", ylabel="cycles per picture")
        reach.set_yticks(octaves, labels=octaves)
        reach.set_title(r"where noise meets signal (circles), $\alpha^2 S_0 = \sigma^2$")
        reach.text(0.08, 1.43, "signal prevails", color=FAINT)
        reach.text(0.92, 11.5, "noise prevails", color=FAINT, ha="right")
        reach.legend(loc="upper right")
        for axes in (power, reach):
            axes.minorticks_off()
    return {"cycles per picture": frequency, "clean": clean, "linear at t/T": spectra, "drowned_from": drowned}


def over_time(steps: int) -> Tensor:
    """t/T with the papers' t = 1 ... T."""
    return torch.arange(1, steps + 1) / steps


def schedules(out: Path) -> tuple[list[Path], Numbers]:
    """Draws both figures into the folder `out`: the files, and the numbers behind them."""
    files = [out / "schedules.png", out / "spectrum.png"]
    return files, {"schedules": draw_schedules(files[0]), "spectrum": draw_spectrum(files[1])}
