"""The blocks against closed forms and torchvision's ConvNeXt; U-Nets of each; their presets."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import BLOCKS, Block, BlockType, ChannelAttention, ChannelAttentionBlock, ConvNeXtBlock, ResidualBlock
from ldm.denoiser import make_denoiser
from ldm.schedule import NoiseSchedule
from ldm.unet import UNet, UNetConfig

KINDS: tuple[BlockType, ...] = get_args(BlockType)
UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 20,
    "norm_num_groups": 8,
}


def new_block(kind: BlockType, in_channels: int = 16, out_channels: int = 16, *, scale_shift: bool = False) -> Block:
    torch.manual_seed(0)
    return BLOCKS[kind](in_channels, out_channels, 12, 8, 1e-5, scale_shift=scale_shift)


def filled(block: nn.Module) -> Any:
    """The module with every parameter drawn anew, so that nothing is zero or one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return block


def inputs(channels: int = 16, height: int = 6, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, channels, height, width, generator=generator), torch.randn(2, 12, generator=generator)


def assert_near(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_every_block_type_has_a_class() -> None:
    assert BLOCKS.keys() == set(KINDS)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_new_block_is_the_identity(kind: BlockType, scale_shift: bool) -> None:
    x, emb = inputs()
    assert torch.equal(new_block(kind, scale_shift=scale_shift)(x, emb), x)
    wider = new_block(kind, 16, 24, scale_shift=scale_shift)
    assert torch.equal(wider(x, emb), wider.conv_shortcut(x))


@pytest.mark.parametrize("out_channels", [16, 8, 24])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_gradients(kind: BlockType, scale_shift: bool, out_channels: int) -> None:
    block = filled(new_block(kind, 16, out_channels, scale_shift=scale_shift))
    for size in ((6, 5), (1, 3), (2, 1)):
        x, emb = (tensor.requires_grad_() for tensor in inputs(16, *size))
        out = block(x, emb)
        assert out.shape == (2, out_channels, *size)
        block.zero_grad()
        out.square().mean().backward()
        for tensor in (x, emb, *block.parameters()):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert tensor.grad.any()


def test_a_residual_block_keeps_five_feature_maps_for_the_gradient() -> None:
    """Its input, what each convolution and the second norm read, and what comes out of that norm; not of the first."""
    block = filled(new_block("residual", 16))
    x, emb = (tensor.requires_grad_() for tensor in inputs(16, 32, 32))
    maps: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == x.shape:
            maps[tensor.data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x, emb)
    assert out.shape == x.shape
    assert len(maps) == 5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_channels_last_stays_channels_last(kind: BlockType) -> None:
    block = filled(new_block(kind, 16, 24, scale_shift=True))
    x, emb = inputs()
    expected = block(x, emb)
    out = block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), emb)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_near(out, expected)


@pytest.mark.parametrize(
    ("kind", "conv"), [("residual", "conv1"), ("channel_attention", "conv1"), ("convnext", "dwconv")]
)
@torch.no_grad()
def test_the_embedding_shifts_the_features_before_the_norm(kind: BlockType, conv: str) -> None:
    """For one sample, that is another bias of the convolution before it."""
    block = filled(new_block(kind, 16, 24))
    x, emb = (tensor[:1] for tensor in inputs())
    expected = block(x, emb)
    block.get_submodule(conv).bias += block.time_emb_proj(emb)[0]
    nn.init.zeros_(block.time_emb_proj.weight)
    nn.init.zeros_(block.time_emb_proj.bias)
    assert_near(block(x, emb), expected)


@pytest.mark.parametrize(
    ("kind", "norm"), [("residual", "norm2"), ("channel_attention", "norm2"), ("convnext", "norm")]
)
@torch.no_grad()
def test_the_embedding_scales_and_shifts_the_normed_features(kind: BlockType, norm: str) -> None:
    """For one sample, that is another weight and bias of the norm."""
    block = filled(new_block(kind, 16, 24, scale_shift=True))
    x, emb = (tensor[:1] for tensor in inputs())
    expected = block(x, emb)
    scale, shift = block.time_emb_proj(emb)[0].chunk(2)
    layer = block.get_submodule(norm)
    layer.weight *= 1 + scale
    layer.bias.copy_(layer.bias * (1 + scale) + shift)
    nn.init.zeros_(block.time_emb_proj.weight)
    nn.init.zeros_(block.time_emb_proj.bias)
    assert_near(block(x, emb), expected)


@torch.no_grad()
def test_convnext_is_torchvisions() -> None:
    from torchvision.models.convnext import CNBlock

    theirs = filled(CNBlock(16, layer_scale=1.0, stochastic_depth_prob=0.0)).eval()
    ours = ConvNeXtBlock(16, 16, 12, 8, 1e-6, scale_shift=False)
    nn.init.zeros_(ours.time_emb_proj.weight)
    nn.init.zeros_(ours.time_emb_proj.bias)
    for mine, layer in ((ours.dwconv, 0), (ours.norm, 2), (ours.pwconv1, 3), (ours.pwconv2, 5)):
        mine.load_state_dict(theirs.block[layer].state_dict())
    ours.pwconv2.weight *= theirs.layer_scale[:, :, 0]  # the layer scale, folded into the last layer
    ours.pwconv2.bias *= theirs.layer_scale[:, 0, 0]
    x, emb = inputs()
    expected = theirs(x.clone())
    assert (expected - x).std() > 0.1
    assert_near(ours(x, emb), expected)


@torch.no_grad()
def test_channel_attention_is_its_formula() -> None:
    channels, k = 128, 5
    attention = filled(ChannelAttention(channels))
    x, _ = inputs(channels)
    weights = attention.conv.weight.flatten().tolist()
    assert len(weights) == k
    expected = torch.empty_like(x)
    for sample in range(2):
        means = [float(x[sample, channel].mean()) for channel in range(channels)]
        for channel in range(channels):
            around = range(channel - k // 2, channel + k // 2 + 1)
            total = sum(w * means[near] for w, near in zip(weights, around, strict=True) if 0 <= near < channels)
            expected[sample, channel] = x[sample, channel] / (1 + math.exp(-total))
    assert_near(attention(x), expected)


@pytest.mark.parametrize(
    ("channels", "k"), [(1, 1), (8, 3), (64, 3), (128, 5), (320, 5), (512, 5), (1280, 5), (2048, 7)]
)
def test_channel_attention_reaches_further_in_wider_maps(channels: int, k: int) -> None:
    """int((log2 C + 1) / 2), and one more where that is even, as in the released code."""
    assert ChannelAttention(channels).conv.kernel_size == (k,)


@torch.no_grad()
def test_channel_attention_gates_the_residual_branch_alone() -> None:
    block = filled(ChannelAttentionBlock(16, 24, 12, 8, 1e-5, scale_shift=False))
    plain = ResidualBlock(16, 24, 12, 8, 1e-5, scale_shift=False)
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if "attention" not in name})
    x, emb = inputs()
    past = F.conv2d(x, plain.conv_shortcut.weight, plain.conv_shortcut.bias)
    assert_near(block(x, emb), past + block.channel_attention(plain(x, emb) - past))


@pytest.mark.parametrize("kind", KINDS)
def test_a_unet_of_each_trains_from_scratch(kind: BlockType) -> None:
    torch.manual_seed(0)
    unet = UNet.from_diffusers_config({**UNET, "block_type": kind, "resnet_time_scale_shift": "scale_shift"})
    blocks = [module for module in unet.modules() if isinstance(module, Block)]
    assert len(blocks) == 2 + 2 + 4
    assert {type(block) for block in blocks} == {BLOCKS[kind]}
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(4, 4, 9, 8, generator=generator), torch.randn(4, 3, 20, generator=generator)
    t = torch.tensor([0, 10, 500, 999])
    assert unet(latents, t, context).abs().max() == 0, "a new network predicts zero"
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (unet(latents, t, context).float() - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.grad.any() for parameter in unet.parameters()), "every parameter is in use"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_unet_of_each_learns_a_variance_too(kind: BlockType) -> None:
    torch.manual_seed(0)
    unet = filled(UNet.from_diffusers_config({**UNET, "block_type": kind, "out_channels": 8}))
    denoise = make_denoiser(unet, NoiseSchedule("cosine"), "eps")
    x_t, t, nothing = torch.randn(2, 4, 9, 8), torch.tensor([3, 600]), torch.zeros(2, 1, 20)
    estimate = denoise(x_t, t, nothing)
    output, v = unet(x_t, t, nothing).chunk(2, dim=1)
    assert estimate.v is not None
    assert torch.equal(estimate.v, v)
    assert torch.equal(estimate.x0, denoise.to_x0(output, x_t, t))


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_written_and_read(kind: BlockType) -> None:
    config = UNetConfig.model_validate({**UNET, "block_type": kind, "num_class_embeds": 3})
    written = json.loads(json.dumps(config.model_dump(mode="json")))
    assert written.get("block_type", "residual") == kind
    assert UNetConfig.model_validate(written) == config


def test_a_stock_network_is_written_in_diffusers_keys_alone() -> None:
    assert "block_type" not in UNetConfig().model_dump()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("adagn", "resnet_time_scale_shift", "scale_shift"),
        ("convnext", "block_type", "convnext"),
        ("channel_attention", "block_type", "channel_attention"),
    ],
)
def test_each_variant_has_a_preset(name: str, field: str, value: str) -> None:
    import unet_training_config

    from ldm.training.command_line import parse_config

    configs = Path(unet_training_config.__file__).parent / "configs"

    def model(*files: str) -> UNetConfig:
        arguments = [f"--config={configs / file}" for file in files]
        config: UNetConfig = parse_config(unet_training_config.UNetTrainingConfig, "", arguments).model
        return config

    def parameters(config: UNetConfig) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in UNet(config).parameters())

    default = model("picturebook_unet.yaml")
    preset = model("picturebook_unet.yaml", f"picturebook_unet_{name}.yaml")
    assert getattr(preset, field) == value
    assert getattr(default, field) != value
    assert 0.9 < parameters(preset) / parameters(default) < 1.1
