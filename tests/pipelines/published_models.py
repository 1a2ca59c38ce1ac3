"""Random models as narrow as the published structure allows: four levels, each family's text tower and tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipelines.loading import DEFAULT_MODEL

FAMILIES = ("1", "2")
WIDTH = 64


def make_published_folder(folder: Path, family: str) -> Path:
    """Saves a random Stable Diffusion 1 or 2 with diffusers; the second predicts the velocity."""
    torch.manual_seed(int(family))
    second = family == "2"
    unet_options: dict[str, Any] = {"attention_head_dim": [1, 1, 1, 1], "use_linear_projection": True} if second else {}
    unet = UNet2DConditionModel(
        sample_size=96 if second else 64,
        block_out_channels=(WIDTH,) * 4,
        cross_attention_dim=WIDTH,
        **unet_options,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=23 if second else 2,
            num_attention_heads=1,
            hidden_act="gelu" if second else "quick_gelu",
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    with torch.no_grad():  # transformers starts so small that no word would matter
        for parameter in text_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    process: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    scheduler = (
        DDIMScheduler(**process, clip_sample=False, prediction_type="v_prediction")
        if second
        else PNDMScheduler(**process, skip_prk_steps=True)
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(DEFAULT_MODEL / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(DEFAULT_MODEL / "tokenizer", folder / "tokenizer")
    if second:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / "tokenizer" / name
            path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "!"}))
    return folder
