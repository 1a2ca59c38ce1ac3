"""The `ldm` command. torch is imported only once there is something to render, so that `--help` answers at once."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from pipelines import __version__
from pipelines.errors import notice, one_line_errors

if TYPE_CHECKING:
    from pipelines.text_to_image import TextToImageOutput, TextToImagePipeline

SLUG_LENGTH = 60

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
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG file to write; by default named after prompt and seed.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Stable Diffusion folder, single file or hub:OWNER/NAME; by default the built-in model."),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What the picture should not show.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default the model's own number.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly to follow the prompt; 1 is unguided.")] = None,
    rescale: Annotated[float, typer.Option(help="Guidance rescale, 0 to 1; tames over-exposure.")] = 0.0,
    sampler: Annotated[str | None, typer.Option(help="Sampler, such as ddim or ddpm.")] = None,
    eta: Annotated[float, typer.Option(help="Fresh noise in each ddim step, 0 to 1.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; each next one adds 1.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", help="How many pictures.")] = 1,
    width: Annotated[int | None, typer.Option(help="Width in pixels; by default the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels; by default the model's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or xpu; by default the best.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the fastest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a last line of JSON.")] = False,
) -> None:
    """Renders a prompt and prints the path of each picture."""
    if count < 1:
        raise ValueError(f"count is {count}; give at least 1")
    from pipelines.png import check_writable

    paths = output_paths(output, prompt, seed, count)
    for path in paths:
        check_writable(path)

    from pipelines.text_to_image import TextToImagePipeline

    start = time.perf_counter()
    pipe = TextToImagePipeline.from_pretrained(model, device, dtype)
    with _progress(pipe.settings.steps if steps is None else steps) as on_step:
        out = pipe(
            prompt,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_rescale=rescale,
            sampler=sampler,
            eta=eta,
            height=height,
            width=width,
            num_images_per_prompt=count,
            seed=seed,
            on_step=on_step,
        )
    record = write_pictures(pipe, out, paths)
    if as_json:
        pictures = [{"path": str(path), "seed": each} for path, each in zip(paths, out.seeds, strict=True)]
        seconds = round(time.perf_counter() - start, 3)
        print(json.dumps({"pictures": pictures, "seconds": seconds, **record}))


Prediction = Annotated[
    str | None, typer.Option(help="epsilon, sample or v_prediction; by default what the model says.")
]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Stable Diffusion folder, single file or hub:OWNER/NAME.")],
    destination: Annotated[Path, typer.Argument(help="A file that ends in .safetensors, or a folder.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (fp32, bf16, fp16); by default each tensor's own.")
    ] = None,
    prediction: Prediction = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of the U-Net's weights.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a .ckpt; nothing but its tensors is built.")
    ] = False,
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


def output_paths(output: Path | None, prompt: str, seed: int, count: int) -> list[Path]:
    """Where the pictures go: a named file is replaced (`X-0.png`, `X-1.png`, ... for several); a file that is named
    after the prompt never is.
    """
    if output is not None:
        return [output.with_stem(f"{output.stem}-{index}") for index in range(count)] if count > 1 else [output]
    slug = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "picture"
    return [_unused(f"{slug}-{seed + index}") for index in range(count)]


def write_pictures(pipe: "TextToImagePipeline", out: "TextToImageOutput", paths: Sequence[Path]) -> dict[str, Any]:
    """Writes the pictures, prints their paths, and returns the record that they share (all but the seed)."""
    import torch

    from pipelines.loading import DEFAULT_MODEL, weight_files
    from pipelines.png import weights_sha256, write_png

    request, source = out.request, pipe.model.source
    assert source is not None
    shared = {
        "prompt": request.prompts[0],
        "negative": request.negatives[0],
        "steps": request.steps,
        "guidance": request.guidance,
        "rescale": request.rescale,
        "sampler": request.sampler,
        "eta": request.eta,
        "width": request.width,
        "height": request.height,
        "model": "default" if source == DEFAULT_MODEL else source.resolve().name,
        "sha256": weights_sha256(weight_files(source)),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "versions": {"ldm": __version__, "torch": torch.__version__},
    }
    for path, image, seed in zip(paths, out.images, out.seeds, strict=True):
        write_png(path, image, {**shared, "seed": seed})
        print(path)
    return shared


def _unused(name: str) -> Path:
    path, tries = Path(f"{name}.png"), 0
    while path.exists():
        tries += 1
        path = Path(f"{name}-{tries}.png")
    return path


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[object], None]]:
    from tqdm import tqdm

    with tqdm(total=steps, desc="render", unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:

        def on_step(_: object) -> None:
            bar.update()

        yield on_step
