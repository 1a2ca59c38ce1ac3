"""Single files against diffusers' own converters, back again, and with everything wrong that can be."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from published_models import FAMILIES, make_published_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from autoencoder import Autoencoder, IdentityAutoencoder, VQAutoencoder, VQAutoencoderConfig
from autoencoder.identity import IdentityAutoencoderConfig
from ldm.unet import UNet
from pipelines import TextToImagePipeline, loading
from pipelines.convert import convert
from pipelines.families import PUBLISHED, PUBLISHED_SCHEDULER, configs_from_shapes, differences
from pipelines.inspection import inspect_model
from pipelines.key_map import ema_name, from_single_file, to_single_file
from pipelines.prediction_type import checked, find_prediction_type, share_of_input
from pipelines.weights import on_meta
from text_encoder import TextEncoder
from text_encoder.clip import from_open_clip

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
FIRST = UNET + "input_blocks.0.0.weight"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read-only: a folder of each family as diffusers saves it."""
    root = tmp_path_factory.mktemp("published")
    return {family: make_published_folder(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path]) -> dict[str, Path]:
    """Read-only: the same as single files."""
    made = {family: folder.with_suffix(".safetensors") for family, folder in folders.items()}
    for family, file in made.items():
        convert(folders[family], file)
    return made


@pytest.fixture(scope="module")
def tiny(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: the smallest model as a single file."""
    file = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    convert(model_folder, file)
    return file


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[dict[str, Tensor]], Any] = lambda _: None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Another file of the same tensors, changed; with no metadata unless given."""
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target, metadata)
    return target


def as_published(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any] = lambda _: None) -> Path:
    """The same file as others would have saved it: without metadata or marker keys."""

    def strip(tensors: dict[str, Tensor]) -> None:
        tensors.pop("v_pred", None)
        change(tensors)

    return rewrite(source, target, strip)


def refusal(file: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        loading.load_model(file, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def stored_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {part: load_file(folder / part / f"{stem}.safetensors") for part, stem in WEIGHTS.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_converters_read_the_same_weights(
    folders: dict[str, Path], files: dict[str, Path], family: str
) -> None:
    checkpoint, expected = load_file(files[family]), stored_weights(folders[family])
    unet = UNet2DConditionModel.load_config(folders[family] / "unet")
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), unet)
    assert same_bits(theirs, expected["unet"])
    vae = AutoencoderKL.load_config(folders[family] / "vae")
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(checkpoint), vae)
    assert same_bits(theirs, expected["vae"])
    if family == "1":
        theirs = single_file_utils.convert_ldm_clip_checkpoint(checkpoint)
    else:
        tower = CLIPTextModel.from_pretrained(folders[family] / "text_encoder")
        theirs = single_file_utils.convert_open_clip_checkpoint(tower, checkpoint)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    assert same_bits(bare, {name.removeprefix("text_model."): t for name, t in expected["text_encoder"].items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_file(folders: dict[str, Path], files: dict[str, Path], family: str) -> None:
    pipe = StableDiffusionPipeline.from_single_file(
        files[family], config=str(folders[family]), local_files_only=True, torch_dtype=torch.float32
    )
    expected = stored_weights(folders[family])
    assert same_bits(dict(pipe.unet.state_dict()), expected["unet"])
    assert same_bits(dict(pipe.vae.state_dict()), expected["vae"])


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_nothing_changes(
    folders: dict[str, Path], files: dict[str, Path], tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, back = folders[family], tmp_path / "back"
    convert(files[family], back)
    for part, weights in stored_weights(folder).items():
        read = load_file(back / part / f"{WEIGHTS[part]}.safetensors")
        prefix = "text_model." if part == "text_encoder" else ""
        assert same_bits(read, {prefix + name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(back) for path in back.rglob("*") if path.is_file()} == names
    for name in (name for name in names if name.suffix != ".safetensors"):
        assert (back / name).read_bytes() == (folder / name).read_bytes(), name
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 3.0}
    pictures = []
    for source in (folder, files[family], back):
        pipe = TextToImagePipeline.from_pretrained(source, "cpu", "float32")
        pictures.append(pipe("a red house", output_type="pt", **options).images)
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])
    log = capsys.readouterr().err
    kind = {"1": "epsilon", "2": "v_prediction"}[family]
    assert f"{files[family]}: prediction type {kind} (scheduler/scheduler_config.json in its metadata)\n" in log


def test_what_other_programs_look_for(files: dict[str, Path]) -> None:
    first, second = (load_file(files[family]) for family in FAMILIES)
    assert "v_pred" not in first
    assert second["v_pred"].numel() == 0
    assert "ztsnr" not in second
    assert metadata_of(files["1"])["modelspec.prediction_type"] == "epsilon"
    assert metadata_of(files["2"])["modelspec.prediction_type"] == "v"
    assert first[VAE + "encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert CLIP + "transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in first
    assert second[CLIP + "model.transformer.resblocks.22.attn.in_proj_weight"].shape == (192, 64)


def test_the_24th_block_is_there_and_changes_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["2"])
    tower = {name.removeprefix(CLIP + "model."): t for name, t in tensors.items() if name.startswith(CLIP)}
    assert {name.split(".")[2] for name in tower if name.startswith("transformer.")} == {str(i) for i in range(24)}
    ids = torch.randint(49408, (1, 77), generator=torch.Generator().manual_seed(0))
    contexts = []
    for layers in (23, 24):
        config = loading.load_model(files["2"]).text_encoder.config.model_copy(update={"num_hidden_layers": layers})
        encoder = TextEncoder(config)
        encoder.load_state_dict(from_open_clip(tower, layers))
        contexts.append(encoder(ids))
    assert torch.equal(contexts[0], contexts[1])
    assert loading.read_model(files["2"]).left_out == ()
    published = loading.read_model(as_published(files["2"], tmp_path / "x.safetensors"), prediction="v")
    assert len(published.left_out) == 12
    assert all(name.startswith(f"{CLIP}model.transformer.resblocks.23.") for name in published.left_out)
    assert inspect_model(tmp_path / "x.safetensors", "v").odd_keys == ()


@pytest.mark.parametrize(("published", "kind", "counts"), [(0, "v1", (686, 248, 196)), (1, "v2", (686, 248, 372))])
def test_the_published_sizes(published: int, kind: str, counts: tuple[int, int, int]) -> None:
    """Of the weights' names and shapes alone, which are what diffusers and we tell the family by."""
    configs = PUBLISHED[published]
    modules = on_meta(lambda: (UNet(configs.unet), Autoencoder(configs.vae), TextEncoder(configs.text_encoder)))
    weights = {part: module.state_dict() for part, module in zip(configs._fields, modules, strict=True)}
    assert tuple(len(tensors) for tensors in weights.values()) == counts
    tensors = to_single_file(configs, weights)
    assert single_file_utils.infer_diffusers_model_type(tensors) == kind
    told = configs_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert differences(told, PUBLISHED_SCHEDULER) == []
    assert told.text_encoder == configs.text_encoder.model_copy(update={"projection_dim": (768, 1024)[published]})


@pytest.mark.parametrize("depths", [2, (1, 3, 2, 1), (1, 1, 1, 4)])
def test_the_depth_of_transformers_shows_in_the_names(depths: int | tuple[int, ...]) -> None:
    first = PUBLISHED[0]
    configs = first._replace(unet=first.unet.model_copy(update={"transformer_layers_per_block": depths}))
    modules = on_meta(lambda: (UNet(configs.unet), Autoencoder(configs.vae), TextEncoder(configs.text_encoder)))
    weights = {part: module.state_dict() for part, module in zip(configs._fields, modules, strict=True)}
    tensors = to_single_file(configs, weights)
    told = configs_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert told.unet == configs.unet
    (fault,) = differences(told, PUBLISHED_SCHEDULER)
    assert fault == f"unet.depths is {configs.unet.depths}, not (1, 1, 1, 1)"
    expected = {part: set(names) for part, names in weights.items()}
    back = from_single_file(configs, expected, tensors)
    assert {part: set(names) for part, names in back.items()} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_without_metadata_is_read_as_published(
    folders: dict[str, Path], files: dict[str, Path], tmp_path: Path, family: str
) -> None:
    def add_usual_keys(tensors: dict[str, Tensor]) -> None:
        tensors["alphas_cumprod"] = torch.ones(1000)
        tensors[CLIP + "transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors[CLIP + "model.logit_scale"] = torch.ones(())
        tensors["global_step"] = torch.tensor(int({"1": 840000, "2": 110000}[family]))

    change = add_usual_keys if family == "1" else lambda tensors: tensors.update(global_step=torch.tensor([110000]))
    model = loading.load_model(as_published(files[family], tmp_path / "x.safetensors", change))
    expected = loading.load_model(folders[family])
    process = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    for name in (*process, "set_alpha_to_one", "steps_offset", "timestep_spacing", "rescale_betas_zero_snr"):
        assert getattr(model.scheduler, name) == getattr(expected.scheduler, name)
    assert model.unet.config.heads == {"1": (8,) * 4, "2": (1,) * 4}[family]
    assert model.unet.config.sample_size == {"1": 64, "2": 96}[family]
    assert model.autoencoder.config.scaling_factor == expected.autoencoder.config.scaling_factor
    assert model.tokenizer.pad_id == {"1": 49407, "2": 0}[family]
    ids = expected.tokenizer(["a red house!"]).ids
    assert torch.equal(model.tokenizer(["a red house!"]).ids, ids)
    for ours, theirs in (
        (model.unet, expected.unet),
        (model.autoencoder, expected.autoencoder),
        (model.text_encoder, expected.text_encoder),
    ):
        assert same_bits(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert torch.equal(model.text_encoder(ids), expected.text_encoder(ids))


def test_a_published_file_becomes_a_folder_that_diffusers_loads(files: dict[str, Path], tmp_path: Path) -> None:
    file = as_published(files["2"], tmp_path / "x.safetensors")
    convert(file, tmp_path / "folder", prediction="v")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.tokenizer.pad_token_id == 0
    assert pipe.text_encoder.config.num_hidden_layers == 23


def test_text_keys_without_their_prefix(files: dict[str, Path], tmp_path: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".text_model." in name]:
            tensors[name.replace(".text_model.", ".")] = tensors.pop(name)

    file = as_published(files["1"], tmp_path / "x.safetensors", strip)
    one, two = (loading.load_model(source, prediction="eps").text_encoder for source in (file, files["1"]))
    assert same_bits(dict(one.state_dict()), dict(two.state_dict()))


def test_the_resolution_in_the_metadata(files: dict[str, Path], tmp_path: Path) -> None:
    file = rewrite(files["1"], tmp_path / "x.safetensors", metadata={"modelspec.resolution": "768x768"})
    assert loading.load_model(file, prediction="epsilon").unet.config.sample_size == 96


def never() -> float:
    raise AssertionError("probed without need")


MARK = torch.empty(0)


@pytest.mark.parametrize(
    ("metadata", "tensors", "share", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, {}, None, ("v_prediction", "modelspec.prediction_type in its metadata")),
        ({"modelspec.prediction_type": "epsilon"}, {"v_pred": MARK}, None, ("epsilon", "modelspec")),
        ({"modelspec.prediction_type": "strange"}, {"v_pred": MARK}, None, ("v_prediction", "its key v_pred")),
        ({}, {"ztsnr": MARK, "global_step": torch.tensor(875000)}, None, ("v_prediction", "its key ztsnr")),
        ({}, {"global_step": torch.tensor(875000)}, None, ("epsilon", "its global_step 875000")),
        ({}, {"global_step": torch.tensor([110000])}, None, ("v_prediction", "its global_step 110000")),
        ({}, {"global_step": torch.tensor(12345)}, 0.99, ("epsilon", "probing: 0.99 of the noise comes back")),
        ({}, {"global_step": torch.ones(2)}, 0.07, ("v_prediction", "probing: 0.07 of the noise comes back")),
        ({}, {}, -0.1, ("v_prediction", "probing: -0.10 of the noise comes back")),
    ],
)
def test_what_tells_the_prediction_type(
    metadata: dict[str, str], tensors: dict[str, Tensor], share: float | None, expected: tuple[str, str]
) -> None:
    kind, reason = find_prediction_type(metadata, tensors, never if share is None else lambda: share)
    assert kind == expected[0]
    assert reason.startswith(expected[1])


@pytest.mark.parametrize("share", [0.5, float("nan")])
def test_an_unclear_probe_is_no_guess(share: float) -> None:
    with pytest.raises(ValueError, match=r"nothing tells the prediction type .*say it with --prediction epsilon or v"):
        find_prediction_type({}, {}, lambda: share)


def test_names_of_prediction_types() -> None:
    names = ("eps", "epsilon", "v", "v_prediction", "sample")
    assert [checked(name) for name in names] == ["epsilon", "epsilon", "v_prediction", "v_prediction", "sample"]
    with pytest.raises(ValueError, match="prediction 'noise' is unknown; there are epsilon, sample, v_prediction"):
        checked("noise")


class Perfect(nn.Module):
    """Knows the law of its latents, which are 1 + 0.5 n with independent n, and answers by the posterior mean."""

    config = SimpleNamespace(in_channels=4, out_channels=4, cross_attention_dim=8)

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        alpha, sigma = PUBLISHED_SCHEDULER.make_schedule().at(t.double())
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        x0 = 1 + gain * (x - alpha)
        noise = (x - alpha * x0) / sigma
        return noise.float() if self.kind == "noise" else (alpha * noise - sigma * x0).float()


def test_probing_tells_perfect_networks_and_the_default_model() -> None:
    assert share_of_input(Perfect("noise")) > 0.9  # type: ignore[arg-type]
    assert abs(share_of_input(Perfect("velocity"))) < 0.1  # type: ignore[arg-type]
    default = loading.load_model()
    told = find_prediction_type({}, {}, lambda: share_of_input(default.unet))
    assert told[0] == default.scheduler.prediction_type


@pytest.mark.parametrize("channels", [(9, 4), (4, 8)], ids=["inpainting", "learned variance"])
def test_networks_with_further_channels_are_probed_by_those_of_the_noise(channels: tuple[int, int]) -> None:
    perfect, seen = Perfect("noise"), []

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.append(x)
        return torch.cat([perfect(x[:, :4], t, context), torch.full_like(x[:, :4], 5.0)], dim=1)[:, : channels[1]]

    config = SimpleNamespace(in_channels=channels[0], out_channels=channels[1], cross_attention_dim=8)
    assert share_of_input(SimpleNamespace(config=config, float=lambda: network)) > 0.9  # type: ignore[arg-type]
    mask, masked_picture = seen[0][:, 4:5], seen[0][:, 5:]
    assert (mask == 1).all()
    assert (masked_picture == 0).all()


def test_a_file_that_says_nothing_is_probed(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.single_file.share_of_input", lambda unet: 0.98)
    file = as_published(files["2"], tmp_path / "x.safetensors")
    model = loading.load_model(file)
    assert (model.scheduler.prediction, model.unet.config.sample_size) == ("eps", 64)
    line = f"notice: {file}: prediction type epsilon (probing: 0.98 of the noise comes back at the last time)\n"
    assert capsys.readouterr().err == line
    assert loading.load_model(file, prediction="v_prediction").scheduler.prediction == "v"


def test_a_mark_of_zero_terminal_snr_changes_the_process(files: dict[str, Path], tmp_path: Path) -> None:
    file = as_published(files["2"], tmp_path / "x.safetensors", lambda tensors: tensors.update(ztsnr=MARK))
    scheduler = loading.load_model(file).scheduler
    assert (scheduler.prediction, scheduler.rescale_betas_zero_snr, scheduler.timestep_spacing) == (
        *("v", True, "trailing"),
    )
    assert not loading.load_model(file, prediction="epsilon").scheduler.rescale_betas_zero_snr


def test_the_prediction_that_is_asked_for_goes_first(model_folder: Path, tiny: Path) -> None:
    for source in (model_folder, tiny):
        assert loading.load_model(source, prediction="v").scheduler.prediction == "v"
        assert loading.read_model(source, prediction="v").prediction_reason == "asked for"


def with_average(tensors: dict[str, Tensor]) -> None:
    tensors.update({ema_name(name): tensor + 1 for name, tensor in tensors.items() if name.startswith(UNET)})


def test_the_moving_average(model_folder: Path, tiny: Path, tmp_path: Path) -> None:
    metadata = metadata_of(tiny)
    file = rewrite(tiny, tmp_path / "x.safetensors", with_average, metadata)
    assert "model_ema.diffusion_modelinput_blocks00weight" in load_file(file)
    plain, average = (loading.load_model(file, ema=ema) for ema in (False, True))
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(average.unet.state_dict()[name], plain.unet.state_dict()[name] + 1)
    assert torch.equal(next(average.autoencoder.parameters()), next(plain.autoencoder.parameters()))
    theirs = single_file_utils.convert_ldm_unet_checkpoint(
        load_file(file), UNet2DConditionModel.load_config(model_folder / "unet"), extract_ema=True
    )
    assert same_bits(dict(average.unet.state_dict()), theirs)
    assert "has no moving average of the U-Net (model_ema." in refusal(tiny, ema=True)
    assert "holds one set of weights only; leave out --ema" in refusal(model_folder, ema=True)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_read_only_if_asked_for_and_never_run(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(files["2"]).items() if name != "v_pred"}
    for zipped in (True, False):
        file = tmp_path / "x.ckpt"
        torch.save({"state_dict": tensors, "global_step": 875000}, file, _use_new_zipfile_serialization=zipped)
        assert "is a pickle, which can run code; render and convert read nothing but its tensors" in refusal(file)
        stored = loading.read_model(file, allow_pickle=True)
        assert stored.prediction_reason == "its global_step 875000"
        assert same_bits(dict(stored.weights["vae"].tensors), stored_weights(files["2"].with_suffix(""))["vae"])
    torch.save({**tensors, "hyper": Canary(tmp_path / "canary")}, file)
    assert "holds more than tensors and numbers, which could run code" in refusal(file, allow_pickle=True)
    file.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert "could run code" in refusal(file, allow_pickle=True)
    assert not (tmp_path / "canary").exists()
    torch.save([1], file)
    assert "holds no dictionary of tensors" in refusal(file, allow_pickle=True)
    torch.save({"state_dict": torch.zeros(1)}, file)
    assert "holds no dictionary of tensors" in refusal(file, allow_pickle=True)
    torch.save({1: torch.zeros(1)}, file)
    assert str(file) in refusal(file, allow_pickle=True)
    for content in (b"", b"PK\x03\x04", bytes(range(256))):
        file.write_bytes(content)
        assert str(file) in refusal(file, allow_pickle=True)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
        (UNET + "label_emb.0.0.weight", "Stable Diffusion XL"),
        (UNET + "joint_blocks.0.context_block.adaLN_modulation.1.bias", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        (UNET + "double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("depth_model.model.pretrained.cls_token", "a depth-to-image model"),
        ("low_scale_model.betas", "an upscaler"),
    ],
)
def test_other_families_are_named(tmp_path: Path, key: str, family: str) -> None:
    save_file({FIRST: torch.ones(4, 4, 3, 3), key: torch.ones(1)}, tmp_path / "x.safetensors")
    assert refusal(tmp_path / "x.safetensors") == (
        f"{tmp_path / 'x.safetensors'}: this is {family} (it holds {key});"
        " only Stable Diffusion 1.x and 2.x are supported"
    )


@pytest.mark.parametrize(("channels", "family"), [(5, "depth"), (7, "upscaler"), (8, "pix2pix")])
def test_other_families_are_named_by_their_channels(tmp_path: Path, channels: int, family: str) -> None:
    save_file({FIRST: torch.ones(4, channels, 3, 3)}, tmp_path / "x.safetensors")
    assert f"{family}" in refusal(tmp_path / "x.safetensors")
    assert f"(its unet takes {channels} channels)" in refusal(tmp_path / "x.safetensors")


def test_files_that_are_no_checkpoints(folders: dict[str, Path], tmp_path: Path) -> None:
    file = folders["1"] / "unet" / "diffusion_pytorch_model.safetensors"
    assert f"{file}: there is no {FIRST}; this is no whole Stable Diffusion checkpoint" in refusal(file)
    save_file({FIRST: torch.ones(4)}, tmp_path / "x.safetensors")
    assert "tensors have too few dimensions" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        (UNET + "time_embed.0.weight", None, f"lacks {UNET}time_embed.0.weight"),
        (VAE + "quant_conv.weight", None, f"lacks {VAE}quant_conv.weight"),
        (CLIP + "transformer.text_model.encoder.layers.1.mlp.fc2.bias", None, "lacks cond_stage_model.transformer"),
        (UNET + "novelty.weight", torch.ones(1), f"holds the unknown {UNET}novelty.weight"),
        (VAE + "decoder.novelty.weight", torch.ones(1), f"holds the unknown {VAE}decoder.novelty.weight"),
        (UNET + "out.2.bias", torch.ones(5), "does not fit its config: conv_out.bias [5] instead of [4]"),
        (UNET + "out.2.bias", torch.full((4,), torch.nan), "conv_out.bias holds NaN or infinity"),
        (UNET + "out.2.bias", torch.ones(4).int(), "holds what is no usual number: conv_out.bias of torch.int32"),
        (UNET + "out.2.bias", torch.ones(4).to(torch.float8_e4m3fn), "conv_out.bias of torch.float8_e4m3fn"),
    ],
)
def test_tensors_that_are_wrong_are_named(
    tiny: Path, tmp_path: Path, key: str, value: Tensor | None, fault: str
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(key, None)
        tensors.update({} if value is None else {key: value})

    file = rewrite(tiny, tmp_path / "x.safetensors", change, metadata_of(tiny))
    assert (text := refusal(file)).startswith(str(file))
    assert fault in text


TOKENS = CLIP + "transformer.text_model.embeddings.token_embedding.weight"


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        (VAE + "encoder.conv_in.weight", None, f"there is no {VAE}encoder.conv_in.weight"),
        (UNET + "input_blocks.4.0.out_layers.3.weight", torch.ones(33, 64, 3, 3), "block_out_channels.1 is 33"),
        (TOKENS, torch.ones(9, 64), "brings no tokenizer, and its 9 tokens are not CLIP's 49408"),
        (TOKENS, torch.ones(49408, 40), "the number of attention heads of a width of 40 was never published"),
    ],
)
def test_shapes_that_were_never_published_are_named(
    files: dict[str, Path], tmp_path: Path, key: str, value: Tensor | None, fault: str
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(key)
        tensors.update({} if value is None else {key: value})

    file = as_published(files["1"], tmp_path / "x.safetensors", change)
    assert (text := refusal(file)).startswith(str(file))
    assert fault in text


def edited(file: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads(metadata_of(file)["ldm"])
    edit(content)
    return rewrite(file, target, metadata={"ldm": json.dumps(content)})


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda c: c["configs"].pop("vae/config.json"), "lacks in its metadata vae/config.json"),
        (lambda c: c.pop("tokenizer"), "tokenizer/tokenizer_config.json does not exist"),
        (lambda c: c.update(tokenizer=[]), "tokenizer is []: input should be a valid dictionary"),
        (lambda c: c["tokenizer"].update({"../evil": "x"}), "../evil"),
        (lambda c: c["tokenizer"].update({"/tmp/evil": "x"}), "/tmp/evil"),
        (lambda c: c["tokenizer"].update({"tokenizer.json": "{"}), "tokenizer: tokenizer.json cannot be read"),
        (lambda c: c["tokenizer"].update({"tokenizer_config.json": "\ud800"}), "surrogates not allowed"),
        (lambda c: c["configs"]["unet/config.json"].update(act_fn="mish"), "unet/config.json: act_fn is 'mish'"),
        (lambda c: c["configs"]["vae/config.json"].update(latent_channels="x"), "vae/config.json: latent_channels"),
        (lambda c: c["configs"]["text_encoder/config.json"].update(hidden_size=-1), "hidden_size is -1"),
        (lambda c: c["configs"]["model_index.json"].update(unet=["a", "b"]), "model_index.json: unet is ['a', 'b']"),
        (
            lambda c: c["configs"]["model_index.json"].update(vae=["autoencoder", "IdentityAutoencoder"]),
            "its vae is of class IdentityAutoencoder, which only a folder can hold",
        ),
        (
            lambda c: c["configs"]["unet/config.json"].update(class_embed_type="timestep"),
            "single files have no name for class_embedding.linear_1.weight",
        ),
        (
            lambda c: c["configs"]["scheduler/scheduler_config.json"].update(beta_schedule="x"),
            "scheduler_config.json: beta_schedule is 'x'",
        ),
    ],
)
def test_metadata_that_is_wrong_is_named(
    tiny: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    file = edited(tiny, tmp_path / "x.safetensors", edit)
    assert (text := refusal(file)).startswith(str(file))
    assert fault in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", '"x"'])
def test_metadata_that_is_no_object(tiny: Path, tmp_path: Path, content: str) -> None:
    file = rewrite(tiny, tmp_path / "x.safetensors", metadata={"ldm": content})
    assert str(file) in refusal(file)


def test_configs_that_nobody_knows_are_not_kept(tiny: Path, tmp_path: Path) -> None:
    file = edited(tiny, tmp_path / "x.safetensors", lambda c: c["configs"].update({"../evil.json": {}}))
    assert "../evil.json" not in loading.read_model(file).configs


@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{broken", b"\xff" * 64])
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    assert refusal(file).startswith(f"{file} is no intact safetensors file")


def test_truncated_files_are_named(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    for size in (7, 1000, len(content) - 1):
        (tmp_path / "x.safetensors").write_bytes(content[:size])
        assert "is no intact safetensors file" in refusal(tmp_path / "x.safetensors")


def test_headers_that_lie_are_named(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def forged(**changes: Any) -> str:
        lie = json.dumps({**header, FIRST: {**header[FIRST], **changes}}).encode()
        file = tmp_path / "x.safetensors"
        file.write_bytes(len(lie).to_bytes(8, "little") + lie + content[8 + size :])
        return refusal(file)

    assert "no intact safetensors file" in forged(shape=[16, 4, 3, 4])
    assert "no intact safetensors file" in forged(data_offsets=[0, 2**60])
    assert "no intact safetensors file" in forged(dtype="F13")
    assert "does not fit its config: conv_in.weight [16, 36]" in forged(shape=[16, 36])
    assert "holds what is no usual number: conv_in.weight of torch.int32" in forged(dtype="I32")


def test_the_tokenizers_files_go_with_the_tokenizer(tiny: Path) -> None:
    model = loading.load_model(tiny)
    folder = model.tokenizer_folder
    assert (folder / "tokenizer.json").is_file()
    del model
    assert not folder.exists()


@pytest.mark.parametrize(
    "autoencoder",
    [
        IdentityAutoencoder(IdentityAutoencoderConfig(latent_channels=4)),
        VQAutoencoder(VQAutoencoderConfig(latent_channels=4, num_vq_embeddings=16)),
    ],
)
def test_other_autoencoders_need_a_folder(
    folder: Path, tmp_path: Path, autoencoder: IdentityAutoencoder | VQAutoencoder
) -> None:
    model = replace(loading.load_model(folder), autoencoder=autoencoder)
    loading.save_model(tmp_path / "x", model)
    again = loading.load_model(tmp_path / "x").autoencoder
    assert type(again) is type(autoencoder)
    assert same_bits(dict(again.state_dict()), dict(autoencoder.state_dict()))
    fault = f"its vae is of class {loading.CLASS_NAMES[type(autoencoder)][1]}, which only a folder can hold"
    assert inspect_model(tmp_path / "x").unreadable == (f"{tmp_path / 'x'}: {fault}",)
    with pytest.raises(ValueError, match=fault):
        loading.save_model(tmp_path / "x.safetensors", model)
    assert not (tmp_path / "x.safetensors").exists()


def test_attention_at_every_level_of_an_autoencoder(folder: Path, tmp_path: Path) -> None:
    model = loading.load_model(folder)
    levels = len(model.autoencoder.config.block_out_channels)  # type: ignore[union-attr]
    types = {
        "down_block_types": ("AttnDownEncoderBlock2D",) * levels,
        "up_block_types": ("AttnUpDecoderBlock2D",) * levels,
    }
    autoencoder = Autoencoder(model.autoencoder.config.model_copy(update=types))  # type: ignore[arg-type]
    loading.save_model(tmp_path / "x.safetensors", replace(model, autoencoder=autoencoder))
    again = loading.load_model(tmp_path / "x.safetensors").autoencoder
    assert same_bits(dict(again.state_dict()), dict(autoencoder.state_dict()))
    assert f"{VAE}decoder.up.0.attn.1.proj_out.weight" in load_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("family", [0, 1])
def test_inpainting_models_are_published_too(folder: Path, tmp_path: Path, family: int) -> None:
    published = PUBLISHED[family]
    inpainting = published._replace(unet=published.unet.model_copy(update={"in_channels": 9}))
    assert differences(inpainting, PUBLISHED_SCHEDULER) == []
    model = loading.load_model(folder)
    unet = UNet(model.unet.config.model_copy(update={"in_channels": 9}))
    loading.save_model(tmp_path / "x.safetensors", replace(model, unet=unet))
    stored = loading.read_model(tmp_path / "x.safetensors")
    assert stored.configs["model_index.json"]["_class_name"] == "StableDiffusionInpaintPipeline"
    assert loading.build_model(stored).unet.config.in_channels == 9


def test_a_tokenizer_that_is_no_text(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer" / "extra.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"extra.bin: 'utf-8' codec can't decode"):
        convert(folder, tmp_path / "x.safetensors")
    (folder / "tokenizer" / "extra.bin").rename(folder / "tokenizer" / ".hidden")
    (folder / "tokenizer" / ".hidden").write_text("x")
    with pytest.raises(ValueError, match=r"tokenizer: tokenizer.\.hidden"):
        convert(folder, tmp_path / "x.safetensors")
