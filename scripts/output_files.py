"""Files that a script is asked to write, checked before it begins, so that no result is lost to a bad name."""

from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def check_file(option: str, file: Path | None) -> None:
    """Raises ValueError if nothing can be written there; None is no file."""
    if file is None:
        return
    if file.is_dir():
        raise ValueError(f"{option} {file} is a folder; give the name of a file in it")
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: folder {file.parent} does not exist; make it first")


def check_picture(option: str, file: Path | None) -> None:
    """The same for a picture, whose folder is made when it is written."""
    if file is None:
        return
    if file.suffix.lower() not in PICTURES:
        raise ValueError(f"{option} {file} is no name for a picture; give one that ends in .png")
    if file.parent.exists():
        check_file(option, file)
