"""What a model is, told from its files; nothing that they contain is run."""

import os
import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from pipelines.families import family
from pipelines.key_map import AVERAGE
from pipelines.loading import CLASS_NAMES, build_model, read_model
from pipelines.single_file import unreadable

USUAL = re.compile(
    r"model_ema\..*|(\w+_)?alphas_cumprod(_prev)?|betas|posterior_\w+|logvar|lvlb_weights|scale_factor|global_step"
    r"|first_stage_model\.loss\..*|cond_stage_model\.(.*\.)?(logit_scale|text_projection(\.weight)?|attn_mask)"
    r"|cond_stage_model\.model\.transformer\.resblocks\.\d+\..*"
    r"|[^/]*\.(md|png)|LICENSE[^/]*|\.gitattributes"
)
"""Keys of published single files that are no weights of the three networks, or of a block that nobody reads; files of
published folders that are for people."""


@dataclass(frozen=True)
class NetworkReport:
    """A network's class, how many numbers it has, the bytes that they take, and how many tensors have which dtype."""

    class_name: str
    parameters: int
    bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What a model is. `picture_size` is width and height in pixels, `context` tokens and width; `odd_keys` are keys of
    a single file, or files of a folder, that are not read and not usual either; `unreadable` is what keeps other
    programs from reading the model as a single file.
    """

    model: str
    layout: str
    family: str
    prediction_type: str
    prediction_reason: str
    zero_terminal_snr: bool
    picture_size: tuple[int, int]
    latent_channels: int
    context: tuple[int, int]
    networks: dict[str, NetworkReport]
    has_moving_average: bool
    odd_keys: tuple[str, ...]
    unreadable: tuple[str, ...]


def inspect_model(source: str | os.PathLike[str] | None, prediction: str | None = None) -> Report:
    """Reads all of a model at `source` but a pickle, and reports what it is; the arguments are `load_model`'s.

    Raises:
        ValueError: one line that names the file and what is wrong in it, or the family if it is not supported.
    """
    stored = read_model(source, prediction)
    model = build_model(stored)
    height, width = model.own_size
    networks: dict[str, nn.Module] = {
        "unet": model.unet,
        "vae": model.autoencoder,
        "text_encoder": model.text_encoder,
    }
    return Report(
        model=str(stored.source),
        layout="folder" if stored.source.is_dir() else "single file",
        family=family(model.text_encoder.config),
        prediction_type=model.scheduler.prediction_type,
        prediction_reason=stored.prediction_reason,
        zero_terminal_snr=model.scheduler.rescale_betas_zero_snr,
        picture_size=(width, height),
        latent_channels=model.autoencoder.config.latent_channels,
        context=(model.tokenizer.max_length, model.unet.config.cross_attention_dim),
        networks={part: _report(network) for part, network in networks.items()},
        has_moving_average=any(name.startswith(AVERAGE) for name in stored.left_out),
        odd_keys=tuple(name for name in stored.left_out if not USUAL.fullmatch(name)),
        unreadable=unreadable(stored, model.scheduler),
    )


def _report(network: nn.Module) -> NetworkReport:
    tensors = network.state_dict().values()
    return NetworkReport(
        class_name=CLASS_NAMES[type(network)][1],
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
    )
