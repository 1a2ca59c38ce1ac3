"""PNG files that say how they were made, written whole or not at all."""

import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

RECORD_CHUNK = "ldm"
PARAMETERS_CHUNK = "parameters"  # where other programs look
CACHE_FILE = "sha256.json"
SLUG_LENGTH = 60


def slug(prompt: str) -> str:
    """A prompt as a part of a file's name: its letters and digits in lower case, the first 60 or so."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "picture"


def write_png(path: Path, image: Image.Image, record: Mapping[str, Any]) -> None:
    """Writes a picture with its record; a reader never sees half of it. Raises OSError if it cannot be written."""
    chunks = PngInfo()
    chunks.add_itxt(RECORD_CHUNK, json.dumps(record, ensure_ascii=False))
    chunks.add_itxt(PARAMETERS_CHUNK, parameters_text(record))
    with _staged(path) as staged:
        image.save(staged, format="PNG", pnginfo=chunks)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a picture that `write_png` wrote.

    Raises:
        ValueError: the file is no picture, or holds no record.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            record = json.loads(image.info[RECORD_CHUNK])
    except KeyError:
        raise ValueError(f"{path} does not say how it was made") from None
    except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable picture with a record: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a broken record")
    return record


def parameters_text(record: Mapping[str, Any]) -> str:
    """The same in the line format of the AUTOMATIC1111 web UI, which most programs read."""
    negative = f"\nNegative prompt: {record['negative']}" if record["negative"] else ""
    fields = {
        "Steps": record["steps"],
        "Sampler": str(record["sampler"]).upper(),
        "CFG scale": record["guidance"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": str(record["sha256"])[:10],
        "Model": record["model"],
    }
    return f"{record['prompt']}{negative}\n" + ", ".join(f"{name}: {value}" for name, value in fields.items())


def check_writable(path: Path) -> None:
    """Finds out before the work whether a picture can be written there.

    Raises:
        ValueError: it is no name for a PNG, its folder does not exist, or nothing can be written there.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} is no name for a picture; give one that ends in .png")
    check_place(path)
    try:
        with _staged(path, keep=False) as staged:
            staged.touch()
    except OSError as error:
        raise ValueError(f"nothing can be written to {path.parent}: {error.strerror}") from None


def check_place(path: Path) -> None:
    """Raises ValueError unless a file could lie there: no folder does, and the one that it would lie in exists."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"folder {path.parent} does not exist; make it first")


def weights_sha256(files: Iterable[Path]) -> str:
    """One digest of a model's weights files: the SHA-256 of the list of theirs, in order.

    Digests of single files are cached by path, size and modification time in the user's cache folder.
    """
    cache = _read_cache()
    digests, fresh = [], False
    for path in files:
        status = path.stat()
        key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        if key not in cache:
            cache[key] = _sha256(path, key)
            fresh = True
        digests.append(cache[key])
    if fresh:
        _write_cache(cache)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


@contextmanager
def _staged(path: Path, keep: bool = True) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place if the block ends well and `keep` is true."""
    staged = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield staged
        if keep:
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


@functools.cache  # where nothing can be written, the same model is not read again for each of its pictures
def _sha256(path: Path, key: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_file() -> Path:
    """Raises RuntimeError where nobody knows the user's home."""
    return _cache_folder() / "ldm" / CACHE_FILE


def _cache_folder() -> Path:
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _read_cache() -> dict[str, str]:
    try:
        content = json.loads(_cache_file().read_bytes())
    except (OSError, ValueError, RuntimeError):
        return {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def _write_cache(cache: Mapping[str, str]) -> None:
    try:
        path = _cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(path) as staged:
            staged.write_text(json.dumps(cache), encoding="utf-8")
    except (OSError, RuntimeError):
        return  # without a cache the next digest only takes longer
