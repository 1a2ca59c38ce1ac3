"""The evaluation from its command line to its result, on a tiny model; and that the default model obeys."""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluate
import picturebook
import pytest
import torch
from evaluation import caption_accuracy, card, exhibits, measurements, metrics, real_pictures, report
from evaluation.feature_networks import open_network
from evaluation.likelihood import bits_per_dimension, bound_in_words
from judge import Detection, Reading
from PIL import Image
from test_feature_networks import open_clip_clip
from tiny_models import TINY_AUTOENCODER, TINY_UNET

from autoencoder import Autoencoder, AutoencoderConfig, IdentityAutoencoder, IdentityAutoencoderConfig
from ldm.pictures import as_tensor
from ldm.unet import UNet
from pipelines import TextToImagePipeline
from pipelines.loading import Model, load_model, save_model
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer

Run = Callable[..., dict[str, Any]]
SCHEDULER = SchedulerConfig(num_train_timesteps=20, beta_schedule="scaled_linear", beta_start=0.01, beta_end=0.3)


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([as_tensor(image) for image in images])


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 20)
    monkeypatch.setattr(metrics, "SET_RESAMPLES", 3)


@pytest.fixture(scope="module")
def tiny(parts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights that makes pictures of 32 pixels."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_folder(parts_folder / "tokenizer")
    text = TextEncoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = Model(
        UNet.from_diffusers_config(TINY_UNET),
        Autoencoder(AutoencoderConfig(**TINY_AUTOENCODER)),
        TextEncoder(text),
        tokenizer,
        parts_folder / "tokenizer",
        SCHEDULER,
        Settings(steps=2, guidance=2),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, model)
    return folder


@pytest.fixture
def run(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script as the command line does, eight prompts by default: the result that it prints."""

    def evaluated(*options: Any, model: Path = tiny) -> dict[str, Any]:
        given = ["evaluate.py", str(model), "--prompts", "8", "--device", "cpu", "--dtype", "float32"]
        monkeypatch.setattr("sys.argv", [*given, *map(str, options)])
        evaluate.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return evaluated


def test_accuracy_counts_a_picture_only_if_all_is_right() -> None:
    scores = [
        {"kind 1": True, "color 1": True},
        {"kind 1": True, "color 1": False},
        {"kind 1": True, "color 1": True, "kind 2": False},
        {"kind 1": True, "color 1": True, "kind 2": True},
    ]
    result = caption_accuracy.accuracy(scores)
    assert result["accuracy"] == 0.5
    assert result["per attribute"] == {"color": 0.75, "kind": round(5 / 6, 4)}
    assert result["per number of attributes"] == {2: [0.5, 2], 3: [0.5, 2]}
    low, high = result["interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert result["per attribute intervals"].keys() == {"color", "kind"}


def test_a_reading_in_words() -> None:
    fish = [Detection("fish", "red", "small", x, 3) for x in (1, 5)]
    boat = Detection("boat", "blue", "big", 9, 9)
    assert caption_accuracy.in_words(Reading("night", (*fish, boat))) == "night: two small red fish, one big blue boat"
    assert caption_accuracy.in_words(Reading("snow", ())) == "snow: nothing"
    many = Reading("snow", (boat,) * 4)
    assert caption_accuracy.in_words(many) == "snow: 4 big blue boats"


def test_psnr_over_the_boxes() -> None:
    scene, image = picturebook.picture(0, 3, size=64)
    real = to_tensor([image])
    inside = torch.zeros(64, 64, dtype=torch.bool)
    for group in scene.things:
        for x0, y0, x1, y1 in group.boxes:
            inside[round(y0) : round(y1), round(x0) : round(x1)] = True
    error = 0.2
    decoded = real + error * inside
    assert measurements.psnr_in_boxes([scene], real, decoded).item() == pytest.approx(
        20 * math.log10(2 / error), abs=0.01
    )
    share = inside.float().mean().item()
    assert metrics.psnr(real, decoded).item() == pytest.approx(
        20 * math.log10(2 / error) - 10 * math.log10(share), abs=0.01
    )


def test_tensor_of_pictures() -> None:
    tensor = to_tensor([Image.new("RGB", (4, 2), (255, 0, 0))])
    assert tensor.shape == (1, 3, 2, 4)
    assert tensor[0, :, 0, 0].tolist() == [1, -1, -1]
    assert torch.equal(measurements.from_pixels(measurements.to_pixels(tensor * 1.5)), tensor)


def test_in_the_picturebook(run: Run, tmp_path: Path) -> None:
    page, sheet, file = tmp_path / "report.html", tmp_path / "sheet.png", tmp_path / "result.json"
    result = run("--guidance", 2, 1, "--report", page, "--sheet", sheet, "--json", file, "--bits", 2)
    assert json.loads(file.read_text()) == result
    assert result["world"] == picturebook.WORLD
    assert (result["seed"], result["pictures"], result["real pictures"], result["size"]) == (evaluate.SEED, 8, 8, 32)
    assert (result["steps"], result["sampler"]) == (2, "ddim")
    assert result["features"]["network"] == "judge"
    assert 0 < result["features"]["variance explained by the background"] <= 1
    assert result["controls"].keys() == {"real pictures", "reconstructions", "another picture's caption", "noise"}
    compared = {f"real against {other}" for other in ("real", "reconstructions", "generated, guidance 2")}
    compared.add("real against generated, guidance 1")
    for name in ("fid", "kid", "precision", "recall"):
        assert result[name]["intervals"].keys() == compared
        for each, (low, high) in result[name]["intervals"].items():
            assert low <= result[name][each] <= high
    assert result["fid"]["feature network"] == "judge.safetensors"
    assert result["inception-style score"]["intervals"].keys() == {
        "real pictures",
        "reconstructions",
        "generated, guidance 2",
        "generated, guidance 1",
    }
    assert "clip score" not in result
    assert result["guidance 2"]["accuracy"] == 0
    assert result["reconstruction psnr"]["intervals"].keys() == {"all pixels", "boxes"}
    assert result["bits per dimension"]["of"] == "bits per latent dimension"
    assert math.isfinite(result["bits per dimension"]["mean"])
    assert result["versions"].keys() >= {"torch", "torchmetrics", "python", "dtype", "device"}
    content = page.read_text(encoding="utf-8")
    assert "http" not in content
    scene = picturebook.picture(0, evaluate.SEED, "heldout", 32)[0]
    assert content.count(scene.text) >= 2  # in the first pictures, and among the failed
    assert content.count("data:image/png") >= 8 + 8 + 2 * 8 + 2 * 8
    assert "read: " in content
    assert sheet.exists()
    assert (tmp_path / "sheet-reconstructions.png").exists()


def test_with_data_of_ones_own(run: Run, data_folder: Path, tmp_path: Path) -> None:
    clip, cache, page = tmp_path / "clip", tmp_path / "cache", tmp_path / "report.html"
    open_clip_clip(clip)
    options = ("--data", data_folder, "--features", f"clip:{clip}", "--cache", cache)
    first = run(*options, "--report", page)
    assert (first["pictures"], first["real pictures"]) == (8, 16)
    assert "world" not in first
    assert "controls" not in first
    assert "inception-style score" not in first
    assert first["clip score"]["intervals"].keys() == {
        "real pictures",
        "real pictures, another's caption",
        "reconstructions",
        "generated, guidance 2",
    }
    assert "open-clip-torch" in first["versions"]
    assert "Best by CLIP score" in page.read_text(encoding="utf-8")
    (stored,) = cache.iterdir()
    assert stored.suffix == ".safetensors"
    assert run(*options) == first  # now out of the cache
    stored.write_bytes(stored.read_bytes()[:100])
    with pytest.raises(SystemExit):  # so it was read
        run(*options)


def test_data_of_ones_own_need_no_other_network_than_the_judge(
    tiny: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", data_folder, "--prompts", 8, "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tiny), *map(str, options)])
    evaluate.main()
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["features"]["network"] == "judge"
    assert result["fid"]["intervals"].keys() >= {"real against reconstructions", "real against generated, guidance 2"}
    assert not {"inception-style score", "controls", "world"} & result.keys()
    assert "classes" not in result["features"]
    assert "notice: the judge's features serve to compare models of this folder alone" in err


def test_the_cache_knows_what_it_is_of(data_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_folder, folder)
    before = real_pictures.from_folder(folder, 8, 32).fingerprint
    assert real_pictures.from_folder(folder, 16, 32).fingerprint == before
    Image.new("RGB", (32, 32)).save(folder / "000003.png")
    assert real_pictures.from_folder(folder, 8, 32).fingerprint != before


def test_pictures_are_those_of_the_pipeline_and_in_order(tiny: Path) -> None:
    """Picture i has seed i and prompt i, whatever is rendered together."""
    pipe = TextToImagePipeline.from_pretrained(tiny, "cpu", "float32")
    real = real_pictures.from_picturebook(10, 5, 32)
    found = measurements.measure(pipe, real, open_network("judge", pipe.device), steps=2)
    pixels = found.generated["guidance 2"]["pixels"]
    for i in (0, 9):
        image = pipe(real.prompts[i], seed=i, num_inference_steps=2, output_type="pt").images
        assert isinstance(image, torch.Tensor)
        assert (pixels[i].float() - 255 * image[0]).abs().max() <= 1
    latents = pipe.autoencoder.encode(real.images(9, 10))
    decoded = pipe.autoencoder.decode(latents).detach()
    assert (found.decoded["pixels"][9].float() - (decoded[0].clamp(-1, 1) + 1) * 127.5).abs().max() <= 1


def test_processes_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each does every n-th block; what all did, in whatever order it comes, is put together by row."""
    import accelerate
    import accelerate.utils

    def work(start: int, stop: int) -> measurements.Rows:
        done.append(start)
        return {"row": torch.arange(start, stop)}

    gathered: list[Any] = []
    done: list[int] = []
    for rank in range(3):
        state = argparse.Namespace(process_index=rank, num_processes=3, is_main_process=rank == 0)
        monkeypatch.setattr(accelerate, "PartialState", lambda state=state: state)

        def gather(own: list[Any]) -> list[Any]:
            gathered.extend(own)
            return gathered if len(done) == 5 else own

        monkeypatch.setattr(accelerate.utils, "gather_object", gather)
        rows = measurements.in_shares(37, work, "work")
    assert done == [0, 24, 8, 32, 16]
    assert rows["row"].tolist() == list(range(37))


def test_bits_of_pixels_are_of_a_probability(tiny: Path) -> None:
    """A model of plain pixels has a bound on 8-bit pictures; black ones cost less than noise."""
    stored = load_model(tiny)
    torch.manual_seed(0)
    pixels = {**TINY_UNET, "sample_size": 32, "in_channels": 3, "out_channels": 3}
    model = Model(
        UNet.from_diffusers_config(pixels),
        IdentityAutoencoder(IdentityAutoencoderConfig()),
        stored.text_encoder,
        stored.tokenizer,
        stored.tokenizer_folder,
        SCHEDULER,
    )
    pipe = TextToImagePipeline(model, "cpu", "float32")
    images = to_tensor([Image.new("RGB", (32, 32)), Image.effect_noise((32, 32), 90).convert("RGB")])
    both = bits_per_dimension(pipe, images, ["black", "noise"], seed=0)
    one = bits_per_dimension(pipe, images[1:], ["noise"], seed=1)
    assert both[1].item() == pytest.approx(one.item(), rel=1e-4)
    assert (both > 0).all()
    assert bound_in_words(pipe)["of"] == "bits per pixel and colour"


def test_exhibits_show_the_extremes() -> None:
    pixels = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 3, 16, 16)
    real = real_pictures.RealPictures(
        tuple(f"prompt {i}" for i in range(30)), 30, 16, lambda i, j: measurements.from_pixels(pixels[i:j]), ""
    )
    worst, best = exhibits.reconstructions(real, pixels, torch.arange(30.0).roll(7))
    assert [card.caption for card in worst.cards[:2]] == ["prompt 7", "prompt 8"]
    assert [card.caption for card in best.cards[:2]] == ["prompt 6", "prompt 5"]
    assert worst.cards[0].pictures[1][0] == "0.0 dB"
    features = torch.arange(30.0)[:, None] * 10
    near, far = exhibits.neighbours(real, pixels, features + torch.arange(30)[:, None].roll(3) * 0.1, features)
    assert near.cards[0].caption == "prompt 3"
    assert far.cards[0].caption == "prompt 2"
    shown = near.cards[0].pictures
    assert [label for label, _ in shown] == ["generated", "nearest real"]
    assert shown[0][1].getpixel((0, 0)) == shown[1][1].getpixel((0, 0)) == (3, 3, 3)


def test_exhibits_show_what_the_judge_read() -> None:
    nothing = Reading("snow", ())
    scores = [{"kind 1": True}, {"kind 1": False, "color 1": False}, {"kind 1": False, "color 1": True}]
    readings = caption_accuracy.Readings([nothing] * 3, scores)
    pixels, prompts = torch.zeros(3, 3, 16, 16, dtype=torch.uint8), ("a", "b", "c")
    right, narrowly, _ = exhibits.read_by_the_judge(prompts, pixels, readings)
    assert "1 of 3" in right.title
    assert [card.caption for card in right.cards] == ["a"]
    assert [card.caption for card in narrowly.cards] == ["c", "b"]
    assert narrowly.cards[1].notes == ("read: snow: nothing", "wrong: kind 1, color 1")
    misread = exhibits.misread("Real pictures", "", prompts, pixels, readings)
    assert "2 of 3" in misread.title
    assert [card.caption for card in misread.cards] == ["b", "c"]


def fails(run: Run, capsys: pytest.CaptureFixture[str], *options: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", 7), "--prompts is 7; give at least 8"),
        (("--bits", 9), "--bits is 9; give a number from 0 to the 8 of --prompts"),
        (("--report", "none/report.html"), "folder none does not exist; make it first"),
        (("--json", "none/result.json"), "folder none does not exist; make it first"),
        (("--report", "."), "--report: . is a folder; give the name of a file in it"),
        (("--json", "."), "--json: . is a folder; give the name of a file in it"),
        (("--sheet", "."), "--sheet . is no name for a picture; give one that ends in .png"),
        (("--sheet", "sheet.foo"), "--sheet sheet.foo is no name for a picture; give one that ends in .png"),
        (("--sheet", "folder.png"), "--sheet: folder.png is a folder; give the name of a file in it"),
        (("--guidance", 3, "nan"), "guidance is nan; give a finite number"),
        (("--data", "x"), "data folder x does not exist"),
        (("--data", "x", "--features", "clip:y", "--seed", 1), "--seed draws picturebook scenes"),
        (("--features", "clip:y"), "folder y does not exist"),
        (("--steps", 0), "steps is 0"),
        (("--sampler", "none"), "sampler 'none'"),
        (("--dtype", "int3"), "dtype 'int3' is unknown"),
    ],
)
def test_bad_options(
    options: tuple[Any, ...],
    message: str,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("it is refused too late")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "measure", measured)
    (tmp_path / "folder.png").mkdir()
    assert message in fails(run, capsys, *options)


def test_the_result_is_printed_before_what_may_not_be_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(evaluate, "write_sheets", full)
    file = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        run("--json", file, "--sheet", tmp_path / "new" / "sheet.png")
    printed = capsys.readouterr()
    assert "error: no space left" in printed.err
    assert json.loads(printed.out) == json.loads(file.read_text())


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def no_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()


def no_pictures(folder: Path) -> None:
    for file in folder.glob("*.png"):
        file.unlink()


def a_picture_less(folder: Path) -> None:
    (folder / "000009.png").unlink()


def an_empty_caption(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[2]["text"] = " "
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def few(folder: Path) -> None:
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(lines[:5]))
    for file in sorted(folder.glob("*.png"))[5:]:
        file.unlink()


def a_broken_picture(folder: Path) -> None:
    (folder / "000003.png").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nothing, "does not exist"),
        (no_metadata, "has no lines in metadata.jsonl"),
        (no_pictures, "captions without pictures"),
        (a_picture_less, "000009.png"),
        (an_empty_caption, "row 2 of"),
        (few, "has 5 pictures with captions, but 8 are asked for: give --prompts 5"),
        (a_broken_picture, "000003.png"),
    ],
)
def test_bad_data(
    spoil: Callable[[Path], None],
    message: str,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    data_folder: Path,
    tmp_path: Path,
) -> None:
    folder, clip = tmp_path / "data", tmp_path / "clip"
    shutil.copytree(data_folder, folder)
    open_clip_clip(clip)
    spoil(folder)
    error = fails(run, capsys, "--data", folder, "--features", f"clip:{clip}")
    assert message in error


def test_scores_are_recorded_in_folders_only(
    run: Run, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, file = tmp_path / "model", tmp_path / "model.safetensors"
    shutil.copytree(tiny, copy)
    (copy / "README.md").write_text(f"# Card\n{card.BEGIN}\nold\n{card.END}\nrest\n")
    result = run("--record", model=copy)
    assert json.loads((copy / "ldm.json").read_text())["scores"] == result
    assert card.score_tables(result) in (copy / "README.md").read_text()
    save_model(file, load_model())
    with pytest.raises(SystemExit):
        run("--record", model=file)
    assert "--record writes into a model folder" in capsys.readouterr().err


def test_the_default_models_card_shows_its_recorded_scores() -> None:
    folder = load_model().folder
    assert folder is not None
    scores = json.loads((folder / "ldm.json").read_text())["scores"]
    assert card.score_tables(scores) in (folder / "README.md").read_text()


def test_the_default_model_draws_what_it_is_told() -> None:
    pipe = TextToImagePipeline.from_pretrained()
    real = real_pictures.from_picturebook(16, 7, pipe.own_size[0])
    network = open_network("judge", pipe.device)
    found = measurements.measure(pipe, real, network)
    result, readings = evaluate.judgements(real, found)
    assert result["controls"]["real pictures"] == 1
    assert result["controls"]["reconstructions"] >= 0.9
    assert result["controls"]["another picture's caption"] == 0
    assert result["controls"]["noise"] == 0
    assert result["guidance 3"]["accuracy"] >= 0.75  # of sixteen; the model card has it of a thousand
    assert report.Gallery in {type(each) for each in exhibits.galleries(real, network, found, readings)}
