"""Configurations of models so small that a training step takes milliseconds."""

from typing import Any

from accelerate.state import AcceleratorState, GradientState

TINY_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 32,
}
TINY_CLIP: dict[str, Any] = {
    "embedding": 16,
    "text_width": 16,
    "text_layers": 2,
    "image_width": 16,
    "image_layers": 1,
    "patch_size": 16,
    "head_width": 8,
}
TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}


def forget_accelerator() -> None:
    """accelerate keeps its state for the whole process, as if there were one run in each."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
