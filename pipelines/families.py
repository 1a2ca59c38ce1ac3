"""The families of published models: which are not ours, and how those that are look."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from autoencoder import AutoencoderConfig
from ldm.unet import UNetConfig
from pipelines.prediction_type import NOISE, VELOCITY
from pipelines.scheduler_config import SchedulerConfig
from text_encoder import TextEncoderConfig

SUPPORTED = "only Stable Diffusion 1.x and 2.x are supported"
OTHER_PIPELINES = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "Depth2Img": "a depth-to-image model",
    "Upscale": "an upscaler",
}
"""Other families, by a part of the pipeline's class in `model_index.json`."""
OTHER_KEYS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "label_emb.0.": "Stable Diffusion XL",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "depth_model.": "a depth-to-image model",
    "low_scale_model.": "an upscaler",
}
"""Other families, by how a key of a single file begins that only they have."""
OTHER_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an instruct-pix2pix model",
}
"""Other families, by the number of channels that go into a U-Net; 4 are latents, and 9 those, a mask and an image."""
INPAINTING_CHANNELS = 9


class NetworkConfigs(NamedTuple):
    """The configs of a model's three networks."""

    unet: UNetConfig
    vae: AutoencoderConfig
    text_encoder: TextEncoderConfig

    @property
    def has_open_clip(self) -> bool:
        """Whether the text tower is OpenCLIP's, as in Stable Diffusion 2; it tells itself by its activation."""
        return self.text_encoder.hidden_act == "gelu"


_AUTOENCODER = AutoencoderConfig.model_validate(
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
)
PUBLISHED = (
    NetworkConfigs(
        UNetConfig(cross_attention_dim=768),
        _AUTOENCODER,
        TextEncoderConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    ),
    NetworkConfigs(
        UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        _AUTOENCODER,
        TextEncoderConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
        ),
    ),
)
"""Stable Diffusion 1.x and 2.x, the latter without its tower's 24th layer, which no reader uses."""
PUBLISHED_SCHEDULER = SchedulerConfig(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
)
FIXED = {
    "unet": (
        *("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types"),
        *("layers_per_block", "depths", "heads", "cross_attention_dim", "use_linear_projection"),
        *("norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift", "resnet_time_scale_shift"),
        *("num_class_embeds", "class_embed_type"),
    ),
    "vae": (
        *("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types"),
        *("layers_per_block", "latent_channels", "norm_num_groups", "scaling_factor"),
        "mid_block_add_attention",
    ),
    "text_encoder": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "hidden_act", "layer_norm_eps"),
    ),
}
"""What a reader of single files takes for granted of each network."""
FIXED_PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


def differences(configs: NetworkConfigs, scheduler: SchedulerConfig) -> list[str]:
    """What makes a model's single file unreadable for other programs: where it is not as its family was published."""
    published = PUBLISHED[configs.has_open_clip]
    if configs.unet.in_channels == INPAINTING_CHANNELS:
        unet = published.unet.model_copy(update={"in_channels": INPAINTING_CHANNELS})
        published = published._replace(unet=unet)
    compared = [
        (f"{part}.{name}", getattr(getattr(configs, part), name, None), getattr(getattr(published, part), name))
        for part, names in FIXED.items()
        for name in names
    ]
    compared += [
        (f"scheduler.{name}", getattr(scheduler, name), getattr(PUBLISHED_SCHEDULER, name)) for name in FIXED_PROCESS
    ]
    faults = [f"{name} is {here}, not {there}" for name, here, there in compared if here != there]
    if scheduler.prediction_type not in (NOISE, VELOCITY):
        faults.append(f"scheduler.prediction_type is {scheduler.prediction_type}, not {NOISE} or {VELOCITY}")
    return faults


def family(text_encoder: TextEncoderConfig) -> str:
    """The family of which a model with this text tower is one, of whatever sizes."""
    return {"quick_gelu": "Stable Diffusion 1.x", "gelu": "Stable Diffusion 2.x"}[text_encoder.hidden_act]


def refuse_other_pipelines(index: Mapping[str, Any]) -> None:
    """Raises ValueError if a `model_index.json` is that of a family that is not supported."""
    name = str(index.get("_class_name", ""))
    for part, family in OTHER_PIPELINES.items():
        if part in name:
            raise ValueError(f"this is {family} (a {name}); {SUPPORTED}")


def refuse_other_families(names: Iterable[str]) -> None:
    """Raises ValueError if the keys of a single file are those of a family that is not supported."""
    for name in names:
        bare = name.removeprefix("model.diffusion_model.")
        for start, family in OTHER_KEYS.items():
            if bare.startswith(start):
                raise ValueError(f"this is {family} (it holds {name}); {SUPPORTED}")


def refuse_other_channels(channels: int) -> None:
    """Raises ValueError if a U-Net takes more than latents."""
    if channels in OTHER_CHANNELS:
        raise ValueError(f"this is {OTHER_CHANNELS[channels]} (its unet takes {channels} channels); {SUPPORTED}")


def configs_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> NetworkConfigs:
    """The configs of a published model from the shapes in its single file; what no shape tells is as published.

    Raises:
        ValueError: a key is missing, or the sizes are such as no config allows or such as were never published.
    """
    unet, vae, clip, open_clip = (
        _Shapes(prefix, shapes)
        for prefix in (
            "model.diffusion_model.",
            "first_stage_model.",
            "cond_stage_model.transformer.text_model.",
            "cond_stage_model.model.",
        )
    )
    try:
        refuse_other_channels(unet["input_blocks.0.0.weight"][1])
        has_open_clip = "token_embedding.weight" in open_clip
        text_encoder = _open_clip_config(open_clip) if has_open_clip else _clip_config(clip)
        return NetworkConfigs(_unet_config(unet, has_open_clip), _autoencoder_config(vae), text_encoder)
    except IndexError:
        raise ValueError("tensors have too few dimensions; this is no Stable Diffusion checkpoint") from None


class _Shapes(dict[str, tuple[int, ...]]):
    """Shapes by key below one prefix; a missing one is the user's error."""

    def __init__(self, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(
            (name.removeprefix(prefix), shape) for name, shape in shapes.items() if name.startswith(prefix)
        )
        self.prefix = prefix

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise ValueError(f"there is no {self.prefix}{name}; this is no whole Stable Diffusion checkpoint")

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group finds in a key."""
        return 1 + max((int(found[1]) for name in self if (found := re.match(pattern, name))), default=-1)


def _unet_config(shapes: _Shapes, has_open_clip: bool) -> UNetConfig:
    levels = 1 + sum(name.endswith(".0.op.weight") for name in shapes)
    blocks = shapes.count(r"input_blocks\.(\d{1,4})\.") // levels  # of a level; the last one halves the size
    widths = [shapes[f"input_blocks.{1 + level * blocks}.0.out_layers.3.weight"][0] for level in range(levels)]
    down = [f"input_blocks.{1 + level * blocks}.1.norm.weight" in shapes for level in range(levels)]
    up = [f"output_blocks.{level * blocks}.1.norm.weight" in shapes for level in range(levels)]

    def depth(level: int) -> int:
        """Transformer blocks at each of a level's places of attention: 1 if it has none."""
        places = [f"input_blocks.{1 + level * blocks}", f"output_blocks.{(levels - 1 - level) * blocks}"]
        if level == levels - 1:
            places.append("middle_block")
        return max(1, *(shapes.count(rf"{place}\.1\.transformer_blocks\.(\d{{1,4}})\.") for place in places))

    depths = [depth(level) for level in range(levels)]
    return UNetConfig.model_validate(
        {
            "in_channels": shapes["input_blocks.0.0.weight"][1],
            "out_channels": shapes["out.2.weight"][0],
            "block_out_channels": widths,
            "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in down],
            "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up],
            "layers_per_block": blocks - 1,
            "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
            "attention_head_dim": [_heads(width) for width in widths] if has_open_clip else 8,
            "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][-1],
            "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
        }
    )


def _autoencoder_config(shapes: _Shapes) -> AutoencoderConfig:
    levels = shapes.count(r"encoder\.down\.(\d{1,4})\.")
    return AutoencoderConfig.model_validate(
        {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": shapes.count(r"encoder\.down\.0\.block\.(\d{1,4})\."),
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        }
    )


def _clip_config(shapes: _Shapes) -> TextEncoderConfig:
    table = shapes["embeddings.token_embedding.weight"]
    return TextEncoderConfig(
        vocab_size=table[0],
        hidden_size=table[1],
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=shapes.count(r"encoder\.layers\.(\d{1,4})\."),
        num_attention_heads=_heads(table[1]),
        max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
        projection_dim=table[1],
    )


def _open_clip_config(shapes: _Shapes) -> TextEncoderConfig:
    table = shapes["token_embedding.weight"]
    most = PUBLISHED[1].text_encoder.num_hidden_layers  # the one after is in the file, but nobody's context
    return TextEncoderConfig(
        vocab_size=table[0],
        hidden_size=table[1],
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=min(shapes.count(r"transformer\.resblocks\.(\d{1,4})\."), most),
        num_attention_heads=_heads(table[1]),
        max_position_embeddings=shapes["positional_embedding"][0],
        hidden_act="gelu",
        projection_dim=table[1],
    )


def _heads(width: int) -> int:
    """Published networks whose heads are not given by their number have heads of 64 channels."""
    if width % 64:
        raise ValueError(f"the number of attention heads of a width of {width} was never published")
    return width // 64
