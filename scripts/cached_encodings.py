"""What the U-Net trains on, encoded once: the pictures' latents, on disk, and the captions' contexts, in memory."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from tqdm import tqdm

from autoencoder.bottleneck import DiagonalGaussian
from ldm.training import randomness
from ldm.training.data import Batch, CaptionedDataset, CaptionedImages, Place
from pipelines.loading import load_autoencoder
from pipelines.runtime import pick_dtype, prepare
from pipelines.stored_model import MODULE_STEM
from pipelines.weights import files_of, find_weights

OF_THE_DECODER = ("decoder.", "post_quant_conv.")
"""Weights on which latents do not depend: an autoencoder with another decoder has the same ones."""


class CaptionedLatents(CaptionedDataset):
    """The posterior moments [2C,h,w] of every picture, float16, encoded once and kept in a file of their own."""

    def __init__(self, moments: Tensor, captions: list[str]) -> None:
        self.moments = moments
        self.captions = captions
        self.workers = 0

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, place: Place) -> tuple[Tensor, str, Place]:
        return self.moments[place[0]].float(), self.captions[place[0]], place


@torch.no_grad()
def encode_first(count: int, images: CaptionedImages, folder: Path, device: torch.device) -> Tensor:
    """Moments [count,2C,h,w] of the first pictures under the autoencoder in `folder`.

    Raises ValueError if their latents are not finite.
    """
    autoencoder = load_autoencoder(folder)
    prepare(autoencoder, device, pick_dtype(None, device))
    dtype = next(autoencoder.parameters()).dtype
    scale = autoencoder.config.scaling_factor
    moments = []
    for start in tqdm(range(0, count, 64), desc="encoding", unit="batch"):
        batch = images.images(start, min(start + 64, count)).to(device, dtype, memory_format=torch.channels_last)
        posterior = autoencoder.posterior(batch)
        scaled = torch.cat(
            [posterior.mean.float() * scale, posterior.logvar.float() + 2 * torch.tensor(scale).log()], 1
        )
        moments.append(scaled.half().cpu())
    whole = torch.cat(moments).contiguous()
    if not bool(whole.chunk(2, dim=1)[0].isfinite().all()):  # log-variances of VQ latents are not
        raise ValueError(f"{folder} makes latents that are not finite: use another autoencoder")
    return whole


def cached_latents(images: CaptionedImages, vae: Path, cache: Path, device: torch.device) -> Tensor:
    """Moments of all pictures, kept in a file named by the encoder, its dtype, the data and their fingerprint."""
    key = hashlib.sha256(f"{images.config.path}/{images.config.size}/{images.rows._fingerprint}".encode())
    key.update(str(pick_dtype(None, device)).encode())
    key.update((vae / "config.json").read_bytes())
    for path in files_of(find_weights(vae, MODULE_STEM)):
        tensors = load_file(path)
        key.update(save({name: t for name, t in tensors.items() if not name.startswith(OF_THE_DECODER)}))
    file = cache / f"latents-{key.hexdigest()[:16]}.safetensors"
    if not file.exists():
        staged = file.with_suffix(".tmp")
        save_file({"moments": encode_first(len(images), images, vae, device)}, staged)
        staged.rename(file)
    return load_file(file)["moments"]


class CachedContexts:
    """captions -> contexts [B,L,D] on the CPU, of captions that were all encoded beforehand, and of ""."""

    @torch.no_grad()
    def __init__(self, encode: Callable[[list[str]], Tensor], captions: list[str]) -> None:
        distinct = sorted({"", *captions})
        self.row = {caption: row for row, caption in enumerate(distinct)}
        starts = tqdm(range(0, len(distinct), 64), desc="encoding captions", unit="batch")
        self.contexts = torch.cat([encode(distinct[start : start + 64]).cpu() for start in starts])

    def __call__(self, captions: list[str]) -> Tensor:
        return self.contexts[[self.row[caption] for caption in captions]]


def sample_posterior(batch: Batch, seed: int) -> Tensor:
    """Latents x0 [B,C,h,w] from the posteriors of which `CaptionedLatents` has the moments."""
    posterior = DiagonalGaussian.from_moments(batch.inputs)
    shape = posterior.mean.shape[1:]
    return posterior.sample(randomness.normal(shape, seed, "posterior", batch.step, batch.positions))
