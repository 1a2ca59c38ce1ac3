import inspect
import json
import math
import os
import pickle
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoencoder import IdentityAutoencoder, IdentityAutoencoderConfig
from ldm.schedule import Spacing
from pipelines import TextToImagePipeline, json_files, loading
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings, words_in
from pipelines.weights import read_safetensors, read_weights

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
UNET = Path("unet") / WEIGHTS["unet"]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    path.unlink()  # the file may be mapped
    save_file(weights, path)


def same_weights(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        loading.load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_parts_of_a_folder(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = loading.load_model(model_folder)
    assert model.source == model.folder == model_folder
    assert model.settings == Settings()
    assert model.scheduler.prediction == "eps"
    assert model.scheduler.make_schedule().alphas_cumprod[0].item() == pytest.approx(1 - 0.00085)
    for part in WEIGHTS:
        stored = load_file(model_folder / part / WEIGHTS[part])
        module = {"unet": model.unet, "vae": model.autoencoder, "text_encoder": model.text_encoder}[part]
        assert len(stored) == len(module.state_dict())
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "missing",
    ["model_index.json", "scheduler/scheduler_config.json", "tokenizer"]
    + [f"{part}/{name}" for part, weights in WEIGHTS.items() for name in ("config.json", weights)],
)
def test_missing_files_are_named(folder: Path, missing: str) -> None:
    path = folder / missing
    path.rename(folder / "elsewhere")
    assert path.name in refusal(folder)


def test_sources_that_are_no_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none does not exist; give a Stable Diffusion folder, a file or hub:OWNER/NAME" in refusal(folder / "none")
    assert "has no model_index.json; give a whole Stable Diffusion folder" in refusal(folder / "unet")
    monkeypatch.setattr(loading, "DEFAULT_MODEL", folder / "none")
    with pytest.raises(ValueError, match="no default model"):
        loading.load_model()


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
        ("StableDiffusionDepth2ImgPipeline", "a depth-to-image model"),
        ("StableDiffusionUpscalePipeline", "an upscaler"),
    ],
)
def test_other_families_are_named(folder: Path, name: str, family: str) -> None:
    edit_json(folder / "model_index.json", _class_name=name)
    assert refusal(folder) == (
        f"{folder / 'model_index.json'}: this is {family} (a {name}); only Stable Diffusion 1.x and 2.x are supported"
    )


def test_no_source_is_the_default_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "DEFAULT_MODEL", folder)
    assert loading.load_model().folder == folder


JSON_FILES = ["model_index.json", "ldm.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]


@pytest.mark.parametrize("name", [*JSON_FILES, "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"a": ', "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[]", "no JSON object"),
    ],
)
def test_broken_json_is_named(folder: Path, name: str, content: bytes, fault: str) -> None:
    (folder / name).write_bytes(content)
    assert (text := refusal(folder)).startswith(str(folder / name))
    assert fault in text


def test_a_value_that_is_not_supported_is_one_line(folder: Path) -> None:
    edit_json(folder / "unet/config.json", act_fn="mish")
    assert refusal(folder).endswith("config.json: act_fn is 'mish', but only 'silu' or 'swish' is supported")
    edit_json(folder / "unet/config.json", act_fn="silu", up_block_types=["UpBlock2D"])
    assert refusal(folder).endswith("config.json: up_block_types has 1 entries, but block_out_channels has 2")


def test_a_huge_json_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_BYTES", 10)
    assert "too big" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("unet/config.json", "act_fn", "mish"),
        ("unet/config.json", "block_out_channels", "many"),
        ("vae/config.json", "latent_channels", -4),
        ("text_encoder/config.json", "hidden_size", 1e308),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid"),
        ("scheduler/scheduler_config.json", "clip_sample_range", 0),
        ("scheduler/scheduler_config.json", "clip_sample_range", math.inf),
        ("scheduler/scheduler_config.json", "thresholding", True),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1]),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
        ("scheduler/scheduler_config.json", "beta_end", 0.0001),
        ("ldm.json", "steps", 0),
        ("ldm.json", "guidance", "much"),
    ],
)
def test_values_that_are_not_supported_are_named(folder: Path, name: str, key: str, value: Any) -> None:
    edit_json(folder / name, **{key: value})
    assert (text := refusal(folder)).startswith(str(folder / name))
    assert key in text


def test_unknown_keys_are_named_in_one_notice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
    for name in [*names, "ldm.json"]:
        edit_json(folder / name, novelty=1, _private=2, other=3)
    loading.load_model(folder)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("notice: ") and line.endswith("ignored: novelty, other") for line in lines)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{broken", b"\xff" * 64])
def test_broken_weights_are_named(folder: Path, part: str, content: bytes) -> None:
    path = folder / part / WEIGHTS[part]
    path.write_bytes(content)
    assert (text := refusal(folder)).startswith(str(path))
    assert "no intact safetensors file" in text


@pytest.mark.parametrize("part", WEIGHTS)
def test_wrong_keys_are_named(folder: Path, part: str) -> None:
    path = folder / part / WEIGHTS[part]
    names = sorted(load_file(path))[:7]
    edit_weights(path, lambda weights: [weights.pop(name) for name in names])
    text = refusal(folder)
    assert f"{path} lacks" in text
    assert all(name in text for name in names[:5])
    assert text.endswith("and 2 more")


def test_unexpected_keys_are_named(folder: Path) -> None:
    edit_weights(folder / UNET, lambda weights: weights.update(novelty=torch.ones(1)))
    assert refusal(folder) == f"{folder / UNET} holds the unknown novelty"


def test_wrong_shapes_are_named(folder: Path) -> None:
    edit_weights(folder / UNET, lambda weights: weights.update({"conv_out.bias": torch.ones(5)}))
    assert refusal(folder) == f"{folder / UNET} does not fit its config: conv_out.bias [5] instead of [4]"


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, part: str, value: float) -> None:
    path = folder / part / WEIGHTS[part]
    name = sorted(load_file(path))[3]
    edit_weights(path, lambda weights: weights[name].view(-1)[-1:].fill_(value))
    assert (text := refusal(folder)).startswith(f"{path}: ")
    assert f"{name} holds NaN or infinity" in text


def test_pickles_are_refused_and_never_opened(folder: Path, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    (folder / UNET).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    assert "only pickled weights (diffusion_pytorch_model.bin)" in refusal(folder)
    assert not (tmp_path / "canary").exists()


def test_half_precision_files_are_taken_if_there_is_nothing_else(folder: Path) -> None:
    full = load_file(folder / UNET)
    save_file({name: tensor.half() for name, tensor in full.items()}, folder / "unet" / "x.safetensors")
    (folder / "unet" / "x.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert next(loading.load_unet(folder / "unet").parameters()).dtype == torch.float32
    (folder / UNET).unlink()
    assert next(loading.load_unet(folder / "unet").parameters()).dtype == torch.float16
    assert [path.name for path in loading.weight_files(folder)] == [
        "model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]


def shard(path: Path, index: str, shards: str) -> Path:
    """Divides a weights file into two with an index, named by patterns; returns the index."""
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    names = sorted(weights)
    weight_map = {}
    half = len(names) // 2
    for number, some in enumerate((names[:half], names[half:]), start=1):
        file = shards.format(path.stem, number)
        save_file({name: weights[name] for name in some}, path.parent / file)
        weight_map |= dict.fromkeys(some, file)
    (path.parent / index.format(path.stem)).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path.parent / index.format(path.stem)


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        ("{}.safetensors.index.json", "{}-{:05d}-of-00002.safetensors"),
        ("{}.safetensors.index.fp16.json", "{}.fp16-{:05d}-of-00002.safetensors"),
    ],
)
def test_weights_in_several_files(folder: Path, index: str, shards: str) -> None:
    first = loading.load_model(folder)
    for part in ("unet", "text_encoder"):
        shard(folder / part / WEIGHTS[part], index, shards)
    model = loading.load_model(folder)
    assert same_weights(model.unet, first.unet)
    assert same_weights(model.text_encoder, first.text_encoder)
    assert len(loading.weight_files(folder)) == 5
    assert loading.read_model(folder).left_out == ()


def test_weights_that_diffusers_divides(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    first = loading.load_unet(folder / "unet")
    stock = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / UNET).unlink()
    stock.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*-of-*"))) > 1
    assert same_weights(loading.load_unet(folder / "unet"), first)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "no valid JSON"),
        ({}, "weight_map must name, for each tensor, the safetensors file beside it"),
        ({"weight_map": {}}, "weight_map must name"),
        ({"weight_map": {"conv_in.bias": 1}}, "weight_map must name"),
        ({"weight_map": {"conv_in.bias": "../vae/x.safetensors"}}, "weight_map must name"),
        ({"weight_map": {"conv_in.bias": "x.bin"}}, "weight_map must name"),
        ({"weight_map": {"conv_in.bias": "none.safetensors"}}, "names shards that do not exist: none.safetensors"),
        ({"weight_map": {"novelty": "{shard}"}}, "names what its shards lack: novelty"),
    ],
)
def test_an_index_that_is_wrong_is_named(folder: Path, content: Any, fault: str) -> None:
    index = shard(folder / UNET, "{}.safetensors.index.json", "{}-{:05d}-of-00002.safetensors")
    text = content if isinstance(content, str) else json.dumps(content)
    index.write_text(text.replace("{shard}", "diffusion_pytorch_model-00001-of-00002.safetensors"))
    assert (refused := refusal(folder)).startswith(str(index))
    assert fault in refused


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_their_files_unless_they_lie_badly(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / UNET)
    odd = {"down": torch.ones(3), **{name: tensor.clone() for name, tensor in weights.items()}}
    del weights
    model = loading.load_unet(folder / "unet")
    places = [
        [int(edge, 16) for edge in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / UNET))
    ]
    aligned = [tensor for tensor in model.parameters() if tensor.data_ptr() % 16 == 0]
    assert len(aligned) == len(list(model.parameters()))
    mapped = [tensor for tensor in aligned if any(low <= tensor.data_ptr() < high for low, high in places)]
    assert len(mapped) == len(aligned)
    # a tensor of odd size shifts all that come after it
    save_file(odd, tmp_path / "odd.safetensors")
    assert any(tensor.data_ptr() % 16 for tensor in read_safetensors(tmp_path / "odd.safetensors")[0].values())
    tensors = read_weights(tmp_path / "odd.safetensors").tensors
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors.values())
    assert all(torch.equal(tensors[name], odd[name]) for name in odd)


def fake_hub(monkeypatch: pytest.MonkeyPatch, *answers: Path | Exception) -> list[dict[str, Any]]:
    """The hub answers with each of these in turn; returns what it is asked."""
    import huggingface_hub

    asked: list[dict[str, Any]] = []
    left = iter(answers)

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        if isinstance(answer := next(left), Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_model_of_the_hub_comes_from_the_cache_if_it_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, folder)
    assert loading.load_model("hub:owner/name").source == folder
    assert [(each["name"], each.get("local_files_only")) for each in asked] == [("owner/name", True)]
    patterns = asked[0]["allow_patterns"]
    assert not any(fnmatch(name, pattern) for pattern in patterns for name in ("unet/x.bin", "x.ckpt", "unet/x.py"))
    for file in (path for path in folder.rglob("*") if path.is_file()):
        assert any(fnmatch(file.relative_to(folder).as_posix(), pattern) for pattern in patterns)


@pytest.mark.parametrize(
    "missing",
    [
        "",
        "model_index.json",
        "scheduler",
        "tokenizer",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_model_of_the_hub_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    part = folder.parent / "part"
    shutil.copytree(folder, part)
    target = part / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    asked = fake_hub(monkeypatch, part if part.exists() else FileNotFoundError("not cached"), folder)
    assert loading.find_model("hub:owner/name") == folder
    assert [each.get("local_files_only", False) for each in asked] == [True, False]


def test_a_model_that_the_hub_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, FileNotFoundError("not cached"), ConnectionError("no\nroute"))
    with pytest.raises(ValueError, match=r"^hub:owner/name is not in the cache and cannot be downloaded: no route$"):
        loading.load_model("hub:owner/name")
    fake_hub(monkeypatch, FileNotFoundError("not cached"), LookupError("403 from the proxy"))
    with pytest.raises(ValueError, match=r"cannot be downloaded: 403 from the proxy$"):
        loading.load_model("hub:owner/name")
    for name in ("hub:", "hub:name", "hub:a/b/c", "hub:../x"):
        with pytest.raises(ValueError, match=r"names no model; write hub:OWNER/NAME"):
            loading.load_model(name)


def test_nothing_else_opens_a_socket(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket is opened")

    monkeypatch.setattr(socket, "socket", refuse)
    loading.save_model(tmp_path / "x.safetensors", loading.load_model(folder))
    assert loading.load_model(tmp_path / "x.safetensors").source == tmp_path / "x.safetensors"
    assert loading.load_model(tmp_path / "x.safetensors").folder is None
    refusal(tmp_path / "owner/name")


def test_text_encoder_keys_with_and_without_prefix(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    first = loading.load_text_encoder(folder / "text_encoder")
    stored = load_file(path)
    prefixed = any(name.startswith("text_model.") for name in stored)
    turned = {
        name.removeprefix("text_model.") if prefixed else f"text_model.{name}": tensor.clone()
        for name, tensor in stored.items()
    }
    path.unlink()
    save_file(turned, path)
    assert same_weights(first, loading.load_text_encoder(folder / "text_encoder"))


def test_attention_keys_of_old_autoencoders(folder: Path) -> None:
    first = loading.load_autoencoder(folder / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            for new_part, old_part in old.items():
                if f".{new_part}." in name:
                    weights[name.replace(new_part, old_part)] = weights.pop(name)

    edit_weights(folder / "vae" / WEIGHTS["vae"], age)
    assert same_weights(first, loading.load_autoencoder(folder / "vae"))


def test_parts_that_do_not_fit_each_other(folder: Path) -> None:
    model = loading.load_model(folder)
    edit_json(folder / "model_index.json", unet=["diffusers", "UNet3D"])
    assert "unet is ['diffusers', 'UNet3D'], but only UNet2DConditionModel" in refusal(folder)
    edit_json(folder / "model_index.json", unet=["diffusers", "UNet2DConditionModel"], vae=None)
    assert "vae is None" in refusal(folder)
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    edit_json(folder / "vae" / "config.json", _class_name="TinyVAE")
    assert "_class_name is 'TinyVAE', but only AutoencoderKL or VQModel or IdentityAutoencoder is" in refusal(folder)
    edit_json(folder / "vae" / "config.json", _class_name="AutoencoderKL")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=78)
    assert "max_position_embeddings is 77, but its tokenizer needs 78" in refusal(folder)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    for changes, fault in (
        ({"cross_attention_dim": 48}, "the unet's cross_attention_dim is 48, but the text encoder is 32 wide"),
        ({"in_channels": 6}, "the unet turns 6 channels into 4, but the autoencoder's latents have 4"),
        ({"out_channels": 8}, "the unet turns 4 channels into 8, but the autoencoder's latents have 4"),
        ({"in_channels": 5}, "this is a depth-to-image model (its unet takes 5 channels)"),
    ):
        loading.save_part(folder / "unet", type(model.unet)(model.unet.config.model_copy(update=changes)))
        assert refusal(folder).startswith(f"{folder}: {fault}")


def test_a_learned_variance_has_as_many_channels_again(folder: Path) -> None:
    model = loading.load_model(folder)
    wide = type(model.unet)(model.unet.config.model_copy(update={"out_channels": 8}))
    scheduler = model.scheduler.model_copy(update={"variance_type": "learned_range"})
    loading.save_model(folder, replace(model, unet=wide, scheduler=scheduler))
    assert loading.load_model(folder).unet.config.out_channels == 8


def test_parts_that_are_not_read_are_left_out(folder: Path) -> None:
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit_json(folder / "model_index.json", safety_checker=checker, requires_safety_checker=True)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    stored = loading.read_model(folder)
    assert stored.left_out == ("safety_checker/config.json",)
    assert stored.configs["model_index.json"]["safety_checker"] == [None, None]
    assert stored.configs["model_index.json"]["requires_safety_checker"] is False


def test_what_is_saved_is_what_was_loaded(model_folder: Path, tmp_path: Path) -> None:
    settings = Settings(steps=7, guidance=2.0, words=("house", "red"), scores={"accuracy": 0.5}, notes="tiny")
    model = replace(loading.load_model(model_folder), settings=settings)
    loading.save_model(tmp_path / "deep" / "copy", model)
    copy = loading.load_model(tmp_path / "deep" / "copy")
    assert copy.settings == settings
    assert copy.scheduler == model.scheduler
    for name in ("unet", "autoencoder", "text_encoder"):
        assert same_weights(getattr(copy, name), getattr(model, name))
        assert getattr(copy, name).config.model_dump() == getattr(model, name).config.model_dump()
    assert torch.equal(copy.tokenizer(["ab c"]).ids, model.tokenizer(["ab c"]).ids)


def test_the_saved_layout(model_folder: Path, tmp_path: Path) -> None:
    model, copy = loading.load_model(model_folder), tmp_path / "copy"
    former = os.umask(0o027)
    try:
        loading.save_model(copy, model, dtype=torch.float16)
    finally:
        os.umask(former)
    index = json.loads((copy / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    scheduler = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    stock = json.loads((model_folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["clip_sample"] is False
    same = [key for key in scheduler if not key.startswith("_")]
    assert {key: scheduler[key] for key in same} == {key: stock[key] for key in same}
    for part, name in WEIGHTS.items():
        with safe_open(copy / part / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
            assert part != "text_encoder" or all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    for path in copy.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_saving_replaces_a_model_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    model = loading.load_model(folder)
    (folder / "leftover").touch()
    loading.save_model(folder, model)
    assert not (folder / "leftover").exists()
    (tmp_path / "empty").mkdir()
    loading.save_model(tmp_path / "empty", model)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").touch()
    for taken in ("photos", "photos/holiday.png"):
        with pytest.raises(ValueError, match="exists and is no model; choose another name"):
            loading.save_model(tmp_path / taken, model)
    with pytest.raises(ValueError, match=r"would be a pickle; name a folder or a file that ends in .safetensors"):
        loading.save_model(tmp_path / "x.ckpt", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "photos", "tiny"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_model_stays_and_what_it_points_to_is_replaced(folder: Path, tmp_path: Path, there: bool) -> None:
    model, link, target = loading.load_model(folder), tmp_path / "link", tmp_path / "elsewhere" / "target"
    if there:
        shutil.copytree(folder, target)
        (target / "leftover").touch()
    link.symlink_to(target)
    loading.save_model(link, model)
    assert link.readlink() == target
    assert not (target / "leftover").exists()
    assert loading.load_model(target).settings == model.settings
    assert {path.name for path in (*tmp_path.iterdir(), *target.parent.iterdir())} <= {
        "link",
        "elsewhere",
        "target",
        "model",
        folder.name,
    }


def test_a_single_file_is_replaced_whole_and_by_nothing_else(folder: Path, tmp_path: Path) -> None:
    model, file = loading.load_model(folder), tmp_path / "x.safetensors"
    file.write_bytes(b"former")
    former = os.umask(0o027)
    try:
        loading.save_model(file, model, torch.float16)
    finally:
        os.umask(former)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert loading.load_model(file).settings == model.settings
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="exists and is no model"):
        loading.save_model(tmp_path / "folder.safetensors", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.safetensors", "tiny", "x.safetensors"]


def test_a_value_too_large_for_half_precision_is_named(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder / UNET, lambda weights: weights["conv_in.bias"].fill_(1e6))
    with pytest.raises(ValueError, match=r"cannot hold in float16 \(use bfloat16\) conv_in.bias"):
        loading.save_model(tmp_path / "half", loading.load_model(folder), torch.float16)
    loading.save_model(tmp_path / "half", loading.load_model(folder), torch.bfloat16)


@pytest.mark.parametrize("step", ["_flush", "write_folder"])
def test_a_failed_save_leaves_the_former_model(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    model = loading.load_model(folder)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(loading, step, fail)
    with pytest.raises(OSError, match="disk full"):
        loading.save_model(folder, model)
    assert same_weights(loading.load_model(folder).unet, model.unet)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_failed_rename_puts_the_former_model_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rename = loading.load_model(folder), Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise OSError("no rename")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no rename"):
        loading.save_model(folder, model)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert same_weights(loading.load_model(folder).unet, model.unet)


def test_the_pipeline_saves_in_its_own_precision_or_another(model_folder: Path, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype="bfloat16")
    pipe.save_pretrained(tmp_path / "own")
    pipe.save_pretrained(tmp_path / "full", dtype=torch.float32)
    assert load_file(tmp_path / "own" / UNET)["conv_in.weight"].dtype == torch.bfloat16
    assert load_file(tmp_path / "full" / UNET)["conv_in.weight"].dtype == torch.float32


SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_config_of_every_stock_scheduler(name: str, kind: str) -> None:
    import diffusers

    extra = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    if name == "PNDMScheduler":
        extra = {"skip_prk_steps": True}
    stock = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule=kind, **extra)
    config = {**stock.config, "_class_name": name}
    made = SchedulerConfig.from_diffusers_config(config)
    assert not [key for key in config if not key.startswith("_") and key not in SchedulerConfig.model_fields]
    assert torch.allclose(made.make_schedule().alphas_cumprod.float(), stock.alphas_cumprod, atol=1e-6)
    bare = SchedulerConfig.from_diffusers_config({"_class_name": name, **extra})
    spacing = stock.config.get("timestep_spacing", "linspace")
    assert made.timestep_spacing == bare.timestep_spacing == spacing
    assert bare.set_alpha_to_one == stock.config.get("set_alpha_to_one", True)


def test_clipping_is_refused_of_a_scheduler_that_does_not_clip() -> None:
    config = {"_class_name": "PNDMScheduler", "clip_sample": True}
    with pytest.raises(ValueError, match="clip_sample of PNDMScheduler is not supported; write false"):
        SchedulerConfig.from_diffusers_config(config)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_is_that_of_ddim(kind: str) -> None:
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind, rescale_betas_zero_snr=True)
    made = SchedulerConfig.from_diffusers_config({**stock.config, "clip_sample": False}).make_schedule()
    assert torch.allclose(made.alphas_cumprod.float(), stock.alphas_cumprod, atol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [True, False])
def test_the_time_grid_is_that_of_ddim(spacing: str, offset: int, to_one: bool) -> None:
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one, clip_sample=False)
    stock.set_timesteps(10)
    config = SchedulerConfig.from_diffusers_config(stock.config)
    grid = config.time_grid(config.make_schedule(), 10, "ddim")
    times = stock.timesteps.double()
    end = -1 if to_one else 0
    expected = times if times[-1] == end else torch.cat([times, torch.tensor([end]).double()])
    assert torch.equal(grid, expected)
    assert config.time_grid(config.make_schedule(), 10, "ddpm")[-1] == -1


def test_a_single_step_ends_clean() -> None:
    config = SchedulerConfig(set_alpha_to_one=False, steps_offset=0)
    assert config.time_grid(config.make_schedule(), 1, "ddim").tolist() == [0, -1]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("UniPCMultistepScheduler", "predict_x0", False),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
    ],
)
def test_a_solver_s_settings_are_not_dropped_in_silence(name: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} {value!r} of {name} is not supported; null is its default"):
        SchedulerConfig.from_diffusers_config({"_class_name": name, key: value})
    assert SchedulerConfig.from_diffusers_config({"_class_name": "DDIMScheduler", key: value}).sampler == "ddim"


@pytest.mark.parametrize(
    ("name", "key", "value", "neutral", "written"),
    [
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1, float("-inf"), "-Infinity"),
        ("DPMSolverSinglestepScheduler", "lambda_min_clipped", -5.1, float("-inf"), "-Infinity"),
        ("UniPCMultistepScheduler", "disable_corrector", [0], [], r"\[\]"),
        ("UniPCMultistepScheduler", "lower_order_final", False, True, "true"),
        ("DEISMultistepScheduler", "lower_order_final", False, True, "true"),
        ("PNDMScheduler", "skip_prk_steps", False, True, "true"),
    ],
)
def test_a_class_s_own_settings_are_not_dropped_in_silence(
    name: str, key: str, value: Any, neutral: Any, written: str
) -> None:
    with pytest.raises(ValueError, match=rf"{key} \[?{value}.* of {name} is not supported; write {written}") as caught:
        SchedulerConfig.from_diffusers_config({"_class_name": name, key: value})
    assert repr(value) in str(caught.value)
    for config in ({"_class_name": name, key: neutral}, {"_class_name": "HeunDiscreteScheduler", key: value}):
        assert SchedulerConfig.from_diffusers_config(config).class_name == config["_class_name"]


def test_runge_kutta_steps_are_what_a_missing_key_means() -> None:
    with pytest.raises(ValueError, match="skip_prk_steps False of PNDMScheduler is not supported; write true"):
        SchedulerConfig.from_diffusers_config({"_class_name": "PNDMScheduler"})


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("DDIMScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", {"use_karras_sigmas": True}),
        ("EulerAncestralDiscreteScheduler", {"use_exponential_sigmas": True}),
        ("DPMSolverSinglestepScheduler", {"timestep_spacing": "leading"}),
    ],
)
def test_a_setting_that_the_class_does_not_have_is_passed_over(name: str, unknown: dict[str, Any]) -> None:
    """A file has it where the scheduler was made from another one's config."""
    import diffusers

    before = diffusers.DPMSolverMultistepScheduler(**{"timestep_spacing": "leading", "steps_offset": 1, **unknown})
    stock = getattr(diffusers, name).from_config(before.config, skip_prk_steps=True, clip_sample=False)
    assert stock.config[next(iter(unknown))] == next(iter(unknown.values()))
    stock.set_timesteps(20)
    config = SchedulerConfig.from_diffusers_config({**stock.config, "_class_name": name})
    grid = config.time_grid(config.make_schedule(), 20, config.sampler)
    assert grid[:20].tolist() == visited(stock.timesteps)


def visited(values: torch.Tensor) -> list[float]:
    """Each value of a decreasing sequence once, of which some schedulers repeat some."""
    return [float(value) for value in values.double().unique().flip(0)]


GRIDS = [*(name for name in SCHEDULERS if not name.startswith(("DDIM", "DDPM", "PNDM"))), "LMSDiscreteScheduler"]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 20, 33])
def test_the_time_grid_is_that_of_each_scheduler(name: str, spacing: str, steps: int) -> None:
    import diffusers

    offers = "timestep_spacing" in inspect.signature(getattr(diffusers, name)).parameters
    stock = getattr(diffusers, name)(**{"timestep_spacing": spacing, "steps_offset": 1} if offers else {})
    stock.set_timesteps(steps)
    config = SchedulerConfig.from_diffusers_config({**stock.config, "_class_name": name})
    grid = config.time_grid(config.make_schedule(), steps, config.sampler)
    times = stock.timesteps[::2] if name.startswith("KDPM2") else stock.timesteps  # without those between two steps
    assert grid.tolist() == pytest.approx([*visited(times), -1], rel=1e-6)
    assert len(grid) == steps + 1


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("by_noise", ["karras", "exponential"])
def test_the_noise_levels_are_those_of_each_scheduler(name: str, spacing: str, by_noise: str) -> None:
    import diffusers

    known = inspect.signature(getattr(diffusers, name)).parameters
    plain = {"timestep_spacing": spacing, "steps_offset": 1} if "timestep_spacing" in known else {}
    stock = getattr(diffusers, name)(**plain, **{f"use_{by_noise}_sigmas": True})
    stock.set_timesteps(20)
    config = SchedulerConfig.from_diffusers_config({**stock.config, "_class_name": name})
    schedule = config.make_schedule()
    alpha, sigma = schedule.at(config.time_grid(schedule, 20, config.sampler)[:20])
    levels = [level for level in visited(stock.sigmas) if level > 0]
    assert (sigma / alpha).tolist() == pytest.approx(levels, rel=1e-4)


@pytest.mark.parametrize(
    ("sampler", "name", "asked"),
    [
        ("dpm++", "DPMSolverMultistepScheduler", {}),
        ("dpm++sde", "DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
        ("dpm++", "DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
        ("diffusers:UniPCMultistepScheduler", "UniPCMultistepScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("euler", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
        ("ddim", "DDIMScheduler", {"clip_sample": False}),
    ],
)
def test_a_sampler_that_is_asked_for_has_the_grid_of_from_config(
    sampler: str, name: str, asked: dict[str, Any]
) -> None:
    import diffusers

    folder = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, timestep_spacing="leading")
    stock = getattr(diffusers, name).from_config(folder.config, **asked)
    stock.set_timesteps(20)
    config = SchedulerConfig.from_diffusers_config(folder.config)
    spacing = "exponential" if "use_exponential_sigmas" in asked else asked.get("timestep_spacing")
    grid = config.time_grid(config.make_schedule(), 20, sampler, spacing)
    # DPM-Solver cuts times off to whole ones for the network, and keeps the noise levels
    within = 1.01 if spacing == "exponential" and name.startswith("DPM") else 1e-3
    assert torch.allclose(grid[:20], stock.timesteps.double(), rtol=1e-4, atol=within)


@pytest.mark.parametrize("plain", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_the_time_grid_by_noise_is_that_of_euler(spacing: str, plain: str) -> None:
    from diffusers import EulerDiscreteScheduler

    stock = EulerDiscreteScheduler(**{f"use_{spacing}_sigmas": True}, timestep_spacing=plain, steps_offset=1)
    stock.set_timesteps(10)
    config = SchedulerConfig.from_diffusers_config(stock.config)
    grid = config.time_grid(config.make_schedule(), 10, "euler")
    assert config.spacing == spacing
    assert torch.allclose(grid[:-1], stock.timesteps.double(), rtol=1e-3, atol=1e-3)
    assert grid[-1] == -1
    without = config.model_copy(update={f"use_{spacing}_sigmas": False})
    assert without.spacing == plain
    assert torch.equal(without.time_grid(config.make_schedule(), 10, "euler", spacing), grid)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_ddim_goes_to_time_0_by_noise_whatever_the_folder_s_spacing(spacing: Spacing) -> None:
    config = SchedulerConfig(timestep_spacing="trailing")
    grid = config.time_grid(config.make_schedule(), 10, "ddim", spacing)
    assert torch.equal(grid, config.make_schedule().timesteps(10, spacing))
    # a folder that ends at time 0 has that time in such a grid already
    ends_at_zero = config.model_copy(update={"set_alpha_to_one": False})
    assert torch.equal(ends_at_zero.time_grid(config.make_schedule(), 10, "ddim", spacing), grid)


MENDED = "read as diffusers reads it, with"
EARLY = {"_diffusers_version": "0.8.0", "sample_size": 32}
PLMS = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}


@pytest.mark.filterwarnings("ignore:The configuration file of:FutureWarning")
@pytest.mark.parametrize(
    ("pipeline", "scheduler", "unet", "told"),
    [
        ("StableDiffusionPipeline", {}, {}, None),
        ("StableDiffusionPipeline", {"steps_offset": 0}, {}, "steps_offset 1"),
        ("StableDiffusionPipeline", {"steps_offset": 0, "timestep_spacing": "trailing"}, {}, None),
        ("StableDiffusionPipeline", {"clip_sample": True}, {}, "clip_sample false"),
        ("StableDiffusionPipeline", {}, EARLY, "sample_size 64"),
        ("StableDiffusionPipeline", {}, {**EARLY, "_diffusers_version": "0.9.0.dev0"}, None),
        ("StableDiffusionPipeline", {}, {**EARLY, "_diffusers_version": "0.8.1.dev0"}, "sample_size 64"),
        ("StableDiffusionPipeline", {}, {**EARLY, "sample_size": 96}, None),
        (
            "StableDiffusionImg2ImgPipeline",
            {"steps_offset": 2, "clip_sample": True},
            EARLY,
            "steps_offset 1, clip_sample false, sample_size 64",
        ),
        ("StableDiffusionPipeline", {**PLMS, "steps_offset": 0}, {}, "steps_offset 1"),
        ("StableDiffusionPipeline", {**PLMS, "clip_sample": True}, {}, "clip_sample false"),
        ("StableDiffusionInpaintPipeline", {**PLMS, "skip_prk_steps": False}, {}, "skip_prk_steps true"),
        ("StableDiffusionInpaintPipeline", {"clip_sample": True}, {}, None),
    ],
)
def test_early_folders_are_mended_as_in_diffusers(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    pipeline: str,
    scheduler: dict[str, Any],
    unet: dict[str, Any],
    told: str | None,
) -> None:
    import diffusers

    edit_json(folder / "scheduler/scheduler_config.json", **scheduler)
    edit_json(folder / "unet/config.json", **unet)
    name = scheduler.get("_class_name", "DDIMScheduler")
    edit_json(folder / "model_index.json", _class_name=pipeline, scheduler=["diffusers", name])
    stock = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(stock).__name__ == pipeline
    capsys.readouterr()
    model = loading.load_model(folder)
    assert capsys.readouterr().err == ("" if told is None else f"notice: {folder}: {MENDED} {told}\n")
    assert model.unet.config.sample_size == stock.unet.config.sample_size
    assert model.scheduler.steps_offset == stock.scheduler.config.steps_offset
    assert model.scheduler.clip_sample == stock.scheduler.config.get("clip_sample", False)
    assert model.scheduler.skip_prk_steps in (None, stock.scheduler.config.get("skip_prk_steps"))


def test_a_scheduler_of_which_nothing_is_said_needs_no_mending(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loading.save_model(tmp_path / "new", replace(loading.load_model(folder), scheduler=SchedulerConfig()))
    capsys.readouterr()
    assert loading.load_model(tmp_path / "new").scheduler.steps_offset == 1
    assert capsys.readouterr().err == ""


def test_an_offset_that_is_no_number_is_not_mended(folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", steps_offset="many")
    assert "steps_offset is 'many'" in refusal(folder)


def test_a_model_of_pixels_is_read_as_it_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loading.load_model(folder)
    autoencoder = IdentityAutoencoder(IdentityAutoencoderConfig(latent_channels=4))
    scheduler = model.scheduler.model_copy(update={"clip_sample": True, "steps_offset": 0})
    loading.save_model(tmp_path / "pixels", replace(model, autoencoder=autoencoder, scheduler=scheduler))
    capsys.readouterr()
    assert loading.load_model(tmp_path / "pixels").scheduler == scheduler
    assert capsys.readouterr().err == ""


def test_the_default_model_is_read_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    written = json.loads((loading.DEFAULT_MODEL / "scheduler/scheduler_config.json").read_text())
    model = loading.load_model()
    assert capsys.readouterr().err == ""
    assert model.scheduler == SchedulerConfig.from_diffusers_config(written)
    assert model.unet.config.sample_size == 16
    grid = model.scheduler.time_grid(model.scheduler.make_schedule(), 20, "ddim")
    assert grid.tolist() == [*range(999, 48, -50), -1]


def test_words() -> None:
    assert words_in("Two RED houses, 3 o'clock: une étoile_rouge!") == {
        "two", "red", "houses", "o'clock", "une", "étoile", "rouge"
    }  # fmt: skip
