"""The classifier of noisy latents: trained through `main`, resumed, read back, and used for guidance."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_classifier
import yaml
from noisy_classifier import (
    ClassifierCard,
    ClassifierConfig,
    NoisyClassifier,
    load_classifier,
    log_prob,
    save_classifier,
)
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_models import forget_accelerator
from train_classifier import ClassifierTrainingConfig, accuracy_by_noise

from ldm import guidance
from ldm.denoiser import Estimate
from ldm.samplers import sample_ddim, sample_ddpm
from ldm.schedule import NoiseSchedule
from ldm.training.command_line import parse_config
from pipelines.json_files import write_json
from pipelines.scheduler_config import SchedulerConfig

SCHEDULER = SchedulerConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=100)
TINY = ClassifierConfig(block_out_channels=(8, 16), norm_num_groups=4)


@pytest.fixture(scope="module")
def model_folder(parts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of a model folder a classifier is trained for: its `vae` and its `scheduler`."""
    folder = tmp_path_factory.mktemp("model")
    write_json(folder / "model_index.json", {})
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER.to_diffusers_config())
    shutil.copytree(parts_folder / "vae", folder / "vae")
    return folder


@pytest.fixture(scope="module")
def numbered(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sixteen pictures with columns of all kinds."""
    folder = tmp_path_factory.mktemp("numbered") / "data"
    shutil.copytree(data_folder, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        columns = {"number": i % 3 + 9, "share": i / 16, "sorted": "first" if i < 12 else "then", "same": "all"}
        row |= {**columns, "gap": None if i == 5 else "there"}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


Run = Callable[..., None]


@pytest.fixture
def run(numbered: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the script as the command line does, three steps by default."""

    def train(out: Path, **changes: Any) -> None:
        config = {
            "data.path": numbered,
            "data.size": 32,
            "loop.out": out,
            "loop.steps": 3,
            "loop.batch_size": 4,
            "loop.mixed_precision": "no",
            "loop.log_every": 1,
            "loop.learning_rate": 0.01,
            "loop.warmup": 0,
            "model": model_folder,
            "label": "number",
            "held_out": 0.25,
            "classifier": json.dumps(TINY.model_dump(mode="json")),
        }
        arguments = [text for name, value in (config | changes).items() for text in (f"--{name}", str(value))]
        forget_accelerator()
        monkeypatch.setattr("sys.argv", ["train_classifier.py", *arguments])
        train_classifier.main()

    return train


def test_it_writes_what_is_read_back(
    run: Run, numbered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    folder = tmp_path / "classifier"
    assert sorted(path.name for path in folder.iterdir()) == ["classifier.safetensors", "config.json"]
    card = ClassifierCard.model_validate(json.loads((folder / "config.json").read_text()))
    assert (card.classifier, card.in_channels, card.labels) == (TINY, 4, ("10", "11", "9"))
    assert card.scheduler == SCHEDULER.to_diffusers_config()
    assert [round(level["t"]) for level in card.accuracy] == [0, 10, 20, 30, 40, 50, 59, 69, 79, 89, 99]
    alphas = [level["alpha"] for level in card.accuracy]
    assert (
        alphas == SCHEDULER.make_schedule().at(torch.tensor([round(level["t"]) for level in card.accuracy]))[0].tolist()
    )
    assert all(level["accuracy"] * 4 in range(5) for level in card.accuracy)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == {"classifier": str(folder), "accuracy": list(card.accuracy)}
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert all({"loss", "accuracy", "gradient_norm"} <= line.keys() for line in log)

    classifier, labels = load_classifier(folder)
    assert labels == card.labels
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    saved = load_file(folder / "classifier.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in classifier.state_dict().items())


def test_a_stopped_run_goes_on_as_if_it_had_not_been(run: Run, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    for _ in range(3):
        run(parts, **{"loop.minutes": 1e-9})
    assert len((parts / "log.jsonl").read_text().splitlines()) == 3
    for name in ("classifier.safetensors", "config.json"):
        assert (parts / "classifier" / name).read_bytes() == (whole / "classifier" / name).read_bytes()


def test_the_held_out_rows_are_the_last_and_not_learned(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: set[int] = set()
    measured = []

    def posterior(batch: Any, seed: int) -> torch.Tensor:
        learned.update(batch.indices)
        return batch.inputs[:, :4]

    def accuracy(classifier: NoisyClassifier, x0: torch.Tensor, targets: torch.Tensor, *_: Any) -> list[Any]:
        measured.append((x0, targets))
        return []

    monkeypatch.setattr(train_classifier, "sample_posterior", posterior)
    monkeypatch.setattr(train_classifier, "accuracy_by_noise", accuracy)
    run(tmp_path)
    assert learned == set(range(12))
    ((x0, targets),) = measured
    (cache,) = tmp_path.glob("latents-*.safetensors")
    assert torch.equal(x0, load_file(cache)["moments"][12:, :4].float())
    assert targets.tolist() == [2, 0, 1, 2]  # 9, 10, 11, 9 among "10", "11", "9"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": "colour"}, ["no column 'colour'", "number", "background"]),
        ({"label": "same"}, ["column 'same'", "holds 'all' only", "two labels"]),
        ({"label": "share"}, ["a float in column 'share'", "text or whole numbers"]),
        ({"label": "things"}, ["a list in column 'things'", "text or whole numbers"]),
        ({"label": "gap"}, ["row 5", "nothing in column 'gap'"]),
        ({"label": "sorted"}, ["label 'then'", "first 12 rows", "shuffle the rows"]),
        ({"held_out": 0.99}, ["first 0 rows", "16 are held out"]),
        ({"held_out": 1.5}, ["held_out", "less than 1"]),
        ({"model": "nowhere"}, ["nowhere", "does not exist"]),
        ({"classifier.norm_num_groups": 3}, ["block_out_channels holds 8", "norm_num_groups 3"]),
        ({"classifier.depth": 3}, ["depth"]),
    ],
)
def test_bad_input_is_one_line(
    changes: dict[str, Any], words: list[str], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, **changes)
    assert stopped.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(word in error for word in words), error


def test_the_preset_is_valid() -> None:
    preset = Path(train_classifier.__file__).parent / "configs" / "picturebook_classifier.yaml"
    config = parse_config(ClassifierTrainingConfig, "", ["--config", str(preset), "--loop.out", "elsewhere"])
    assert (config.data.path, config.label, config.loop.out) == ("runs/picturebook", "background", "elsewhere")
    assert yaml.safe_load(preset.read_text())["classifier"].keys() == ClassifierConfig.model_fields.keys()
    NoisyClassifier(config.classifier, 4, 8)


def separable(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N,4,8,8] of two classes, one about +1 and one about -1 in every channel."""
    targets = torch.arange(count) % 2
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return (2.0 * targets - 1)[:, None, None, None] + 0.3 * noise, targets


class Sign(torch.nn.Module):
    """Knows the two classes apart by the latents' mean, whatever the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (len(x_t),)
        mean = self.gain * x_t.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def test_the_accuracy_falls_from_one_to_chance_as_the_signal_goes() -> None:
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    x0, targets = separable(600)
    report = accuracy_by_noise(Sign(), x0, targets, schedule, seed=0)  # type: ignore[arg-type]
    assert report[0]["accuracy"] == 1
    assert (report[-1]["t"], report[-1]["alpha"]) == (999, 0)
    assert report[-1]["accuracy"] == pytest.approx(0.5, abs=4 * 0.5 / 600**0.5)
    assert accuracy_by_noise(Sign(), x0, targets, schedule, seed=0) == report  # type: ignore[arg-type]
    assert accuracy_by_noise(Sign(), x0, 1 - targets, schedule, seed=0)[0]["accuracy"] == 0  # type: ignore[arg-type]


def test_the_classifier_looks_at_latents_of_any_size_and_at_the_time() -> None:
    torch.manual_seed(0)
    classifier = NoisyClassifier(TINY, 4, 3)
    for block in classifier.layers:
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight)  # as after training: new ones are zero, and the time unseen
    for shape in ((2, 4, 8, 8), (2, 4, 5, 7)):
        x_t = torch.randn(shape, dtype=torch.float64)
        early, late = (classifier(x_t, torch.full((2,), t)) for t in (10, 900))
        assert early.shape == (2, 3)
        assert not torch.allclose(early, late, atol=1e-3)
        assert torch.equal(early, classifier(x_t, torch.full((2,), 10.0, dtype=torch.float64)))
    both = torch.randn(2, 4, 8, 8)
    alone = torch.cat([classifier(x[None], torch.tensor([7])) for x in both])
    torch.testing.assert_close(classifier(both, torch.tensor([7, 7])), alone, atol=1e-5, rtol=1e-5)


def test_log_prob_is_the_logarithm_of_one_label_s_probability() -> None:
    torch.manual_seed(0)
    classifier = NoisyClassifier(TINY, 4, 3)
    x_t, t = torch.randn(5, 4, 8, 8), torch.full((5,), 30.0)
    probabilities = torch.stack([log_prob(classifier, label)(x_t, t).exp() for label in range(3)], 1)
    torch.testing.assert_close(probabilities, classifier(x_t, t).softmax(1))
    for label in (-1, 3):
        with pytest.raises(ValueError, match=f"label_index is {label}, but the classifier knows labels 0 to 2"):
            log_prob(classifier, label)


def test_guidance_leads_to_the_label() -> None:
    """A classifier that learned +1 from -1 in noisy latents turns a denoiser that knows neither, by both algorithms."""
    torch.manual_seed(0)
    schedule = NoiseSchedule("scaled_linear")
    classifier = NoisyClassifier(TINY, 4, 2)
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
    for _ in range(60):
        x0, targets = separable(32)
        t = torch.randint(1000, (32,))
        loss = torch.nn.functional.cross_entropy(
            classifier(schedule.add_noise(x0, torch.randn_like(x0), t), t), targets
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classifier.eval().requires_grad_(False)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> Estimate:
        """E[x0 | x_t] of x0 ~ N(0, 1)."""
        return Estimate(schedule.coefficients(t, x_t)[0] * x_t)

    noise, grid = torch.randn(8, 4, 8, 8), schedule.timesteps(20, "trailing")
    means = []
    for label in range(2):
        towards = log_prob(classifier, label)
        ddim = sample_ddim(guidance.classifier(denoise, towards, schedule, 100.0), noise, schedule, grid)
        shift = guidance.log_prob_gradient(towards, 100.0)
        ddpm = sample_ddpm(denoise, noise, schedule, grid, mean_shift=shift)
        means.append((ddim.mean((1, 2, 3)), ddpm.mean((1, 2, 3))))
    for minus, plus in zip(*means, strict=True):
        assert (plus - minus).min() > 0.2


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    card = ClassifierCard(classifier=TINY, in_channels=4, labels=("a", "b"), scheduler={}, accuracy=())
    save_classifier(tmp_path, NoisyClassifier(TINY, 4, 2), card)
    content = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="nowhere"):
        load_classifier(tmp_path / "nowhere")
    write_json(tmp_path / "config.json", {**content, "labels": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"classifier.safetensors does not fit its config: .*out.weight \[2, 16\]"):
        load_classifier(tmp_path)
    write_json(tmp_path / "config.json", {**content, "labels": ["a"]})
    with pytest.raises(ValueError, match=r"config.json: labels is"):
        load_classifier(tmp_path)
    write_json(tmp_path / "config.json", content)
    (tmp_path / "classifier.safetensors").unlink()
    with pytest.raises(ValueError, match=r"classifier.safetensors does not exist"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("widths", [(8, 6), (0,), (9,)])
def test_widths_that_do_not_divide_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match=f"block_out_channels holds {widths[-1]}, but must hold even multiples"):
        ClassifierConfig(block_out_channels=widths, norm_num_groups=4)
