"""Checkpoints are whole or not there, whenever the process dies."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from ldm.training import checkpoint


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Saved:
    """An accelerator with one small prepared model, whose weights say which step they are of."""

    def __init__(self) -> None:
        self.accelerator = Accelerator()
        model = nn.Linear(3, 2)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def save(self, folder: Path, step: int, keep: int = 2) -> None:
        nn.init.constant_(self.model.weight, step)
        checkpoint.save_checkpoint(self.accelerator, folder, step, keep)

    def load(self, folder: Path) -> int:
        nn.init.constant_(self.model.weight, -1)
        step = checkpoint.load_newest(self.accelerator, folder)
        assert (self.model.weight == (step or -1)).all()
        return step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_no_checkpoint_is_step_0(tmp_path: Path) -> None:
    assert Saved().load(tmp_path) == 0


def test_the_newest_is_loaded_and_the_oldest_pruned(tmp_path: Path) -> None:
    saved = Saved()
    for step in (1, 2, 3, 10):
        saved.save(tmp_path, step)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert saved.load(tmp_path) == 10
    saved.save(tmp_path, 11, keep=1)
    assert names(tmp_path) == ["step-00000011"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    saved = Saved()
    saved.save(tmp_path, 5)
    saved.save(tmp_path, 5)
    assert names(tmp_path) == ["step-00000005"]
    assert saved.load(tmp_path) == 5


def test_a_half_written_checkpoint_is_ignored_and_swept(tmp_path: Path) -> None:
    saved = Saved()
    saved.save(tmp_path, 1)
    (tmp_path / ".tmp-00000002").mkdir()
    (tmp_path / ".tmp-00000002" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000003").mkdir()  # its manifest went first when it was pruned
    assert saved.load(tmp_path) == 1
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    saved.save(tmp_path, 3)
    assert saved.load(tmp_path) == 3


@pytest.mark.parametrize("damage", ["flip a bit", "cut short", "remove"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str, name: str) -> None:
    saved = Saved()
    saved.save(tmp_path, 1)
    saved.save(tmp_path, 2)
    file = tmp_path / "step-00000002" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip a bit" else content[:-1])
    with pytest.raises(ValueError, match=rf"step-00000002/{name} is damaged: delete .*step-00000002 to resume"):
        saved.load(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"step": 1, "fi', "[]", "{}", '{"step": 1, "files": {"a": 1}}', '{"step": 2, "files": {}}']
)
def test_a_damaged_manifest_is_refused_by_name(content: str, tmp_path: Path) -> None:
    saved = Saved()
    saved.save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"step-00000001/manifest\.json is damaged"):
        saved.load(tmp_path)


def other_network(accelerator: Accelerator) -> None:
    accelerator.prepare(nn.Linear(3, 4))


def another_kind_of_network(accelerator: Accelerator) -> None:
    accelerator.prepare(nn.Conv2d(3, 2, 1, bias=False))


def other_groups(accelerator: Accelerator) -> None:
    model = nn.Linear(3, 2)
    accelerator.prepare(model, torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}]))


def a_second_optimizer(accelerator: Accelerator) -> None:
    model = nn.Linear(3, 2)
    accelerator.prepare(model, torch.optim.AdamW([model.weight]), torch.optim.AdamW([model.bias]))


@pytest.mark.parametrize("prepare", [other_network, another_kind_of_network, other_groups, a_second_optimizer])
def test_a_checkpoint_of_something_else_is_one_line(tmp_path: Path, prepare: Callable[[Accelerator], None]) -> None:
    Saved().save(tmp_path, 1)
    accelerator = Accelerator()
    accelerator._models.clear()
    accelerator._optimizers.clear()
    prepare(accelerator)
    with pytest.raises(ValueError, match=r"step-00000001 is of another network or optimizer \(.+\): give") as caught:
        checkpoint.load_newest(accelerator, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_in_a_precision_that_needs_a_scaler(tmp_path: Path) -> None:
    saved = Saved()
    saved.save(tmp_path, 3)
    scaler = saved.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert saved.load(tmp_path) == 3
    assert saved.accelerator.scaler is scaler
    saved.save(tmp_path, 4)
    saved.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    assert saved.load(tmp_path) == 4
    assert saved.accelerator.scaler.get_scale() == 8.0


class Killed(BaseException):
    """As sudden as a signal: nothing catches it."""


@pytest.mark.parametrize("at", ["save_state", "flush 1", "flush 3", "rename"])
def test_killed_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    saved = Saved()
    saved.save(tmp_path, 1, keep=1)
    calls = 0

    def die(*_: object) -> None:
        nonlocal calls
        calls += 1
        if not at.startswith("flush") or calls == int(at.split()[1]):
            raise Killed

    with monkeypatch.context() as patch:
        if at == "save_state":
            patch.setattr(saved.accelerator, "save_state", die)
        elif at == "rename":
            patch.setattr(Path, "rename", die)
        else:
            patch.setattr(checkpoint, "_flush", die)
        with pytest.raises(Killed):
            saved.save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [".tmp-00000002", "step-00000001"]
    assert saved.load(tmp_path) == 1
    assert names(tmp_path) == ["step-00000001"]
    saved.save(tmp_path, 2, keep=1)
    assert saved.load(tmp_path) == 2


def test_every_file_is_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, events = Saved(), []
    rename = Path.rename
    monkeypatch.setattr(checkpoint, "_flush", lambda path: events.append(path.name))

    def noted(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", noted)
    saved.save(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(names(tmp_path / "step-00000001")) <= set(before)
    assert before.index("manifest.json") > max(before.index("model.safetensors"), before.index("optimizer.bin"))
    assert after == [tmp_path.name]
