"""The `ldm` command. torch is imported only once there is something to render, so that `--help` answers at once."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from pipelines import __version__
from pipelines.errors import notice, one_line_errors

if TYPE_CHECKING:
    import torch

    from pipelines.text_to_image import TextToImagePipeline

Prediction = Annotated[
    str | None, typer.Option(help="epsilon, sample or v_prediction; by default what the model says.")
]
EMA = Annotated[bool, typer.Option("--ema", help="Of a single file, take the moving average of the U-Net's weights.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read a .ckpt; nothing but its tensors is built.")]

app = typer.Typer(name="ldm", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; a user's error leaves by SystemExit(2) after one line."""
    with one_line_errors():
        try:
            code = app(args=arguments, prog_name="ldm", standalone_mode=False)
        except TyperException as error:
            raise ValueError(f"{error.format_message()} (see ldm --help)") from None
    return code if isinstance(code, int) else 0


def _print_version(asked: bool) -> None:
    if asked:
        print(f"ldm {__version__}")
        raise typer.Exit


@app.callback()
def ldm(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Text to image with latent diffusion."""


@app.command()
def render(
    prompt: Annotated[str | None, typer.Argument(help="What the picture should show.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, .txt or .jsonl, instead of one. What is in the folder already is skipped."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="PNG file, by default named after prompt and seed; of --prompts, folder."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Stable Diffusion folder, single file or hub:OWNER/NAME; by default the built-in model."),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What the picture should not show.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default the model's own number.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly to follow the prompt; 1 is unguided.")] = None,
    rescale: Annotated[float, typer.Option(help="Guidance rescale, 0 to 1; tames over-exposure.")] = 0.0,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ddim, ddpm, dpm++, dpm++sde, euler, euler_ancestral, heun, ode or diffusers:CLASS; by default the"
            " model's own."
        ),
    ] = None,
    eta: Annotated[float, typer.Option(help="Fresh noise in each ddim step, 0 to 1.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; each next one adds 1.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", help="How many pictures.")] = 1,
    width: Annotated[int | None, typer.Option(help="Width in pixels; by default the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels; by default the model's own.")] = None,
    init: Annotated[Path | None, typer.Option(help="Picture to start from.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --init gives way, 0 to 1; by default 0.8, or 1 under a mask.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="White where to paint over --init, black where to keep it.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA file, FILE[:weight]; may be given several times.")
    ] = None,
    syntax: Annotated[
        Literal["plain", "weighted"], typer.Option(help="weighted understands (a:1.3), [a] and BREAK.")
    ] = "plain",
    clip_skip: Annotated[int, typer.Option(help="Last layers of the text encoder to leave out.")] = 0,
    tiled: Annotated[
        bool, typer.Option("--tiled", help="Decode in tiles, for large pictures in little memory.")
    ] = False,
    spacing: Annotated[
        str | None,
        typer.Option(
            help="How the steps are spaced: leading, trailing, linspace, karras or exponential; by default the model's"
            " own."
        ),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Guide at noise levels sigma / alpha between these two only; changes the picture."),
    ] = None,
    reuse: Annotated[
        int, typer.Option(help="Steps for which the U-Net's deep features are kept; above 1 changes the picture.")
    ] = 1,
    merge_tokens: Annotated[
        float, typer.Option(help="Share of tokens that self-attention merges; above 0 changes the picture.")
    ] = 0.0,
    strict_tokens: Annotated[
        bool, typer.Option("--strict-tokens", help="Refuse a prompt that is too long, instead of cutting it.")
    ] = False,
    prediction: Prediction = None,
    ema: EMA = False,
    allow_pickle: AllowPickle = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or xpu; by default the best.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the fastest.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the networks: pays after minutes, for many pictures of one size.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a last line of JSON.")] = False,
) -> None:
    """Renders a prompt, or those of a file, and prints the path of each picture."""
    if (prompt is None) == (prompts is None):
        raise ValueError("give one prompt in quotes, or a file of them with --prompts")
    if count < 1:
        raise ValueError(f"count is {count}; give at least 1")
    loras = [] if lora is None else [_parse_lora(text) for text in lora]
    began = time.perf_counter()

    def load(device: "str | torch.device | None") -> "TextToImagePipeline":
        from pipelines.text_to_image import TextToImagePipeline

        pipe = TextToImagePipeline.from_pretrained(
            model, device, dtype, prediction, ema, allow_pickle, compile=compiled
        )
        pipe.load_loras(loras)
        return pipe

    options: dict[str, Any] = {
        "negative": negative,
        "steps": steps,
        "guidance": guidance,
        "rescale": rescale,
        "sampler": sampler,
        "eta": eta,
        "width": width,
        "height": height,
        "syntax": syntax,
        "clip_skip": clip_skip,
        "tiled": tiled,
        "spacing": spacing,
        "init": None if init is None else str(init),
        "mask": None if mask is None else str(mask),
        "strength": strength,
        "guidance_interval": guidance_interval,
        "reuse": reuse,
        "merge_tokens": merge_tokens,
    }
    if prompt is not None:
        from pipelines.one_prompt import render_prompt

        made = render_prompt(prompt, output, seed, count, options, strict_tokens, partial(load, device))
    else:
        assert prompts is not None
        if strict_tokens:
            raise ValueError("--strict-tokens goes with one prompt; leave it out with --prompts")
        made = _render_file(prompts, output, seed, {**options, "count": count}, device, load)
    if as_json:
        print(json.dumps({**made, "seconds": round(time.perf_counter() - began, 3)}))


def _parse_lora(text: str) -> tuple[Path, float]:
    from pipelines.lora import parse_lora

    return parse_lora(text)


def _render_file(
    file: Path,
    output: Path | None,
    seed: int,
    options: dict[str, Any],
    device: str | None,
    load: Callable[["str | torch.device | None"], "TextToImagePipeline"],
) -> dict[str, Any]:
    """Renders a file of prompts, prints the path of each picture, and returns what `--json` tells of them."""
    from tqdm import tqdm

    from pipelines.prompt_file import device_of, open_folder, process_of, read_prompts, render_prompts

    process = process_of(os.environ)
    listed = read_prompts(file, seed, options)
    folder = open_folder(output)
    pipe = load(device_of(os.environ, device))
    done = []
    pictures = render_prompts(pipe, listed, folder, process)
    for picture in tqdm(pictures, desc="render", unit="picture", leave=False, disable=not sys.stderr.isatty()):
        print(picture.path)
        done.append({"path": str(picture.path), "seed": picture.seed, "rendered": picture.rendered})
    return {"pictures": done}


@app.command()
def replay(
    image: Annotated[Path, typer.Argument(help="PNG file that was rendered here.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG file for the picture made again.")] = None,
    model: Annotated[str | None, typer.Option(help="The model it was made with; by default the built-in one.")] = None,
    init: Annotated[Path | None, typer.Option(help="The picture that it started from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask that it was painted under.")] = None,
    lora: Annotated[list[Path] | None, typer.Option(help="A LoRA file that it was made with, in their order.")] = None,
    device: Annotated[str | None, typer.Option(help="By default that of the picture.")] = None,
    dtype: Annotated[str | None, typer.Option(help="By default that of the picture.")] = None,
    prediction: Prediction = None,
    ema: EMA = False,
    allow_pickle: AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a last line of JSON.")] = False,
) -> None:
    """Renders a picture again from its own record, and says whether it is identical or how far off."""
    from pipelines.png import check_writable, write_png
    from pipelines.replay import replay

    if output is not None:
        check_writable(output)
    made = replay(
        image,
        model,
        init=init,
        mask=mask,
        loras=lora or [],
        device=device,
        dtype=dtype,
        prediction=prediction,
        ema=ema,
        allow_pickle=allow_pickle,
    )
    for line in made.lines():
        notice(line)
    if output is not None:
        write_png(output, made.image, made.now.model_dump())
        print(output)
    if as_json:
        print(json.dumps(made.summary()))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Stable Diffusion folder, single file or hub:OWNER/NAME.")],
    destination: Annotated[Path, typer.Argument(help="A file that ends in .safetensors, or a folder.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (fp32, bf16, fp16); by default each tensor's own.")
    ] = None,
    prediction: Prediction = None,
    ema: EMA = False,
    allow_pickle: AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as a last line of JSON.")] = False,
) -> None:
    """Turns a model folder into a single file or back, proves that nothing was lost, and prints its path."""
    from pipelines.convert import convert
    from pipelines.runtime import pick_device, pick_dtype

    wanted = None if dtype is None else pick_dtype(dtype, pick_device("cpu"))
    certificate = convert(source, destination, wanted, prediction, ema, allow_pickle)
    for line in certificate.lines():
        notice(line)
    print(destination)
    if as_json:
        print(json.dumps(asdict(certificate)))


@app.command()
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="Stable Diffusion folder, single file or hub:OWNER/NAME; by default the built-in model."),
    ] = None,
    prediction: Prediction = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Tells what a model is: family, prediction type and why, sizes, dtypes, odd keys. Never unpickles."""
    from pipelines.inspection import inspect_model

    print(json.dumps(asdict(inspect_model(model, prediction)), indent=None if as_json else 2))
