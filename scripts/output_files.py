"""Files that a script is asked to write, checked before it begins, so that no result is lost to a bad name."""

from functools import partial
from pathlib import Path

from pipelines.json_files import naming_file
from pipelines.png import check_place

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def check_file(option: str, file: Path | None) -> None:
    """Raises ValueError unless a file could lie there; None is no file."""
    if file is None:
        return
    naming_file(Path(option), partial(check_place, file))


def check_picture(option: str, file: Path | None) -> None:
    """The same for a picture, whose folder is made when it is written."""
    if file is None:
        return
    if file.suffix.lower() not in PICTURES:
        raise ValueError(f"{option} {file} is no name for a picture; give one that ends in .png")
    if file.parent.exists():
        check_file(option, file)
