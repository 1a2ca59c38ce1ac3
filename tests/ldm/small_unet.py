"""A U-Net of two levels, the first of which attends, with random weights everywhere."""

import torch

from ldm.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
)


def random_unet(config: UNetConfig = CONFIG) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet
