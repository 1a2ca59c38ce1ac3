"""The four commands of the README on a folder of other pictures: check, autoencoder, U-Net, render."""

import json
from pathlib import Path

import check_data
import glyphs
import pytest
import torch
import train_autoencoder
import train_unet
from PIL import Image
from safetensors.torch import load_file
from tiny_models import forget_accelerator
from train_autoencoder import AutoencoderTrainingConfig
from unet_training_config import UNetTrainingConfig

from autoencoder import AutoencoderConfig, VQAutoencoderConfig
from ldm.training.command_line import parse_config
from ldm.unet import UNet
from pipelines import cli
from pipelines.loading import find_model, load_model
from text_encoder import Tokenizer

ROOT = Path(train_unet.__file__).parents[1]
CONFIGS = ROOT / "scripts" / "configs"
FEW = ["--loop.steps", "2", "--loop.batch_size", "2", "--loop.log_every", "1"]


def run(main: object, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    forget_accelerator()
    monkeypatch.chdir(ROOT)  # presets name files from there
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    main()  # type: ignore[operator]


@pytest.mark.parametrize("size", [64, 128])
def test_four_commands(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(tmp_path / "data")
    glyphs.write_folder(Path(data), 32, seed=0, split="train", size=size)
    run(check_data.main, monkeypatch, data)
    assert capsys.readouterr().out.splitlines()[-1] == "32 of 32 pictures can be trained on"

    out = tmp_path / "autoencoder"
    preset = ["--config", str(CONFIGS / f"own_{size}_autoencoder.yaml"), "--data.path", data]
    run(train_autoencoder.main, monkeypatch, *preset, "--loop.out", str(out), *FEW)
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert first["psnr"] > 15  # it goes on from an autoencoder that has learned to see

    unet = tmp_path / "unet"
    preset = ["--config", str(CONFIGS / f"own_{size}_unet.yaml"), "--data.path", data, "--settings.steps", "1"]
    run(train_unet.main, monkeypatch, *preset, "--autoencoder", str(out / "model"), "--loop.out", str(unet), *FEW)

    words = json.loads((unet / "model" / "ldm.json").read_text())["words"]
    assert "letter" in words
    tokenizer = Tokenizer.from_folder(unet / "model" / "tokenizer")
    new = int(tokenizer(["letter"]).ids[0, 1])
    rows = [
        load_file(folder / "text_encoder" / "model.safetensors")["text_model.embeddings.token_embedding.weight"][new]
        for folder in (find_model(None), unet / "model")
    ]
    assert [bool(row.any()) for row in rows] == [False, True]  # the text encoder learns words that it never saw

    picture = tmp_path / "q.png"
    cli.main(["render", "a bold blue letter Q", "--model", str(unet / "model"), "-o", str(picture), "--steps", "1"])
    with Image.open(picture) as rendered:
        assert rendered.size == (size, size)


SIZES = {64: 4, 128: 8, 256: 8}


@pytest.mark.parametrize("size", SIZES)
def test_presets_fit_together(size: int) -> None:
    autoencoder, unet = (
        parse_config(kind, "", ["--config", str(CONFIGS / f"own_{size}_{stage}.yaml")])
        for kind, stage in ((AutoencoderTrainingConfig, "autoencoder"), (UNetTrainingConfig, "unet"))
    )
    factor = autoencoder.model.downsampling_factor
    assert (autoencoder.data.size, unet.data.size, factor) == (size, size, SIZES[size])
    assert (autoencoder.model.sample_size, unet.model.sample_size) == (size, size // factor)
    assert unet.autoencoder == f"{autoencoder.loop.out}/model"
    assert unet.model.in_channels == autoencoder.model.latent_channels
    assert (str(unet.text_folder), unet.train_text_encoder) == ("pipelines/default_model", True)
    width = json.loads((find_model(None) / "text_encoder" / "config.json").read_text())["hidden_size"]
    assert unet.model.cross_attention_dim == width
    with torch.device("meta"):
        UNet(unet.model)


@pytest.mark.parametrize(("size", "preset"), [(64, "picturebook_autoencoder"), (128, "picturebook_autoencoder_128")])
def test_the_smaller_presets_are_shaped_like_the_default_model_that_they_start_from(size: int, preset: str) -> None:
    autoencoder, unet = (
        parse_config(kind, "", ["--config", str(CONFIGS / f"own_{size}_{stage}.yaml")])
        for stage, kind in (("autoencoder", AutoencoderTrainingConfig), ("unet", UNetTrainingConfig))
    )
    default = load_model(None)
    recipe = parse_config(AutoencoderTrainingConfig, "", ["--config", str(CONFIGS / f"{preset}.yaml")])
    assert autoencoder.init == unet.init == "pipelines/default_model"
    assert autoencoder.model == recipe.model
    assert (unet.model, unet.scheduler) == (default.unet.config, default.scheduler)
    assert (unet.settings.steps, unet.settings.guidance) == (default.settings.steps, default.settings.guidance)


def test_an_autoencoder_of_another_shape_is_no_start(parts_folder: Path) -> None:
    parts = {"data": {"path": "data"}, "loop": {"out": "out"}, "init": str(parts_folder)}
    shape = json.loads((parts_folder / "vae" / "config.json").read_text())
    same = AutoencoderConfig(**{k: v for k, v in shape.items() if not k.startswith("_")})
    made = train_autoencoder.make_autoencoder(
        AutoencoderTrainingConfig(**parts, model=same.model_copy(update={"sample_size": 64}))
    )
    weights = load_file(parts_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in made.state_dict().items())
    assert (made.config.scaling_factor, made.config.sample_size) == (1.0, 64)

    other = same.model_copy(update={"layers_per_block": 2})
    with pytest.raises(ValueError, match=r"has layers_per_block 1, but model.layers_per_block is 2: make them agree"):
        train_autoencoder.make_autoencoder(AutoencoderTrainingConfig(**parts, model=other))
    wider = {"block_out_channels": (4, *same.block_out_channels[:-1], 2 * same.block_out_channels[-1])}
    deeper = {"block_out_channels": (4, *same.block_out_channels)}
    for change, decoder_only in ((wider, False), (deeper, True)):
        blocks = {
            name: (getattr(same, name)[0], *getattr(same, name)) for name in ("down_block_types", "up_block_types")
        }
        other = same.model_copy(update={**blocks, **change})
        with pytest.raises(
            ValueError, match=r"has block_out_channels .*, but model.block_out_channels is \(4, .*agree"
        ):
            train_autoencoder.make_autoencoder(
                AutoencoderTrainingConfig(**parts, model=other, decoder_only=decoder_only)
            )
    with pytest.raises(ValueError, match=r"has a Autoencoder, but vq describes a VQAutoencoder: make them agree"):
        train_autoencoder.make_autoencoder(AutoencoderTrainingConfig(**parts, vq=VQAutoencoderConfig()))
