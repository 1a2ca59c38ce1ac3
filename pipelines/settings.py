"""`ldm.json`: what a Stable Diffusion folder has no field for. An absent file means the defaults."""

import re
from typing import Any

from pydantic import BaseModel, Field

from ldm.schedule import Spacing

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def words_in(text: str) -> set[str]:
    """The words of a prompt or caption in lower case; digits and punctuation are no words."""
    return set(WORD.findall(text.lower()))


class Settings(BaseModel, frozen=True, extra="ignore"):
    """A model's own defaults and history. No picture depends on anything here but the first four, which a caller sets.

    `words` are all words of the training captions in order; None means unknown.
    """

    steps: int = Field(default=20, ge=1)
    guidance: float = Field(default=7.5, allow_inf_nan=False)
    sampler: str | None = None
    spacing: Spacing | None = None
    recipe: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    words: tuple[str, ...] | None = None
    notes: str = ""
