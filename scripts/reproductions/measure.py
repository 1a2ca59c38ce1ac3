"""Real pictures, and what the judge makes of any: FID in its features, its logits of the kinds, captions it reads."""

from dataclasses import dataclass
from functools import cache

import torch
from evaluation.caption_accuracy import accuracy, read_all
from evaluation.feature_networks import open_network
from evaluation.metrics import frechet
from picturebook import Scene, picture
from torch import Tensor

from ldm.pictures import as_tensor

REAL, *OTHERS = range(101, 106)  # seeds of worlds that nothing is trained on
AT_ONCE = 100
THINGS, RIGHT = "FID of things", "captions right"
FIDS = {"FID": "judge", THINGS: "judge-things"}
"""The features that each FID is of, by its name in a table; those of the first see backgrounds first."""
RIGHT_IS = f"{RIGHT.capitalize()}: the share of pictures in which the judge reads all that their caption states."


@dataclass(frozen=True)
class RealPictures:
    scenes: tuple[Scene, ...]
    images: Tensor
    """[N,3,size,size] in [-1,1]."""

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(scene.text for scene in self.scenes)


@cache
def real_pictures(count: int, size: int, seed: int) -> RealPictures:
    """The first `count` pictures of the picturebook's `seed`, split train."""
    drawn = [picture(index, seed=seed, size=size) for index in range(count)]
    images = torch.stack([as_tensor(image) for _, image in drawn])
    return RealPictures(tuple(scene for scene, _ in drawn), images)


_open = cache(open_network)


@torch.inference_mode()
def _embedded(images: Tensor, network: str, which: str) -> Tensor:
    embed = _open(network, torch.device("cpu")).embed
    return torch.cat([embed(some)[which] for some in images.split(AT_ONCE)])


def features(images: Tensor, network: str = "judge") -> Tensor:
    """The judge's features [N,D] of images [N,3,H,W] in [-1,1]."""
    return _embedded(images, network, "features")


def kind_logits(images: Tensor) -> Tensor:
    """The judge's logits [N,K] of the kind of thing in the cell where it is surest of a thing's centre."""
    return _embedded(images, "judge-things", "logits")


def fid(images: Tensor, name: str = "FID") -> float:
    """FID, that of `FIDS`, of images [N,3,size,size] against as many real ones of their size."""
    network = FIDS[name]
    return frechet(real_features(len(images), images.shape[-1], REAL, network), features(images, network))


def judged(images: Tensor, real: RealPictures) -> dict[str, float]:
    """Both FIDs and the share of captions right, of images [N,3,size,size] in [-1,1] of the real pictures' captions."""
    right = accuracy(read_all(real.scenes, images).scores)["accuracy"]
    return {**{name: fid(images, name) for name in FIDS}, RIGHT: right}


@cache
def real_features(count: int, size: int, seed: int, network: str) -> Tensor:
    return features(real_pictures(count, size, seed).images, network)


def real_against_real(count: int, size: int, name: str = "FID") -> tuple[float, float]:
    """FID, that of `FIDS`, of `count` real pictures against as many: its mean and standard deviation over others."""
    real, *others = (real_features(count, size, seed, FIDS[name]) for seed in (REAL, *OTHERS))
    distances = torch.tensor([frechet(real, each) for each in others])
    return distances.mean().item(), distances.std().item()
