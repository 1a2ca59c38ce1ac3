"""The forward process: how much of the clean signal is left at each time, and which times a sampler visits.

q(x_t | x0) = N(alpha_t x0, sigma_t^2) with alpha^2 + sigma^2 = 1. `NoiseSchedule` has T steps: t runs from 0, the least
noisy, to T - 1 (the papers' t minus one), and -1 is clean: alpha 1, sigma 0. `VPSDE` is the same process in continuous
time: t runs from 0, clean, to 1. Samplers, denoisers and losses take either.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

ScheduleKind = Literal["linear", "scaled_linear", "cosine"]
Spacing = Literal["leading", "trailing", "linspace", "karras", "exponential"]
SMALLEST_SIGNAL = 2.0**-24
"""What alpha^2 is raised to where sigma / alpha must be finite: the smallest in use elsewhere (diffusers' too)."""


class ForwardProcess(ABC):
    """alpha and sigma over time, and what follows from them."""

    clean: float
    """The time at which alpha is 1."""
    last: float
    """The noisiest time."""

    @abstractmethod
    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times t, each float64, with t's shape and on its device.

        Raises:
            ValueError: t out of range. Checked on the CPU only: on an accelerator it would make the host wait.
        """

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t: float64, t's shape and device; infinite where sigma or alpha is 0.

        Raises:
            ValueError: t out of range (on the CPU).
        """

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """The times at which the log-SNR is `log_snr`, the inverse of `log_snr()`: float64, its shape and device.

        Raises:
            ValueError: log-SNR below that of the noisiest time (on the CPU).
        """

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether nothing of the signal is left at the noisiest time."""
        return bool(self.at(torch.tensor(self.last, dtype=torch.float64))[0] == 0)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at t ([B] or 0-d), ready to multiply `like` [B, ...]: in float32 or its wider dtype.

        Raises:
            ValueError: t out of range, or neither one time nor one for each of `like`.
        """
        alpha, sigma = self.at(t)
        return per_sample(alpha, like), per_sample(sigma, like)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at t: float64, t's shape and device; infinite at the clean time.

        Raises:
            ValueError: t out of range.
        """
        alpha, sigma = self.at(t)
        return (alpha / sigma) ** 2

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 4), in the dtype of x0.

        x0 and eps are [B, ...], t is [B] or 0-d.

        Raises:
            ValueError: t out of range, or x0, eps and t of shapes that do not fit.
        """
        if x0.shape != eps.shape:
            raise ValueError(f"x0 is {tuple(x0.shape)} and eps {tuple(eps.shape)}: give both the same shape")
        alpha, sigma = self.coefficients(t, like=x0)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def _times_by_noise(
        self, n: int, spacing: Literal["karras", "exponential"], noisiest: float, least_noisy: float
    ) -> Tensor:
        """n times from `noisiest` down to `least_noisy`, spaced by sigma / alpha: float64 [n].

        karras: evenly in its seventh root (Karras et al. 2022, eq. 5); exponential: evenly in its logarithm. Where the
        SNR is zero at `noisiest`, the first is that of alpha^2 = 2^-24 instead.
        """
        ends = torch.tensor([noisiest, least_noisy], dtype=torch.float64)
        most, least = (-self.log_snr(ends) / 2).nan_to_num(posinf=math.log(1 / SMALLEST_SIGNAL - 1) / 2)
        ramp = torch.linspace(0, 1, n, dtype=torch.float64)
        if spacing == "karras":
            log_noise = 7 * torch.lerp((most / 7).exp(), (least / 7).exp(), ramp).log()
        else:
            log_noise = torch.lerp(most, least, ramp)
        # Root and power may miss the ends by a last bit, and beyond them there may be no time.
        log_noise[-1], log_noise[0] = least, most
        return self.time_at(-2 * log_noise).clamp(least_noisy, noisiest)


class NoiseSchedule(ForwardProcess):
    """A variance-preserving noise schedule of T steps, tabulated in float64 on the CPU.

    Args:
        kind: `linear` (betas linear, Ho et al. 2020), `scaled_linear` (square roots of the betas linear, Rombach et
            al. 2022) or `cosine` (Nichol and Dhariwal 2021, eq. 17, betas clipped at 0.999; it has no beta bounds).
        steps: T.
        beta_start, beta_end: the first and the last beta, 0 < beta_start <= beta_end < 1.
        zero_terminal_snr: shift and scale alpha so that it is 0 at T - 1 (Lin et al. 2023, algorithm 1).

    Raises:
        ValueError: unknown kind, steps < 1, betas out of order, zero terminal SNR with fewer than two steps, or so many
            steps that alpha^2 rounds to 0 before the last.
    """

    clean = -1.0
    alphas_cumprod: Tensor
    """alpha^2 at t = 0 ... T - 1: float64 [T], strictly decreasing."""

    def __init__(
        self,
        kind: ScheduleKind,
        steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}: a noise schedule needs at least 1")
        alphas_cumprod = (1 - _betas(kind, steps, beta_start, beta_end)).cumprod(0)
        self._tabulate(_with_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> "NoiseSchedule":
        """The schedule whose alpha^2 at t = 0 ... T - 1 is `alphas_cumprod` [T], of any float dtype.

        Raises:
            ValueError: unless it is one-dimensional and strictly decreasing, between 0 and 1, with 0 at most last.
        """
        values = alphas_cumprod.detach().to("cpu", torch.float64, copy=True)
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"alphas_cumprod has shape {tuple(values.shape)}: give one value per time, [T]")
        schedule = cls.__new__(cls)
        schedule._tabulate(values)
        return schedule

    def _tabulate(self, alphas_cumprod: Tensor) -> None:
        if not (0 < alphas_cumprod[0] < 1 and alphas_cumprod[-1] >= 0 and bool((alphas_cumprod.diff() < 0).all())):
            raise ValueError("alphas_cumprod must decrease strictly from below 1 and may reach 0 at its last time only")
        self.alphas_cumprod = alphas_cumprod
        self.last = len(alphas_cumprod) - 1.0
        # One leading entry for the clean end, so that time t is row t + 1.
        alpha_squared = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod])
        log_snr = alpha_squared.log() - (-alpha_squared).log1p()
        self._tables = {torch.device("cpu"): torch.stack([alpha_squared.sqrt(), (1 - alpha_squared).sqrt(), log_snr])}

    @property
    def steps(self) -> int:
        """T, the number of times that a network is trained at."""
        return len(self.alphas_cumprod)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times t, each float64, with t's shape and on its device.

        t is an int or float tensor in [-1, T - 1]. Integers give the tables' entries; between two integers the log-SNR
        is interpolated linearly. Where it is infinite at one end that is impossible, and what is linear there is
        sigma / alpha (between -1 and 0) and alpha / sigma (between T - 2 and T - 1 under zero terminal SNR), each of
        which is 0 at the infinite end.

        Raises:
            ValueError: t out of range. Checked on the CPU only: on an accelerator it would make the host wait.
        """
        self._check_range(t)
        position = t.to(torch.float64) + 1
        lower = position.floor().long()
        alphas, sigmas, _ = self._tables_on(t.device)
        alpha, sigma = alphas[lower], sigmas[lower]
        if not t.is_floating_point():
            return alpha, sigma
        log_snr = self._interpolated_log_snr(position, lower)
        on_table = position == lower
        return (
            torch.where(on_table, alpha, log_snr.sigmoid().sqrt()),
            torch.where(on_table, sigma, (-log_snr).sigmoid().sqrt()),
        )

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t in [-1, T - 1], interpolated as `at` does: float64, t's shape and device.

        It is infinite at -1, and minus infinity at T - 1 under zero terminal SNR.

        Raises:
            ValueError: t out of range (on the CPU).
        """
        self._check_range(t)
        position = t.to(torch.float64) + 1
        lower = position.floor().long()
        *_, log_snr = self._tables_on(t.device)
        return torch.where(position == lower, log_snr[lower], self._interpolated_log_snr(position, lower))

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The times in [-1, T - 1] at which the log-SNR is `log_snr`, the inverse of `log_snr()`.

        Raises:
            ValueError: log-SNR below that of T - 1 (on the CPU).
        """
        *_, table = self._tables_on(log_snr.device)
        wanted = log_snr.to(torch.float64)
        if wanted.device.type == "cpu" and wanted.numel() > 0 and not wanted.min() >= table[-1]:
            raise ValueError(f"log-SNR {wanted.min().item():g} is below this schedule's last, {table[-1].item():g}")
        # The wanted log-SNR lies between that of row `lower` and the next row's.
        lower = (torch.searchsorted(-table, -wanted.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        start, end = table[lower], table[lower + 1]
        inside = (start - wanted) / (start - end)
        next_to_clean = ((end - wanted) / 2).exp()
        next_to_noise = -((wanted - start) / 2).expm1()
        weight = torch.where(start.isinf(), next_to_clean, torch.where(end.isinf(), next_to_noise, inside))
        return lower + weight - 1

    def _tables_on(self, device: torch.device) -> Tensor:
        """alpha, sigma and log-SNR at -1 ... T - 1: [3, T + 1]. They are copied to an accelerator once: at every copy
        its host waits.
        """
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _check_range(self, t: Tensor) -> None:
        if t.device.type == "cpu" and t.numel() > 0 and not (t.min() >= -1 and t.max() <= self.steps - 1):
            raise ValueError(
                f"t spans {t.min().item():g} to {t.max().item():g}, but this schedule has times -1 (clean) "
                f"to {self.steps - 1}"
            )

    def _interpolated_log_snr(self, position: Tensor, lower: Tensor) -> Tensor:
        *_, table = self._tables_on(position.device)
        start, end = table[lower], table[position.ceil().long()]
        weight = position - lower
        inside = torch.lerp(start, end, weight)
        next_to_clean = end - 2 * weight.log()
        next_to_noise = start + 2 * (-weight).log1p()
        return torch.where(start.isinf(), next_to_clean, torch.where(end.isinf(), next_to_noise, inside))

    def timesteps(
        self,
        n: int,
        spacing: Spacing,
        offset: int = 0,
        end: float = -1,
        *,
        spare: int = 0,
        rounded: bool = True,
        between: tuple[float, float] | None = None,
    ) -> Tensor:
        """A time grid: n times to run the network at, then `end`; float64 [n + 1], strictly decreasing.

        "leading", "trailing" and "linspace" are those of Lin et al. 2023, table 2; "karras" (Karras et al. 2022, eq. 5)
        and "exponential" space sigma / alpha between its values at T - 1 and 0, by its seventh root and its logarithm;
        under zero terminal SNR they start where alpha^2 is 2^-24 instead, as those of diffusers do.
        `offset` shifts "leading" only, which alone stops short of T - 1. `end` is where sampling ends: -1 is clean, 0
        stands for diffusers' `set_alpha_to_one: false`.

        Args:
            spare: lay "leading" and "linspace" for n + spare times and leave the least noisy ones out.
            rounded: whether the times of "linspace" are whole.
            between: the first and the last of the n times of "karras" and "exponential", instead of T - 1 and 0.

        Raises:
            ValueError: n < 1 or n + spare > T, unknown spacing, a first time beyond T - 1, or an end that is below -1
                or not below the n times.
        """
        last = self.steps - 1
        if not 1 <= n <= self.steps - spare:
            raise ValueError(f"{n} steps asked of a schedule of {self.steps}: choose 1 to {self.steps - spare}")
        times: list[float]
        match spacing:
            case "leading":
                times = [index * (self.steps // (n + spare)) + offset for index in range(spare, n + spare)]
            case "trailing":
                # Not simply -T / n: this is the stride of numpy's arange, and times half-way between two integers are
                # rounded as diffusers rounds them only with its last bits.
                stride = (self.steps - self.steps / n) - self.steps
                times = [round(self.steps + index * stride) - 1 for index in reversed(range(n))]
            case "linspace":
                stride = last / max(n + spare - 1, 1)
                # The product may miss T - 1 by a last bit, and beyond it there is no time.
                times = [min(index * stride, last) for index in range(spare, n + spare)]
                if rounded:
                    times = [round(time) for time in times]
            case "karras" | "exponential":
                times = self._times_by_noise(n, spacing, *(between or (last, 0))).flip(0).tolist()
            case _:
                raise ValueError(f"spacing is {spacing!r}, but must be one of {', '.join(get_args(Spacing))}")
        if times[-1] > last:
            raise ValueError(f"offset {offset} puts the first of {n} times at {times[-1]}, but the last time is {last}")
        if not -1 <= end < times[0]:
            raise ValueError(
                f"a grid that comes down to {times[0]} cannot end at {end}: choose an end from -1 to below that"
            )
        return torch.tensor([*reversed(times), end], dtype=torch.float64)


class VPSDE(ForwardProcess):
    """The variance-preserving SDE dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw (Song et al. 2021, eq. 11).

    beta(t) rises linearly from `beta_min` at 0 (clean) to `beta_max` at 1, so that log alpha is
    -(beta_max - beta_min) t^2 / 4 - beta_min t / 2 (eqs. 32 and 33). Networks get t in [0, 1].

    Raises:
        ValueError: unless 0 < beta_min <= beta_max.
    """

    clean = 0.0
    last = 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(f"beta_min {beta_min} and beta_max {beta_max} must satisfy 0 < beta_min <= beta_max")
        self.beta_min, self.beta_max = beta_min, beta_max

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at t in [0, 1], each float64, with t's shape and on its device.

        Raises:
            ValueError: t out of range (on the CPU).
        """
        decay = self._decay(t)
        return (-decay / 2).exp(), (-(-decay).expm1()).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t in [0, 1]: float64, t's shape and device; infinite at 0.

        Raises:
            ValueError: t out of range (on the CPU).
        """
        decay = self._decay(t)
        return -decay - (-(-decay).expm1()).log()

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The times in [0, 1] at which the log-SNR is `log_snr`: float64, its shape and device.

        Raises:
            ValueError: log-SNR below that of t = 1 (on the CPU).
        """
        decay = torch.nn.functional.softplus(-log_snr.to(torch.float64), threshold=50)
        rise = self.beta_max - self.beta_min
        t = 2 * decay / (self.beta_min + (self.beta_min**2 + 2 * rise * decay).sqrt())
        # One bit of the log-SNR is more than one of t. Minus infinity makes t NaN.
        if t.device.type == "cpu" and t.numel() > 0 and not t.max() <= 1 + 1e-12:
            raise ValueError(f"log-SNR {log_snr.min().item():g} is below this process's last, at t = 1")
        return t.clamp(max=1)

    def timesteps(self, n: int, spacing: Spacing = "linspace", least_noisy: float = 1e-3) -> Tensor:
        """A time grid: n times from 1 down to `least_noisy`, then 0: float64 [n + 1], strictly decreasing.

        "linspace" spaces t evenly; "karras" and "exponential" space sigma / alpha, by its seventh root and logarithm.

        Raises:
            ValueError: n < 1, unknown spacing, or least_noisy outside (0, 1).
        """
        if n < 1:
            raise ValueError(f"{n} steps asked: choose at least 1")
        if not 0 < least_noisy < 1:
            raise ValueError(f"least_noisy is {least_noisy}, but must be between 0 and 1")
        match spacing:
            case "linspace":
                times = torch.linspace(1, least_noisy, n, dtype=torch.float64)
            case "karras" | "exponential":
                times = self._times_by_noise(n, spacing, self.last, least_noisy)
            case _:
                raise ValueError(f"spacing is {spacing!r}, but must be one of linspace, karras, exponential")
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    def _decay(self, t: Tensor) -> Tensor:
        """-log alpha^2, the integral of beta from 0 to t."""
        if t.device.type == "cpu" and t.numel() > 0 and not (t.min() >= 0 and t.max() <= 1):
            raise ValueError(f"t spans {t.min().item():g} to {t.max().item():g}, but must be from 0 (clean) to 1")
        t = t.to(torch.float64)
        return self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t**2


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """What was found for times t ([B] or 0-d), ready to multiply `like` [B, ...]: in float32 or its wider dtype.

    Raises:
        ValueError: neither one value nor one for each of `like`.
    """
    if values.ndim > 1 or (values.ndim == 1 and len(values) not in (1, len(like))):
        raise ValueError(f"t has shape {tuple(values.shape)}: give one time, or one for each of {len(like)} samples")
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(like.device, dtype).reshape((-1,) + (1,) * (like.ndim - 1))


def _betas(kind: ScheduleKind, steps: int, beta_start: float, beta_end: float) -> Tensor:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start {beta_start} and beta_end {beta_end} must satisfy 0 < beta_start <= beta_end < 1")
    match kind:
        case "linear":
            return torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps, dtype=torch.float64) ** 2
        case "cosine":
            time = torch.arange(steps + 1, dtype=torch.float64) / steps
            alphas_cumprod = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
        case _:
            raise ValueError(f"kind is {kind!r}, but must be 'linear', 'scaled_linear' or 'cosine'")


def _with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Lin et al. 2023, algorithm 1: alpha is shifted to end at 0 and scaled to start where it did."""
    if len(alphas_cumprod) < 2:
        raise ValueError("zero_terminal_snr needs steps of at least 2: the first time keeps its signal")
    alpha = alphas_cumprod.sqrt()
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
