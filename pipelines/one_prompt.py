"""One prompt, rendered batch by batch into files; `prompt_file` has many prompts."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.image_to_image import open_init
from pipelines.png import check_writable, slug, write_png
from pipelines.replay import make_records
from pipelines.request import MAX_PICTURES, checked_seeds
from pipelines.text_to_image import BATCH, TextToImageOutput, TextToImagePipeline

CALLED = {
    "negative": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "rescale": "guidance_rescale",
    "syntax": "prompt_syntax",
    "init": "image",
    "mask": "mask_image",
}
"""How a pipeline's call names the options that it does not name as the command line does."""


def render_prompt(
    prompt: str,
    output: Path | None,
    seed: int,
    count: int,
    options: dict[str, Any],
    strict_tokens: bool,
    load: Callable[[], TextToImagePipeline],
) -> dict[str, Any]:
    """Renders pictures of one prompt, prints the path of each, and returns what `--json` tells of them.

    `options` are named as on the command line. Raises ValueError for what is wrong with them: as far as that is seen
    without the model, before `load` reads it.
    """
    if count > MAX_PICTURES:
        raise ValueError(f"count is {count}; give at most {MAX_PICTURES}")
    seeds = checked_seeds(seed, count)
    paths = output_paths(output, prompt, seed, count)
    for path in paths:
        check_writable(path)
    init, mask, steps = options["init"], options["mask"], options["steps"]
    source = open_init(init, mask, options["strength"])
    pipe = load()
    total = pipe.settings.steps if steps is None else min(steps, pipe.schedule.steps)  # more are refused
    arguments = {CALLED.get(name, name): value for name, value in options.items()}
    if source is not None:
        total = int(total * source.strength)
        arguments |= {"image": source.picture, "mask_image": source.mask}
    # Batch by batch, so that what is there stays if the rest is interrupted.
    batches = [slice(start, start + BATCH) for start in range(0, count, BATCH)]
    records = []
    with _progress(total * len(batches)) as on_step:
        for batch in batches:
            out = pipe(
                prompt,
                num_images_per_prompt=len(paths[batch]),
                seed=seeds[batch][0],
                on_step=on_step,
                strict_tokens=strict_tokens,
                **arguments,
            )
            records.append(_write_pictures(pipe, out, paths[batch], init, mask))
    pictures = [{"path": str(path), "seed": each} for path, each in zip(paths, seeds, strict=True)]
    return {"pictures": pictures, **records[0]}


def output_paths(output: Path | None, prompt: str, seed: int, count: int) -> list[Path]:
    """Where the pictures go: a named file is replaced (`X-0.png`, `X-1.png`, ... for several); a file that is named
    after the prompt never is.
    """
    if output is not None:
        return [output.with_stem(f"{output.stem}-{index}") for index in range(count)] if count > 1 else [output]
    return [_unused(f"{slug(prompt)}-{seed + index}") for index in range(count)]


def _write_pictures(
    pipe: TextToImagePipeline, out: TextToImageOutput, paths: Sequence[Path], init: str | None, mask: str | None
) -> dict[str, Any]:
    """Writes the pictures, prints their paths, and returns the record that they share (all but the seed)."""
    records = [record.model_dump() for record in make_records(pipe, out.request, out.seeds, init, mask)]
    for path, image, record in zip(paths, out.images, records, strict=True):
        write_png(path, image, record)
        print(path)
    return {name: value for name, value in records[0].items() if name != "seed"}


def _unused(name: str) -> Path:
    path, tries = Path(f"{name}.png"), 0
    while path.exists():
        tries += 1
        path = Path(f"{name}-{tries}.png")
    return path


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[object], None]]:
    with tqdm(total=steps, desc="render", unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:

        def on_step(_: object) -> None:
            bar.update()

        yield on_step
