"""The JSON files of a model folder: every fault names the file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipelines.errors import notice

MAX_BYTES = 64 * 2**20

MadeT = TypeVar("MadeT")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a model folder needs it")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is too big for a configuration")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object to a JSON file; makes its folder. Raises OSError if that cannot be."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def naming_file(path: Path, make: Callable[[], MadeT]) -> MadeT:
    """What `make` makes; its ValueError becomes one line with the file's name in front."""
    try:
        return make()
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_fault(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def name_unknown_keys(path: Path, content: Mapping[str, Any], known: type[BaseModel]) -> None:
    """Says in one notice which keys are not read; those that begin with `_` are nobody's business."""
    if unknown := [key for key in content if not key.startswith("_") and key not in known.model_fields]:
        notice(f"{path}: unknown keys are ignored: {', '.join(unknown)}")


def _first_fault(error: ValidationError) -> str:
    """The first of pydantic's complaints as `key is value, but only ... is supported`."""
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("literal"))
    if fault["type"] == "literal_error":
        return f"{key} is {fault['input']!r}, but only {fault['ctx']['expected']} is supported"
    return f"{key} is {fault['input']!r}: {fault['msg'].lower()}"
