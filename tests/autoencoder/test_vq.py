"""The VQ autoencoder against diffusers' `VQModel`, and its codebook against the paper."""

import inspect
from math import exp, log
from typing import Any

import pytest
import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer as TheirQuantizer
from torch import Tensor

from autoencoder import VQAutoencoder, VQAutoencoderConfig
from autoencoder.bottleneck import Quantized, VectorQuantizer, perplexity
from autoencoder.loss import CODEBOOK, codebook_loss

VQ_F4: dict[str, Any] = {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
    "sample_size": 256,
}
VQ_F8: dict[str, Any] = {
    **VQ_F4,
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": [*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3],
    "latent_channels": 4,
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 4,
}
CODES = 20


def small(published: dict[str, Any], **changes: Any) -> dict[str, Any]:
    widths = [8, 16, 24, 32][: len(published["block_out_channels"])]
    sizes = {"block_out_channels": widths, "norm_num_groups": 4, "num_vq_embeddings": CODES, "scaling_factor": 0.3}
    return {**published, **sizes, **changes}


def make_pair(config: dict[str, Any]) -> tuple[VQAutoencoder, VQModel]:
    """Codes are spread as wide as the latents, so that many of them are the nearest of some."""
    torch.manual_seed(0)
    theirs = VQModel(**config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms start as the identity, which would hide a missing one
            parameter.add_(0.1 * torch.randn_like(parameter))
        latents = theirs.encode(pictures()).latents
        spread = latents.std((0, 2, 3)) * torch.randn_like(theirs.quantize.embedding.weight)
        theirs.quantize.embedding.weight.copy_(latents.mean((0, 2, 3)) + spread)
    ours = VQAutoencoder.from_diffusers_config(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def pictures(count: int = 2, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def quantized(*indices: int) -> Quantized:
    return Quantized(torch.zeros(1), torch.zeros(1), torch.tensor(indices).reshape(1, 1, -1))


@pytest.mark.parametrize(
    "config",
    [small(VQ_F4), small(VQ_F8), small(VQ_F4, mid_block_add_attention=False, vq_embed_dim=None)],
    ids=["f4", "f8", "no attention"],
)
@torch.no_grad()
def test_equals_diffusers(config: dict[str, Any]) -> None:
    ours, theirs = make_pair(config)
    images = pictures()
    expected = theirs.encode(images).latents

    latents = ours.encode(images)
    torch.testing.assert_close(latents, expected * 0.3, atol=1e-5, rtol=1e-5)
    assert latents.shape == (2, ours.config.latent_channels, 32 // ours.downsampling_factor, latents.shape[3])
    assert perplexity(ours.quantize(expected).indices) > 5

    torch.testing.assert_close(ours.decode(latents), theirs.decode(expected).sample, atol=1e-5, rtol=1e-5)
    others = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours.decode(others), theirs.decode(others / 0.3).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "factor"), [(VQ_F4, 4), (VQ_F8, 8)])
def test_published_sizes_have_the_same_keys_and_shapes(config: dict[str, Any], factor: int) -> None:
    with torch.device("meta"):
        ours, theirs = VQAutoencoder.from_diffusers_config(config), VQModel.from_config(config)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert ours.downsampling_factor == factor


def test_config_has_the_fields_and_defaults_of_diffusers() -> None:
    parameters = inspect.signature(VQModel.__init__).parameters
    theirs = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    assert VQAutoencoderConfig().model_dump() == theirs


@torch.no_grad()
def test_latents_are_what_the_decoder_then_quantizes() -> None:
    ours, _ = make_pair(small(VQ_F4))
    latents = ours.encode(pictures())
    codes = ours.quantize(latents / 0.3).codes * 0.3
    assert not torch.allclose(latents, codes, atol=1e-2)
    torch.testing.assert_close(ours.decode(latents), ours.decode(codes), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_generator_draws_nothing() -> None:
    ours, _ = make_pair(small(VQ_F4))
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    latents = ours.encode(pictures(), generator)
    assert torch.equal(latents, ours.encode(pictures()))
    assert torch.equal(generator.get_state(), before)

    posterior = ours.posterior(pictures())
    assert torch.equal(posterior.sample(torch.randn_like(posterior.mean)), posterior.mean)
    assert torch.equal(posterior.mean * 0.3, latents)


@torch.no_grad()
def test_bfloat16() -> None:
    ours, _ = make_pair(small(VQ_F4))
    ours.bfloat16()
    assert ours.decode(ours.encode(pictures().bfloat16())).isfinite().all()


def test_the_nearest_code_by_hand() -> None:
    quantizer = VectorQuantizer(3, 2)
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    quantizer.embedding.weight.data.copy_(codebook)
    points = torch.tensor([[0.4, 0.0], [0.6, 0.1], [0.0, 1.6], [0.9, 1.4], [-9.0, 1.0], [5.0, 5.0]])
    nearest = torch.tensor([[0, 1, 2], [1, 0, 2]])
    found = quantizer(points.reshape(1, 2, 3, 2).permute(0, 3, 1, 2))
    assert torch.equal(found.indices, nearest[None])
    assert torch.equal(found.codes, codebook[nearest].permute(2, 0, 1)[None])


def test_new_codes_are_uniform() -> None:
    torch.manual_seed(0)
    codebook = VectorQuantizer(64, 100).embedding.weight
    assert codebook.abs().max() <= 1 / 64
    assert codebook.std().item() == pytest.approx(1 / 64 / 3**0.5, rel=0.02)


def test_gradients_go_straight_through() -> None:
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantizer = VectorQuantizer(CODES, 3)
    found = quantizer(latents)
    through = found.straight_through()
    assert torch.equal(through, found.codes)
    towards = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    (through * towards).sum().backward()
    assert latents.grad is not None
    assert torch.equal(latents.grad, towards)
    assert quantizer.embedding.weight.grad is None


def test_codebook_loss_equals_diffusers() -> None:
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    theirs, ours = TheirQuantizer(CODES, 3, beta=0.25), VectorQuantizer(CODES, 3)
    torch.nn.init.normal_(theirs.embedding.weight, generator=torch.Generator().manual_seed(1))
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    losses = []
    for quantizer in (ours, theirs):
        latents = z.clone().requires_grad_()
        output = quantizer(latents)
        losses.append(codebook_loss(output) if isinstance(output, Quantized) else output[1])
        losses[-1].backward()
        gradients.append((latents.grad, quantizer.embedding.weight.grad))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_codebook_loss_by_hand() -> None:
    latents = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1).requires_grad_()
    codes = torch.tensor([0.0, 4.0]).reshape(1, 2, 1, 1).requires_grad_()
    loss = codebook_loss(Quantized(latents, codes, torch.zeros(1, 1, 1, dtype=torch.int64)))
    assert loss.item() == pytest.approx((1 + CODEBOOK) * (1 + 4) / 2)
    loss.backward()
    assert latents.grad is not None
    assert codes.grad is not None
    assert latents.grad.flatten().tolist() == [1, -2]
    assert codes.grad.flatten().tolist() == [-CODEBOOK, 2 * CODEBOOK]


def test_perplexity_by_hand() -> None:
    assert perplexity(quantized(7, 7, 7).indices).item() == 1
    assert perplexity(quantized(0, 5, 9, 2).indices).item() == pytest.approx(4)
    assert perplexity(quantized(3, 3, 1, 3).indices).item() == pytest.approx(exp(0.75 * log(4 / 3) + 0.25 * log(4)))


def test_forward_is_for_training() -> None:
    ours, _ = make_pair(small(VQ_F4))
    images = pictures()
    reconstruction, found = ours(images, torch.zeros(()))
    torch.testing.assert_close(reconstruction, ours.decode(ours.encode(images)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.latents, ours.posterior(images).mean)

    reconstruction.square().mean().backward()
    without = {name for name, parameter in ours.named_parameters() if parameter.grad is None}
    assert without == {"quantize.embedding.weight"}
    assert ours.encoder.conv_in.weight.grad.abs().max() > 0
    _, found = ours(images, torch.zeros(()))
    codebook_loss(found).backward()
    moved = ours.quantize.embedding.weight.grad.abs().sum(1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(found.indices.flatten().tolist())


@torch.no_grad()
def test_whiten_changes_the_latents_and_no_picture() -> None:
    ours, _ = make_pair(small(VQ_F4, scaling_factor=1.0))
    images = pictures(8)
    latents = ours.encode(images)
    decoded, indices = ours.decode(latents), ours.quantize(latents).indices
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3), correction=0)
    assert not torch.allclose(std.square().mean(), torch.ones(()), atol=0.05)

    ours.whiten(mean, std)

    white = ours.encode(images)
    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(white.var((0, 2, 3), correction=0).mean(), torch.ones(()), atol=1e-4, rtol=0)
    assert torch.equal(ours.quantize(white).indices, indices)
    torch.testing.assert_close(ours.decode(white), decoded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vq_embed_dim": 5}, "vq_embed_dim 5 must be latent_channels 3"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings"),
        ({"norm_type": "spatial"}, "norm_type"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "3 levels"),
    ],
)
def test_unsupported_config(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VQAutoencoder.from_diffusers_config(small(VQ_F4, **change))


def test_config_survives_its_own_json() -> None:
    config = VQAutoencoderConfig.model_validate(small(VQ_F8))
    assert VQAutoencoderConfig.model_validate_json(config.model_dump_json()) == config
