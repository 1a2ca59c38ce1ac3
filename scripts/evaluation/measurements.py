"""What an evaluation computes with networks, shared between processes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from picturebook import UNITS, Scene
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from evaluation import metrics
from evaluation.feature_networks import FeatureNetwork
from evaluation.likelihood import bits_per_dimension
from evaluation.real_pictures import RealPictures
from pipelines import TextToImagePipeline
from pipelines.text_to_image import BATCH
from pipelines.weights import read_safetensors

Rows = dict[str, Tensor]
"""A row for each picture: "features" [N,D], perhaps "logits" [N,K], "pixels" uint8 [N,3,H,W], "psnr" [N] and so on."""


@dataclass(frozen=True)
class Measurements:
    """What the networks said of all pictures. The first `len(decoded)` real ones belong to the prompts."""

    real: Rows
    decoded: Rows
    generated: dict[str, Rows]
    """By the name of their guidance."""
    bits: Rows | None


def to_pixels(images: Tensor) -> Tensor:
    """Pictures in [-1,1] as uint8, clamped and rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def from_pixels(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def in_shares(count: int, work: Callable[[int, int], Rows], about: str) -> Rows:
    """`work(start, stop)` of all rows, `BATCH` at once, shared between the processes; all get all, in order.

    What goes through a network together does not depend on the number of processes, so neither does any rounding.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    blocks = [(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    own = blocks[state.process_index :: state.num_processes]
    total, done = sum(stop - start for start, stop in own), []
    with tqdm(total=total, desc=about, disable=not state.is_main_process) as progress, torch.inference_mode():
        for start, stop in own:
            done.append((start, work(start, stop)))
            progress.update(stop - start)
    parts = [rows for _, rows in sorted(gather_object(done), key=lambda each: each[0])]
    return {name: torch.cat([rows[name] for rows in parts]) for name in parts[0]}


def real_features(real: RealPictures, network: FeatureNetwork, cache: Path | None) -> Rows:
    """Features of all real pictures, from the cache folder if they are in it; else they are put there."""
    about = f"{network.sha256[:16]}-{real.size}px-{real.fingerprint[:16]}"
    file = None if cache is None else cache / f"{network.name.partition(' ')[0].lower()}-{about}.safetensors"
    if file is not None and file.is_file():
        return read_safetensors(file)[0]
    rows = in_shares(real.count, lambda start, stop: network.embed(real.images(start, stop)), "real pictures")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_suffix(f".{os.getpid()}")
        save_file(rows, staged, metadata={"resize": network.resize, "data": real.fingerprint})
        staged.replace(file)
    return rows


def measure(
    pipe: TextToImagePipeline,
    real: RealPictures,
    network: FeatureNetwork,
    *,
    guidances: Sequence[float | None] = (None,),
    steps: int | None = None,
    sampler: str | None = None,
    bits: int = 0,
    cache: Path | None = None,
) -> Measurements:
    """Renders and reconstructs, and puts all pictures through the feature network; None is the model's own default."""
    prompts = real.prompts

    def reconstruct(start: int, stop: int) -> Rows:
        images = real.images(start, stop)
        latents = pipe.autoencoder.encode(images.to(pipe.device, pipe.autoencoder_dtype))
        pixels = to_pixels(pipe.autoencoder.decode(latents))
        decoded = from_pixels(pixels)
        rows = {"psnr": metrics.psnr(images, decoded), "ssim": metrics.ssim(images, decoded), "pixels": pixels}
        if real.scenes is not None:
            rows["psnr in boxes"] = psnr_in_boxes(real.scenes[start:stop], images, decoded)
        return network.embed(decoded) | rows

    def render(guidance: float | None, start: int, stop: int) -> Rows:
        images = pipe(
            prompts[start:stop],
            seed=start,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
            output_type="pt",
        ).images
        assert isinstance(images, Tensor)
        pixels = to_pixels(2 * images - 1)
        return network.embed(from_pixels(pixels)) | {"pixels": pixels}

    def count_bits(start: int, stop: int) -> Rows:
        return {"bits": bits_per_dimension(pipe, real.images(start, stop), prompts[start:stop], seed=start)}

    found = real_features(real, network, cache)
    decoded = in_shares(len(prompts), reconstruct, "reconstructions")
    generated = {}
    for guidance in guidances:
        name = f"guidance {pipe.settings.guidance if guidance is None else guidance:g}"
        generated[name] = in_shares(len(prompts), partial(render, guidance), name)
    return Measurements(found, decoded, generated, in_shares(bits, count_bits, "bits") if bits else None)


def psnr_in_boxes(scenes: Sequence[Scene], images: Tensor, decoded: Tensor) -> Tensor:
    """PSNR in dB over the pixels of the things' boxes alone, of each picture [N,3,H,W] in [-1,1]: [N]."""
    found = []
    for scene, error in zip(scenes, (images - decoded).square().mean(1), strict=True):
        inside = torch.zeros_like(error, dtype=torch.bool)
        scale = error.shape[-1] / UNITS
        for group in scene.things:
            for x0, y0, x1, y1 in group.boxes:
                inside[round(y0 * scale) : round(y1 * scale), round(x0 * scale) : round(x1 * scale)] = True
        found.append(10 * torch.log10(4 / error[inside].mean()))
    return torch.stack(found).clamp(max=metrics.EXACT)
