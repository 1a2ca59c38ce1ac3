"""Each training script, run for two steps, writes what it promises."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cached_encodings
import pytest
import torch
import torch.nn.functional as F
import train_autoencoder
import train_clip
import train_unet
import unet_objective
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import TINY_AUTOENCODER, TINY_CLIP, TINY_UNET, forget_accelerator
from torch import Tensor, nn
from train_autoencoder import AdversaryConfig, AutoencoderTrainingConfig
from train_clip import ClipConfig, ClipTrainingConfig
from unet_training_config import UNetTrainingConfig

from autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    IdentityAutoencoder,
    IdentityAutoencoderConfig,
    VQAutoencoder,
    VQAutoencoderConfig,
)
from ldm.loss import diffusion_loss
from ldm.time_sampling import draw, logit_normal
from ldm.training import randomness
from ldm.training.command_line import parse_config
from ldm.training.data import Batch, CaptionedImages, DataConfig
from ldm.training.loop import LoopConfig, Training, make_accelerator
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.loading import DEFAULT_MODEL, load_autoencoder, load_model, load_unet, save_part
from pipelines.settings import Settings
from text_encoder import Tokenizer

STEPS_AND_GUIDANCE: dict[str, Any] = {"steps": 2, "guidance": 2.0}
STUDENT = {"objective": {"distill_guidance": 3.0}, "settings": {"guidance": 1.0}}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def loop_config(out: Path, **changes: Any) -> LoopConfig:
    defaults = {"steps": 2, "batch_size": 8, "mixed_precision": "no", "log_every": 1, "warmup": 0}
    return LoopConfig(out=str(out), **{**defaults, **changes})


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


TINY_VQ = VQAutoencoderConfig(**{**TINY_AUTOENCODER, "latent_channels": 4, "num_vq_embeddings": 8})


def autoencoder_config(out: Path, data: Path, init: Path | None = None, **loop: Any) -> AutoencoderTrainingConfig:
    return AutoencoderTrainingConfig(
        data=DataConfig(path=str(data), size=32),
        loop=loop_config(out, **loop),
        model=TINY_AUTOENCODER,
        adversary={"start": 0, "warmup": 1, "width": 8},
        init=None if init is None else str(init),
    )


@pytest.fixture(scope="module")
def trained_autoencoder(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    forget_accelerator()
    out = tmp_path_factory.mktemp("autoencoder")
    train_autoencoder.train(autoencoder_config(out, data_folder))
    return out


@pytest.fixture(scope="module")
def trained_clip(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    forget_accelerator()
    out = tmp_path_factory.mktemp("clip")
    train_clip.train(
        ClipTrainingConfig(data=DataConfig(path=str(data_folder), size=32), loop=loop_config(out), model=TINY_CLIP)
    )
    return out


def unet_config(out: Path, data: Path, vae: Path, text: Path, /, **changes: Any) -> UNetTrainingConfig:
    fields: dict[str, Any] = {
        "data": DataConfig(path=str(data), size=32),
        "loop": loop_config(out),
        "autoencoder": str(vae / "model"),
        "text_encoder": str(text / "model"),
        "model": TINY_UNET,
        "scheduler": ZERO_SNR,
        "objective": {"min_snr_gamma": 5, "caption_dropout": 0.5},
        "settings": STEPS_AND_GUIDANCE,
    }
    return UNetTrainingConfig(**{**fields, **changes})


@pytest.fixture(scope="module")
def trained_unet(
    data_folder: Path, trained_autoencoder: Path, trained_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    forget_accelerator()
    out = tmp_path_factory.mktemp("unet")
    train_unet.train(unet_config(out, data_folder, trained_autoencoder, trained_clip))
    return out


def test_autoencoder_writes_a_whitened_vae(trained_autoencoder: Path, data_folder: Path) -> None:
    first, second = log_of(trained_autoencoder)
    assert {"loss", "kl", "psnr", "discriminator", "real", "fake", "gradient_norm"} <= first.keys()
    assert {"adversarial", "adversarial_weight"} & first.keys() == set()  # it learns for one step, then has a say
    assert {"adversarial", "adversarial_weight", "discriminator"} <= second.keys()
    assert (trained_autoencoder / "samples" / "00000002.png").exists()

    autoencoder = load_autoencoder(trained_autoencoder / "model" / "vae")
    assert autoencoder.config.scaling_factor == 1.0
    images = CaptionedImages(DataConfig(path=str(data_folder), size=32), seed=0).images(0, 16)
    with torch.no_grad():
        posterior = autoencoder.posterior(images)
        samples = torch.stack([posterior.sample(torch.randn_like(posterior.mean)) for _ in range(20)])
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(samples.std((0, 1, 3, 4)), torch.ones(4), atol=0.02, rtol=0)


def test_a_vq_autoencoder_trains_a_model_that_renders(trained_clip: Path, data_folder: Path, tmp_path: Path) -> None:
    config = autoencoder_config(tmp_path / "vq", data_folder)
    train_autoencoder.train(config.model_copy(update={"vq": TINY_VQ}))
    assert {"codebook", "perplexity", "discriminator"} <= log_of(tmp_path / "vq")[-1].keys()
    assert isinstance(load_autoencoder(tmp_path / "vq/model/vae"), VQAutoencoder)
    forget_accelerator()
    train_unet.train(unet_config(tmp_path / "unet", data_folder, tmp_path / "vq", trained_clip))
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "unet/model", device="cpu", dtype="float32")
    assert pipe("a red house").images[0].size == (32, 32)


def test_autoencoder_goes_on_from_another(trained_autoencoder: Path, data_folder: Path, tmp_path: Path) -> None:
    """At a learning rate of next to nothing the pictures stay; the latents are whitened already."""
    init = trained_autoencoder / "model"
    train_autoencoder.train(autoencoder_config(tmp_path, data_folder, init, steps=1, learning_rate=1e-12))
    images = CaptionedImages(DataConfig(path=str(data_folder), size=32), seed=0).images(0, 2)
    before, after = load_autoencoder(init / "vae"), load_autoencoder(tmp_path / "model" / "vae")
    with torch.no_grad():
        torch.testing.assert_close(after.encode(images), before.encode(images), atol=1e-2, rtol=1e-2)
        decoded = before.decode(before.encode(images))
        torch.testing.assert_close(after.decode(after.encode(images)), decoded, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_a_decoder_trained_alone_leaves_the_latents_as_they_are(
    exact: bool, trained_unet: Path, data_folder: Path, tmp_path: Path
) -> None:
    """And the whole model that it came from is written with it, where it came from one."""
    init, whole = tmp_path / "init", tmp_path / "whole"
    shutil.copytree(trained_unet / "model", init)
    scaled = json.loads((init / "vae" / "config.json").read_text()) | {"scaling_factor": 0.5}
    (init / "vae" / "config.json").write_text(json.dumps(scaled))
    scored = json.loads((init / "ldm.json").read_text()) | {"scores": {"accuracy": 1}}
    (init / "ldm.json").write_text(json.dumps(scored))
    if exact:
        weights = init / "vae" / "diffusion_pytorch_model.safetensors"
        save_file(
            {name: torch.randn_like(w, dtype=torch.float32) / 10 for name, w in load_file(weights).items()}, weights
        )
    config = autoencoder_config(whole, data_folder, init, steps=3, learning_rate=1e-2)
    train_autoencoder.train(config.model_copy(update={"decoder_only": True}))
    before, after = (load_file(f / "vae/diffusion_pytorch_model.safetensors") for f in (init, whole / "model"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert load_autoencoder(whole / "model" / "vae").config.scaling_factor == 0.5
    assert json.loads((whole / "model" / "ldm.json").read_text())["scores"] == {}
    kept = "unet/diffusion_pytorch_model.safetensors"
    assert (whole / "model" / kept).read_bytes() == (init / kept).read_bytes()

    forget_accelerator()
    part = tmp_path / "part"
    (init / "model_index.json").unlink()
    train_autoencoder.train(config.model_copy(update={"decoder_only": True, "loop": loop_config(part, steps=1)}))
    assert [folder.name for folder in (part / "model").iterdir()] == ["vae"]


@pytest.mark.parametrize("vq", [False, True])
def test_a_decoder_trained_alone_is_shaped_and_sized_as_its_init(vq: bool, data_folder: Path, tmp_path: Path) -> None:
    init, out = tmp_path / "init", tmp_path / "out"
    shape: dict[str, Any] = {**TINY_AUTOENCODER, "sample_size": 48}
    made = VQAutoencoder(VQAutoencoderConfig(**shape)) if vq else Autoencoder(AutoencoderConfig(**shape))
    save_part(init / "vae", made)
    said = ["--data.path", str(data_folder), "--loop.out", str(out), "--init", str(init)]
    few = ["--loop.steps", "1", "--loop.batch_size", "2", "--loop.mixed_precision", "no"]
    config = parse_config(AutoencoderTrainingConfig, "", [*said, *few, "--decoder_only", "true"])
    assert (config.vq or config.model) == made.config
    assert config.data.size == 48
    train_autoencoder.train(config)
    assert load_autoencoder(out / "model" / "vae").config == made.config

    section, other = ("vq", "model") if vq else ("model", "vq")
    said += ["--decoder_only", "true", "--data.size", "64"]
    config = parse_config(AutoencoderTrainingConfig, "", [*said, f"--{section}.layers_per_block", "2"])
    assert config.data.size == 64
    with pytest.raises(ValueError, match=rf"has layers_per_block 1, but {section}.layers_per_block is 2: make them"):
        train_autoencoder.make_autoencoder(config)
    config = parse_config(AutoencoderTrainingConfig, "", [*said, f"--{other}.layers_per_block", "1"])
    with pytest.raises(ValueError, match=f"but {other} describes a .*: make them agree"):
        train_autoencoder.make_autoencoder(config)


def test_a_model_of_pixels_has_no_decoder_to_train(tmp_path: Path) -> None:
    save_part(tmp_path / "vae", IdentityAutoencoder(IdentityAutoencoderConfig()))
    with pytest.raises(ValueError, match="is a model of pixels and has no decoder: name another one"):
        AutoencoderTrainingConfig(data={"path": "x"}, loop=loop_config(tmp_path), init=str(tmp_path), decoder_only=True)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_an_autoencoder_for_other_sizes_learns_the_latents_of_its_init(
    levels: int, trained_unet: Path, data_folder: Path, tmp_path: Path
) -> None:
    """So that the whole model, its U-Net unchanged, makes pictures of twice or half the size."""
    init = tmp_path / "init"
    shutil.copytree(trained_unet / "model", init)
    scaled = json.loads((init / "vae" / "config.json").read_text()) | {"scaling_factor": 0.5}
    (init / "vae" / "config.json").write_text(json.dumps(scaled))
    weights = init / "vae" / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    save_file({name: w + torch.randn_like(w) / 10 for name, w in load_file(weights).items()}, weights)
    size = 8 * 2 ** (levels - 1)
    shape = AutoencoderConfig(
        block_out_channels=[8, 8, 8, 16][-levels:],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=size,
    )
    config = autoencoder_config(tmp_path / "out", data_folder, init, steps=60, learning_rate=4e-3, ema_decay=0.5)
    data = DataConfig(path=str(data_folder), size=size)
    other = {"model": shape, "data": data, "latents_weight": 100.0, "adversary": AdversaryConfig()}
    config = config.model_copy(update=other)
    train_autoencoder.train(config)

    apart = [line["latents"] for line in log_of(tmp_path / "out")]
    model, before = load_model(tmp_path / "out" / "model"), load_model(init)
    assert (model.own_size, model.autoencoder.config.scaling_factor) == ((size, size), 0.5)
    images = CaptionedImages(data, seed=0).images(0, 16)
    with torch.no_grad():
        at_its_size = F.interpolate(images, 32, mode="area" if levels > 3 else "bilinear")
        wanted = before.autoencoder.float().encode(at_its_size)
        error = (model.autoencoder.float().encode(images) - wanted).square().mean()
    learned = sum(apart[-5:]) / 5
    assert error < 2 * learned
    if levels == 3:
        assert apart[0] < 1e-5  # it starts as the same
    else:
        assert learned < apart[0] / 2
    kept = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / "model" / kept).read_bytes() == (init / kept).read_bytes()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_neither_side_s_gradients_reach_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = autoencoder_config(tmp_path, tmp_path)
    accelerator = make_accelerator(config.loop)
    torch.manual_seed(0)
    autoencoder = Autoencoder(config.model)
    discriminator = train_autoencoder.PatchDiscriminator(8)
    training = Training(accelerator, config.loop, [], [], lambda batch: {})  # type: ignore[arg-type]
    training.optimizers = [None, None]  # type: ignore[list-item]
    step = train_autoencoder.Step(training, config, autoencoder, discriminator)
    monkeypatch.setattr(train_autoencoder, "apply_gradients", lambda *_: torch.zeros(()))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    batch = Batch(images, ["", ""], [0, 1], [0, 1], step=1)

    reconstruction, values = step._train_autoencoder(batch, images)
    generator_side = gradients(autoencoder)
    assert generator_side.keys() == {name for name, _ in autoencoder.named_parameters()}
    assert gradients(discriminator) == {}
    assert all(parameter.requires_grad for parameter in discriminator.parameters())

    step._train_discriminator(images, reconstruction.detach())
    assert gradients(discriminator).keys() == {name for name, _ in discriminator.named_parameters()}
    assert same(gradients(autoencoder), generator_side)

    autoencoder.zero_grad()
    step._train_autoencoder(Batch(images, ["", ""], [0, 1], [0, 1], step=0), images)
    assert not same(gradients(autoencoder), generator_side)  # the adversary had a say in it
    assert values["adversarial_weight"] > 0


def test_clip_writes_a_text_encoder_and_a_clip(trained_clip: Path, data_folder: Path) -> None:
    import open_clip

    assert [line["step"] for line in log_of(trained_clip)] == [1, 2]
    clip = open_clip.create_model(f"local-dir:{trained_clip / 'clip'}").eval()
    weights = load_file(trained_clip / "clip" / "open_clip_model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in clip.state_dict().items())

    tokenizer = Tokenizer.from_folder(trained_clip / "model" / "tokenizer")
    captions = [json.loads(line)["text"] for line in (data_folder / "metadata.jsonl").read_text().splitlines()]
    tower = train_clip.TextEncoder.from_transformers_config(
        json.loads((trained_clip / "model" / "text_encoder" / "config.json").read_text())
    )
    tower.load_state_dict(load_file(trained_clip / "model" / "text_encoder" / "model.safetensors"))
    ids = tokenizer(captions).ids
    assert (tower.config.num_hidden_layers, tower.config.max_position_embeddings, ids.shape[1]) == (1, 77, 77)

    table = tower.text_model.embeddings.token_embedding.weight
    seen = torch.zeros(len(table), dtype=torch.bool)
    seen[ids.unique()] = True
    assert torch.equal(table.abs().sum(1) > 0, seen)
    longest = int((ids == tokenizer.end_id).int().argmax(1).max()) + 1
    positions = tower.text_model.embeddings.position_embedding.weight
    assert torch.equal(positions.abs().sum(1) > 0, torch.arange(77) < longest)

    with torch.no_grad():  # the penultimate layer through the last norm
        x = clip.token_embedding(ids[:, :longest]) + clip.positional_embedding
        hidden = clip.transformer.resblocks[0](x, attn_mask=clip.attn_mask)
        torch.testing.assert_close(tower(ids[:, :longest]), clip.ln_final(hidden), atol=1e-5, rtol=1e-5)


def test_unet_writes_a_model_that_renders(trained_unet: Path, data_folder: Path) -> None:
    assert [line["step"] for line in log_of(trained_unet)] == [1, 2]
    with Image.open(trained_unet / "samples" / "00000002.png") as sheet:
        assert sheet.width > 8 * 32
    assert len(list(trained_unet.glob("latents-*.safetensors"))) == 1

    pipe = TextToImagePipeline.from_pretrained(trained_unet / "model", device="cpu", dtype="float32")
    (image,) = pipe("a red house", seed=0).images
    assert image.size == (32, 32)
    assert image.tobytes() == pipe("a red house", seed=0).images[0].tobytes()
    assert pipe.schedule.zero_terminal_snr

    settings = json.loads((trained_unet / "model" / "ldm.json").read_text())
    assert (settings["steps"], settings["guidance"]) == (2, 2.0)
    captions = [json.loads(line)["text"] for line in (data_folder / "metadata.jsonl").read_text().splitlines()]
    assert settings["words"] == sorted({word for caption in captions for word in caption.replace(",", "").split()})


def test_what_is_not_said_is_as_in_the_init(trained_unet: Path) -> None:
    init = str(trained_unet / "model")
    said = ["--data.path", "data", "--loop.out", "out", "--init", init]
    model, config = load_model(init), parse_config(UNetTrainingConfig, "", said)
    assert (config.autoencoder, str(config.text_folder)) == (init, init)
    assert (config.model, config.scheduler) == (model.unet.config, model.scheduler)
    assert config.settings == Settings(**STEPS_AND_GUIDANCE)  # whose recipe and words are not this one's

    said += ["--model.transformer_layers_per_block", "2", "--scheduler.timestep_spacing", "linspace"]
    said += ["--settings.guidance", "1", "--autoencoder", "other"]
    config = parse_config(UNetTrainingConfig, "", said)
    assert config.model == model.unet.config.model_copy(update={"transformer_layers_per_block": 2})
    assert config.scheduler == model.scheduler.model_copy(update={"timestep_spacing": "linspace"})
    assert config.settings == Settings(**{**STEPS_AND_GUIDANCE, "guidance": 1})
    assert config.autoencoder == "other"


def test_an_init_of_pixels_goes_on_with_pixels(trained_clip: Path, data_folder: Path, tmp_path: Path) -> None:
    train_unet.train(unet_config(tmp_path, data_folder, tmp_path, trained_clip, autoencoder=None, model={**PIXELS}))
    said = ["--data.path", "data", "--loop.out", "out", "--init", str(tmp_path / "model")]
    assert parse_config(UNetTrainingConfig, "", said).autoencoder is None


@pytest.mark.parametrize("train_text_encoder", [False, True])
@pytest.mark.parametrize("whitened", [False, True])
def test_unet_goes_on_from_another(
    train_text_encoder: bool,
    whitened: bool,
    trained_unet: Path,
    trained_clip: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    """At a learning rate of next to nothing the weights are those of the model that it starts from."""
    out = tmp_path / "out"
    config = unet_config(
        out,
        data_folder,
        trained_unet,
        trained_clip,
        loop=loop_config(out, steps=1, learning_rate=1e-12),
        init=str(trained_unet / "model"),
        train_text_encoder=train_text_encoder,
        whiten_contexts=whitened,
    )
    train_unet.train(config)
    tolerance = 1e-3 if whitened else 1e-6  # float16 rounds otherwise once a weight was unfolded and folded again
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        before, after = (load_file(run / "model" / f"{part}.safetensors") for run in (trained_unet, out))
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[name].float(), after[name].float(), atol=tolerance) for name in before)


@pytest.mark.parametrize("trained", [True, False])
def test_the_text_encoder_learns_only_if_asked(
    trained: bool, trained_autoencoder: Path, trained_clip: Path, data_folder: Path, tmp_path: Path
) -> None:
    config = unet_config(
        tmp_path,
        data_folder,
        trained_autoencoder,
        trained_clip,
        loop=loop_config(tmp_path, steps=5, learning_rate=0.01),
        train_text_encoder=trained,
    )
    train_unet.train(config)
    file = "model/text_encoder/model.safetensors"
    before, after = load_file(trained_clip / file), load_file(tmp_path / file)
    assert same({name: tensor.half() for name, tensor in before.items()}, after) != trained


def test_the_text_encoder_learns_at_its_own_rate(
    trained_unet: Path, trained_clip: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Adam's first step is proportional to the rate, and the U-Net's does not depend on the text encoder's."""

    def stepped(rate: float) -> dict[str, Tensor]:
        out = tmp_path / str(rate)
        config = unet_config(
            out,
            data_folder,
            trained_unet,
            trained_clip,
            loop=loop_config(out, steps=1, learning_rate=0.05),
            init=str(trained_unet / "model"),
            text_encoder_rate=rate,
        )
        train_unet.train(config)
        return load_file(out / "model/text_encoder/model.safetensors") | load_file(out / f"model/{unet}")

    unet, text = "unet/diffusion_pytorch_model.safetensors", "text_model.final_layer_norm.bias"
    start = load_file(trained_unet / "model/text_encoder/model.safetensors")[text].float()
    whole, tenth = stepped(1.0), stepped(0.1)
    moved = (whole[text].float() - start).abs()
    assert moved.mean() > 1e-4
    torch.testing.assert_close((tenth[text].float() - start).abs(), moved / 10, rtol=0.05, atol=1e-5)
    assert all(torch.equal(whole[name], tenth[name]) for name in load_file(trained_unet / f"model/{unet}"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_cached_contexts_change_no_bit(
    precision: str, trained_autoencoder: Path, trained_clip: Path, data_folder: Path, tmp_path: Path
) -> None:
    weights = []
    for cached in (False, True):
        out = tmp_path / str(cached)
        config = unet_config(
            out,
            data_folder,
            trained_autoencoder,
            trained_clip,
            loop=loop_config(out, steps=3, learning_rate=0.01, mixed_precision=precision),
            train_text_encoder=False,
            cache_contexts=cached,
        )
        forget_accelerator()
        train_unet.train(config)
        weights.append(load_file(out / "model/unet/diffusion_pytorch_model.safetensors"))
    assert same(*weights)


PIXELS = {**TINY_UNET, "sample_size": 32, "in_channels": 3, "out_channels": 3}
TWO_TIMES = {"num_train_timesteps": 2, "steps_offset": 0}
LEARNED_VARIANCE = {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2", **TWO_TIMES}


@pytest.mark.parametrize(
    ("model", "scheduler", "objective"),
    [
        (PIXELS, {}, {"caption_dropout": 1.0}),
        ({**PIXELS, "out_channels": 6}, LEARNED_VARIANCE, {"loss": "hybrid"}),
        ({**PIXELS, "out_channels": 6}, LEARNED_VARIANCE, {"loss": "bound", "times": "importance"}),
    ],
    ids=["ddpm", "hybrid", "bound"],
)
def test_a_model_of_pixels_renders(
    model: dict[str, Any],
    scheduler: dict[str, Any],
    objective: dict[str, Any],
    trained_clip: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    config = unet_config(
        tmp_path,
        data_folder,
        tmp_path,
        trained_clip,
        autoencoder=None,
        model=model,
        scheduler=scheduler,
        objective=objective,
        loop=loop_config(tmp_path, steps=4),
        settings={"steps": 2, "guidance": 0.0, "sampler": "ddpm"},
    )
    train_unet.train(config)
    assert len(log_of(tmp_path)) == 4
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert pipe.own_size == (32, 32)
    latents = pipe("a red house", output_type="latent").images
    images = pipe("a red house", output_type="pt").images
    torch.testing.assert_close(images, (latents / 2 + 0.5).clamp(0, 1))


def test_importance_is_remembered_over_a_resume(trained_clip: Path, data_folder: Path, tmp_path: Path) -> None:
    """Two times and eight pictures: after three steps each has ten losses, and draws are no longer uniform."""
    logs = []
    for stops in ([6], [4, 6]):
        out = tmp_path / str(len(stops))
        for stop in stops:
            forget_accelerator()
            config = unet_config(
                out,
                data_folder,
                tmp_path,
                trained_clip,
                autoencoder=None,
                model=PIXELS,
                scheduler=TWO_TIMES,
                objective={"times": "importance"},
                train_text_encoder=False,
                loop=loop_config(out, steps=6, learning_rate=1e-3, minutes=1e-9 if stop < 6 else None, log_every=4),
            )
            train_unet.train(config)
        logs.append(load_file(out / "model/unet/diffusion_pytorch_model.safetensors"))
    assert same(*logs)


@pytest.mark.parametrize(("train_text_encoder", "whitened"), [(True, False), (False, True), (True, True)])
def test_the_loss_on_held_out_pictures_is_logged(
    train_text_encoder: bool,
    whitened: bool,
    trained_autoencoder: Path,
    trained_clip: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    """It is that of the model that was written, also where the U-Net was trained on whitened contexts, and then the
    first line of a training that starts from that model."""

    def trained(out: Path, init: str | None) -> tuple[UNetTrainingConfig, list[dict[str, float]]]:
        config = unet_config(
            tmp_path,
            data_folder,
            trained_autoencoder,
            trained_clip,
            heldout=str(data_folder),
            loop=loop_config(out, steps=4, sample_every=2, learning_rate=1e-2),
            train_text_encoder=train_text_encoder,
            whiten_contexts=whitened,
            init=init,
        )
        train_unet.train(config)
        return config, [line for line in log_of(out) if "heldout_loss" in line]

    config, measured = trained(tmp_path, None)
    assert [line["step"] for line in measured] == [0, 2, 4]
    _, again = trained(tmp_path / "again", str(tmp_path / "model"))
    for name in ("heldout_loss", "heldout_loss_other_caption"):
        learned = abs(measured[-1][name] - measured[0][name])
        assert learned > 1e-4
        assert again[0][name] == pytest.approx(measured[-1][name], abs=0.1 * learned)  # the model is float16 on disk

    model = load_model(tmp_path / "model")
    rows = CaptionedImages(config.data, 0)
    count = len(rows)
    latents = load_autoencoder(trained_autoencoder / "model" / "vae").float().encode(rows.images(0, count))
    t = torch.tensor([int((i + 0.5) * 1000 / count) for i in range(count)])
    eps = randomness.normal(latents.shape[1:], 0, "heldout", 0, range(count))
    captions = rows.captions()
    for name, words in (("heldout_loss", captions), ("heldout_loss_other_caption", captions[-1:] + captions[:-1])):
        context = model.text_encoder.float()(model.tokenizer(words).ids)
        schedule = config.scheduler.make_schedule()
        with torch.no_grad():
            inputs = model.unet.float(), latents, eps, t, context, schedule, config.scheduler.prediction
            losses = diffusion_loss(*inputs, config.objective.min_snr_gamma)
        assert measured[-1][name] == pytest.approx(float(losses.mean()), rel=2e-2)  # the model is float16 on disk


@pytest.mark.parametrize("whitened", [False, True])
def test_a_student_learns_what_its_teacher_does_with_guidance(
    whitened: bool, trained_autoencoder: Path, trained_clip: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Both are the same network at first: what the student loses is what guidance changes."""

    def trained(name: str, **changes: Any) -> list[dict[str, float]]:
        forget_accelerator()
        loop = {"steps": 12, "learning_rate": 2e-2, "sample_every": 12}
        config = unet_config(
            tmp_path / name,
            data_folder,
            trained_autoencoder,
            trained_clip,
            loop=loop_config(tmp_path / name, **loop),
            **changes,
        )
        train_unet.train(config)
        return log_of(tmp_path / name)

    trained("teacher", train_text_encoder=False)
    teacher = tmp_path / "teacher" / "model"
    logged = trained(
        "student",
        init=str(teacher),
        train_text_encoder=False,
        whiten_contexts=whitened,
        heldout=str(data_folder),
        objective={"distill_guidance": 101.0, "caption_dropout": 0.0},
        settings={"guidance": 1.0},
    )
    (measured, *_), (first, *_) = ([line[key] for line in logged if key in line] for key in ("heldout_loss", "loss"))

    model = load_model(teacher)
    rows = CaptionedImages(DataConfig(path=str(data_folder), size=32), 0)
    count = len(rows)
    latents = load_autoencoder(trained_autoencoder / "model" / "vae").float().encode(rows.images(0, count))
    t = torch.tensor([int((i + 0.5) * 1000 / count) for i in range(count)])
    x_t = model.scheduler.make_schedule().add_noise(
        latents, randomness.normal(latents.shape[1:], 0, "heldout", 0, range(count)), t
    )
    with torch.no_grad():
        contexts = [model.text_encoder.float()(model.tokenizer(words).ids) for words in (rows.captions(), [""] * count)]
        told, untold = (model.unet.float()(x_t, t, context) for context in contexts)
    expected = float((100 * (told - untold)).square().mean())
    assert measured == pytest.approx(expected, rel=2e-2)
    assert expected / 5 < first < expected * 5  # of 8 pictures at other times


def test_a_teacher_of_other_noise_is_refused(
    trained_unet: Path, trained_clip: Path, data_folder: Path, tmp_path: Path
) -> None:
    config = unet_config(
        tmp_path,
        data_folder,
        trained_unet,
        trained_clip,
        init=str(trained_unet / "model"),
        train_text_encoder=False,
        **STUDENT,
        scheduler={**ZERO_SNR, "beta_end": 0.5},
    )
    with pytest.raises(ValueError, match=r"has beta_end 0.02, but scheduler.beta_end is 0.5: make them agree"):
        train_unet.train(config)


def test_an_init_may_lack_attention_or_depth_but_be_of_no_other_shape(
    trained_clip: Path, data_folder: Path, tmp_path: Path
) -> None:
    def config(**change: Any) -> UNetTrainingConfig:
        parts = {"autoencoder": None, "model": {**PIXELS, **change}}
        return unet_config(tmp_path, data_folder, tmp_path, trained_clip, **parts)

    def grown_from(trained: Path, **change: Any) -> UNet:
        return train_unet.make_unet(config(**change).model_copy(update={"init": str(trained)}), None)

    train_unet.train(config())
    trained = tmp_path / "model"
    wider = [2 * width for width in PIXELS["block_out_channels"]]
    for change in ({"block_out_channels": wider}, {"attention_head_dim": 1}):
        ((fault, _),) = change.items()
        with pytest.raises(ValueError, match=rf"has {fault} .*, but model.{fault} is .*: make them agree"):
            grown_from(trained, **change)

    (file,) = (trained / "unet").glob("*.safetensors")
    weights = load_file(file)
    for name in weights:
        if name.endswith("proj_out.weight"):  # still near zero, behind which nothing would show
            weights[name] = torch.randn_like(weights[name])
    save_file(weights, file)
    same = load_unet(trained / "unet").float()
    more = {
        "down_block_types": ["CrossAttnDownBlock2D" for _ in wider],
        "up_block_types": ["CrossAttnUpBlock2D" for _ in wider],
    }
    x, context = torch.randn(2, 3, 32, 32), torch.randn(2, 7, PIXELS["cross_attention_dim"])
    for change in (more, {"transformer_layers_per_block": [1] * (len(wider) - 1) + [3]}):
        grown = grown_from(trained, **change)
        assert len(grown.state_dict()) > len(same.state_dict())
        with torch.no_grad():
            before = same(x, torch.tensor([5, 900]), context)
            torch.testing.assert_close(grown(x, torch.tensor([5, 900]), context), before)
    less = {"down_block_types": ["DownBlock2D" for _ in wider]}
    with pytest.raises(ValueError, match=r"has down_block_types .*, but model.down_block_types is .*: make them agree"):
        grown_from(trained, **less)


def test_logit_normal_times_are_drawn_from_it_and_not_weighed(
    trained_clip: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[Tensor] = []
    diffusion_loss = unet_objective.diffusion_loss

    def recorded(*arguments: Any) -> Tensor:
        times.append(arguments[3])
        loss = diffusion_loss(*arguments)
        return loss + (1 - loss).detach()  # 1, with its gradient

    monkeypatch.setattr(unet_objective, "diffusion_loss", recorded)
    config = unet_config(
        tmp_path,
        data_folder,
        tmp_path,
        trained_clip,
        autoencoder=None,
        model=PIXELS,
        objective={"times": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5},
        loop=loop_config(tmp_path, steps=2),
    )
    train_unet.train(config)
    assert [line["loss"] for line in log_of(tmp_path)] == pytest.approx([1, 1])
    probabilities = logit_normal(config.scheduler.make_schedule(), 1.0, 0.5)
    for step, drawn in enumerate(times):
        expected = draw(probabilities, randomness.uniform(config.loop.seed, "t", step, range(len(drawn))))
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": {"loss": "bound", "min_snr_gamma": 5}}, "min_snr_gamma weighs the squared error"),
        ({"objective": {"logit_mean": 1.0}}, "logit_mean is that of logit_normal times, but times is uniform"),
        ({"objective": {"logit_std": 0.5}}, "logit_std is that of logit_normal times, but times is uniform"),
        ({"text_encoder_rate": 0.1, "train_text_encoder": False}, "text_encoder_rate goes with train_text"),
        ({"settings": {"steps": 1001}}, "settings.steps is 1001, but there are 1000 times"),
        ({"settings": {"sampler": "best"}}, "sampler 'best' is unknown"),
        (
            {"scheduler": {}, "settings": {"steps": 1000}},
            "offset 1 puts the first of 1000 times at 1000, but the last time is 999",
        ),
        ({"data": {"path": "x", "flip": True}}, "data.flip mirrors pictures as they are read, but latents"),
        ({"objective": {"distill_guidance": 3}}, "distill_guidance goes with settings.guidance: 1"),
        ({"objective": {"distill_guidance": 3, "loss": "hybrid"}}, "distill_guidance is a loss of its own"),
        ({"objective": {"distill_guidance": 3, "min_snr_gamma": 5}}, "distill_guidance is a loss of its own"),
        ({**STUDENT}, "distill_guidance goes with init"),
        (
            {**STUDENT, "init": str(DEFAULT_MODEL), "model": UNetConfig(**TINY_UNET)},
            "distill_guidance goes with train_text_encoder: f",
        ),
        ({"text_encoder": None}, "text_encoder is missing: name a model folder"),
        ({"init": "nowhere"}, "model nowhere does not exist"),
        ({"scheduler": {"variance_type": "learned_range"}}, "model.out_channels is 4, but must be 8"),
        ({"model": {**TINY_UNET, "out_channels": 8}}, "model.out_channels is 8, but must be 4"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        unet_config(tmp_path, tmp_path, tmp_path, tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": {"path": "x", "size": 30}}, "data.size is 30, but must be a multiple of 4, pixels per latent"),
        ({"decoder_only": True}, "decoder_only goes with init: say whose latents to keep"),
        ({"latents_weight": 1.0}, "latents_weight goes with init: say whose latents to keep"),
        ({"init": str(DEFAULT_MODEL), "decoder_only": True, "latents_weight": 1.0, "model": {}}, "leave out latents_w"),
        ({"init": "x", "decoder_only": True}, "x/vae"),
        ({"data": {"path": "x", "size": 20}, "adversary": {"start": 0}}, "the adversary needs pictures of 24 pixels"),
    ],
)
def test_autoencoders_that_cannot_be_trained(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"data": {"path": "x", "size": 32}, "loop": loop_config(tmp_path), "model": TINY_AUTOENCODER}
    with pytest.raises(ValueError, match=message):
        AutoencoderTrainingConfig(**{**given, **fields})


def test_an_adversary_that_never_starts_needs_no_pixels(tmp_path: Path) -> None:
    given = {"data": {"path": "x", "size": 8}, "loop": loop_config(tmp_path, steps=5), "model": TINY_AUTOENCODER}
    AutoencoderTrainingConfig(**given)
    AutoencoderTrainingConfig(**given, adversary={"start": 5})
    with pytest.raises(ValueError, match=r"leave out adversary\.start"):
        AutoencoderTrainingConfig(**given, adversary={"start": 4})


def test_the_least_size_of_an_adversary_is_the_discriminator_s() -> None:
    judge = train_autoencoder.PatchDiscriminator(8)
    least = train_autoencoder.LEAST_JUDGED
    assert judge(torch.zeros(1, 3, least, least)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        judge(torch.zeros(1, 3, least - 1, least - 1))


def test_a_clip_s_patches_are_no_larger_than_its_pictures(tmp_path: Path) -> None:
    def config(patch: int) -> ClipTrainingConfig:
        return ClipTrainingConfig(
            data={"path": "x", "size": 32}, loop=loop_config(tmp_path), model={**TINY_CLIP, "patch_size": patch}
        )

    config(32)
    with pytest.raises(ValueError, match=r"model.patch_size is 33, but pictures of data.size are 32 pixels wide"):
        config(33)


@pytest.mark.parametrize("side", ["text", "image"])
def test_widths_of_a_clip_are_whole_heads(side: str) -> None:
    with pytest.raises(ValueError, match=f"{side}_width is 20, but must be a multiple of head_width 8"):
        ClipConfig(**{**TINY_CLIP, f"{side}_width": 20})


def test_a_unet_renders_at_the_size_that_it_is_trained_at(
    trained_autoencoder: Path, trained_clip: Path, data_folder: Path, tmp_path: Path
) -> None:
    config = unet_config(
        tmp_path, data_folder, trained_autoencoder, trained_clip, data=DataConfig(path=str(data_folder), size=64)
    )
    with pytest.raises(ValueError, match=r"data.size 64 are 16 cells wide to the U-Net, but model.sample_size is 8"):
        train_unet.train(config)


@pytest.mark.parametrize(
    ("model", "pixels", "message"),
    [
        ({"in_channels": 8, "out_channels": 8}, False, r"latents of .* have 4 channels, but model.in_channels is 8"),
        ({}, True, "pixels have 3 channels, but model.in_channels is 4: make it 3, or name an autoencoder"),
        ({"cross_attention_dim": 24}, False, r"encoder of .* is 16 wide, but model.cross_attention_dim is 24: make"),
    ],
)
def test_a_unet_that_does_not_take_what_it_is_given_is_refused_before_all_is_encoded(
    model: dict[str, Any], pixels: bool, message: str, trained_autoencoder: Path, trained_clip: Path, tmp_path: Path
) -> None:
    changes = {"model": {**TINY_UNET, **model}, **({"autoencoder": None} if pixels else {})}
    config = unet_config(tmp_path, tmp_path / "no data", trained_autoencoder, trained_clip, **changes)
    with pytest.raises(ValueError, match=message):
        train_unet.train(config)


@pytest.mark.parametrize(
    ("stage", "first", "then"),
    [
        ("autoencoder", 2, None),
        ("vq", 2, None),
        ("clip", 2, None),
        ("unet", 2, 1),
        ("unet", 1, 2),
    ],
)
def test_two_processes_train_as_one(
    stage: str,
    first: int,
    then: int | None,
    trained_autoencoder: Path,
    trained_clip: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    """Real ones: the losses of each step are those of a single process, and with them all that led there; also where
    after the first step another number of them goes on."""
    module: Any = {"clip": train_clip, "unet": train_unet}.get(stage, train_autoencoder)
    autoencoder = autoencoder_config(tmp_path, data_folder)
    config: Any = {
        "autoencoder": autoencoder,
        "vq": autoencoder.model_copy(update={"vq": TINY_VQ}),
        "clip": ClipTrainingConfig(data=autoencoder.data, loop=autoencoder.loop, model=TINY_CLIP),
        "unet": unet_config(tmp_path, data_folder, trained_autoencoder, trained_clip),
    }[stage]

    def train(processes: int, name: str, minutes: float | None = None) -> list[dict[str, float]]:
        loop = loop_config(tmp_path / name, steps=3, gradient_accumulation=2, minutes=minutes)
        whole = config.model_copy(update={"loop": loop})
        if processes == 1:
            forget_accelerator()
            module.train(whole)
        else:
            file = tmp_path / f"{name}.yaml"
            file.write_text(whole.model_dump_json(exclude_defaults=True))
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, *launch, module.__file__, "--config", file]
            subprocess.run(command, env=environment, check=True, timeout=300)
        return log_of(tmp_path / name)

    one = train(1, "one")
    two = train(first, "two", None if then is None else 1e-9)
    if then is not None:
        assert [line["step"] for line in two] == [1]
        two = train(then, "two")
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3]
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys()
        for name in alone.keys() - {"images_per_second"}:
            assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name


def test_captions_without_words_end_no_training(trained_clip: Path, data_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data_folder, data)
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(line | {"text": " "}) for line in lines))
    parts = {"autoencoder": None, "model": PIXELS, "loop": loop_config(out, steps=1)}
    train_unet.train(unet_config(out, data, tmp_path, trained_clip, **parts))
    assert (out / "samples" / "00000001.png").is_file()


def test_latents_are_cached_of_one_encoder_alone(trained_autoencoder: Path, data_folder: Path, tmp_path: Path) -> None:
    vae, cache, device = tmp_path / "vae", tmp_path / "cache", torch.device("cpu")
    shutil.copytree(trained_autoencoder / "model" / "vae", vae)
    cache.mkdir()
    images = CaptionedImages(DataConfig(path=str(data_folder), size=32), 0)
    first = cached_encodings.cached_latents(images, vae, cache, device)
    some = cached_encodings.encode_first(3, images, vae, device)
    torch.testing.assert_close(some, first[:3], rtol=1e-2, atol=1e-2)
    original = (vae / "config.json").read_text()
    config = json.loads(original)
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 2.0}))
    second = cached_encodings.cached_latents(images, vae, cache, device)
    torch.testing.assert_close(second[:, :4], 2 * first[:, :4], rtol=1e-2, atol=1e-2)

    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 1e9}))  # beyond float16
    with pytest.raises(ValueError, match="makes latents that are not finite: use another autoencoder"):
        cached_encodings.cached_latents(images, vae, cache, device)
    assert len(list(cache.iterdir())) == 2

    (vae / "config.json").write_text(original)
    (file,) = vae.glob("*.safetensors")
    weights = load_file(file)
    for part, files in (("decoder.conv_in", 2), ("post_quant_conv", 2), ("encoder.conv_in", 3), ("quant_conv", 4)):
        weights[f"{part}.weight"] *= 1.5
        save_file(weights, file)
        cached_encodings.cached_latents(images, vae, cache, device)
        assert len(list(cache.iterdir())) == files, part


def test_contexts_that_go_out_of_date_are_not_cached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache_contexts goes with train_text_encoder: false"):
        unet_config(tmp_path, tmp_path, tmp_path, tmp_path, cache_contexts=True)


@pytest.mark.parametrize("script", [train_autoencoder, train_clip, train_unet])
def test_a_missing_folder_is_one_line(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data.path", str(tmp_path / "nowhere"), "--loop.out", str(tmp_path / "out")]
    arguments += ["--loop.mixed_precision", "no"]
    if script is train_unet:
        arguments += ["--autoencoder", str(tmp_path / "nowhere"), "--text_encoder", str(tmp_path / "nowhere")]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "nowhere" in error[0]


@pytest.mark.parametrize(
    ("stage", "config_class"),
    [
        ("autoencoder", AutoencoderTrainingConfig),
        ("vq", AutoencoderTrainingConfig),
        ("clip", ClipTrainingConfig),
        ("unet", UNetTrainingConfig),
        ("ddpm", UNetTrainingConfig),
        ("iddpm", UNetTrainingConfig),
    ],
)
def test_presets_are_valid(stage: str, config_class: Any) -> None:
    preset = Path(train_unet.__file__).parent / "configs" / f"picturebook_{stage}.yaml"
    config = parse_config(config_class, "", ["--config", str(preset), "--loop.out", "elsewhere"])
    assert isinstance(config, config_class)
    assert (config.data.path, config.loop.out) == ("runs/picturebook", "elsewhere")


CONFIGS = Path(train_unet.__file__).parent / "configs"
STATED = re.compile(r"(\d+(?:\.(\d+))?) M\b")


def header_of(preset: Path) -> str:
    """The comment at its beginning, on one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), preset.read_text().splitlines())
    return " ".join(line.removeprefix("# ") for line in lines)


@pytest.mark.parametrize(
    "preset", [file for file in sorted(CONFIGS.glob("*.yaml")) if STATED.search(header_of(file))], ids=lambda p: p.stem
)
def test_a_preset_says_how_many_parameters_its_network_has(preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parents[1])  # presets name files from there
    header = header_of(preset)
    files = re.findall(r"--config (\S+)", header) or [preset.name]
    arguments = [part for file in files for part in ("--config", str(CONFIGS / file))]
    of_unet = "unet" in preset.stem or "ddpm" in preset.stem
    config: Any = parse_config(UNetTrainingConfig if of_unet else AutoencoderTrainingConfig, "", arguments)
    with torch.device("meta"):
        network: nn.Module
        if of_unet:
            network = UNet(config.model)
        else:
            network = VQAutoencoder(config.vq) if config.vq else Autoencoder(config.model)
    stated = STATED.search(header)
    assert stated is not None
    millions = sum(each.numel() for each in network.parameters()) / 1e6
    assert stated[1] == f"{millions:.{len(stated[2] or '')}f}"


def test_the_student_s_preset_fits_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(train_unet.__file__).parents[1]
    monkeypatch.chdir(root)
    config = parse_config(UNetTrainingConfig, "", ["--config", "scripts/configs/picturebook_student.yaml"])
    assert config.init == config.autoencoder == str(config.text_folder)
    teacher = load_model(config.init)
    assert (config.model, config.scheduler) == (teacher.unet.config, teacher.scheduler)
    assert (config.data.size, config.data.size) == teacher.own_size
    assert config.objective.distill_guidance == teacher.settings.guidance
    assert config.settings.guidance == 1
    train_unet.make_unet(config, None)
