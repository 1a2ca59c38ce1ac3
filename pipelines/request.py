"""What a caller asks for, with the model's defaults filled in and every value checked before anything is computed."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from ldm.diffusers_scheduler import diffusers_sampler
from ldm.samplers import SAMPLERS, Sampler
from ldm.schedule import Spacing
from ldm.token_merging import MOST_MERGED

DIFFUSERS = "diffusers:"
"""Before the name of a scheduler of diffusers that is used as a sampler."""
MAX_SIDE = 4096
MAX_PICTURES = 10_000
MAX_PROMPT = 10_000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """A checked request; `prompts` and `negatives` have one entry per picture, `height` and `width` are pixels.

    `strength` is the part of the steps that is made, with an image to start from; None without one. `spacing` None is
    the model's own time grid, which a pipeline names. The last three are shortcuts that change the picture.

    Raises:
        ValueError: one line that names the argument, its value and what is allowed.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    steps: int
    guidance: float
    rescale: float
    sampler: str
    eta: float
    height: int
    width: int
    syntax: str = "plain"
    clip_skip: int = 0
    tiled: bool = False
    strength: float | None = None
    spacing: Spacing | None = None
    guidance_interval: tuple[float, float] | None = None
    reuse: int = 1
    merge_tokens: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; give a finite number")
        strength = 1.0 if self.strength is None else self.strength
        for name, value in (("eta", self.eta), ("guidance rescale", self.rescale), ("strength", strength)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; give a number from 0 to 1")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not (0 <= low < high and math.isfinite(high)):
                raise ValueError(f"guidance interval is {low:g} to {high:g}; give two numbers, 0 <= low < high")
        if self.reuse < 1:
            raise ValueError(f"reuse is {self.reuse}; give a number of steps, at least 1")
        if not 0 <= self.merge_tokens <= MOST_MERGED:
            raise ValueError(f"merge tokens is {self.merge_tokens}; give a share from 0 to {MOST_MERGED}")
        if self.spacing not in (None, *get_args(Spacing)):
            raise ValueError(f"spacing {self.spacing!r} is unknown; there are {', '.join(get_args(Spacing))}")
        find_sampler(self.sampler)
        if self.eta and not takes_eta(self.sampler):
            able = ", ".join(name for name in sorted(SAMPLERS) if takes_eta(name))
            raise ValueError(f"sampler {self.sampler!r} has no eta; leave it at 0 or use {able}")

    @property
    def options(self) -> dict[str, Any]:
        """All but the prompts, by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def first_step(self) -> int:
        """Index of the first step that is made: an image to start from stands for those before (as in diffusers)."""
        return 0 if self.strength is None else self.steps - int(self.steps * self.strength)

    def check_steps(self, most: int) -> None:
        """Raises ValueError unless 1 <= steps <= `most`."""
        if not 1 <= self.steps <= most:
            raise ValueError(f"steps is {self.steps}; give a number from 1 to {most}")

    def check_clip_skip(self, layers: int) -> None:
        """Raises ValueError unless of the text encoder's layers at least one is left."""
        if not 0 <= self.clip_skip < layers:
            raise ValueError(
                f"clip_skip is {self.clip_skip}; this text encoder has {layers} layers: give 0 to {layers - 1}"
            )

    def check_size(self, multiple: int) -> None:
        """Raises ValueError unless both sides are multiples of `multiple` and not absurd."""
        for name, value in (("width", self.width), ("height", self.height)):
            if not 0 < value <= MAX_SIDE:
                raise ValueError(f"{name} is {value}; give a number from {multiple} to {MAX_SIDE}")
            if value % multiple:
                near = max(multiple, round(value / multiple) * multiple)
                raise ValueError(f"{name} is {value}, which is not a multiple of {multiple}; the nearest is {near}")


OPTIONS = tuple(each.name for each in fields(Request) if each.name not in ("prompts", "negatives"))
"""What pictures that are rendered together have in common."""


def find_sampler(name: str) -> Sampler:
    """One of ours by its name, or a scheduler of diffusers, such as `diffusers:UniPCMultistepScheduler`.

    Raises:
        ValueError: there is no such sampler, or diffusers is not installed.
    """
    if name.startswith(DIFFUSERS):
        return diffusers_sampler(name.removeprefix(DIFFUSERS))
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; there are {', '.join(sorted(SAMPLERS))} and {DIFFUSERS}CLASS")
    return SAMPLERS[name]


def takes_eta(sampler: str) -> bool:
    return "eta" in inspect.signature(find_sampler(sampler)).parameters


def checked_prompts(prompt: str | Sequence[str], copies: int) -> tuple[str, ...]:
    """One prompt per picture: prompt by prompt, then copies.

    Raises:
        ValueError: no prompt, an empty one, one of absurd length, or an impossible number of copies.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    if copies < 1 or copies * len(prompts) > MAX_PICTURES:
        raise ValueError(f"{copies} pictures of each prompt asked for; give from 1 to {MAX_PICTURES // len(prompts)}")
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"a prompt is {type(text).__name__}; give text")
        if not text.strip():
            raise ValueError("the prompt is empty; say what the picture should show")
    return tuple(_clean(text) for text in prompts for _ in range(copies))


def checked_negatives(negative: str | Sequence[str] | None, prompts: int, copies: int) -> tuple[str, ...]:
    """One negative prompt per picture; "" where none is given.

    Raises:
        ValueError: a list whose length is not that of the prompts.
    """
    if negative is None or isinstance(negative, str):
        return (_clean(negative or ""),) * (prompts * copies)
    negatives = list(negative)
    if len(negatives) != prompts:
        raise ValueError(
            f"there are {len(negatives)} negative prompts for {prompts} prompts; give one, or one for each"
        )
    return tuple(_clean(text) for text in negatives for _ in range(copies))


def checked_seeds(seed: int, count: int) -> range:
    """The seeds of so many pictures. Raises ValueError for one that no generator takes."""
    if not 0 <= seed <= MAX_SEED - count:
        raise ValueError(f"seed is {seed}; give a number from 0 to {MAX_SEED - count}")
    return range(seed, seed + count)


def _clean(text: str) -> str:
    if len(text) > MAX_PROMPT:
        raise ValueError(f"a prompt has {len(text)} characters; give at most {MAX_PROMPT}")
    return text.encode("utf-8", "replace").decode()  # lone surrogates have no tokens and no place in a file
