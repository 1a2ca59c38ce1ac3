"""`--config FILE.yaml --section.field value`, and one line for what is wrong."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from ldm.training.command_line import parse_config
from ldm.training.data import DataConfig
from ldm.training.loop import LoopConfig


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """Two sections and a field."""

    data: DataConfig
    loop: LoopConfig
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
    assert config == RunConfig(
        data=DataConfig(path="pictures", size=32), loop=LoopConfig(out="runs/a", steps=9, learning_rate=1e-3), init="other"
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
    ],
)
def test_bad_input_is_one_line(
    file: str, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--config", file, *arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err


@pytest.mark.parametrize("text", ["loop:\n  out: a\n  speed: 3\ndata:\n  path: b\n", "loop:\n  out: a\n", "a: [", "- 1\n"])
def test_bad_file_is_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse("--config", str(tmp_path / "bad.yaml"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
