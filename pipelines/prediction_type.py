"""What tells which prediction type a network was trained for: no shape does, so the first that speaks is believed."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ldm.prediction import PREDICTIONS
from ldm.unet import UNet

NOISE, _, VELOCITY = PREDICTIONS  # by the names that diffusers gives them
NAMES = {name: name for name in PREDICTIONS} | {ours: name for name, ours in PREDICTIONS.items()}
STATED = "modelspec.prediction_type"  # https://github.com/Stability-AI/ModelSpec: "epsilon" or one letter
MARKS = VELOCITY_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors
PUBLISHED_STEPS = {470_000: NOISE, 840_000: NOISE, 875_000: NOISE, 220_000: NOISE, 140_000: VELOCITY, 110_000: VELOCITY}
"""`global_step` of the checkpoints of Stable Diffusion 1.4, 1.5, 2.0 base, 2.1 base, 2.0 and 2.1."""
UNCLEAR = (0.25, 0.75)


def checked(name: str) -> str:
    """diffusers' name of a prediction type that has its name or ours. Raises ValueError for another."""
    if name not in NAMES:
        raise ValueError(f"prediction {name!r} is unknown; there are {', '.join(PREDICTIONS)}")
    return NAMES[name]


def statement(prediction_type: str, zero_terminal_snr: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a single file says of its prediction type: metadata, and the marker keys that other programs look for."""
    is_velocity = prediction_type == VELOCITY
    marks = (VELOCITY_MARK,) * is_velocity + (ZERO_SNR_MARK,) * (is_velocity and zero_terminal_snr)
    stated = PREDICTIONS[VELOCITY] if is_velocity else prediction_type
    return {STATED: stated}, {mark: torch.empty(0) for mark in marks}


def find_prediction_type(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], probe: Callable[[], float]
) -> tuple[str, str]:
    """The prediction type of a single file by diffusers' name, and what told it: in this order its metadata, its
    marker keys, its `global_step`, and what `probe`, a call of `share_of_input`, finds.

    Raises:
        ValueError: nothing told it.
    """
    if (stated := metadata.get(STATED, "").lower()) in NAMES:
        return NAMES[stated], f"{STATED} in its metadata"
    for mark in MARKS:
        if mark in tensors:
            return VELOCITY, f"its key {mark}"
    step = tensors.get("global_step")
    if step is not None and step.numel() == 1 and (found := PUBLISHED_STEPS.get(int(step))):
        return found, f"its global_step {int(step)}"
    share = probe()
    low, high = UNCLEAR
    if not (share <= low or share >= high):
        raise ValueError(
            f"nothing tells the prediction type ({share:.2f} of the noise comes back at the last time);"
            f" say it with --prediction {NOISE} or {VELOCITY}"
        )
    return NOISE if share >= high else VELOCITY, f"probing: {share:.2f} of the noise comes back at the last time"


@torch.no_grad()
def share_of_input(unet: UNet, steps: int = 1000) -> float:
    """How much of pure noise a network returns at its last time, where there is nothing else to see.

    About 1 if it predicts the noise; else it returns minus its idea of a picture, which the noise cannot tell it,
    and alpha times the noise: below 0.1. The network is cast to float32, in which any CPU computes fast enough.
    """
    config, generator = unet.config, torch.Generator().manual_seed(0)
    channels = min(config.in_channels, config.out_channels)  # a learned variance comes out, a mask goes in beside
    x = torch.randn(1, channels, 16, 16, generator=generator)
    nothing_known = torch.zeros(1, config.in_channels - channels, 16, 16)
    nothing_known[:, :1] = 1  # all to be painted, over an empty picture
    x_t = torch.cat([x, nothing_known], dim=1)
    out = unet.float()(x_t, torch.tensor(steps - 1), torch.zeros(1, 77, config.cross_attention_dim))[:, :channels]
    return float((out * x).sum() / (x * x).sum())
