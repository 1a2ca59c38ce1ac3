"""Damaged model folders and files: whatever is wrong with them is one line and exit code 2, never a traceback.

The default suite tries a few; `LDM_FUZZ=1000 python -m pytest tests/pipelines/test_fuzz.py` tries a thousand.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli
from pipelines.loading import load_model, save_model

COUNT = int(os.environ.get("LDM_FUZZ", "40"))
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 7, 2**31, 1e308, float("nan"), "", "x", "epsilon", "../..", "é\n"),
    *([], [1], ["a"], [[1, 2]], {}, {"a": 1}, [0] * 3, [1e9] * 4),
)


def change_json(file: Path, chance: random.Random) -> None:
    """Another value for one field, at any depth; or the field is gone."""
    content = json.loads(file.read_text())
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.7:
            place = place[key]
            continue
        if isinstance(place, dict) and chance.random() < 0.2:
            del place[key]
        else:
            place[key] = chance.choice(VALUES)
        break
    file.write_text(json.dumps(content))


def flip_bytes(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 3, 30])):
        if data:
            # Half of the damage is in the header, where it matters most.
            reach = len(data) if chance.random() < 0.5 else min(len(data), 300)
            data[chance.randrange(reach)] = chance.randrange(256)
    file.write_bytes(data)


def cut(file: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.choice([0, 1, 7, 8, 9, len(data) // 2, max(0, len(data) - 1)])])


def append(file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.choice([1, 8, 1000])))


def remove(file: Path, chance: random.Random) -> None:
    file.unlink()


def replace_by_folder(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def swap(file: Path, chance: random.Random) -> None:
    """The contents of another file of the model."""
    others = sorted(other for other in file.parents[0].rglob("*") if other.is_file())
    file.write_bytes(chance.choice(others).read_bytes())


DAMAGE: tuple[Callable[[Path, random.Random], None], ...] = (flip_bytes, cut, append, remove, replace_by_folder, swap)


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_no_damage_makes_a_traceback(
    layout: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = tmp_path / "original.safetensors"
    save_model(original, load_model(model_folder))
    refused = 0
    for seed in range(COUNT):
        chance = random.Random(seed)
        model = tmp_path / ("model" if layout == "folder" else "model.safetensors")
        if layout == "folder":
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(model_folder, model)
            files = sorted(file for file in model.rglob("*") if file.is_file() and file.name != "README.md")
        else:
            shutil.copyfile(original, model)
            files = [model]
        file = chance.choice(files)
        damages = (*DAMAGE, *([change_json] * 6 if file.suffix == ".json" else []))
        damage = chance.choice(damages if layout == "folder" else (flip_bytes, cut, append))
        damage(file, chance)
        picture = tmp_path / "x.png"
        arguments = ["render", "a house", "--steps", "1", "--dtype", "float32", "--device", "cpu", "-o", str(picture)]
        try:
            code = cli.main([*arguments, "--model", str(model)])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {damage.__name__} of {file.name}") from error
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), f"seed {seed}: {damage.__name__} of {file.name}: {captured}"
        refused += code == 2
    assert refused > COUNT // 5
