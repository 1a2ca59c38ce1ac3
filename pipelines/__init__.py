"""Joins the three pillars: render, load, save, command line. Exports lazily, so that `ldm --help` needs no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.text_to_image import TextToImagePipeline

__all__ = ["TextToImagePipeline"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "TextToImagePipeline":
        from pipelines.text_to_image import TextToImagePipeline

        return TextToImagePipeline
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
