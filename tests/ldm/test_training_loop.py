"""The loop that every training script drives."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.training import loop
from ldm.training.data import Batch, CaptionedDataset, Place
from ldm.training.loop import (
    LoopConfig,
    Training,
    apply_gradients,
    fit,
    learning_rate_factor,
    make_accelerator,
    make_ema,
    make_optimizers,
)


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset()
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Points(CaptionedDataset):
    """x of a line that is to be learned."""

    workers = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: Place) -> tuple[Tensor, str, Place]:
        return torch.tensor([place[0] / 12]), "", place


def configure(out: Path, **changes: Any) -> LoopConfig:
    defaults = {"steps": 6, "batch_size": 4, "mixed_precision": "no", "log_every": 1, "warmup": 0, "learning_rate": 0.1}
    return LoopConfig(out=str(out), **{**defaults, **changes})


def start(config: LoopConfig, spoil: Callable[[Batch], bool] = lambda batch: False) -> tuple[Training, nn.Module]:
    """A line y = 2 x + 1 being learned; where `spoil` says so the loss is not a number."""
    reset()
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    network = nn.Linear(1, 1)
    ema = make_ema(network, config, accelerator.device)
    model, *optimizers = accelerator.prepare(network, *make_optimizers(network, config))

    def train_step(batch: Batch) -> dict[str, Tensor]:
        with accelerator.accumulate(model):
            loss = (model(batch.inputs) - 2 * batch.inputs - 1).square().mean()
            if spoil(batch):
                loss = loss * float("nan")
            accelerator.backward(loss)
            norm = apply_gradients(training, model, optimizers)
        return {"loss": loss.detach(), "gradient_norm": norm}

    training = Training(accelerator, config, Points(), optimizers, train_step, [(ema, model)])
    return training, network


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_learning_rate_warms_up_and_falls_to_zero(tmp_path: Path) -> None:
    config = configure(tmp_path, steps=110, warmup=10)
    factors = [learning_rate_factor(config, step) for step in range(111)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert learning_rate_factor(configure(tmp_path, warmup=0), 0) == 1
    assert learning_rate_factor(configure(tmp_path, steps=5, warmup=10), 9) == 1  # ends within the warm-up


def test_a_line_is_learned_and_logged(tmp_path: Path) -> None:
    training, _ = start(configure(tmp_path, steps=60, log_every=10))
    sheets: list[Path] = []
    training.on_sample = sheets.append
    training.config = training.config.model_copy(update={"sample_every": 40})
    assert fit(training) == 60
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [10, 20, 30, 40, 50, 60]
    assert log[-1]["loss"] < 0.05 * log[0]["loss"]
    assert {"images_per_second", "learning_rate", "gradient_norm"} <= log[0].keys()
    assert log[-1]["learning_rate"] < 0.01 * log[0]["learning_rate"]
    assert [sheet.name for sheet in sheets] == ["00000040.png", "00000060.png"]
    assert (tmp_path / "step-00000060").is_dir()
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path: Path) -> None:
    fit(start(configure(tmp_path / "each"))[0])
    fit(start(configure(tmp_path / "third", log_every=3))[0])
    each = [line["loss"] for line in log_of(tmp_path / "each")]
    third = [line["loss"] for line in log_of(tmp_path / "third")]
    assert third == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-4)


def test_only_matrices_decay() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    network[0].weight.requires_grad_(True)
    [adamw] = make_optimizers(network, LoopConfig(out=".", weight_decay=0.3))
    assert [(len(group["params"]), group["weight_decay"]) for group in adamw.param_groups] == [(1, 0.3), (3, 0.0)]
    network[0].requires_grad_(False)
    [adamw] = make_optimizers(network, LoopConfig(out="."))
    assert [len(group["params"]) for group in adamw.param_groups] == [0, 2]


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Embedding(7, 5), nn.Linear(5, 6))
    muon, adamw = make_optimizers(network, LoopConfig(out=".", optimizer="muon", weight_decay=0.3))
    assert [p.shape for p in muon.param_groups[0]["params"]] == [network[0].weight.shape, network[3].weight.shape]
    assert muon.param_groups[0]["weight_decay"] == 0.3
    assert [len(group["params"]) for group in adamw.param_groups] == [1, 4]  # the embedding; biases and norms


def test_the_average_s_memory_grows_to_its_decay() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = make_ema(network, LoopConfig(out=".", ema_decay=0.5), torch.device("cpu"))
    expected = 0.0
    for count in range(20):
        nn.init.constant_(network.weight, count)
        ema.update_parameters(network)
        decay = min(0.5, (1 + count) / (10 + count))
        expected = count if count == 0 else decay * expected + (1 - decay) * count
        assert ema.module.weight.item() == pytest.approx(expected)


def test_an_average_taken_every_few_steps_forgets_as_fast(tmp_path: Path) -> None:
    """Of weights that climb evenly, the average is behind by decay / (1 - decay) steps, here three times as many."""
    training, network = start(configure(tmp_path, steps=400, ema_decay=0.9, ema_every=3))
    nn.init.zeros_(network.weight)
    updates = []
    (ema, _), step = training.averaged[0], training.train_step

    def climb(batch: Batch) -> dict[str, Tensor]:
        values = step(batch)
        nn.init.constant_(network.weight, batch.step + 1)
        updates.append(int(ema.n_averaged))
        return values

    training.train_step = climb
    fit(training)
    assert updates[:7] == [0, 0, 0, 1, 1, 1, 2]
    behind = 399 - ema.module.weight.item()  # its last update was after step 399
    assert behind == pytest.approx(3 * 0.9**3 / (1 - 0.9**3), rel=0.01)


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    training, network = start(configure(tmp_path))
    accelerator, optimizer = training.accelerator, training.optimizers[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for bad in (float("nan"), float("inf")):
        accelerator.backward(network(torch.ones(1, 1)).sum() * bad)
        assert not torch.isfinite(apply_gradients(training, network, [optimizer]))
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())
        for state in optimizer.state_dict()["state"].values():
            assert not any(value.any() for value in state.values())
    accelerator.backward(network(torch.ones(1, 1)).sum())
    assert apply_gradients(training, network, [optimizer]).item() == pytest.approx(2**0.5)
    assert not torch.equal(network.weight, before["weight"])


def test_training_goes_on_after_a_few_bad_steps(tmp_path: Path) -> None:
    training, network = start(configure(tmp_path, steps=12), spoil=lambda batch: 1 <= batch.step < 10)
    assert fit(training) == 12
    assert torch.isfinite(network.weight).all()
    assert torch.isfinite(training.averaged[0][0].module.weight).all()
    assert int(training.averaged[0][0].n_averaged) == 12


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_host_reads_no_number_between_two_lines_of_the_log(optimizer: str, tmp_path: Path) -> None:
    """Or an accelerator would stand still at every step until the host has read it and sent on what comes next."""

    class Reads(TorchDispatchMode):
        """Of other than whole numbers: those are the order's and the average's, which stay with the host."""

        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.int64
            return func(*args, **(kwargs or {}))

    training, network = start(configure(tmp_path, steps=12, log_every=6, optimizer=optimizer))
    with Reads() as reads:
        fit(training)
    assert reads.count == 0
    with reads:
        assert network.weight.isfinite().all()
    assert reads.count == 1


def test_training_gives_up_after_ten_bad_steps(tmp_path: Path) -> None:
    training, _ = start(configure(tmp_path, steps=30), spoil=lambda batch: batch.step >= 2)
    with pytest.raises(ValueError, match=r"not finite for 10 steps up to step 12: lower loop\.learning_rate"):
        fit(training)
    assert loop.MOST_SKIPPED == 10


@pytest.mark.parametrize("log_every", [20, 100])
def test_a_run_that_ends_in_bad_steps_is_no_success(tmp_path: Path, log_every: int) -> None:
    training, _ = start(configure(tmp_path, steps=39, log_every=log_every), spoil=lambda batch: batch.step >= 20)
    with pytest.raises(ValueError, match="the gradient was not finite for 19 steps up to step 39"):
        fit(training)


def test_what_is_shorter_than_the_average_s_steps_is_averaged_once(tmp_path: Path) -> None:
    training, network = start(configure(tmp_path, steps=5, ema_every=10))
    fit(training)
    ((ema, _),) = training.averaged
    assert torch.equal(dict(ema.named_parameters())["module.weight"], network.weight)


def test_the_last_line_is_of_the_steps_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # a second passes at each look
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    training, _ = start(configure(tmp_path, steps=5, log_every=3))
    fit(training)
    assert [(line["step"], line["images_per_second"]) for line in log_of(tmp_path)] == [(3, 3 * 4 / 1), (5, 2 * 4 / 2)]


def test_what_a_run_that_was_cut_short_logged_is_logged_once(tmp_path: Path) -> None:
    def interrupt(batch: Batch) -> bool:
        if batch.step == 5:
            raise KeyboardInterrupt
        return False

    config = configure(tmp_path, steps=9, checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        fit(start(config, interrupt)[0])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    fit(start(config)[0])
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_stops_when_time_is_up_and_goes_on(tmp_path: Path) -> None:
    training, _ = start(configure(tmp_path / "a", log_every=2, minutes=1e-9))
    assert fit(training) == 2
    assert (tmp_path / "a" / "step-00000002").is_dir()
    training, resumed = start(configure(tmp_path / "a", log_every=2))
    assert fit(training) == 6
    training, whole = start(configure(tmp_path / "b", log_every=2))
    assert fit(training) == 6
    assert torch.equal(resumed.weight, whole.weight)
    assert [line["loss"] for line in log_of(tmp_path / "a")] == [line["loss"] for line in log_of(tmp_path / "b")]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    fit(start(configure(tmp_path))[0])
    before = (tmp_path / "log.jsonl").read_text()
    training, _ = start(configure(tmp_path))
    assert fit(training) == 6
    assert (tmp_path / "log.jsonl").read_text() == before


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    made = []
    for parts in (1, 2, 4):
        training, network = start(configure(tmp_path / str(parts), gradient_accumulation=parts))
        fit(training)
        made.append(network)
    for network in made[1:]:
        torch.testing.assert_close(network.weight, made[0].weight, atol=1e-5, rtol=1e-5)


def test_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    training, _ = start(configure(tmp_path, batch_size=5, gradient_accumulation=2))
    with pytest.raises(ValueError, match="batch_size 5 is not a multiple of 2"):
        fit(training)


@pytest.mark.parametrize(
    ("asked", "fastest", "taken"),
    [("auto", torch.bfloat16, "bf16"), ("auto", torch.float32, "no"), ("bf16", torch.float32, "bf16")],
)
@pytest.mark.parametrize("launched", [None, "no", "bf16"])
def test_precision_follows_from_the_hardware_unless_it_is_given(
    asked: str,
    fastest: torch.dtype,
    taken: str,
    launched: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reset()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        taken = "bf16" if launched == "bf16" else taken
    monkeypatch.setattr(loop, "fastest_dtype", lambda device: fastest)
    assert make_accelerator(configure(tmp_path, mixed_precision=asked)).mixed_precision == taken


def test_scaled_gradients_are_scaled_down_once_for_each_of_several_optimizers() -> None:
    """As of fp16: a step that overflows changes nothing but the scale, and all others are those of an unscaled loss."""

    def trained(scaler: torch.amp.GradScaler | None) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        weight, bias = (
            AcceleratedOptimizer(torch.optim.AdamW([parameter], lr=0.1, fused=True), device_placement=False)
            for parameter in network.parameters()
        )
        accelerator = SimpleNamespace(
            sync_gradients=True, scaler=scaler, clip_grad_norm_=partial(nn.utils.clip_grad_norm_)
        )
        training = SimpleNamespace(accelerator=accelerator, config=SimpleNamespace(gradient_clip=0.5))
        for factor in (1.0, float("inf"), 2.0):
            loss = network(torch.ones(2, 4)).square().sum() * factor
            (loss if scaler is None else scaler.scale(loss)).backward()
            norm = apply_gradients(training, network, [weight, bias])  # type: ignore[arg-type]
            assert bool(torch.isfinite(norm)) == (factor != float("inf"))
        return network

    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for one, other in zip(trained(scaler).parameters(), trained(None).parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert scaler.get_scale() == 512


def test_rate_and_decay_are_those_asked_for_when_a_run_goes_on(tmp_path: Path) -> None:
    first, _ = start(configure(tmp_path, minutes=1e-9))
    fit(first)
    changed = configure(tmp_path, learning_rate=0.02, weight_decay=0.5)
    training, _ = start(changed)
    assert fit(training) == 6
    rates = {line["step"]: line["learning_rate"] for line in log_of(tmp_path)}
    assert rates[1] == pytest.approx(0.1)
    for step in range(2, 7):
        assert rates[step] == pytest.approx(0.02 * learning_rate_factor(changed, step - 1), rel=1e-4)
    assert {group["weight_decay"] for group in training.optimizers[0].param_groups} == {0.5, 0.0}


def test_another_accumulation_when_a_run_goes_on(tmp_path: Path) -> None:
    """Three steps in one part each, three in two: with the count of parts kept, they would end in mid-step."""
    fit(start(configure(tmp_path / "a", steps=6, checkpoint_every=3, keep=9))[0])
    shutil.copytree(tmp_path / "a" / "step-00000003", tmp_path / "b" / "step-00000003")
    training, network = start(configure(tmp_path / "b", steps=6, gradient_accumulation=2))
    fit(training)
    whole = load_file(tmp_path / "a" / "step-00000006" / "model.safetensors")
    torch.testing.assert_close(network.state_dict()["weight"], whole["weight"], atol=1e-5, rtol=1e-5)


def test_the_log_knows_the_whole_step_s_gradient_only(tmp_path: Path) -> None:
    norms = []
    for parts in (1, 2, 4):
        fit(start(configure(tmp_path / str(parts), gradient_accumulation=parts, steps=2))[0])
        norms.append([line["gradient_norm"] for line in log_of(tmp_path / str(parts))])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_what_only_some_steps_measure_is_averaged_over_those(tmp_path: Path) -> None:
    training, _ = start(configure(tmp_path, log_every=6))
    step = training.train_step

    def sometimes(batch: Batch) -> dict[str, Tensor]:
        return step(batch) | ({"late": torch.tensor(5.0)} if batch.step >= 4 else {})

    training.train_step = sometimes
    fit(training)
    assert log_of(tmp_path)[0]["late"] == 5
