"""The papers' tables made again: their claims, the measures behind them, resuming, and each command at a tiny size."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reproduce
import torch
from judge import load_judge
from matplotlib.figure import Figure
from PIL import Image
from reproductions import autoencoders, ddim, guidance, measure, models, objectives
from reproductions.table import Claim, Paper, Results, Setup, Table, along, draw, falls, fingerprint, rises, run
from tiny_models import TINY_UNET, forget_accelerator

from ldm.schedule import NoiseSchedule
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.loading import DEFAULT_MODEL, Model, load_autoencoder, load_text_encoder, load_unet, save_model
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings
from text_encoder import Tokenizer

TABLES = reproduce.TABLES
SCORE, THINGS, RIGHT = guidance.SCORE, measure.THINGS, measure.RIGHT
NLL, RFID, PSNR = objectives.NLL, autoencoders.RFID, autoencoders.PSNR


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    reproduce.main()


def paper(table: Table, name: str) -> dict[tuple[str, str], dict[str, float]]:
    (results,) = (each.results for each in table.papers if each.name == name)
    return {cell: dict(figures) for cell, figures in results.items()}


def verdicts(table: Table, results: Results) -> list[str]:
    return [claim.verdict(results) for claim in table.claims]


def test_the_papers_figures() -> None:
    """Spot checks, each against the paper's page."""
    cifar, celeba = paper(ddim.LATENTS, "CIFAR-10"), paper(ddim.LATENTS, "CelebA")
    assert [cifar["0", steps]["FID"] for steps in ddim.STEPS] == [13.36, 6.84, 4.67, 4.16, 4.04]
    assert (cifar["1", "10"]["FID"], cifar["sigma-hat", "10"]["FID"], cifar["sigma-hat", "1000"]["FID"]) == (
        41.07,
        367.43,
        3.17,
    )
    assert (celeba["0.2", "50"]["FID"], celeba["0.5", "100"]["FID"]) == (9.51, 8.09)
    imagenet = paper(guidance.TABLE, "ImageNet 64x64")
    assert imagenet["0.1", "0.1"] == {"FID": 1.55, SCORE: 66.11}
    assert imagenet["0", "0.5"] == {"FID": 2.21, SCORE: 47.61}
    assert imagenet["4", "0.2"] == {"FID": 23.84, SCORE: 248.97}
    assert paper(objectives.TABLE, "CIFAR-10")["cosine", "bound"] == {NLL: 2.94, "FID": 11.47}
    assert paper(objectives.TABLE, "CIFAR-10")["cosine", "hybrid"] == {NLL: 3.17, "FID": 3.19}
    assert paper(objectives.TABLE, "ImageNet 64x64")["linear", "simple"] == {NLL: 3.77, "FID": 31.3}
    assert paper(autoencoders.TABLE, "LDM, KL")["f = 4", autoencoders.WITH] == {RFID: 0.27, PSNR: 27.53}
    assert paper(autoencoders.TABLE, "LDM, KL")["f = 8", autoencoders.WITH] == {RFID: 0.90, PSNR: 24.19}
    assert all(set(each.results) <= set(table.cells) for table in TABLES.values() for each in table.papers)


def test_every_claim_is_one_of_the_papers() -> None:
    """On their own figures the claims hold; CIFAR-10's FID is the one that prefers the linear schedule."""
    found = {(name, each.name): verdicts(t, each.results) for name, t in TABLES.items() for each in t.papers}
    assert found == {
        ("ddim", "CIFAR-10"): ["yes"] * 5 + ["-"] * 5,
        ("ddim", "CelebA"): ["yes"] * 5 + ["-"] * 5,
        ("ddim-pixels", "CIFAR-10"): ["yes"] * 5,
        ("ddim-pixels", "CelebA"): ["yes"] * 5,
        ("guidance", "ImageNet 64x64"): ["yes", "yes", "yes", "yes", "-", "-"],
        ("guidance-small", "ImageNet 64x64"): ["yes", "yes", "yes", "yes", "-", "-"],
        ("objectives", "ImageNet 64x64"): ["yes"] * 5,
        ("objectives", "CIFAR-10"): ["yes", "yes", "yes", "yes", "no"],
        ("autoencoders", "LDM, KL"): ["yes", "yes", "-", "-"],
        ("autoencoders", "VQGAN, dVAE"): ["-", "-", "yes", "-"],
    }


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_claims_of_nothing_are_not_measured(table: Table) -> None:
    assert set(verdicts(table, {})) == {"-"}
    one = {table.cells[0]: dict.fromkeys(table.metrics, 1.0)}
    assert set(verdicts(table, one)) == {"-"}


@pytest.mark.parametrize(
    ("cell", "fid", "expected"),
    [
        (("0", "1000"), 50.0, ["no", "yes", "yes", "yes", "yes"]),
        (("1", "10"), 400.0, ["yes", "yes", "no", "yes", "yes"]),  # two neighbours of five may change places
        (("sigma-hat", "10"), 1.0, ["yes", "no", "no", "no", "yes"]),
        (("sigma-hat", "1000"), 5.0, ["yes", "yes", "yes", "yes", "no"]),
    ],
)
def test_ddim_claims_can_fail(cell: tuple[str, str], fid: float, expected: list[str]) -> None:
    """That of things is made up: the same."""
    results = paper(ddim.LATENTS, "CIFAR-10")
    results[cell] = {"FID": fid}
    assert verdicts(ddim.LATENTS, results) == [*expected, *["-"] * 5]
    for figures in results.values():
        figures[THINGS] = figures["FID"]
    assert verdicts(ddim.LATENTS, results) == [*expected, *expected]


def test_ddim_claims_of_a_part() -> None:
    results = {cell: figures for cell, figures in paper(ddim.LATENTS, "CelebA").items() if cell[1] in ("20", "50")}
    assert verdicts(ddim.LATENTS, results) == ["yes", "yes", "yes", "yes", *["-"] * 6]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({("4", "0.2"): {SCORE: 1.0}, ("3", "0.2"): {SCORE: 2.0}}, ["no", "yes", "yes", "no", "yes", "yes"]),
        ({("0", "0.5"): {"FID": 0.1}}, ["yes", "no", "yes", "yes", "yes", "yes"]),
        ({("2", "0.1"): {"FID": 0.1}}, ["yes", "no", "yes", "yes", "yes", "yes"]),
        ({("4", "0.1"): {"FID": 1.7}}, ["yes", "yes", "no", "yes", "yes", "yes"]),
        ({("1", "0.5"): {SCORE: 165.0}}, ["yes", "yes", "yes", "no", "yes", "yes"]),
        ({("1", "0.2"): {RIGHT: 0.7}}, ["yes", "yes", "yes", "yes", "no", "yes"]),
        ({("0.6", "0.1"): {THINGS: 1.0}}, ["yes", "yes", "yes", "yes", "yes", "no"]),
    ],
)
def test_guidance_claims_can_fail(changes: dict[tuple[str, str], dict[str, float]], expected: list[str]) -> None:
    """What the paper has not is made up: captions as right as the score is high, and things as its FID is."""
    results = paper(guidance.TABLE, "ImageNet 64x64")
    for figures in results.values():
        figures |= {RIGHT: figures[SCORE], THINGS: figures["FID"]}
    for cell, figures in changes.items():
        results[cell] |= figures
    assert verdicts(guidance.TABLE, results) == expected


def test_guidance_claims_of_the_default_model_alone() -> None:
    results = {cell: figures for cell, figures in paper(guidance.TABLE, "ImageNet 64x64").items() if cell[1] == "0.1"}
    assert verdicts(guidance.TABLE, results) == ["yes", "yes", "yes", "-", "-", "-"]


@pytest.mark.parametrize(
    ("cell", "figures", "expected"),
    [
        (("linear", "hybrid"), {NLL: 3.8}, ["no", "yes", "yes", "yes", "yes"]),
        (("cosine", "bound"), {NLL: 3.63}, ["yes", "no", "yes", "yes", "yes"]),
        (("cosine", "bound"), {"FID": 32.0}, ["yes", "yes", "no", "yes", "yes"]),
        (("linear", "simple"), {NLL: 3.67}, ["yes", "yes", "yes", "no", "yes"]),
        (("linear", "hybrid"), {"FID": 27.5}, ["yes", "yes", "yes", "yes", "no"]),
    ],
)
def test_objectives_claims_can_fail(cell: tuple[str, str], figures: dict[str, float], expected: list[str]) -> None:
    results = paper(objectives.TABLE, "ImageNet 64x64")
    results[cell] |= figures
    assert verdicts(objectives.TABLE, results) == expected


def test_autoencoders_claims_can_fail() -> None:
    without, with_ = autoencoders.WITHOUT, autoencoders.WITH
    good = {
        ("f = 4", without): {RFID: 2.0, PSNR: 30.0},
        ("f = 4", with_): {RFID: 1.0, PSNR: 29.0},
        ("f = 8", without): {RFID: 4.0, PSNR: 26.0},
        ("f = 8", with_): {RFID: 3.0, PSNR: 25.0},
    }
    assert verdicts(autoencoders.TABLE, good) == ["yes"] * 4
    worse = {**good, ("f = 8", with_): {RFID: 0.5, PSNR: 29.5}}
    assert verdicts(autoencoders.TABLE, worse) == ["no", "no", "yes", "no"]
    assert verdicts(autoencoders.TABLE, {**good, ("f = 4", with_): {RFID: 2.5, PSNR: 29.0}})[2] == "no"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0], True),
        ([2.0, 1.0], False),
        ([1.0, 3.0, 2.0], False),
        ([1.0, 2.0, 4.0, 3.0], False),
        ([1.0, 2.0, 4.0, 3.0, 5.0], True),
        ([1.0, 4.0, 2.0, 3.0, 5.0], False),
    ],
)
def test_rises_by_rank(values: list[float], expected: bool) -> None:
    from scipy.stats import spearmanr

    assert rises(values) == falls(values[::-1]) == falls([-value for value in values]) == expected
    assert (spearmanr(values, range(len(values))).statistic >= 0.9 - 1e-9) == expected


def test_along_a_row_or_column() -> None:
    results = {("a", "1"): {"m": 1.0}, ("a", "2"): {"m": 2.0}, ("b", "1"): {"m": 3.0}, ("b", "2"): {"n": 4.0}}
    assert along(results, "m", row="a") == [1.0, 2.0]
    assert along(results, "m", column="1") == [1.0, 3.0]
    assert along(results, "m") == [1.0, 2.0, 3.0]
    with pytest.raises(KeyError):
        along(results, "m", row="b")


def test_the_judge_s_kind_is_that_of_its_surest_thing() -> None:
    images = measure.real_pictures(6, 64, seed=7).images
    logits = measure.kind_logits(images)
    readings = load_judge().read(images)
    from judge import KINDS

    for row, reading in zip(logits, readings, strict=True):
        assert KINDS[int(row.argmax())] in {thing.kind for thing in reading.things}


def test_real_pictures_are_read_at_any_size() -> None:
    assert measure.fid(measure.real_pictures(4, 64, measure.REAL).images) == pytest.approx(0, abs=1e-3)
    assert measure.real_against_real(4, 64)[0] > 0.1
    small = measure.real_pictures(4, 32, measure.REAL)
    assert small.images.shape == (4, 3, 32, 32)
    assert measure.features(small.images).shape == measure.features(measure.real_pictures(4, 64, 1).images).shape
    assert measure.fid(small.images) == pytest.approx(0, abs=1e-3)


def test_sigma_hat_is_the_larger_variance() -> None:
    """One step of each sampler from the same x: the same mean, and the noise of Song et al. 2020, eq. 16."""
    from ldm.denoiser import Estimate

    schedule = NoiseSchedule("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)
    times = torch.tensor([700.0, 500.0], dtype=torch.float64)
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def step(eta: str, noise: float) -> torch.Tensor:
        denoise = lambda x_t, t: Estimate(0.3 * x_t)  # noqa: E731
        return ddim.sampler(eta)(denoise, x, schedule, times, randn=lambda shape: torch.full(shape, noise))

    (a_t, s_t), (a_s, s_s) = (tuple(map(float, schedule.at(torch.tensor(t)))) for t in (700, 500))
    large = (1 - (a_t / a_s) ** 2) ** 0.5
    for eta, std in (("0", 0.0), ("0.5", 0.5 * s_s / s_t * large), ("1", s_s / s_t * large), ("sigma-hat", large)):
        torch.testing.assert_close(step(eta, 1.0) - step(eta, 0.0), torch.full_like(x, std))
    torch.testing.assert_close(step("sigma-hat", 0.0), step("1", 0.0))


def test_rendering_is_that_of_the_pipeline() -> None:
    pipe = models.default_model()
    captions = measure.real_pictures(2, 64, measure.REAL).captions
    times = pipe.schedule.timesteps(2, "trailing")
    images = models.render(pipe, captions, ddim.sampler("0"), times, scale=2.0)
    expected = pipe(list(captions), num_inference_steps=2, guidance_scale=2.0, sampler="ddim", output_type="pt").images
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(images / 2 + 0.5, expected, atol=0.01, rtol=0)


def made_up(calls: list[tuple[str, str]], **changes: Any) -> Table:
    def count(cell: tuple[str, str], setup: Setup) -> dict[str, float]:
        calls.append(cell)
        return {"m": float(len(calls))}

    table = Table(
        title="Made up",
        rows="row",
        columns="column",
        metrics=("m",),
        cells=(("a", "1"), ("a", "2"), ("b", "1")),
        papers=(Paper("Paper", "Nobody 2000", {("a", "1"): {"m": 7.25}}, "made up"),),
        claims=(Claim("it rises", lambda r: rises(along(r, "m", row="a"))),),
        panels=(lambda axes, results: axes.plot([0, 1]),),
        measure=count,
        seconds=lambda cells, setup: 1800.0 * len(cells),
        size=64,
        pictures=2,
    )
    return replace(table, **changes)


def test_finished_cells_are_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, str]] = []
    table, setup = made_up(calls), Setup(tmp_path, 2, 0)
    files, numbers = run("made", table, setup, columns=["2"])
    assert calls == [("a", "2")]
    assert [file.name for file in files] == ["made.txt", "made.json", "made.png"]
    said = capsys.readouterr()
    assert "notice: made: 1 cells to make, about 0.5 hours" in said.err
    assert "-    yes" not in said.out
    assert numbers["claims"] == {"it rises": {"here": "-", "Paper": "-"}}

    _, numbers = run("made", table, setup)
    assert calls == [("a", "2"), ("a", "1"), ("b", "1")]
    assert numbers["claims"]["it rises"]["here"] == "no"  # 2 at (a, 1), made later, then 1
    assert [(each["row"], each["column"], each["m"]) for each in numbers["figures"]["here"]] == [
        ("a", "1", 2),
        ("a", "2", 1),
        ("b", "1", 3),
    ]
    assert numbers["figures"]["Paper"] == [{"row": "a", "column": "1", "m": 7.25}]

    capsys.readouterr()
    assert run("made", table, setup)[1] == numbers
    assert len(calls) == 3
    assert "to make" not in capsys.readouterr().err
    assert len((tmp_path / "made.jsonl").read_text().splitlines()) == 3

    run("made", table, replace(setup, pictures=3), rows=["b"])
    assert calls[3:] == [("b", "1")]
    run("made", replace(table, weights=(DEFAULT_MODEL / "unet",)), setup, rows=["b"])
    assert len(calls) == 5
    run("made", replace(table, training_steps=9), Setup(tmp_path, 2, 9), rows=["b"])
    assert len(calls) == 6
    capsys.readouterr()


def test_a_table_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("made", made_up([], notes=("A note.",)), Setup(tmp_path, 2, 0), rows=["a"])
    text = capsys.readouterr().out
    assert text == (tmp_path / "made.txt").read_text() + "\n"
    lines = text.splitlines()
    assert lines[:7] == [
        "Made up",
        "",
        "m, here",
        "  row \\ column   1   2",
        "  a              1   2",
        "",
        "m, Paper",
    ]
    assert "  row \\ column      1   2" in lines
    assert "  yes   -      it rises" in lines
    assert "A note." in lines
    assert any("of N = 2 pictures of 64 px" in line and "that of as many other real ones is" in line for line in lines)
    assert "Paper: Nobody 2000. Not to be compared figure by figure: made up." in lines
    with Image.open(tmp_path / "made.png") as image:
        assert image.width == 1600


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    for broken in ('{"row": "a"', "[]", '{"pictures": 2, "weights": "WEIGHTS"}'):
        calls: list[tuple[str, str]] = []
        run("made", made_up(calls), Setup(tmp_path, 2, 0), rows=["b"])
        good = (tmp_path / "made.jsonl").read_text()
        weights = json.loads(good)["weights"]
        (tmp_path / "made.jsonl").write_text(good + broken.replace("WEIGHTS", weights) + "\n")
        with pytest.raises(ValueError, match=r"made.jsonl: line 2 is no finished cell; delete it"):
            run("made", made_up(calls), Setup(tmp_path, 2, 0))
        (tmp_path / "made.jsonl").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tables"], "argument TABLE: invalid choice: 'tables'"),
        ([], "the following arguments are required: TABLE"),
        (["ddim", "--pictures", "1"], "pictures is 1, but FID needs 2"),
        (["ddim", "--pictures", "x"], "argument --pictures: invalid int value: 'x'"),
        (["ddim", "--columns", "30"], "steps: 30 is not in this table; choose from 10, 20, 50, 100, 1000"),
        (["guidance", "--rows", "0", "5"], "w: 5 is not in this table; choose from 0, 0.1"),
        (["guidance", "--rows"], "argument --rows: expected at least one argument"),
        (["objectives", "--training-steps", "0"], "training-steps is 0; give at least 1"),
        (["autoencoders", "--out", "TAKEN"], "taken: File exists"),
        (["ddim", "--training-steps", "3"], "unrecognized arguments: --training-steps 3"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").touch()
    arguments = [str(tmp_path / "taken") if each == "TAKEN" else each for each in arguments]
    if arguments and "--out" not in arguments and arguments[0] in TABLES:
        arguments += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, *arguments)
    said = capsys.readouterr()
    assert left.value.code == 2
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.fixture(scope="module")
def tiny_model(parts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model of tiny random parts, of 32 pixels."""
    torch.manual_seed(0)
    model = Model(
        unet=UNet(UNetConfig(**TINY_UNET)),
        autoencoder=load_autoencoder(parts_folder / "vae"),
        text_encoder=load_text_encoder(parts_folder / "text_encoder"),
        tokenizer=Tokenizer.from_folder(parts_folder / "tokenizer"),
        tokenizer_folder=parts_folder / "tokenizer",
        scheduler=SchedulerConfig(),
        settings=Settings(),
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(folder, model)
    return folder


@pytest.fixture
def tiny(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> None:
    """A tiny default model, two pictures a batch, few steps, and data that are there already."""
    monkeypatch.setattr(models, "DEFAULT_MODEL", tiny_model)
    monkeypatch.setattr(models, "BATCH", 2)
    monkeypatch.setattr(models, "training_data", lambda folder, count, size: data_folder)
    monkeypatch.setattr(guidance, "STEPS", 2)
    monkeypatch.setattr(guidance, "SIDE", 32)
    monkeypatch.setattr(objectives, "STEPS", 2)
    monkeypatch.setattr(objectives, "T", 20)
    monkeypatch.setitem(objectives.SCHEDULES["linear"], "beta_end", 0.5)  # so that T = 20 ends in noise
    monkeypatch.setattr(objectives, "BATCH", 2)


def small_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks the models of pixels."""
    smaller = {
        "text_encoder": str(models.DEFAULT_MODEL),
        "model.block_out_channels": [16, 16, 16],
        "model.attention_head_dim": 2,
        "model.cross_attention_dim": 16,
    }
    settings = objectives.settings
    monkeypatch.setattr(objectives, "settings", lambda cell: {**settings(cell), **smaller})


def made_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: Path, name: str, *arguments: str
) -> dict[str, Any]:
    """The numbers of `reproduce.py NAME`, after a look at what it wrote."""
    forget_accelerator()
    command(monkeypatch, name, "--out", str(out), "--pictures", "2", "--json", *arguments)
    *_, text, table, plot, last = capsys.readouterr().out.splitlines()
    assert [text, table, plot] == [str(out / f"{name}.{kind}") for kind in ("txt", "json", "png")]
    numbers: dict[str, Any] = json.loads(last)
    assert numbers == json.loads(Path(table).read_text())
    assert numbers["pictures"] == 2
    for floor in numbers["real against real"].values():
        assert floor["mean"] > floor["standard deviation"] > 0
    with Image.open(plot) as image:
        assert image.width == 1600
        assert len(image.convert("RGB").getcolors(10**6)) > 50
    return numbers


def test_a_plot_leaves_no_gap_and_no_room_for_a_far_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel of what no paper measured has the row to itself; real against real is drawn where the curves are."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file: figures.append(self))
    ours = {
        (w, "0.1"): {"FID": 2.0 + i, SCORE: 15.0 + i, THINGS: 3.0 + i, RIGHT: 0.8 + i / 10}
        for i, w in enumerate(("0", "1"))
    }
    sources = {"here": ours, "ImageNet 64x64": paper(guidance.TABLE, "ImageNet 64x64")}
    draw(tmp_path / "a.png", guidance.TABLE, Setup(tmp_path, 2, 1), sources, {"FID": 2.5, THINGS: 50.0})
    above, beside, below, nothing = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (above, beside)] == ["here, N = 2", "ImageNet 64x64"]
    spans = [(spec.rowspan, spec.colspan) for axes in (above, below) if (spec := axes.get_subplotspec())]
    assert spans == [(range(1), range(1)), (range(1, 2), range(2))]
    assert not nothing.axison
    assert [len(axes.get_lines()) for axes in (above, below)] == [2, 1]
    assert above.get_lines()[1].get_label() == "real against real"


@pytest.mark.usefixtures("tiny")
def test_ddim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = made_table(monkeypatch, capsys, tmp_path, "ddim", "--columns", "10", "--rows", "0", "1", "sigma-hat")
    assert all(each.keys() == {"row", "column", "FID", THINGS, RIGHT} for each in numbers["figures"]["here"])
    found = {each["row"]: each["FID"] for each in numbers["figures"]["here"]}
    assert list(found) == ["0", "1", "sigma-hat"]
    assert len(set(found.values())) == 3
    assert set(numbers["claims"]["at the fewest steps sigma-hat is worst"].values()) <= {"yes", "no"}


@pytest.mark.usefixtures("tiny")
def test_ddim_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small_pixels(monkeypatch)
    arguments = ("--columns", "10", "20", "--rows", "sigma-hat", "--training-steps", "1")
    numbers = made_table(monkeypatch, capsys, tmp_path, "ddim-pixels", *arguments)
    found = {(each["row"], each["column"]): each["FID"] for each in numbers["figures"]["here"]}
    assert list(found) == [("sigma-hat", "10"), ("sigma-hat", "20")]
    assert (tmp_path / "pixels-linear-simple-1steps" / "finished").exists()


@pytest.mark.usefixtures("tiny")
def test_guidance(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guidance, "DEFAULT_MODEL", tiny_model)
    arguments = ("--rows", "0", "1", "--columns", "0.1", "0.5", "--training-steps", "1")
    numbers = made_table(monkeypatch, capsys, tmp_path, "guidance", *arguments)
    found = {(each["row"], each["column"]): each for each in numbers["figures"]["here"]}
    assert list(found) == [("0", "0.1"), ("0", "0.5"), ("1", "0.1"), ("1", "0.5")]
    assert all(1 <= each[SCORE] <= 2.001 for each in found.values())
    (trained,) = tmp_path.glob("guidance-0.5-1steps-from-*")
    before, after = (load_unet(made / "unet").state_dict() for made in (tiny_model, trained / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("tiny")
def test_guidance_with_small_models(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = {f"model.{name}": value for name, value in TINY_UNET.items()}
    parts = {"autoencoder": str(tiny_model), "text_encoder": str(tiny_model)}
    monkeypatch.setattr(guidance, "SMALL_SETTINGS", {**guidance.SMALL_SETTINGS, **smaller, **parts})
    arguments = ("--rows", "0", "1", "--columns", "0.1", "0.5", "--training-steps", "1")
    numbers = made_table(monkeypatch, capsys, tmp_path, "guidance-small", *arguments)
    assert len(numbers["figures"]["here"]) == 4
    assert len(list(tmp_path.glob("guidance-small-*-1steps-from-*/model"))) == 2  # each share has learned for itself


def test_guidance_trains_and_renders_as_a_cell_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def trained(folder: Path, preset: str, size: int, steps: int, settings: dict[str, Any]) -> Path:
        asked.update(settings, folder=folder.name, preset=preset, steps=steps)
        return DEFAULT_MODEL

    def render(pipe: TextToImagePipeline, captions: tuple[str, ...], *_: Any, scale: float) -> torch.Tensor:
        asked.update(scale=scale, captions=captions)
        return real.images

    real = measure.real_pictures(3, 64, measure.REAL)
    monkeypatch.setattr(guidance, "trained", trained)
    monkeypatch.setattr(guidance, "render", render)
    figures = guidance.measure(("0.3", "0.2"), Setup(tmp_path, 3, 7))
    assert (asked["folder"], asked["preset"], asked["steps"]) == (
        f"guidance-0.2-7steps-from-{fingerprint(*guidance.WEIGHTS)}",
        "own_128_unet",
        7,
    )
    assert (asked["objective.caption_dropout"], asked["init"]) == (0.2, str(DEFAULT_MODEL))
    assert (asked["scale"], asked["captions"]) == (1.3, real.captions)
    assert [figures[name] for name in ("FID", THINGS)] == pytest.approx([0, 0], abs=1e-3)
    assert figures[RIGHT] == 1
    assert models.default_model().own_size == (models.SIDE, models.SIDE)
    asked.clear()
    guidance.measure(("0", "0.1"), Setup(tmp_path, 3, 7))  # the default model itself
    assert asked == {"scale": 1, "captions": real.captions}
    guidance.measure_small(("3", "0.1"), Setup(tmp_path, 3, 7))
    assert asked["folder"] == f"guidance-small-0.1-7steps-from-{fingerprint(*guidance.SMALL_WEIGHTS)}"
    assert (asked["preset"], asked["objective.caption_dropout"], asked["scale"]) == ("picturebook_unet", 0.1, 4)
    assert (asked["autoencoder"], "init" in asked) == (str(DEFAULT_MODEL), False)


@pytest.mark.usefixtures("tiny")
def test_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = objectives.settings
    small_pixels(monkeypatch)
    arguments = ("--rows", "cosine", "--columns", "simple", "bound", "--training-steps", "2")
    numbers = made_table(monkeypatch, capsys, tmp_path, "objectives", *arguments)
    found = {each["column"]: each for each in numbers["figures"]["here"]}
    assert list(found) == ["simple", "bound"]
    assert all(each[NLL] > 0 and each["FID"] > 0 for each in found.values())
    assert numbers["training_steps"] == 2
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "pixels-cosine-bound-2steps" / "model", device="cpu")
    assert pipe.model.scheduler.learns_variance
    assert pipe.own_size == (32, 32)
    linear = settings(("linear", "simple"))
    assert (linear["scheduler.beta_schedule"], linear["model.out_channels"]) == ("linear", 3)


@pytest.mark.usefixtures("tiny")
def test_autoencoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = made_table(monkeypatch, capsys, tmp_path, "autoencoders", "--rows", "f = 8", "--training-steps", "2")
    found = {(each["row"], each["column"]): each for each in numbers["figures"]["here"]}
    assert list(found) == [("f = 8", autoencoders.WITHOUT), ("f = 8", autoencoders.WITH)]
    assert len({each[PSNR] for each in found.values()}) == 2
    assert all(0 < each[PSNR] < 40 and each[RFID] > 0 for each in found.values())
    made = load_autoencoder(tmp_path / "autoencoders-f=8-withdiscriminator-2steps" / "model" / "vae")
    assert made.downsampling_factor == 8


def test_a_trained_model_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = []

    class Script:
        train = staticmethod(partial(trainings.append))

    monkeypatch.setattr(models, "configured", lambda preset, settings: (Script, settings))
    monkeypatch.setattr(models, "write_folder", lambda folder, *_, **__: folder.mkdir())
    for _ in range(2):
        (tmp_path / "one").mkdir(exist_ok=True)
        assert (
            models.trained(tmp_path / "one", "picturebook_ddpm", 32, 50, {"loop.warmup": 1}) == tmp_path / "one/model"
        )
    (settings,) = trainings
    assert settings["loop.warmup"] == 1
    assert (settings["loop.steps"], settings["data.size"], settings["loop.batch_size"]) == (50, 32, models.BATCH)
    assert settings["data.path"] == str(tmp_path / "picturebook-1600-32px")


def test_training_data_are_made_once(tmp_path: Path) -> None:
    data = models.training_data(tmp_path, 2, 32)
    lines = (data / "metadata.jsonl").read_text()
    assert len(lines.splitlines()) == 2
    (data / "metadata.jsonl").write_text("kept")
    assert models.training_data(tmp_path, 2, 32) == data
    assert (data / "metadata.jsonl").read_text() == "kept"
