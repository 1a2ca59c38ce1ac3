"""diffusers' schedulers as samplers: one adapter that steps any of them down a time grid of ours.

A scheduler is given the grid itself as its table of training times, one row per time, and visits every row. So it steps
from each time to the next whatever the grid is, and whatever forward process the grid belongs to.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm import prediction
from ldm.denoiser import Denoiser
from ldm.samplers import Sampler
from ldm.schedule import SMALLEST_SIGNAL, ForwardProcess, NoiseSchedule
from ldm.walk import Randn, StepHook, StepInfo, estimate_at, finite, levels_of

NOT_DRIVEN = {"DPMSolverSDEScheduler", "EDMEulerScheduler"}
"""The first draws its noise from a tree of its own seed; the second is not variance preserving."""
NOT_TOLD_X0 = {
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
}
"""These take no `prediction_type="sample"`; they are told the noise, which is diffusers' default."""


def diffusers_sampler(name: str) -> Sampler:
    """The scheduler of class `name`, such as "UniPCMultistepScheduler", with diffusers' default settings, as a sampler.

    It computes in float32, as diffusers does, and needs a grid that ends clean, except DDIM's and PNDM's. Where a step
    takes several evaluations, `on_step` gets the x0 of the last. Noise that the scheduler draws comes from `randn`,
    which some call at the last step too, where it adds nothing. A learned variance goes unused.

    Raises:
        ValueError: an unknown name or a scheduler of another kind; diffusers, or what the scheduler needs beside it, is
            not installed; from the sampler, a grid that does not end clean and what all samplers raise.
    """
    try:
        import diffusers
        from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
    except ImportError:
        raise ValueError(f'{name} needs diffusers: pip install "ldm-text-to-image[train]"') from None
    stems = sorted(
        kind.name.removesuffix("Scheduler") for kind in KarrasDiffusionSchedulers if kind.name not in NOT_DRIVEN
    )
    stem = name.removesuffix("Scheduler")
    if name not in {f"{one}Scheduler" for one in stems}:
        near = ", ".join(f"{one}Scheduler" for one in difflib.get_close_matches(stem, stems, n=3, cutoff=0))
        raise ValueError(f"{name!r} is no variance-preserving scheduler of diffusers; the nearest names are {near}")
    scheduler_class = getattr(diffusers, name)
    missing = " ".join(package for package in getattr(scheduler_class, "_backends", ()) if package != "torch")
    if missing:
        raise ValueError(f"diffusers' {name} needs what is not installed: pip install {missing}")

    @torch.no_grad()
    def sample(
        denoise: Denoiser,
        x: Tensor,
        schedule: ForwardProcess,
        timesteps: Tensor,
        *,
        randn: Randn | None = None,
        on_step: StepHook | None = None,
    ) -> Tensor:
        *levels, end = levels_of(schedule, timesteps, SMALLEST_SIGNAL)
        # Row 0 is the least noisy time, as in every table of training times.
        levels.reverse()
        alphas_cumprod = torch.tensor([level.alpha**2 for level in levels], dtype=torch.float64)
        table = NoiseSchedule.from_alphas_cumprod(alphas_cumprod)
        scheduler = _scheduler(scheduler_class, table)
        if end.sigma > 0:
            if not hasattr(scheduler, "final_alpha_cumprod"):
                raise ValueError(f"the grid ends at {end.t:g}, but diffusers' {name} ends clean, at {schedule.clean:g}")
            scheduler.final_alpha_cumprod = torch.tensor(end.alpha**2, dtype=torch.float64)
        kind = prediction.PREDICTIONS[scheduler.config.prediction_type]
        rows = scheduler.timesteps.tolist()
        ends, last = _ends_of_steps(rows), len(rows) - 1
        # What some schedulers step is x / alpha; they multiply by alpha before each evaluation.
        x = x.float() / scheduler.scale_model_input(torch.ones(()), scheduler.timesteps[0])
        x_t = scheduler.scale_model_input(x, scheduler.timesteps[0])
        for index, row in enumerate(rows):
            position = torch.tensor(row, dtype=torch.float64)
            # Between two rows a scheduler interpolates log-SNR, as the table does.
            t = levels[int(row)].t if row == int(row) else schedule.time_at(table.log_snr(position)).item()
            x0 = estimate_at(denoise, x_t, t).x0
            if index == last and not _reaches_clean(scheduler):
                x = x0  # by a step of first order: DEIS alone cannot step to sigma 0
            else:
                output = prediction.from_x0(kind, x0, x_t, *table.coefficients(position, like=x_t))
                with _Draws(randn or torch.randn):
                    x = scheduler.step(output, scheduler.timesteps[index], x).prev_sample
            x_t = x if index == last else scheduler.scale_model_input(x, scheduler.timesteps[index + 1])
            if on_step is not None and index in ends:
                number = ends.index(index)
                on_step(StepInfo(number, levels[-1 - number].t, x_t, x0))
        return finite(x_t, "the result")

    return sample


class _Draws(TorchFunctionMode):
    """Within it `torch.randn`, by which every scheduler draws, is our `randn`."""

    def __init__(self, randn: Randn) -> None:
        super().__init__()
        self.randn = randn

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return self.randn(torch.Size(args[0])).to(kwargs["device"], kwargs["dtype"])
        return func(*args, **kwargs)


def _scheduler(scheduler_class: Any, table: NoiseSchedule) -> Any:
    """The scheduler whose training times are the rows of `table`, set to visit all of them."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), table.alphas_cumprod[:-1]])
    settings = {
        "num_train_timesteps": table.steps,
        "trained_betas": (1 - table.alphas_cumprod / before).tolist(),
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "lower_order_final": True,
        "skip_prk_steps": True,
        "clip_sample": False,
    }
    if scheduler_class.__name__ not in NOT_TOLD_X0:
        settings["prediction_type"] = "sample"
    taken = inspect.signature(scheduler_class).parameters
    scheduler = scheduler_class(**{name: value for name, value in settings.items() if name in taken})
    # Its own is a product in float32, which near the clean end has few digits of sigma left.
    scheduler.alphas_cumprod = table.alphas_cumprod
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(range(table.steps))[::-1])
    else:
        scheduler.set_timesteps(table.steps)
    return scheduler


def _ends_of_steps(rows: list[float]) -> list[int]:
    """The evaluations after which x has come to a row for good: the next is the last one there, or there is none."""
    last = {row: index for index, row in enumerate(rows)}
    return [*sorted(index - 1 for row, index in last.items() if row == int(row) and index > 0), len(rows) - 1]


def _reaches_clean(scheduler: Any) -> bool:
    sigmas = getattr(scheduler, "sigmas", None)
    return sigmas is None or bool(sigmas[-1] == 0)
