"""The networks in whose features pictures are compared: the judge, Inception v3 or a CLIP, from local files.

    judge               the picturebook's judge, beside this file: its mean features, which see backgrounds first
    judge-things        the spread of its features over the picture, which sees things first
    inception:FILE      Inception v3: the state dict of torch-fidelity or pytorch-fid (FID's own, 1008 classes), or of
                        torchvision (1000 classes)
    clip:FOLDER         a CLIP: a folder that transformers' CLIPModel wrote, or open_clip's with open_clip_config.json

Figures in the features of different networks, or after different resizing, do not compare.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from judge import WEIGHTS, load_judge
from picturebook import UNITS
from torch import Tensor, nn

from pipelines.weights import PICKLES, files_of, find_weights, read_pickle, read_safetensors

HOW = "inception:FILE (Inception v3 of torch-fidelity or torchvision) or clip:FOLDER (of transformers or open_clip)"
INCEPTION_SIZE = 299


@dataclass(frozen=True)
class FeatureNetwork:
    """A network and how it was given its pictures; `classes` says what its logits tell apart, if it has any."""

    name: str
    weights: tuple[Path, ...]
    resize: str
    embed: Callable[[Tensor], dict[str, Tensor]]
    """Images [B,3,H,W] in [-1,1] on any device -> float32 "features" [B,D] and, with classes, "logits" [B,K]; on the
    CPU."""
    classes: str | None = None
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None
    """Captions -> [B,D], in the space of the features; CLIPs alone have it."""
    library: str | None = None

    @cached_property
    def sha256(self) -> str:
        """That of the weights' file; of several, of the list of theirs."""
        digests = []
        for path in self.weights:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def describe(self) -> dict[str, str]:
        """What a reader needs to get the same features."""
        own = {"network": self.name, "file": self.weights[0].name, "sha256": self.sha256, "resize": self.resize}
        if self.classes is not None:
            own["classes"] = self.classes
        return own

    def version(self) -> dict[str, str]:
        """That of the library that runs it."""
        return {self.library: version(self.library)} if self.library else {}


def open_network(source: str, device: torch.device) -> FeatureNetwork:
    """The network that `source` names, as the module's docstring has it, ready on a device.

    Raises:
        ValueError: `source` names no network, or its files are not there or not what they should be.
    """
    kind, _, path = source.partition(":")
    if source in ("judge", "judge-things"):
        return _judge(things=source == "judge-things")
    if kind == "inception" and path:
        return _inception(Path(path), device)
    if kind == "clip" and path:
        return _clip(Path(path), device)
    raise ValueError(f"features {source!r} are unknown; give judge, judge-things, {HOW}")


def _judge(things: bool) -> FeatureNetwork:
    judge = load_judge()

    def embed(images: Tensor) -> dict[str, Tensor]:
        features = judge.features(images.cpu().float())
        center, kinds, *_, backgrounds = judge.answers(features)
        if not things:
            return {"features": features.mean((2, 3)), "logits": backgrounds}
        surest = center.flatten(1).argmax(1)
        return {"features": features.std((2, 3)), "logits": kinds.flatten(2)[range(len(features)), :, surest]}

    classes = "the 16 kinds, of the surest thing" if things else "the 8 backgrounds"
    name = "judge-things" if things else "judge"
    return FeatureNetwork(name, (WEIGHTS,), f"area to {UNITS} px", embed, classes)


class _OwnPooling(nn.Module):
    """A block of torchvision's Inception whose last branch pools as FID's network of 2015 does.

    That one averages over the pixels that there are, without the zeros around them, and in its very last block takes
    the maximum; torchvision does neither.
    """

    def __init__(self, block: nn.Module, largest: bool = False) -> None:
        super().__init__()
        self.block, self.largest = block, largest

    def forward(self, x: Tensor) -> Tensor:
        if self.largest:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        pooled = self.block.branch_pool(pooled)  # type: ignore[operator]
        return torch.cat([self.block(x)[:, : -pooled.shape[1]], pooled], 1)


AVERAGING = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")


def _inception(file: Path, device: torch.device) -> FeatureNetwork:
    try:
        from torchvision.models import Inception3
    except ImportError:
        raise ValueError('Inception needs torchvision: pip install -e ".[train]"') from None
    if not file.is_file():
        raise ValueError(f"features: {file} does not exist; give {HOW}")
    found = read_pickle(file) if file.suffix in PICKLES else read_safetensors(file)[0]
    found = {name: tensor for name, tensor in found.items() if not name.startswith("AuxLogits.")}
    rows = len(found.get("fc.weight", ()))
    if rows not in (1000, 1008):
        raise ValueError(f"{file} is no Inception v3: its fc.weight has {rows} rows instead of 1008 or 1000")
    network = Inception3(rows, aux_logits=False, init_weights=False)
    counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    faults = network.load_state_dict(found, strict=False)
    if odd := sorted({*faults.missing_keys, *faults.unexpected_keys} - counters):
        raise ValueError(f"{file} is no Inception v3: it lacks or has besides {', '.join(odd[:3])}")
    if rows == 1008:
        for name in AVERAGING:
            setattr(network, name, _OwnPooling(getattr(network, name)))
        network.Mixed_7c = _OwnPooling(network.Mixed_7c, largest=True)
    classes = network.fc
    network.fc = nn.Identity()
    network.to(device).eval()

    def embed(images: Tensor) -> dict[str, Tensor]:
        images = _resized(images.to(device), INCEPTION_SIZE)
        if rows == 1008:
            images = (images * 127.5 - 0.5) / 128  # of 0 ... 255 it takes (k - 128) / 128
        features = network(images)
        return {"features": features.cpu(), "logits": classes(features).cpu()}

    name = "Inception v3 of 2015, FID's own" if rows == 1008 else "Inception v3 of torchvision"
    return FeatureNetwork(
        name,
        (file,),
        f"bicubic with antialiasing to {INCEPTION_SIZE} px",
        embed,
        f"{rows} of ImageNet",
        None,
        "torchvision",
    )


def _clip(folder: Path, device: torch.device) -> FeatureNetwork:
    if not folder.is_dir():
        raise ValueError(f"features: folder {folder} does not exist; give {HOW}")
    from_open_clip = (folder / "open_clip_config.json").is_file()
    if not from_open_clip and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no CLIP: it has neither config.json nor open_clip_config.json")
    weights = find_weights(folder, "open_clip_model" if from_open_clip else "model")
    try:
        tower = _open_clip_tower(folder, device) if from_open_clip else _transformers_tower(folder, device)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} is no intact CLIP: {' '.join(str(error).split())[:200]}") from None
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (tower.mean, tower.std))

    def embed(images: Tensor) -> dict[str, Tensor]:
        images = _resized(images.to(device), tower.size)
        return {"features": tower.images(((images + 1) / 2 - mean) / std).float().cpu()}

    def embed_texts(captions: Sequence[str]) -> Tensor:
        return torch.cat([tower.texts(list(captions[i : i + 64])).float().cpu() for i in range(0, len(captions), 64)])

    resize = f"bicubic with antialiasing to {tower.size} px"
    name = "CLIP image tower, joint space, not normalised"
    return FeatureNetwork(name, tuple(files_of(weights)), resize, embed, None, embed_texts, tower.library)


@dataclass(frozen=True)
class _Towers:
    images: Callable[[Tensor], Tensor]
    texts: Callable[[list[str]], Tensor]
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    library: str


def _transformers_tower(folder: Path, device: torch.device) -> _Towers:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    clip, loading = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"its weights lack {missing[0]}")
    # Where there is no tokenizer transformers makes one that knows no words.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError("it has no tokenizer: neither tokenizer.json nor vocab.json")
    clip.to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    has_processor = (folder / "preprocessor_config.json").is_file()
    processor: Any = CLIPImageProcessor.from_pretrained(folder) if has_processor else CLIPImageProcessor()

    def texts(captions: list[str]) -> Tensor:
        length = clip.config.text_config.max_position_embeddings
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        return clip.text_projection(clip.text_model(**tokens).pooler_output)

    def images(pixels: Tensor) -> Tensor:
        return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)

    size = clip.config.vision_config.image_size
    return _Towers(images, texts, size, processor.image_mean, processor.image_std, "transformers")


def _open_clip_tower(folder: Path, device: torch.device) -> _Towers:
    import open_clip

    clip: Any = open_clip.create_model(f"local-dir:{folder}", device=device)
    clip.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    size = clip.visual.image_size
    given = clip.visual.preprocess_cfg
    return _Towers(
        clip.encode_image,
        lambda captions: clip.encode_text(tokenizer(captions).to(device)),
        size if isinstance(size, int) else size[0],
        given["mean"],
        given["std"],
        "open-clip-torch",
    )


def _resized(images: Tensor, size: int) -> Tensor:
    """Square pictures in [-1,1], resized as Parmar et al. 2022 ask for FID: antialiased, without rounding to 8 bits."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
