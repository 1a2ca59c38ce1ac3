"""The U-Net against diffusers' own, weights for weights and output for output."""

import json
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm.layers import Conv3x3, GroupNorm
from ldm.unet import UNet, UNetConfig
from pipelines.loading import DEFAULT_MODEL

SMALL = {"norm_num_groups": 8, "cross_attention_dim": 20}
THREE = {"block_out_channels": (16, 32, 48), "layers_per_block": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "convolutional projections, like SD 1": {
        **SMALL,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
    },
    "linear projections and heads per level, like SD 2": {
        **SMALL,
        **THREE,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4, 6),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "no attention at the first level": {
        **SMALL,
        **THREE,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "in_channels": 9,
        "out_channels": 8,
    },
    "transformers of several blocks": {
        **SMALL,
        **THREE,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 3, 2),
    },
    "adaptive group norm": {
        **SMALL,
        **THREE,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "resnet_time_scale_shift": "scale_shift",
    },
    "one level, attention only on the way up": {
        **SMALL,
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "attention_head_dim": 2,
    },
}
CONFIG = CONFIGS["convolutional projections, like SD 1"]
CLASSES: dict[str, tuple[dict[str, Any], Tensor]] = {
    "indices": ({"num_class_embeds": 10}, torch.tensor([3, 9])),
    "numbers": ({"class_embed_type": "timestep", "freq_shift": 1, "flip_sin_to_cos": False}, torch.tensor([250, 3])),
    "fractions": ({"class_embed_type": "timestep", "num_class_embeds": 5}, torch.tensor([0.5, 30.25])),
    "embeddings": ({"class_embed_type": "identity"}, torch.randn(2, 64, generator=torch.Generator().manual_seed(2))),
}
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def pair(config: dict[str, Any]) -> tuple[UNet, UNet2DConditionModel]:
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval()
    ours = UNet.from_diffusers_config(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(config: dict[str, Any], height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.get("in_channels", 4), height, width, generator=generator)
    return latents, torch.tensor([999, 3]), torch.randn(2, 7, config["cross_attention_dim"], generator=generator)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (13, 7), (5, 3)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(CONFIGS[name])
    latents, t, context = inputs(CONFIGS[name], *size)
    expected = theirs(latents, t, context).sample
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(latents, t, context), expected, atol=1e-5, rtol=0)
    ours.to(memory_format=torch.channels_last)
    out = ours(latents.to(memory_format=torch.channels_last), t, context)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_classes_equal_diffusers(kind: str, dtype: torch.dtype) -> None:
    change, labels = CLASSES[kind]
    config = {**CONFIG, **change}
    ours, theirs = (network.to(dtype) for network in pair(config))
    latents, t, context = (tensor.to(dtype) for tensor in inputs(config))
    expected = theirs(latents, t, context, class_labels=labels).sample
    torch.testing.assert_close(ours(latents, t, context, labels), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(ours(latents, t, context, labels.flip(0)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_classes_in_bfloat16(kind: str) -> None:
    change, labels = CLASSES[kind]
    config = {**CONFIG, **change}
    ours, _ = pair(config)
    latents, t, context = inputs(config)
    expected = ours(latents, t, context, labels)
    out = ours.bfloat16()(latents.bfloat16(), t, context.bfloat16(), labels)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.03 * expected.norm()


def test_class_labels_are_given_where_there_are_classes_and_nowhere_else() -> None:
    latents, t, context = inputs(CONFIG)
    with pytest.raises(ValueError, match="the network has no classes: leave them out"):
        UNet.from_diffusers_config(CONFIG)(latents, t, context, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="class_labels are missing, but the network has classes"):
        UNet.from_diffusers_config({**CONFIG, "num_class_embeds": 2})(latents, t, context)
    with pytest.raises(ValueError, match="there are 1 class_labels, but 2 latents: give one for each"):
        UNet.from_diffusers_config({**CONFIG, "num_class_embeds": 2})(latents, t, context, torch.tensor([0]))


@pytest.mark.parametrize("reads", [False, True], ids=["context", "reading"])
@pytest.mark.parametrize("name", [*CONFIGS, "attention in the middle alone"])
@torch.no_grad()
def test_several_contexts_for_each_of_the_latents(name: str, reads: bool) -> None:
    """As many outputs as contexts, and what comes before the first attention to them is made of the latents once."""
    nowhere = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    config = CONFIGS.get(name, {**CONFIG, **nowhere})
    unet = pair(config)[0].double().to(memory_format=torch.channels_last)
    latents, t, _ = inputs(config)
    latents = latents.double()
    contexts = torch.randn(6, 7, 20, generator=torch.Generator().manual_seed(2)).double()
    expected = unet(torch.cat([latents] * 3), t.repeat(3), contexts)
    given = unet.read(contexts) if reads else contexts
    batches: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            batches.setdefault(name, len(given[0]))

        return hook

    for each, module in unet.named_modules():
        module.register_forward_pre_hook(note(each))
    out = unet(latents, t, given)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    once = [each for each, batch in batches.items() if batch == 2]
    first = next(each for each in batches if each.endswith("attn1"))
    assert once == list(batches)[: len(once)]
    assert once[-1].startswith(first), "all to the end of the self-attention before the context is attended to"
    assert set(batches.values()) == {2, 6}


def test_contexts_that_are_no_multiple_of_the_latents_are_refused() -> None:
    latents, t, context = inputs(CONFIG)
    with pytest.raises(ValueError, match="a batch of 3 is no multiple of one of 2"):
        UNet.from_diffusers_config(CONFIG)(latents, t, torch.cat([context, context[:1]]))


@torch.no_grad()
def test_zeros_are_no_context() -> None:
    ours, _ = pair(CONFIG)
    latents, t, context = inputs(CONFIG)
    expected = ours(latents, t, torch.zeros(2, 1, 20))
    torch.testing.assert_close(ours(latents, t, torch.zeros_like(context)), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(ours(latents, t, context), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "labels"),
    [({}, None), ({"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 10}, torch.tensor([3, 9]))],
    ids=["stock", "adaptive group norm and classes"],
)
def test_gradients_equal_diffusers(change: dict[str, Any], labels: Tensor | None) -> None:
    config = {**CONFIG, **change}
    ours, theirs = pair(config)
    latents, t, context = inputs(config)
    ours(latents, t, context, labels).square().mean().backward()
    theirs(latents, t, context, class_labels=labels).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-4, msg=name)


def kept(network: nn.Module, config: dict[str, Any]) -> int:
    """Bytes that a forward pass keeps for the gradient, without the parameters."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(*inputs(config))
    assert out is not None
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def test_training_the_default_model_keeps_less_than_diffusers() -> None:
    config = json.loads((DEFAULT_MODEL / "unet" / "config.json").read_text())
    ours, theirs = pair(config)
    assert 0 < kept(ours, config) < kept(theirs, config)


def test_the_full_model_has_the_published_parameters() -> None:
    with torch.device("meta"):
        ours, theirs = UNet.from_diffusers_config(SD15), UNet2DConditionModel(**SD15)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == 859_520_964
    assert ours.config.sample_size == 64


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_times_of_any_dtype_give_one_answer(dtype: torch.dtype) -> None:
    ours, _ = pair(CONFIG)
    latents, t, context = inputs(CONFIG)
    assert torch.equal(ours(latents, t.to(dtype), context), ours(latents, t, context))


@torch.no_grad()
def test_one_time_stands_for_the_batch_and_fractions_count() -> None:
    ours, theirs = pair(CONFIG)
    latents, _, context = inputs(CONFIG)
    assert torch.equal(ours(latents, torch.tensor(500), context), ours(latents, torch.tensor([500, 500]), context))
    t = torch.tensor([500.5, 499.5], dtype=torch.float64)
    expected = theirs(latents, t, context).sample
    torch.testing.assert_close(ours(latents, t, context), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(ours(latents, t.floor(), context), expected, atol=1e-5, rtol=0)


def test_tokens_are_a_view_of_channels_last_memory() -> None:
    ours, _ = pair(CONFIG)
    transformer = ours.down_blocks[0].attentions[0]
    seen: dict[str, Tensor] = {}
    transformer.norm.register_forward_hook(lambda module, args, out: seen.update(normed=out))
    transformer.proj_in.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    transformer(x, torch.randn(2, 7, 20))
    assert seen["tokens"].shape == (2, 64, 16)
    assert seen["tokens"].data_ptr() == seen["normed"].data_ptr()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4)], ids=str)
@torch.no_grad()
def test_a_product_of_matrices_stands_for_a_convolution_of_few_positions(
    size: tuple[int, int], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = Conv3x3(6, 256, stride).to(torch.float64)
    x = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, stride, padding=1)
    with monkeypatch.context() as only:
        only.setattr(torch.nn.Conv2d, "forward", lambda self, input: pytest.fail("it was convolved"))
        out = conv(x)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    many = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(many, conv.weight, conv.bias, stride, padding=1)
    assert torch.equal(conv(many), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "side", "by_way"),
    [(32, 8, True), (24 * 8, 8, True), (16 * 8, 8, False), (40 * 8, 8, False), (32, 32, False)],
    ids=["groups of 4", "of 24", "of 16, a vector", "of 40", "of 4, many positions"],
)
def test_a_group_norm_of_narrow_groups_goes_by_way_of_float32(
    channels: int, side: int, by_way: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(8, channels, eps=1e-3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    norm.to(dtype)
    drawn = 3 + 2 * torch.randn(2, 2, channels, side, side, generator=generator)
    x, grad = (each.to(torch.bfloat16, memory_format=torch.channels_last) for each in drawn)
    given = x.requires_grad_(), norm.weight, norm.bias
    out = norm(x)
    assert ("GroupNormInFloat32" in type(out.grad_fn).__name__) == by_way
    assert out.is_contiguous(memory_format=torch.channels_last)
    if not by_way:
        assert torch.equal(out, nn.functional.group_norm(x, 8, norm.weight, norm.bias, eps=1e-3))
        return
    exact = [each.detach().float().requires_grad_() for each in given]
    expected = nn.functional.group_norm(exact[0], 8, *exact[1:], eps=1e-3)
    assert torch.equal(out, expected.bfloat16()), "rounded but once"
    gradients = torch.autograd.grad(out, given, grad)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, exact, grad.float()), strict=True):
        assert torch.equal(found, wanted.to(found.dtype))
    norm.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(norm(x), x, grad)[0], gradients[0]), "where the norm does not train"


def test_pure_bfloat16_stays_near_float32_and_in_bfloat16() -> None:
    ours, _ = pair(CONFIG)
    latents, t, context = inputs(CONFIG)
    with torch.inference_mode():
        expected = ours(latents, t, context)
        out = ours.bfloat16()(latents.bfloat16(), t.double(), context.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.03 * expected.norm()


def test_times_next_to_each_other_differ_in_bfloat16() -> None:
    ours, _ = pair(CONFIG)
    ours.bfloat16()
    latents, _, context = inputs(CONFIG)
    with torch.inference_mode():
        near = [ours(latents.bfloat16(), torch.tensor(t), context.bfloat16()) for t in (998, 999)]
    assert not torch.equal(near[0], near[1])


def test_trains_from_scratch_under_autocast() -> None:
    torch.manual_seed(0)
    unet = UNet.from_diffusers_config(CONFIG)
    latents, t, context = inputs(CONFIG)
    assert unet(latents, t, context).abs().max() == 0, "a new network predicts zero"
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (unet(latents, t, context).float() - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in unet.parameters()), "every parameter is in use"


def test_num_attention_heads_goes_before_the_misnamed_key() -> None:
    config = UNetConfig.model_validate({**CONFIG, "attention_head_dim": 3, "num_attention_heads": [1, 2, 4]})
    assert config.heads == (1, 2, 4)


def test_every_key_of_diffusers_is_known_with_the_same_default() -> None:
    with torch.device("meta"):
        theirs = {key: value for key, value in UNet2DConditionModel().config.items() if not key.startswith("_")}
    assert UNetConfig().model_dump() == theirs, f"diffusers {diffusers.__version__}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "mish"}, r"act_fn\n  Input should be 'silu' or 'swish'"),
        ({"class_embed_type": "projection"}, "class_embed_type\n  Input should be None, 'timestep' or 'identity'"),
        ({"num_class_embeds": 0}, "num_class_embeds\n  Input should be greater than or equal to 1"),
        ({"resnet_time_scale_shift": "spatial"}, "time_scale_shift\n  Input should be 'default' or 'scale_shift'"),
        ({"block_type": "dense"}, "block_type\n  Input should be 'residual', 'convnext' or 'channel_attention'"),
        ({"dropout": 0.1}, "dropout\n  Input should be 0"),
        ({"layers_per_block": [1, 2, 2]}, "layers_per_block\n  Input should be a valid integer"),
        ({"in_channels": 0}, "in_channels\n  Input should be greater than or equal to 1"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "down_block_types.1\n  Input should be"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 entries, but block_out_channels has 3"),
        ({"attention_head_dim": [8, 8]}, "heads has 2 entries"),
        ({"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block has 2 entries, but .* has 3"),
        ({"transformer_layers_per_block": [[1, 1], 1, 1]}, "Input should be a valid integer"),
        ({"norm_num_groups": 32}, "block_out_channels.0 is 16, no multiple of 32 groups"),
        ({"attention_head_dim": [8, 5, 8]}, "block_out_channels.1 is 32, no multiple of 5 heads"),
        ({"freq_shift": 8}, "block_out_channels.0 is 16, but must be even and more than twice freq_shift"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet.from_diffusers_config({**CONFIG, **change})
