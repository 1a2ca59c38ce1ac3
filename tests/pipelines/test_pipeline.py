import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.samplers import StepInfo
from pipelines import TextToImagePipeline, loading, runtime, text_to_image
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings

PROMPT = "a red house"
SHAPE = (4, 8, 8)


def latents_of(pipe: TextToImagePipeline, prompt: Any = PROMPT, **options: Any) -> torch.Tensor:
    latents = pipe(prompt, output_type="latent", **{"num_inference_steps": 4, **options}).images
    assert isinstance(latents, torch.Tensor)
    return latents


def with_settings(pipe: TextToImagePipeline, **settings: Any) -> TextToImagePipeline:
    return TextToImagePipeline(replace(pipe.model, settings=Settings(**settings)), "cpu", "float32")


@pytest.mark.parametrize(
    ("spacing", "prediction", "zero_terminal", "to_one"),
    [
        ("leading", "epsilon", False, False),
        ("leading", "sample", False, True),
        ("trailing", "v_prediction", True, True),
        ("trailing", "v_prediction", False, False),
    ],
)
def test_diffusers_renders_the_same(
    model_folder: Path, tmp_path: Path, spacing: str, prediction: str, zero_terminal: bool, to_one: bool
) -> None:
    from diffusers import StableDiffusionPipeline

    model = loading.load_model(model_folder)
    changes = {
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_terminal,
        "set_alpha_to_one": to_one,
    }
    scheduler = model.scheduler.model_copy(update=changes)
    pipe = TextToImagePipeline(replace(model, scheduler=scheduler), "cpu", "float32")
    pipe.save_pretrained(tmp_path / "saved")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True, use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    # five steps divide the schedule; where they do not, diffusers steps to times that are not on its grid
    theirs: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 7.5, "negative_prompt": ["blue"] * 2}
    expected = stock([PROMPT, "two fish"], latents=noise, output_type="latent", **theirs).images
    ours = {**theirs, "latents": noise}
    assert (latents_of(pipe, [PROMPT, "two fish"], **ours) - expected).abs().max() < 1e-3
    expected_images = stock([PROMPT, "two fish"], latents=noise, output_type="np", **theirs).images
    images = np.stack([np.asarray(image) for image in pipe([PROMPT, "two fish"], **ours).images])
    assert images.std() > 5
    difference = np.abs(images.astype(int) - (expected_images * 255).round().astype(int))
    assert (difference <= 1).mean() >= 0.999


STOCK_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "diffusers:UniPCMultistepScheduler": ("UniPCMultistepScheduler", {}),
    "diffusers:DEISMultistepScheduler": ("DEISMultistepScheduler", {}),
}


@pytest.mark.parametrize("sampler", STOCK_SCHEDULERS)
def test_each_sampler_renders_as_in_diffusers(model_folder: Path, tmp_path: Path, sampler: str) -> None:
    import diffusers

    model = loading.load_model(model_folder)
    process = {"timestep_spacing": "trailing", "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    pipe = TextToImagePipeline(replace(model, scheduler=model.scheduler.model_copy(update=process)), "cpu", "float32")
    pipe.save_pretrained(tmp_path / "saved")
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    name, settings = STOCK_SCHEDULERS[sampler]
    stock.scheduler = getattr(diffusers, name).from_config(stock.scheduler.config, **settings)
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    # diffusers starts from sigma / alpha times the noise where it steps x / alpha, and so from sigma times it
    stock.scheduler.set_timesteps(20)
    _, sigma = pipe.schedule.at(torch.tensor(999))
    start = float(stock.scheduler.init_noise_sigma)
    theirs = noise if start == 1 else noise / sigma.float()
    expected = stock(PROMPT, latents=theirs, num_inference_steps=20, guidance_scale=4, output_type="latent").images
    found = latents_of(pipe, latents=noise, num_inference_steps=20, guidance_scale=4, sampler=sampler)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max().clamp(min=1)


PNDM = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
LEADING_KARRAS = {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True}


@pytest.mark.parametrize(
    ("name", "settings", "sampler"),
    [
        ("PNDMScheduler", PNDM, "diffusers:PNDMScheduler"),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, "dpm++"),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}, "diffusers:UniPCMultistepScheduler"),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, "diffusers:UniPCMultistepScheduler"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpm++"),
        ("DPMSolverMultistepScheduler", {}, "dpm++"),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "dpm++"),
        ("DPMSolverSinglestepScheduler", {}, "diffusers:DPMSolverSinglestepScheduler"),
        ("UniPCMultistepScheduler", {"timestep_spacing": "leading"}, "diffusers:UniPCMultistepScheduler"),
        ("EulerDiscreteScheduler", LEADING_KARRAS, "euler"),
        ("LMSDiscreteScheduler", LEADING_KARRAS, "diffusers:LMSDiscreteScheduler"),
        ("DDIMScheduler", {"timestep_spacing": "leading", "clip_sample": False, "steps_offset": 1}, "ddim"),
        ("DDIMScheduler", {"clip_sample": True, "steps_offset": 0}, "ddim"),
    ],
)
def test_a_folder_s_own_scheduler_is_the_default(
    model_folder: Path, tmp_path: Path, name: str, settings: dict[str, Any], sampler: str
) -> None:
    import diffusers

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    process = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = getattr(diffusers, name)(**process, **settings)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    (folder / "ldm.json").unlink(missing_ok=True)
    stock = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    pipe = TextToImagePipeline.from_pretrained(folder, "cpu", "float32")
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = stock(PROMPT, latents=noise, num_inference_steps=20, guidance_scale=4, output_type="latent").images
    out = pipe(PROMPT, latents=noise, num_inference_steps=20, guidance_scale=4, output_type="latent")
    assert out.request.sampler == sampler
    assert (out.images - expected).abs().max() < 1e-3 * expected.abs().max().clamp(min=1)
    pipe.save_pretrained(tmp_path / "saved")
    saved = TextToImagePipeline.from_pretrained(tmp_path / "saved", "cpu", "float32")
    again = saved(PROMPT, latents=noise, num_inference_steps=20, guidance_scale=4, output_type="latent")
    assert torch.equal(again.images, out.images)


def test_a_scheduler_that_clips_renders_as_in_diffusers(model_folder: Path) -> None:
    """As models of pixels want it; here of latents, of which hardly one in three would else be within the range."""
    import diffusers

    stock = diffusers.StableDiffusionPipeline.from_pretrained(model_folder, local_files_only=True, use_safetensors=True)
    process = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    clips = {"clip_sample": True, "clip_sample_range": 0.4}
    stock.scheduler = diffusers.DDPMScheduler(**process, **clips, timestep_spacing="trailing")
    stock.set_progress_bar_config(disable=True)
    scheduler = SchedulerConfig.from_diffusers_config({**stock.scheduler.config, "_class_name": "DDPMScheduler"})
    model = replace(loading.load_model(model_folder), scheduler=scheduler)  # in a folder of latents it is mended
    pipe = TextToImagePipeline(model, "cpu", "float32")
    options: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "latent"}
    found = pipe(PROMPT, seed=5, **options).images
    expected = stock(PROMPT, generator=torch.Generator().manual_seed(5), **options).images
    assert (found - expected).abs().max() < 1e-3
    assert (expected.abs() == 0.4).float().mean() > 0.5


def test_an_unknown_sampler_of_diffusers(pipe: TextToImagePipeline) -> None:
    with pytest.raises(ValueError, match="'UniPCScheduler' is no variance-preserving scheduler"):
        pipe(PROMPT, sampler="diffusers:UniPCScheduler")


def test_loras_come_and_go(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    weight = pipe.unet.get_parameter(f"{name}.weight")
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    before, original = latents_of(pipe), weight.clone()
    pipe.load_loras([(tmp_path / "lora.safetensors", 0.5)])
    torch.testing.assert_close(pipe.unet.get_parameter(f"{name}.weight"), original + 0.5 * up @ down)
    assert not torch.equal(latents_of(pipe), before)
    pipe.unload_loras()
    assert torch.equal(pipe.unet.get_parameter(f"{name}.weight"), original)
    assert torch.equal(latents_of(pipe), before)


def test_seeds_and_eta_are_those_of_a_list_of_generators(pipe: TextToImagePipeline, model_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(model_folder, local_files_only=True, use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5 + index) for index in range(4)]
    options: dict[str, Any] = {"num_images_per_prompt": 2, "num_inference_steps": 4, "eta": 0.7, "guidance_scale": 3.0}
    expected = stock([PROMPT, "a boat"], generator=generators, output_type="latent", **options).images
    ours = pipe([PROMPT, "a boat"], seed=5, output_type="latent", **options)
    assert ours.seeds == [5, 6, 7, 8]
    assert (ours.images - expected).abs().max() < 1e-3
    generators = [torch.Generator().manual_seed(5 + index) for index in range(4)]
    again = pipe([PROMPT, "a boat"], generator=generators, output_type="latent", **options)
    assert torch.equal(again.images, ours.images)
    assert again.seeds == [None] * 4


def test_one_generator_draws_for_the_whole_batch(pipe: TextToImagePipeline) -> None:
    ours = latents_of(pipe, [PROMPT, "a boat"], generator=torch.Generator().manual_seed(3))
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours, latents_of(pipe, [PROMPT, "a boat"], latents=noise))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(
    pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    prompts = ["a house", "two red boats", "a fish"]
    options = {"sampler": sampler, "eta": 0.5 if sampler == "ddim" else 0.0}
    together = latents_of(pipe, prompts, num_images_per_prompt=2, seed=10, **options)
    for index in range(6):
        alone = latents_of(pipe, prompts[index // 2], seed=10 + index, **options)
        assert (together[index] - alone[0]).abs().max() < 1e-4
    monkeypatch.setattr(text_to_image, "BATCH", 4)
    assert (latents_of(pipe, prompts, num_images_per_prompt=2, seed=10, **options) - together).abs().max() < 1e-4
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_big_batches_go_through_the_networks_in_parts(
    pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_to_image, "BATCH", 2)
    sizes: list[int] = []
    hook = pipe.unet.conv_out.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        out = pipe(PROMPT, num_images_per_prompt=5, num_inference_steps=1, guidance_scale=3.0)
        assert sizes == [4, 4, 2]
        pipe(PROMPT, num_inference_steps=1, guidance_scale=1.0)
        assert sizes[3:] == [1]
    finally:
        hook.remove()
    assert len(out.images) == 5


def test_the_kinds_of_output(pipe: TextToImagePipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 4}
    images = pipe(PROMPT, output_type="pt", **options).images
    assert isinstance(images, torch.Tensor)
    assert images.shape == (1, 3, 64, 64)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    latents = latents_of(pipe, **options)
    assert torch.allclose((pipe.autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1), images, atol=1e-6)
    (picture,) = pipe(PROMPT, **options).images
    assert isinstance(picture, Image.Image)
    assert np.array_equal(np.asarray(picture), (images[0] * 255).round().permute(1, 2, 0).byte().numpy())


def test_sizes(pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipe(PROMPT, num_inference_steps=1, width=56, height=72).images[0].size == (56, 72)
    assert capsys.readouterr().err == ""
    assert pipe(PROMPT, num_inference_steps=1, width=96).images[0].size == (96, 64)
    assert capsys.readouterr().err == "notice: 96x64 is far from the 64x64 that the model was trained at\n"


def test_the_model_has_a_say_in_what_is_not_given(pipe: TextToImagePipeline) -> None:
    own = with_settings(pipe, steps=3, guidance=2.0, sampler="ddpm")
    request = own(PROMPT).request
    assert (request.steps, request.guidance, request.sampler) == (3, 2.0, "ddpm")
    expected = latents_of(pipe, num_inference_steps=3, guidance_scale=2.0, sampler="ddpm")
    assert torch.equal(latents_of(own, num_inference_steps=None), expected)
    request = pipe(PROMPT, output_type="latent").request
    assert (request.steps, request.guidance, request.sampler) == (20, 7.5, "ddim")
    assert (request.height, request.width, request.negatives) == (64, 64, ("",))


def test_what_is_asked_for_matters(pipe: TextToImagePipeline) -> None:
    first = latents_of(pipe)
    for change in (
        {"prompt": "a blue boat"},
        {"negative_prompt": "a boat"},
        {"num_inference_steps": 5},
        {"guidance_scale": 2.0},
        {"guidance_rescale": 0.7},
        {"sampler": "ddpm"},
        {"spacing": "karras"},
        {"eta": 1.0},
        {"seed": 1},
    ):
        assert (latents_of(pipe, **change) - first).abs().max() > 1e-3, change
    assert torch.equal(latents_of(pipe), first)


def test_shortcuts_change_the_picture_and_save_evaluations(pipe: TextToImagePipeline) -> None:
    batches: list[int] = []
    deep: list[int] = []
    hooks = [
        pipe.unet.conv_out.register_forward_hook(lambda _, given, __: batches.append(len(given[0]))),
        pipe.unet.mid_block.register_forward_hook(lambda *_: deep.append(1)),
    ]
    try:
        exact = latents_of(pipe)
        assert (batches, len(deep)) == ([2] * 4, 4)
        for change, wanted, whole in (
            ({"reuse": 2}, [2, 2, 2, 2], 2),
            ({"reuse": 4}, [2, 2, 2, 2], 1),
            ({"merge_tokens": 0.5}, [2, 2, 2, 2], 4),
            ({"guidance_interval": (0.5, 4.0)}, [1, 2, 2, 1], 4),  # sigma / alpha of the steps: 4.1, 1.6, 0.7, 0.03
            ({"guidance_interval": (0.0, 100.0)}, [2, 2, 2, 2], 4),
        ):
            batches.clear(), deep.clear()
            far = (latents_of(pipe, **change) - exact).abs().max()
            assert (batches, len(deep)) == (wanted, whole), change
            assert (far == 0) if change == {"guidance_interval": (0.0, 100.0)} else (far > 1e-4), change
        assert torch.equal(latents_of(pipe), exact)
    finally:
        for hook in hooks:
            hook.remove()


def test_shortcuts_go_with_a_picture_to_start_from(pipe: TextToImagePipeline) -> None:
    image, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    shortcuts = {"reuse": 2, "merge_tokens": 0.25, "guidance_interval": (0.1, 10.0)}
    given = {"image": image, "mask_image": mask, "num_inference_steps": 4}
    plain, short = (latents_of(pipe, **given, **each) for each in ({}, shortcuts))
    assert torch.allclose(plain[..., 5:], short[..., 5:], atol=1e-5)  # what is known stays
    assert (plain - short).abs().max() > 1e-3


def test_a_picture_in_tiles_is_nearly_the_same(pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, small = (pipe(PROMPT, output_type="pt", tiled=tiled).images for tiled in (False, True))
    assert torch.equal(whole, small)  # it fits into one tile
    monkeypatch.setattr(text_to_image, "TILE", 6)
    monkeypatch.setattr(text_to_image, "OVERLAP", 2)
    tiles = pipe(PROMPT, output_type="pt", tiled=True).images
    assert 0 < (tiles - whole).abs().max() < 0.5


def test_negative_prompts_may_differ(pipe: TextToImagePipeline) -> None:
    both = latents_of(pipe, [PROMPT, PROMPT], negative_prompt=["a", "b"])
    assert (both[1] - latents_of(pipe, negative_prompt="b", seed=1)[0]).abs().max() < 1e-4


def test_each_step_is_told_and_may_cancel(pipe: TextToImagePipeline) -> None:
    steps: list[StepInfo] = []
    latents = latents_of(pipe, on_step=steps.append)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert torch.equal(steps[-1].x, latents)

    class CancelledError(Exception):
        pass

    def cancel(_: StepInfo) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        pipe(PROMPT, on_step=cancel)


def test_words_that_the_model_never_saw(pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    own = with_settings(pipe, words=("a", "house", "red"))
    latents_of(own, "A red house, 2")
    assert capsys.readouterr().err == ""
    latents_of(own, ["a zebra", "a gnu"], negative_prompt="ugly")
    assert capsys.readouterr().err == "notice: the model never saw these words: gnu, ugly, zebra\n"


def test_text_that_is_cut_is_shown(pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    latents_of(pipe, "x" * 75)
    assert capsys.readouterr().err == ""
    latents_of(pipe, "x " * 75 + "the end")
    assert capsys.readouterr().err == "notice: the prompt is too long; this part is left out: the end\n"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": [PROMPT, ""]}, "prompt is empty"),
        ({"prompt": [3]}, "a prompt is int; give text"),
        ({"prompt": "x" * 10_001}, "has 10001 characters; give at most 10000"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"num_images_per_prompt": 0}, "0 pictures of each prompt"),
        ({"num_images_per_prompt": 10**9}, "1000000000 pictures of each prompt"),
        ({"num_inference_steps": 0}, "steps is 0; give a number from 1 to 1000"),
        ({"num_inference_steps": 1001}, "steps is 1001"),
        ({"guidance_scale": float("nan")}, "guidance is nan"),
        ({"guidance_scale": float("inf")}, "guidance is inf"),
        ({"guidance_rescale": 1.5}, "guidance rescale is 1.5"),
        ({"eta": -0.5}, "eta is -0.5"),
        ({"eta": 0.5, "sampler": "ddpm"}, "'ddpm' has no eta; leave it at 0 or use ddim"),
        (
            {"spacing": "magic"},
            "spacing 'magic' is unknown; there are leading, trailing, linspace, karras, exponential$",
        ),
        ({"sampler": "magic"}, "sampler 'magic' is unknown; there are ddim, ddpm"),
        ({"width": 100}, "width is 100, which is not a multiple of 8; the nearest is 96"),
        ({"height": 4}, "height is 4, which is not a multiple of 8; the nearest is 8"),
        ({"width": 0}, "width is 0; give a number from 8 to 4096"),
        ({"height": -8}, "height is -8"),
        ({"width": 10**9}, "width is 1000000000"),
        ({"output_type": "np"}, "output_type 'np' is unknown; there are pil, pt, latent"),
        ({"prompt_syntax": "magic"}, "prompt syntax 'magic' is unknown; there are plain, weighted"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 1, "generator": torch.Generator()}, "neither generator nor latents"),
        ({"seed": 1, "latents": torch.zeros(1, *SHAPE)}, "neither generator nor latents"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(2, *SHAPE)}, r"latents are \[2, 4, 8, 8\]; these pictures need \[1, 4, 8, 8\]"),
        ({"latents": torch.full((1, *SHAPE), torch.nan)}, "the given latents hold NaN"),
    ],
)
def test_bad_requests_are_refused_in_one_line(pipe: TextToImagePipeline, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        pipe(**{"prompt": PROMPT, **options})
    assert "\n" not in str(caught.value)


def test_lone_surrogates_render(pipe: TextToImagePipeline) -> None:
    assert pipe("a \udc80 b", num_inference_steps=1, output_type="latent").request.prompts == ("a ? b",)


def test_a_picture_that_is_not_finite_is_an_error(pipe: TextToImagePipeline) -> None:
    with torch.no_grad():
        bias = pipe.unet.conv_out.bias
        assert isinstance(bias, torch.Tensor)
        kept = bias.clone()
        bias.fill_(torch.nan)
        with pytest.raises(ValueError, match="256 of 256 values that are not finite: try the network in float32"):
            pipe(PROMPT, num_inference_steps=1)
        bias.copy_(kept)
        scale = pipe.autoencoder.post_quant_conv.weight
        kept = scale.clone()
        scale.fill_(torch.inf)
        with pytest.raises(ValueError, match="the decoded images hold NaN"):
            pipe(PROMPT, num_inference_steps=1)
        scale.copy_(kept)


def test_nothing_opens_a_socket(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    pipe = TextToImagePipeline.from_pretrained(model_folder)
    pipe(PROMPT, num_inference_steps=1)
    pipe.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16", torch.float32])
def test_the_networks_run_in_the_dtype_and_the_sampler_in_float32(model_folder: Path, dtype: Any) -> None:
    pipe = TextToImagePipeline.from_pretrained(str(model_folder), device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {pipe.dtype}
    out = pipe(PROMPT, num_inference_steps=2, output_type="latent")
    assert out.images.dtype == torch.float32
    assert len(pipe(PROMPT, num_inference_steps=2).images) == 1


def test_modules_are_ready_to_render(pipe: TextToImagePipeline) -> None:
    for module in (pipe.unet, pipe.autoencoder, pipe.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert runtime.pick_device() == torch.device("cpu")
    assert runtime.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda' is not available here; use cpu"):
        runtime.pick_device("cuda")
    with pytest.raises(ValueError, match="device 'gpu' is unknown"):
        runtime.pick_device("gpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert runtime.pick_device() == torch.device("cuda")
    assert runtime.pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="device 'cuda:1' does not exist; there are 1"):
        runtime.pick_device("cuda:1")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert runtime.pick_dtype("bf16", cpu) == runtime.pick_dtype(torch.bfloat16, cuda) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype 'int8' is unknown; use bf16, bfloat16"):
        runtime.pick_dtype("int8", cpu)
    for flag, expected in (("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flag=flag: {flag: True})
        assert runtime.pick_dtype(None, cpu) == expected
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert runtime.pick_dtype(None, cuda) == expected
    assert runtime.pick_dtype(None, torch.device("mps")) == torch.float32


def test_where_float16_is_too_narrow_the_autoencoder_goes_on_in_float32(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype="fp16")
    plain = TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype="fp16")
    decode, seen = pipe.autoencoder.decode, []

    def narrow(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents.dtype)
        return decode(latents) * (torch.inf if latents.dtype == torch.float16 else 1)

    pipe.autoencoder.decode = narrow  # type: ignore[method-assign]
    for _ in range(2):
        (image,) = pipe(PROMPT, num_inference_steps=1, output_type="pt").images
    assert seen == [torch.float16, torch.float32, torch.float32]
    assert capsys.readouterr().err == "notice: this autoencoder's values exceed float16; it decodes in float32\n"
    (expected,) = plain(PROMPT, num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close(image, expected, atol=0.02, rtol=0)


def test_guidance_below_1_is_worth_a_notice_unless_it_is_the_model_s_own(
    pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(PROMPT, num_inference_steps=1, guidance_scale=0.0)
    assert "notice: guidance 0 leads away from the prompt; 1 is unguided" in capsys.readouterr().err
    monkeypatch.setattr(pipe, "settings", pipe.settings.model_copy(update={"guidance": 0.0}))
    pipe(PROMPT, num_inference_steps=1)
    assert "guidance" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"reuse": 2}, {"merge_tokens": 0.5}, {"tiled": True}], ids=str)
def test_shortcuts_do_not_go_with_compile(model_folder: Path, options: dict[str, Any]) -> None:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype="float32", compile=True)
    with pytest.raises(ValueError, match="reuse, merge tokens and tiled do not go with compile; leave out one"):
        pipe(PROMPT, **options)
