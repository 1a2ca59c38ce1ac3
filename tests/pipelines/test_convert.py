"""Conversion, its certificate and the inspection, in Python and at the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines import cli, loading
from pipelines.convert import Certificate, convert
from pipelines.inspection import inspect_model


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def file(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: the tiny model as a single file."""
    made = tmp_path_factory.mktemp("converted") / "tiny.safetensors"
    convert(model_folder, made)
    return made


def test_a_certificate_in_every_direction(model_folder: Path, file: Path, tmp_path: Path) -> None:
    for index, (source, name) in enumerate(
        [(model_folder, "a.safetensors"), (model_folder, "a"), (file, "b.safetensors"), (file, "b")]
    ):
        certificate = convert(source, tmp_path / name)
        assert certificate.holds
        assert certificate == replace(certificate, source=str(source), destination=str(tmp_path / name))
        assert (certificate.family, certificate.prediction_type) == ("Stable Diffusion 1.x", "epsilon")
        assert certificate.prediction_reason.startswith("scheduler/scheduler_config.json")
        assert certificate.dtypes == ("float32",)
        assert certificate.tensors == sum(len(weights.tensors) for weights in loading.read_model(file).weights.values())
        assert (certificate.rounding, certificate.left_out) == (0.0, ())
        assert certificate.forward == {"unet": 0.0, "vae": 0.0, "text_encoder": 0.0}
        assert bool(certificate.unreadable) == (index in (0, 2))
    assert (
        "unet.block_out_channels is (16, 32), not (320, 640, 1280, 1280)"
        in convert(model_folder, tmp_path / "a.safetensors").unreadable
    )
    expected = load_file(file)
    for name in ("a.safetensors", "b.safetensors"):
        tensors = load_file(tmp_path / name)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_another_dtype_rounds_and_nothing_else(
    model_folder: Path, tmp_path: Path, dtype: torch.dtype, unit: float
) -> None:
    certificate = convert(model_folder, tmp_path / "x.safetensors", dtype)
    assert certificate.holds
    assert certificate.dtypes == (str(dtype).removeprefix("torch."),)
    largest = max(
        float(tensor.abs().max())
        for weights in loading.read_model(model_folder).weights.values()
        for tensor in weights.tensors.values()
    )
    assert 0 < certificate.rounding <= unit * largest
    assert all(0 < difference < 0.1 for difference in certificate.forward.values())
    config = loading.read_model(tmp_path / "x.safetensors").config("text_encoder")
    assert config["dtype"] == certificate.dtypes[0]
    back = convert(tmp_path / "x.safetensors", tmp_path / "back")
    assert (back.rounding, back.dtypes) == (0.0, certificate.dtypes)


def test_a_prediction_type_that_is_asked_for_is_written_down(model_folder: Path, tmp_path: Path) -> None:
    certificate = convert(model_folder, tmp_path / "x.safetensors", prediction="v")
    assert (certificate.prediction_type, certificate.prediction_reason) == ("v_prediction", "asked for")
    assert loading.load_model(tmp_path / "x.safetensors").scheduler.prediction == "v"
    assert "v_pred" in load_file(tmp_path / "x.safetensors")
    certificate = convert(model_folder, tmp_path / "x.safetensors", prediction="sample")
    assert "scheduler.prediction_type is sample, not epsilon or v_prediction" in certificate.unreadable


def test_zero_terminal_snr_is_marked(model_folder: Path, tmp_path: Path) -> None:
    model = loading.load_model(model_folder)
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = model.scheduler.model_copy(update=changes)
    loading.save_model(tmp_path / "x.safetensors", replace(model, scheduler=scheduler))
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "x.safetensors").keys()
    assert loading.load_model(tmp_path / "x.safetensors").scheduler == scheduler


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda tensors: tensors["unet/conv_in.bias"].neg_(), "unequal=('unet/conv_in.bias',)"),
        (lambda tensors: tensors.pop("vae/quant_conv.bias"), "missing=('vae/quant_conv.bias',)"),
        (lambda tensors: tensors.update({"vae/novelty": torch.ones(1)}), "unexpected=('vae/novelty',)"),
    ],
)
def test_what_does_not_come_through_is_named_and_not_left_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], Any], field: str
) -> None:
    from pipelines import convert as module

    # a bias of zeros is as good as one of negative zeros to all but the bits
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(unet).items()}
    weights["conv_in.bias"].zero_()
    unet.unlink()
    save_file(weights, unet)
    tensors_of, calls = module._tensors, []

    def damaged(stored: Any) -> Any:
        tensors = {name: tensor.clone() for name, tensor in tensors_of(stored).items()}
        calls.append(stored)
        if len(calls) == 2:  # the way back
            damage(tensors)
        return tensors

    monkeypatch.setattr(module, "_tensors", damaged)
    with pytest.raises(ValueError, match=r"x.safetensors would not be the same model as") as caught:
        convert(folder, tmp_path / "x.safetensors")
    assert field in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_the_default_model_there_and_back(tmp_path: Path) -> None:
    first = convert(loading.DEFAULT_MODEL, tmp_path / "x.safetensors")
    second = convert(tmp_path / "x.safetensors", tmp_path / "folder")
    assert first.holds
    assert second.holds
    assert set(first.left_out) == {"README.md", "sheet.png"}
    assert first.forward == second.forward == {"unet": 0.0, "vae": 0.0, "text_encoder": 0.0}
    for path in loading.DEFAULT_MODEL.rglob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "folder" / path.relative_to(loading.DEFAULT_MODEL)), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_command_prints_the_path_and_what_matters(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.safetensors"
    code, out, err = command(capsys, "convert", model_folder, target, "--dtype", "bf16", "--json")
    assert code == 0
    path, last = out.splitlines()
    assert path == str(target)
    record = json.loads(last)
    assert set(record) == set(Certificate.__dataclass_fields__)
    assert (record["destination"], record["dtypes"], record["unequal"]) == (str(target), ["bfloat16"], [])
    lines = err.splitlines()
    assert lines[0] == "notice: Stable Diffusion 1.x, prediction type epsilon (scheduler/scheduler_config.json)"
    assert lines[1].endswith("tensors, all configs and the tokenizer come back equal; outputs differ by: " + ", ".join(
        f"{part} {value:.2g}" for part, value in record["forward"].items()
    ))  # fmt: skip
    assert lines[2] == f"notice: rounding changed values by up to {record['rounding']:.2g}"
    assert lines[3].startswith("notice: other programs cannot read it: unet.block_out_channels is (16, 32), not")
    (tmp_path / "extra").mkdir()
    assert command(capsys, "convert", target, tmp_path / "extra")[:2] == (0, f"{tmp_path / 'extra'}\n")
    (tmp_path / "extra" / "notes").touch()
    err = command(capsys, "convert", tmp_path / "extra", tmp_path / "y.safetensors")[2]
    assert "notice: left out: notes\n" in err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["none", "x"], "model none does not exist"),
        (["{model}", "x.ckpt"], "would be a pickle"),
        (["{model}", "x", "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["{model}", "x", "--prediction", "noise"], "prediction 'noise' is unknown"),
        (["{model}", "x", "--ema"], "holds one set of weights only"),
        (["{model}", "taken"], "exists and is no model"),
        (["p.ckpt", "x"], "is a pickle"),
        (["p.ckpt", "x", "--allow-pickle"], "is no intact checkpoint"),
        (["{model}"], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fault: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_bytes(b"")
    Path("p.ckpt").write_bytes(b"")
    named = [argument.format(model=model_folder) for argument in arguments]
    code, out, err = command(capsys, "convert", *named)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fault.lower() in err.lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.ckpt", "taken"]


def test_inspection(model_folder: Path, file: Path) -> None:
    reports = [inspect_model(source) for source in (model_folder, file)]
    assert [report.layout for report in reports] == ["folder", "single file"]
    assert [report.model for report in reports] == [str(model_folder), str(file)]
    assert replace(reports[0], layout="", model="", prediction_reason="") == replace(
        reports[1], layout="", model="", prediction_reason=""
    )
    report = reports[1]
    assert (report.family, report.prediction_type, report.zero_terminal_snr) == (
        *("Stable Diffusion 1.x", "epsilon", False),
    )
    assert (report.picture_size, report.latent_channels, report.context) == ((64, 64), 4, (77, 32))
    model = loading.load_model(model_folder)
    for part, network in (("unet", model.unet), ("vae", model.autoencoder), ("text_encoder", model.text_encoder)):
        parameters = list(network.parameters())
        assert report.networks[part].parameters == sum(each.numel() for each in parameters)
        assert report.networks[part].bytes == 4 * report.networks[part].parameters
        assert report.networks[part].class_name == loading.CLASS_NAMES[type(network)][1]
        assert report.networks[part].dtypes == {"float32": len(parameters)}
    assert (report.odd_keys, report.has_moving_average) == ((), False)


def test_odd_keys_are_told_from_usual_ones(file: Path, tmp_path: Path) -> None:
    odd = {"novelty": 1, "first_stage_model.novelty": 1, "cond_stage_model.transformer.vision_model.x": 1}
    usual = {
        **{"alphas_cumprod": 1, "sqrt_one_minus_alphas_cumprod": 1, "betas": 1, "global_step": 1, "v_pred": 0},
        **{"model_ema.decay": 1, "first_stage_model.loss.logvar": 1, "cond_stage_model.logit_scale": 1},
        **{"cond_stage_model.model.text_projection": 1, "posterior_mean_coef1": 1},
        "cond_stage_model.transformer.text_model.embeddings.position_ids": 1,
    }
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    extra = {name: torch.ones(size) for name, size in {**odd, **usual}.items()}
    save_file({**load_file(file), **extra}, tmp_path / "odd.safetensors", metadata)
    report = inspect_model(tmp_path / "odd.safetensors")
    assert set(report.odd_keys) == set(odd)
    assert report.has_moving_average


def test_inspect_at_the_command_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "inspect", file, "--json")
    assert (code, out.count("\n"), err) == (0, 1, "")
    report = json.loads(out)
    assert report["prediction_reason"] == "scheduler/scheduler_config.json in its metadata"
    code, out, _ = command(capsys, "inspect", file)
    assert (code, json.loads(out)) == (0, report)
    assert out.count("\n") > 10
    assert json.loads(command(capsys, "inspect", file, "--prediction", "v", "--json")[1])["prediction_type"] == (
        "v_prediction"
    )
    assert json.loads(command(capsys, "inspect")[1])["model"] == str(loading.DEFAULT_MODEL)
    monkeypatch.setattr(torch, "load", None)
    (tmp_path / "x.ckpt").write_bytes(b"")
    code, out, err = command(capsys, "inspect", tmp_path / "x.ckpt")
    assert (code, out) == (2, "")
    assert "is a pickle" in err
    assert "--allow-pickle" not in command(capsys, "inspect", "--help")[1]
