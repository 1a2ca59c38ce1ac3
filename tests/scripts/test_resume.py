"""A run that is interrupted and resumed equals the uninterrupted one bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_unet
import unet_objective
from safetensors.torch import load_file
from tiny_models import TINY_UNET, forget_accelerator
from torch import Tensor
from unet_training_config import UNetTrainingConfig

from ldm.training.loop import LoopConfig

STEPS = 200
Losses = list[float]
Run = Callable[..., Losses]


class Killed(BaseException):
    """As sudden as a signal: nothing catches it."""


@pytest.fixture(scope="module")
def run(data_folder: Path, parts_folder: Path) -> Run:
    """Trains as the script does; returns every micro-batch's loss, all its digits. `kill` is the one to die at."""

    def train(out: Path, kill: int | None = None, **loop: Any) -> Losses:
        forget_accelerator()
        defaults = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "warmup": 10, "mixed_precision": "no"}
        defaults |= {"log_every": 1, "checkpoint_every": 25, "sample_every": 10_000}
        config = UNetTrainingConfig(
            data={"path": str(data_folder), "size": 32},
            loop=LoopConfig(out=str(out), **{**defaults, **loop}),
            autoencoder=str(parts_folder),
            text_encoder=str(parts_folder),
            model=TINY_UNET,
            settings={"steps": 1},
        )
        losses: Losses = []
        diffusion_loss = unet_objective.diffusion_loss

        def recorded(*arguments: Any) -> Tensor:
            if len(losses) == kill:
                raise Killed
            loss = diffusion_loss(*arguments)
            losses.append(float(loss.mean().detach()))
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unet_objective, "diffusion_loss", recorded)
            if kill is None:
                train_unet.train(config)
            else:
                with pytest.raises(Killed):
                    train_unet.train(config)
        return losses

    return train


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    """The uninterrupted run's folder and losses."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


def assert_same_state(one: Path, other: Path, step: int = STEPS) -> None:
    """Weights, their averages and the optimizer's moments are equal bit for bit."""
    folder = f"step-{step:08}"
    for file in (f"{folder}/model.safetensors", "model/unet/diffusion_pytorch_model.safetensors"):
        weights, others = load_file(one / file), load_file(other / file)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
    kept = [file for pattern in ("optimizer*.bin", "custom_checkpoint_*.pkl") for file in (one / folder).glob(pattern)]
    assert len(kept) >= 4  # of both networks, the times' sampler, and their averages
    for file in kept:
        states = [torch.load(path / folder / file.name, weights_only=False) for path in (one, other)]
        assert_equal(*states)


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def logged(out: Path) -> dict[int, dict[str, float]]:
    """The log's lines by step; where a resumed run wrote a step again, it wrote the same."""
    lines: dict[int, dict[str, float]] = {}
    for text in (out / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        del line["images_per_second"]
        assert lines.setdefault(line["step"], line) == line
    return lines


def test_the_run_trains(whole: tuple[Path, Losses]) -> None:
    out, losses = whole
    assert len(losses) == len(logged(out)) == STEPS
    assert len(set(losses)) == STEPS
    assert sum(losses[-50:]) < 0.97 * sum(losses[:50])
    assert sorted(path.name for path in out.glob("step-*")) == ["step-00000175", "step-00000200"]


def test_killed_again_and_again(run: Run, whole: tuple[Path, Losses], tmp_path: Path) -> None:
    """Before the first checkpoint, between two, right after one, and in the last step."""
    out, expected = whole
    resumed_at = 0
    for killed_in in (3, 62, 100, 199, None):
        losses = run(tmp_path, kill=None if killed_in is None else killed_in - resumed_at)
        assert losses == expected[resumed_at : resumed_at + len(losses)]
        resumed_at = STEPS if killed_in is None else killed_in // 25 * 25
    assert logged(tmp_path) == logged(out)
    assert_same_state(tmp_path, out)


def test_stopped_by_the_clock_at_every_step(run: Run, whole: tuple[Path, Losses], tmp_path: Path) -> None:
    for step in range(4):
        assert run(tmp_path, minutes=1e-9) == whole[1][step : step + 1]
    assert not list(tmp_path.glob("step-00000005"))


def test_accumulation_and_a_kill_within_it(run: Run, whole: tuple[Path, Losses], tmp_path: Path) -> None:
    """Two halves of a batch are the batch, but for rounding; dying between them loses nothing but time."""
    parts = {"gradient_accumulation": 2, "checkpoint_every": 5, "steps": 12}
    halves = run(tmp_path / "halves", **parts)
    batches = run(tmp_path / "batches", steps=12)
    means = [(a + b) / 2 for a, b in zip(halves[::2], halves[1::2], strict=True)]
    assert means == pytest.approx(batches, rel=1e-3)
    assert batches[0] == whole[1][0]

    killed = run(tmp_path / "killed", kill=2 * 7 + 1, **parts)
    assert killed == halves[:15]
    assert run(tmp_path / "killed", **parts) == halves[10:]
    assert_same_state(tmp_path / "killed", tmp_path / "halves", step=12)


def test_muon_s_momentum_is_resumed(run: Run, tmp_path: Path) -> None:
    muon = {"optimizer": "muon", "checkpoint_every": 5, "steps": 12}
    whole = run(tmp_path / "whole", **muon)
    assert run(tmp_path / "killed", kill=8, **muon) == whole[:8]
    assert run(tmp_path / "killed", **muon) == whole[5:]
    assert_same_state(tmp_path / "killed", tmp_path / "whole", step=12)
    states = [
        torch.load(tmp_path / "whole/step-00000012" / name, weights_only=False)["state"]
        for name in ("optimizer.bin", "optimizer_1.bin")
    ]
    assert [set(state[0]) for state in states] == [{"momentum"}, {"step", "exp_avg", "exp_avg_sq"}]
