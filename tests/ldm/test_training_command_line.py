"""`--config FILE.yaml --section.field value`, and one line for what is wrong."""

from pathlib import Path
from typing import Self

import pytest
from pydantic import BaseModel, model_validator

from ldm.training.command_line import parse_config
from ldm.training.data import DataConfig
from ldm.training.loop import LoopConfig


class LevelsConfig(BaseModel, frozen=True, extra="forbid"):
    """Two fields that have to agree."""

    widths: tuple[int, ...] = (8,)
    blocks: int = 1

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if len(self.widths) != self.blocks:
            raise ValueError(f"{self.blocks} blocks need as many widths")
        return self


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """Three sections and a field."""

    data: DataConfig
    loop: LoopConfig
    model: LevelsConfig = LevelsConfig()
    init: str | None = None


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  path: pictures\n  size: 32\nloop:\n  out: runs/a\n  steps: 7\n  learning_rate: 1.0e-3\n")
    return str(path)


def parse(*arguments: str) -> RunConfig:
    return parse_config(RunConfig, "Train.", list(arguments))


def test_file_and_later_arguments(file: str) -> None:
    config = parse("--config", file, "--loop.steps", "9", "--init", "other")
    assert parse("--config", file, "--model.blocks", "2", "--model.widths", "[8, 16]").model.widths == (8, 16)
    assert config == RunConfig(
        data=DataConfig(path="pictures", size=32),
        loop=LoopConfig(out="runs/a", steps=9, learning_rate=1e-3),
        init="other",
    )


def test_arguments_alone() -> None:
    assert parse("--data.path", "p", "--loop.out", "o").loop == LoopConfig(out="o")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--loop.steps", "0"], "steps"),
        (["--loop.steps", "many"], "steps"),
        (["--loop.setps", "3"], "setps"),
        (["--loop.mixed_precision", "fp64"], "mixed_precision"),
        (["--data.size", "4"], "size"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model.blocks", "2"], "2 blocks need as many widths"),
    ],
)
def test_bad_input_is_one_line(file: str, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--config", file, *arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err


@pytest.mark.parametrize(
    "text",
    ["loop:\n  out: a\n  speed: 3\ndata:\n  path: b\n", "loop:\n  out: a\n", "a: [", "- 1\n"],
)
def test_bad_file_is_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse("--config", str(tmp_path / "bad.yaml"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_file_in_another_encoding_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.yaml").write_bytes("loop:\n  out: café\n".encode("latin-1"))
    with pytest.raises(SystemExit) as stopped:
        parse("--config", str(tmp_path / "latin.yaml"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --config names a file that is not UTF-8 text")
    assert error.endswith("save it as UTF-8\n")
    assert error.count("\n") == 1
