"""The model inside the package: it renders, opens in diffusers, and is as small as promised."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from pipelines import TextToImagePipeline
from pipelines.cli import main
from pipelines.loading import DEFAULT_MODEL
from pipelines.png import read_record

PROMPT = "a red house under a yellow sun"


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(dtype="float32")


def test_one_command_makes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "house.png"
    assert main(["render", PROMPT, "-o", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(picture)]
    assert "notice" not in err
    record = read_record(picture)
    assert (record["prompt"], record["steps"], record["model"]) == (PROMPT, 20, "default")


def test_unseen_words_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["render", "a red zeppelin", "--steps", "1", "-o", str(tmp_path / "a.png")])
    assert capsys.readouterr().err == "notice: the model never saw these words: zeppelin\n"


def test_latents_are_white(pipe: TextToImagePipeline) -> None:
    latents = pipe([PROMPT, "two blue boats in the ocean"] * 4, output_type="latent").images
    assert isinstance(latents, torch.Tensor)
    assert latents.mean((0, 2, 3)).abs().max() < 0.6
    assert 0.6 < latents.std((0, 2, 3)).min() < latents.std((0, 2, 3)).max() < 1.5


@torch.no_grad()
def test_diffusers_draws_the_same_picture(pipe: TextToImagePipeline) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(DEFAULT_MODEL, torch_dtype=torch.float32)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0, "latents": noise}
    latents = pipe(PROMPT, sampler="ddim", output_type="latent", **settings).images
    assert isinstance(latents, torch.Tensor)
    torch.testing.assert_close(latents, theirs(PROMPT, output_type="latent", **settings).images, atol=1e-3, rtol=0)
    ours = np.asarray(pipe(PROMPT, sampler="ddim", **settings).images[0], dtype=int)  # type: ignore[arg-type]
    other = np.asarray(theirs(PROMPT, **settings).images[0], dtype=int)
    assert (np.abs(ours - other) <= 1).mean() >= 0.999


def test_size_and_card() -> None:
    assert sum(path.stat().st_size for path in DEFAULT_MODEL.rglob("*") if path.is_file()) < 60_000_000
    for name in ("README.md", "sheet.png", "ldm.json"):
        assert (DEFAULT_MODEL / name).is_file()
