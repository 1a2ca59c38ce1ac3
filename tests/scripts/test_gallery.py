"""The gallery's files: what is on them, and what a user may get wrong."""

from pathlib import Path

import gallery
import numpy as np
import picturebook
import pytest
import torch
from PIL import Image
from tiny_models import TINY_UNET

from ldm.samplers import SAMPLERS
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.loading import Model, load_autoencoder, load_text_encoder, save_model
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings
from text_encoder import Tokenizer

PROMPTS = [f"a house, number {letter}" for letter in "abcdefg"]


@pytest.fixture(scope="module")
def model_folder(parts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**TINY_UNET))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    folder = tmp_path_factory.mktemp("gallery") / "model"
    model = Model(
        unet=unet,
        autoencoder=load_autoencoder(parts_folder / "vae"),
        text_encoder=load_text_encoder(parts_folder / "text_encoder"),
        tokenizer=Tokenizer.from_folder(parts_folder / "tokenizer"),
        tokenizer_folder=parts_folder / "tokenizer",
        scheduler=SchedulerConfig(),
        settings=Settings(steps=5, guidance=2.0),
    )
    save_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(model_folder, "cpu", "float32")


def test_one_command_writes_all(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    out = tmp_path / "out"
    arguments = [str(model_folder), "--out", str(out), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["gallery.py", *arguments, "--dtype", "float32"])
    gallery.main()
    names = ["denoising-animated", "denoising", "guidance", "prompts", "samplers"]
    assert capsys.readouterr().out.split() == [str(out / f"{name}.webp") for name in names]
    columns = {"prompts": 6, "guidance": 5, "denoising": 5, "samplers": len(SAMPLERS) // 2}
    rows = {"prompts": 2, "guidance": 3, "denoising": 2, "samplers": 2}
    for name, across in columns.items():
        with Image.open(out / f"{name}.webp") as drawn:
            assert drawn.width == across * (3 * 32 + 8) + 8
            assert rows[name] == (drawn.height - 8) // (3 * 32 + 8 + 14)  # a line of caption or two


def test_an_animation_holds_its_last_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (60 * i, 0, 0)) for i in range(4)]
    gallery.write_animation(tmp_path / "a.webp", frames)
    with Image.open(tmp_path / "a.webp") as animation:
        assert (animation.n_frames, animation.size) == (4, (96, 96))
        for i, milliseconds in enumerate((125, 125, 125, 2000)):
            animation.seek(i)
            animation.load()
            assert animation.info["duration"] == milliseconds
            assert abs(animation.convert("RGB").getpixel((5, 5))[0] - 60 * i) < 6


def test_picture_i_is_that_of_seed_i(pipe: TextToImagePipeline) -> None:
    images = gallery.render(pipe, PROMPTS[:3])
    assert images[2].tobytes() == pipe(PROMPTS[2], seed=2).images[0].tobytes()


def test_denoising_ends_in_the_picture(pipe: TextToImagePipeline) -> None:
    noisy, clean = gallery.watch(pipe, PROMPTS[0])
    assert len(noisy) == len(clean) == 5
    image = np.asarray(pipe(PROMPTS[0], seed=0).images[0], dtype=int)
    for last in (noisy[-1], clean[-1]):  # the last step ends at the estimate
        assert np.abs(np.asarray(last, dtype=int) - image).max() <= 1
    assert np.abs(np.asarray(noisy[0], dtype=int) - image).max() > 1

    images, labels = gallery.strip(noisy, clean)
    assert labels[0] == "step 1 of 5"
    assert labels[-1] == "step 5 of 5: estimate"
    assert images[len(images) // 2 - 1] is noisy[-1]
    assert images[-1] is clean[-1]


def test_prompts_are_held_out_captions_in_order() -> None:
    prompts = gallery.read_prompts(None)
    assert len(prompts) == 24
    assert prompts[5] == picturebook.scene(5, gallery.SEED, "heldout")[0].text


def test_the_scenes_are_those_of_the_evaluation() -> None:
    import evaluate

    assert gallery.SEED == evaluate.SEED


def test_an_empty_file_of_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n \n")
    monkeypatch.setattr("sys.argv", ["gallery.py", "--prompts", str(tmp_path / "prompts.txt")])
    with pytest.raises(SystemExit) as left:
        gallery.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.strip().endswith("prompts.txt has no prompts: write one a line")
