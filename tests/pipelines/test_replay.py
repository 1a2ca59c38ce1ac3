"""A picture is made again from what its file says."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines import TextToImagePipeline
from pipelines.configs_digest import configs_sha256
from pipelines.convert import convert
from pipelines.key_map import UNET, ema_name
from pipelines.loading import load_model
from pipelines.png import read_record, write_png
from pipelines.replay import Record, Source, make_records, replay

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "negative_prompt": "blue"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def lora_file(pipe: TextToImagePipeline) -> Path:
    out_features, in_features = pipe.unet.time_embedding.linear_1.weight.shape
    generator = torch.Generator().manual_seed(0)
    name = "unet.time_embedding.linear_1.lora_{}.weight"
    tensors = {
        name.format("A"): torch.randn(2, in_features, generator=generator),
        name.format("B"): torch.randn(out_features, 2, generator=generator),
    }
    save_file(tensors, "some.safetensors")
    return Path("some.safetensors")


def made(
    pipe: TextToImagePipeline, path: str, prompt: str | list[str] = "a red house", index: int = 0, **options: Any
) -> Record:
    """Renders, writes picture `index` with its record, and returns the record."""
    out = pipe(prompt, **{**OPTIONS, **options})
    record = make_records(pipe, out.request, out.seeds, options.get("image"), options.get("mask_image"))[index]
    write_png(Path(path), out.images[index], record.model_dump())
    return record


def rewritten(path: str, **change: Any) -> None:
    """The same picture with another record."""
    record = {**read_record(Path(path)), **change}
    with Image.open(path) as picture:
        write_png(Path(path), picture, record)


def edit_json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_the_record_comes_back_whole(pipe: TextToImagePipeline) -> None:
    record = made(pipe, "x.png", seed=3, guidance_scale=2.5, num_images_per_prompt=2, index=1, clip_skip=1)
    assert Record.read(Path("x.png")) == record
    assert (record.prompt, record.negative, record.seed, record.batch) == ("a red house", "blue", 4, 2)
    assert (record.guidance, record.clip_skip, record.model, record.dtype) == (2.5, 1, "tiny", "float32")
    assert (record.prediction, record.ema, record.spacing) == ("epsilon", False, "leading")
    assert record.changes(record) == {}


def test_the_record_tells_how_many_were_rendered_at_once(pipe: TextToImagePipeline) -> None:
    out = pipe("a", num_images_per_prompt=10, num_inference_steps=1, output_type="latent")
    assert [record.batch for record in make_records(pipe, out.request, out.seeds)] == [8] * 8 + [2] * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 7, "guidance_scale": 1.0, "height": 72, "width": 56},
        {"sampler": "ddim", "eta": 0.5, "guidance_rescale": 0.7},
        {"prompt_syntax": "weighted", "clip_skip": 1, "prompt": "(a) house"},
        {"num_images_per_prompt": 3, "index": 2},
        {"num_inference_steps": 4, "guidance_interval": (0.5, 4.0), "reuse": 2, "merge_tokens": 0.5},
        {"num_inference_steps": 4, "spacing": "karras"},
        {"prompt": ["a house", "two fish", "a boat"], "index": 1},
    ],
)
def test_a_replay_is_identical(pipe: TextToImagePipeline, model_folder: Path, options: dict[str, Any]) -> None:
    record = made(pipe, "x.png", **options)
    again = replay("x.png", model_folder)
    assert (again.identical, again.max_difference, again.share) == (True, 0, 0.0)
    assert again.before == again.now == record
    assert np.array_equal(np.asarray(again.image), np.asarray(Image.open("x.png")))
    assert again.lines() == ["identical"]


def test_a_record_of_an_earlier_version_is_understood(pipe: TextToImagePipeline, model_folder: Path) -> None:
    record = made(pipe, "x.png").model_dump()
    for name in ("syntax", "clip_skip", "strength", "init", "mask", "loras", "batch", "prediction", "reuse"):
        del record[name]
    for name in ("ema", "configs_sha256", "spacing"):
        del record[name]
    with Image.open("x.png") as picture:
        write_png(Path("x.png"), picture, {**record, "unknown": 1})
    again = replay("x.png", model_folder)
    assert again.lines() == ["identical"]
    assert again.before.changes(again.now) == {}
    assert (again.now.ema, again.now.spacing) == (False, "leading")


def test_how_far_off_a_picture_is(pipe: TextToImagePipeline, model_folder: Path) -> None:
    record = made(pipe, "x.png")
    pixels = np.array(Image.open("x.png"))
    pixels[0, 0, 1] = pixels[0, 0, 1] + 40 if pixels[0, 0, 1] < 128 else pixels[0, 0, 1] - 40
    pixels[3, 5] ^= 1
    write_png(Path("x.png"), Image.fromarray(pixels), record.model_dump())
    again = replay("x.png", model_folder)
    assert (again.identical, again.max_difference, again.share) == (False, 40, 2 / 64**2)
    assert again.lines() == ["not identical: up to 40 of 255 off, in 0.05% of the pixels"]


def test_other_weights_render_all_the_same_and_are_told(pipe: TextToImagePipeline, folder: Path) -> None:
    before = made(pipe, "x.png")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor * 1.1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    again = replay("x.png", folder)
    assert not again.identical
    assert again.before == before
    assert before.changes(again.now) == {"sha256": (before.sha256, again.now.sha256)}
    assert again.lines()[1:] == [
        "it was made with model tiny, now with tiny; name its own with --model",
        f"sha256 of the weights was {before.sha256}, now {again.now.sha256}",
    ]
    assert again.summary() == {
        "identical": False,
        "max_difference": again.max_difference,
        "share": again.share,
        "model": {"before": "tiny", "now": "tiny"},
        "changes": {"sha256": {"before": before.sha256, "now": again.now.sha256}},
    }


def test_the_configs_and_the_tokenizer_have_a_digest(pipe: TextToImagePipeline, folder: Path) -> None:
    before = made(pipe, "x.png")

    def now() -> str:
        return configs_sha256(load_model(folder))

    assert now() == before.configs_sha256
    # no picture depends on who wrote a config, nor on where a default is written; the rest is recorded by itself
    edit_json(folder / "vae" / "config.json", _diffusers_version="9", scaling_factor=0.18215)
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="sample", _class_name="DDPMScheduler")
    assert now() == before.configs_sha256
    digests = {now()}
    for name, change in (
        ("vae/config.json", {"scaling_factor": 1.0}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}),
    ):
        edit_json(folder / name, **change)
        digests.add(now())
    assert len(digests) == 6


def test_other_configs_are_told(pipe: TextToImagePipeline, folder: Path) -> None:
    before = made(pipe, "x.png")
    edit_json(folder / "vae" / "config.json", scaling_factor=0.5)
    again = replay("x.png", folder)
    assert not again.identical
    assert again.lines()[1:] == [
        f"sha256 of the configs and the tokenizer was {before.configs_sha256}, now {again.now.configs_sha256}"
    ]


def test_a_replay_reads_the_model_as_the_picture_s_own(model_folder: Path, folder: Path) -> None:
    convert(model_folder, Path("tiny.safetensors"))
    with safe_open("tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file("tiny.safetensors")
    tensors |= {ema_name(name): tensor * 1.1 for name, tensor in tensors.items() if name.startswith(UNET)}
    save_file(tensors, "both.safetensors", metadata)

    averaged = TextToImagePipeline.from_pretrained("both.safetensors", "cpu", "float32", "v_prediction", ema=True)
    record = made(averaged, "x.png")
    assert (record.prediction, record.ema) == ("v_prediction", True)
    again = replay("x.png", "both.safetensors")
    assert again.lines() == ["identical"]
    assert again.now == record

    plain = TextToImagePipeline.from_pretrained("both.safetensors", "cpu", "float32")
    changes = record.changes(made(plain, "y.png"))
    assert changes == {"prediction": ("v_prediction", "epsilon"), "ema": (True, False)}
    # of another model, neither holds
    assert list(record.changes(replay("x.png", folder).now)) == ["sha256", "prediction", "ema"]


def test_a_replay_keeps_the_spacing_that_was_the_model_s_own(pipe: TextToImagePipeline, folder: Path) -> None:
    record = made(pipe, "x.png", num_inference_steps=4)
    edit_json(folder / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
    again = replay("x.png", folder)
    assert again.identical
    assert list(record.changes(again.now)) == ["configs_sha256"]


def test_a_file_s_name_may_be_no_utf_8(pipe: TextToImagePipeline, folder: Path) -> None:
    init = os.fsdecode(b"b\xe9.png")
    Image.radial_gradient("L").save(init)
    record = made(pipe, "x.png", image=init, width=64, height=64)
    assert Record.read(Path("x.png")) == record
    assert record.init is not None
    assert record.init.file == "b?.png"
    Path("link").symlink_to(shutil.move(folder, folder.with_name(os.fsdecode(b"m\xe9"))))
    assert made(TextToImagePipeline.from_pretrained("link", "cpu", "float32"), "x.png").model == "m?"


def test_a_model_may_be_read_otherwise(pipe: TextToImagePipeline, model_folder: Path) -> None:
    made(pipe, "x.png")
    again = replay("x.png", model_folder, prediction="v_prediction")
    assert not again.identical
    assert again.before.changes(again.now) == {"prediction": ("epsilon", "v_prediction")}


def test_the_dtype_and_the_device_are_the_record_s_unless_others_are_named(
    pipe: TextToImagePipeline, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    made(pipe, "x.png")
    rewritten("x.png", device="cuda", versions={"torch": "1.0"})
    again = replay("x.png", model_folder)
    assert again.identical
    assert again.now.dtype == "float32"
    versions = ({"torch": "1.0"}, again.now.versions)
    assert again.before.changes(again.now) == {"device": ("cuda", "cpu"), "versions": versions}
    assert again.lines()[1] == "device was cuda, now cpu"
    other = replay("x.png", model_folder, dtype="bfloat16")
    assert other.before.changes(other.now)["dtype"] == ("float32", "bfloat16")
    assert 0 < other.max_difference < 64
    with pytest.raises(ValueError, match="device 'cuda' is not available here"):
        replay("x.png", model_folder, device="cuda")


def test_the_files_to_start_from(pipe: TextToImagePipeline, model_folder: Path) -> None:
    Image.radial_gradient("L").save("init.png")
    Image.linear_gradient("L").save("mask.png")
    files = {"image": "init.png", "mask_image": "mask.png"}
    record = made(pipe, "x.png", strength=0.5, width=64, height=64, **files)
    assert record.init == Source(record.init.sha256 if record.init else "", "under any name")
    assert replay("x.png", model_folder, init="init.png", mask="mask.png").identical
    Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).save("mask.png")
    again = replay("x.png", model_folder, init="init.png", mask="mask.png")
    assert not again.identical
    assert list(again.before.changes(again.now)) == ["mask"]
    assert json.loads(json.dumps(again.summary()))["changes"]["mask"]["now"]["file"] == "mask.png"
    with pytest.raises(ValueError, match=r"x\.png was made with init\.png; give it with --init"):
        replay("x.png", model_folder)
    with pytest.raises(ValueError, match=r"x\.png was made with mask\.png; give it with --mask"):
        replay("x.png", model_folder, init="init.png")
    made(pipe, "y.png")
    with pytest.raises(ValueError, match=r"y\.png was made with no --init; leave out init\.png"):
        replay("y.png", model_folder, init="init.png")


def test_loras(model_folder: Path, lora_file: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model_folder, "cpu", "float32")
    made(pipe, "plain.png")
    pipe.load_loras([(lora_file, 0.5), (lora_file, 0.25)])
    record = made(pipe, "x.png")
    assert Path("plain.png").read_bytes() != Path("x.png").read_bytes()
    assert [(lora.file, lora.weight) for lora in record.loras] == [
        ("some.safetensors", 0.5),
        ("some.safetensors", 0.25),
    ]
    again = replay("x.png", model_folder, loras=[lora_file, lora_file])
    assert again.identical
    assert again.before == again.now
    with pytest.raises(
        ValueError, match=r"was made with some\.safetensors and some\.safetensors; give each with --lora"
    ):
        replay("x.png", model_folder, loras=[lora_file])
    with pytest.raises(ValueError, match=r"made with no --lora; leave out some\.safetensors"):
        replay("plain.png", model_folder, loras=[lora_file])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"steps": "few"}, "x.png: steps is 'few': input should be a valid integer"),
        ({"seed": -1}, "x.png: seed is -1: input should be greater"),
        ({"batch": 0}, "x.png: batch is 0: input should be greater"),
        ({"loras": [{"file": "a"}]}, "x.png: loras.0.sha256 is"),
        ({"sampler": "magic"}, "x.png: sampler 'magic' is unknown"),
        ({"steps": 0}, "x.png: steps is 0; give a number from 1 to 1000"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"width": 128}, "x.png is 64x64, but was rendered at 128x64; give the original"),
    ],
)
def test_a_bad_record_is_one_line(
    pipe: TextToImagePipeline, model_folder: Path, change: dict[str, Any], fault: str
) -> None:
    made(pipe, "x.png")
    rewritten("x.png", **change)
    with pytest.raises(ValueError, match=r"^x\.png|dtype") as caught:
        replay("x.png", model_folder)
    assert str(caught.value).startswith(fault)
    assert "\n" not in str(caught.value)


def test_a_picture_without_a_record() -> None:
    Image.new("RGB", (8, 8)).save("x.png")
    with pytest.raises(ValueError, match=r"x\.png does not say how it was made"):
        replay("x.png")
