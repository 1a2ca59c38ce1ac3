"""Feature networks from local files: the judge, Inception of both makers, CLIPs of both, and what is no network."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import picturebook
import pytest
import torch
import torch.nn.functional as F
from evaluation import feature_networks
from evaluation.feature_networks import open_network
from evaluation.metrics import explained
from judge import WEIGHTS, load_judge
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import Inception3
from torchvision.models.inception import InceptionA, InceptionC, InceptionE

from ldm.pictures import as_tensor, to_pil
from text_encoder.tokenizer import write_tokenizer

CPU = torch.device("cpu")
CAPTIONS = ["a red house", "two small fish in the ocean", "a balloon"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.stack([as_tensor(picturebook.picture(i, 3)[1]) for i in range(3)])


def inception_file(folder: Path, classes: int) -> Path:
    torch.manual_seed(0)
    network = Inception3(classes, aux_logits=False, init_weights=False)
    save_file(
        {name: tensor.half() for name, tensor in network.state_dict().items() if tensor.ndim}, folder / "i.safetensors"
    )
    return folder / "i.safetensors"


def transformers_clip(folder: Path) -> Any:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    write_tokenizer(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "projection_dim": 8}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    clip.save_pretrained(folder)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    CLIPImageProcessor(image_mean=mean, image_std=std, size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return clip


def open_clip_clip(folder: Path) -> Any:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    shape = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    clip = CLIP(**shape).eval()
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": preprocess}))
    return clip


def test_the_judge(images: Tensor) -> None:
    network = open_network("judge", CPU)
    judge = load_judge()
    with torch.inference_mode():
        found = network.embed(images)
        assert torch.equal(found["features"], judge.features(images).mean((2, 3)))
        torch.testing.assert_close(found["logits"], judge(images)[4])
        doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(network.embed(doubled)["features"], found["features"])
    assert network.sha256 == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert network.describe()["resize"] == "area to 64 px"
    assert network.describe()["classes"] == "the 8 backgrounds"


def test_the_judges_view_of_things() -> None:
    """It tells kinds apart, and backgrounds explain less of it than of the mean."""
    scenes = [picturebook.picture(i, 3) for i in range(40)]
    images = torch.stack([as_tensor(image) for _, image in scenes])
    share = {}
    with torch.inference_mode():
        for source in ("judge", "judge-things"):
            found = open_network(source, CPU).embed(images)
            share[source] = explained(found["features"], [scene.background for scene, _ in scenes])
    assert share["judge-things"] < 0.4 < 0.7 < share["judge"]
    read = [picturebook.KINDS[i] for i in found["logits"].argmax(1).tolist()]
    right = [kind in {group.kind for group in scene.things} for kind, (scene, _) in zip(read, scenes, strict=True)]
    assert sum(right) >= 39


@pytest.mark.parametrize("classes", [1000, 1008])
def test_inception_of_both_makers(classes: int, tmp_path: Path, images: Tensor) -> None:
    file = inception_file(tmp_path, classes)
    network = open_network(f"inception:{file}", CPU)
    with torch.inference_mode():
        found = network.embed(images[:1])
        assert found["features"].shape == (1, 2048)
        assert found["logits"].shape == (1, classes)
        weights = load_file(file)
        torch.testing.assert_close(
            found["logits"], F.linear(found["features"], weights["fc.weight"].float(), weights["fc.bias"].float())
        )
        if classes == 1000:  # exactly torchvision's own, which takes pictures in [-1,1]
            own = Inception3(classes, aux_logits=False, init_weights=False).eval()
            own.load_state_dict(weights, strict=False)
            resized = F.interpolate(images[:1], (299, 299), mode="bicubic", antialias=True).clamp(-1, 1)
            torch.testing.assert_close(found["logits"], own(resized))
    assert str(classes) in network.describe()["classes"]
    assert "torchvision" in network.version()


@pytest.mark.parametrize(
    ("block", "channels", "largest"),
    [(InceptionA(12, 8), 12, False), (InceptionC(12, 8), 12, False), (InceptionE(12), 12, True)],
)
def test_pooling_of_fids_own_inception(block: nn.Module, channels: int, largest: bool) -> None:
    block.eval()
    x = torch.randn(1, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    around = F.pad(x, (1, 1, 1, 1), value=float("nan"))
    windows = around.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    pooled = windows.nan_to_num(-1e9).amax(4) if largest else windows.nanmean(4)
    with torch.inference_mode():
        found = feature_networks._OwnPooling(block, largest)(x)
        own = block.branch_pool(pooled)  # type: ignore[operator]
        torch.testing.assert_close(found[:, -own.shape[1] :], own)
        assert torch.equal(found[:, : -own.shape[1]], block(x)[:, : -own.shape[1]])
        assert not torch.allclose(found, block(x))


def test_a_clip_of_transformers(tmp_path: Path, images: Tensor) -> None:
    from transformers import CLIPImageProcessor, CLIPTokenizer

    clip = transformers_clip(tmp_path)
    network = open_network(f"clip:{tmp_path}", CPU)
    assert network.embed_texts is not None
    assert network.classes is None
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(CAPTIONS, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(tmp_path)(to_pil(images / 2 + 0.5), return_tensors="pt")
    with torch.inference_mode():
        theirs = clip(**tokens, **pixels)
        features, texts = network.embed(images)["features"], network.embed_texts(CAPTIONS)
        cosine = F.normalize(texts) @ F.normalize(features).T
        assert torch.allclose(F.normalize(texts), theirs.text_embeds, atol=1e-5)
        # they resize in 8 bits
        assert torch.allclose(F.normalize(features), theirs.image_embeds, atol=2e-2)
        assert torch.allclose(cosine, theirs.logits_per_text / clip.logit_scale.exp(), atol=2e-2)
    assert network.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_a_clip_of_open_clip(tmp_path: Path, images: Tensor) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    clip = open_clip_clip(tmp_path)
    network = open_network(f"clip:{tmp_path}", CPU)
    assert network.embed_texts is not None
    small = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(network.embed(images)["features"], clip.encode_image(small))
        torch.testing.assert_close(
            network.embed_texts(CAPTIONS), clip.encode_text(SimpleTokenizer(context_length=20)(CAPTIONS))
        )


def test_resizing_is_that_of_pillow() -> None:
    """Parmar et al. 2022: bicubic with antialiasing."""
    image = picturebook.picture(0, 3)[1]
    theirs = as_tensor(image.resize((24, 24), Image.Resampling.BICUBIC))
    found = feature_networks._resized(as_tensor(image)[None], 24)[0]
    assert (found - theirs).abs().max() < 2.5 / 127.5
    assert (found - theirs).abs().mean() < 0.5 / 127.5


def no_inception(folder: Path) -> str:
    save_file({"fc.weight": torch.zeros(10, 4)}, folder / "i.safetensors")
    return f"inception:{folder / 'i.safetensors'}"


def half_an_inception(folder: Path) -> str:
    save_file({"fc.weight": torch.zeros(1008, 2048), "odd": torch.zeros(1)}, folder / "i.safetensors")
    return f"inception:{folder / 'i.safetensors'}"


def not_even_tensors(folder: Path) -> str:
    (folder / "i.safetensors").write_bytes(b"nothing")
    return f"inception:{folder / 'i.safetensors'}"


def clip_without_weights(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    return f"clip:{folder}"


def clip_without_tokenizer(folder: Path) -> str:
    transformers_clip(folder)
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink()
    return f"clip:{folder}"


def clip_with_half_its_weights(folder: Path) -> str:
    transformers_clip(folder)
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "visual_projection" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    return f"clip:{folder}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: "inception", "features 'inception' are unknown; give judge, judge-things, inception:FILE"),
        (lambda _: "vgg:x", "features 'vgg:x' are unknown"),
        (lambda folder: f"inception:{folder}/none.pth", r"none\.pth does not exist; give inception:FILE"),
        (lambda folder: f"clip:{folder}/none", "folder .*none does not exist"),
        (lambda folder: f"clip:{folder}", "is no CLIP: it has neither"),
        (no_inception, "has 10 rows instead of 1008 or 1000"),
        (half_an_inception, "is no Inception v3: it lacks or has besides Conv2d_1a_3x3"),
        (not_even_tensors, "is no intact safetensors file"),
        (clip_without_weights, r"model\.safetensors does not exist"),
        (clip_without_tokenizer, "is no intact CLIP: it has no tokenizer"),
        (clip_with_half_its_weights, r"is no intact CLIP: its weights lack visual_projection\.weight"),
    ],
)
def test_what_is_no_network(make: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_network(make(tmp_path), CPU)
