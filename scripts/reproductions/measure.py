"""Real pictures, and what the judge makes of any: FID in its features, and its logits of the kinds."""

from dataclasses import dataclass
from functools import cache

import torch
from evaluation.feature_networks import open_network
from evaluation.metrics import frechet
from picturebook import picture
from torch import Tensor

from ldm.pictures import as_tensor

REAL, *OTHERS = range(101, 106)  # seeds of worlds that nothing is trained on
AT_ONCE = 100


@dataclass(frozen=True)
class RealPictures:
    captions: tuple[str, ...]
    images: Tensor
    """[N,3,size,size] in [-1,1]."""


@cache
def real_pictures(count: int, size: int, seed: int) -> RealPictures:
    """The first `count` pictures of the picturebook's `seed`, split train."""
    drawn = [picture(index, seed=seed, size=size) for index in range(count)]
    images = torch.stack([as_tensor(image) for _, image in drawn])
    return RealPictures(tuple(scene.text for scene, _ in drawn), images)


_open = cache(open_network)


@torch.inference_mode()
def _embedded(images: Tensor, network: str, which: str) -> Tensor:
    embed = _open(network, torch.device("cpu")).embed
    return torch.cat([embed(some)[which] for some in images.split(AT_ONCE)])


def features(images: Tensor) -> Tensor:
    """The judge's features [N,D] of images [N,3,H,W] in [-1,1]."""
    return _embedded(images, "judge", "features")


def kind_logits(images: Tensor) -> Tensor:
    """The judge's logits [N,K] of the kind of thing in the cell where it is surest of a thing's centre."""
    return _embedded(images, "judge-things", "logits")


def fid(images: Tensor) -> float:
    """FID of images [N,3,size,size] against as many real ones of their size."""
    return frechet(real_features(len(images), images.shape[-1], REAL), features(images))


@cache
def real_features(count: int, size: int, seed: int) -> Tensor:
    return features(real_pictures(count, size, seed).images)


def real_against_real(count: int, size: int) -> tuple[float, float]:
    """FID of `count` real pictures against as many others: its mean and standard deviation over sets of others."""
    real = real_features(count, size, REAL)
    distances = torch.tensor([frechet(real, real_features(count, size, seed)) for seed in OTHERS])
    return distances.mean().item(), distances.std().item()
