"""A model from one layout into another, with a certificate: the way back is compared before anything is left there."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.families import family
from pipelines.loading import Model, build_model, new_model_at, read_model, write_model
from pipelines.single_file import SUFFIX, unreadable
from pipelines.stored_model import StoredModel, with_dtype
from pipelines.weights import some

CELLS = 8  # along each side of the latents for which the networks are compared


@dataclass(frozen=True)
class Certificate:
    """What a conversion kept. "The way back" is the new model read again, its weights under a folder's names.

    Tensors are named as `unet/conv_in.weight`. `unequal` on the way back are not bit for bit what was to be written,
    `missing` are not there, `unexpected` were not written. `rounding` is the largest change of a value by the new
    dtype, `forward` the largest difference between what the two models' networks make of fixed random inputs, in
    float32. `left_out` are keys or files of the source that have no place in the destination, `unreadable` is what
    keeps other programs from reading it.
    """

    source: str
    destination: str
    family: str
    prediction_type: str
    prediction_reason: str
    dtypes: tuple[str, ...]
    tensors: int
    unequal: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    configs_equal: bool
    tokenizer_equal: bool
    rounding: float
    forward: dict[str, float]
    left_out: tuple[str, ...]
    unreadable: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether all that is not `left_out` came through, and nothing changed but by `rounding`."""
        return not (self.unequal or self.missing or self.unexpected) and self.configs_equal and self.tokenizer_equal

    def lines(self) -> list[str]:
        """What a person should know of it, one fact each."""
        outputs = ", ".join(f"{part} {value:.2g}" for part, value in self.forward.items())
        facts = [
            f"{self.family}, prediction type {self.prediction_type} ({self.prediction_reason})",
            f"{self.tensors} tensors, all configs and the tokenizer come back equal; outputs differ by: {outputs}",
        ]
        facts += [f"rounding changed values by up to {self.rounding:.2g}"] * (self.rounding > 0)
        facts += [f"left out: {some(self.left_out)}"] * bool(self.left_out)
        facts += [f"other programs cannot read it: {some(self.unreadable)}"] * bool(self.unreadable)
        return facts


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    prediction: str | None = None,
    ema: bool = False,
    allow_pickle: bool = False,
) -> Certificate:
    """Writes the model at `source` as a single file if `destination` ends in .safetensors, else as a folder.

    Args:
        dtype: of the weights on disk; None keeps each tensor's own.
        prediction, ema, allow_pickle: as for `load_model`.

    Raises:
        ValueError: the source cannot be read, has no form as a single file or does not come through, or the
            destination is taken by something that is no model; nothing has been written then.
    """
    target = Path(destination)
    stored = with_dtype(read_model(source, prediction, ema, allow_pickle), dtype)
    model = build_model(stored)
    with new_model_at(target) as place:
        write_model(place, stored, dtype)
        back = read_model(place)
        source_tensors, found = _tensors(stored), _tensors(back)
        written = {name: tensor.to(dtype or tensor.dtype) for name, tensor in source_tensors.items()}
        shared = sorted(written.keys() & found.keys())
        certificate = Certificate(
            source=str(stored.source),
            destination=str(target),
            family=family(model.text_encoder.config),
            prediction_type=model.scheduler.prediction_type,
            prediction_reason=stored.prediction_reason,
            dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.values()})),
            tensors=len(written),
            unequal=tuple(name for name in shared if not _same_bits(written[name], found[name])),
            missing=tuple(sorted(written.keys() - found.keys())),
            unexpected=tuple(sorted(found.keys() - written.keys())),
            configs_equal=stored.configs == back.configs,
            tokenizer_equal=_tokenizer_files(stored) == _tokenizer_files(back),
            rounding=max((_distance(source_tensors[name], found[name]) for name in shared), default=0.0),
            forward=_forward_differences(model, build_model(back)),
            left_out=stored.left_out,
            unreadable=unreadable(stored, model.scheduler) if target.suffix == SUFFIX else (),
        )
        if not certificate.holds:
            raise ValueError(f"{target} would not be the same model as {stored.source}: {certificate}")
    return certificate


def _tensors(stored: StoredModel) -> dict[str, Tensor]:
    return {
        f"{part}/{name}": tensor for part, weights in stored.weights.items() for name, tensor in weights.tensors.items()
    }


def _same_bits(one: Tensor, two: Tensor) -> bool:
    """Stricter than equality of numbers, in which 0 is -0."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, two)))


def _distance(one: Tensor, two: Tensor) -> float:
    if one.dtype == two.dtype or not one.numel():
        return 0.0
    return float((one.float() - two.float()).abs().max())


def _tokenizer_files(stored: StoredModel) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in stored.tokenizer_folder.iterdir() if file.is_file()}


@torch.no_grad()
def _forward_differences(one: Model, two: Model) -> dict[str, float]:
    """The largest difference of each network's outputs. Both models lose their weights on the way."""
    unet, tower, channels = one.unet.config, one.text_encoder.config, one.autoencoder.config.latent_channels
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, unet.in_channels, CELLS, CELLS, generator=generator)
    context = torch.randn(1, tower.max_position_embeddings, unet.cross_attention_dim, generator=generator)
    latents = torch.randn(1, channels, CELLS, CELLS, generator=generator)
    ids = torch.randint(tower.vocab_size, (1, tower.max_position_embeddings), generator=generator)

    def difference(networks: tuple[nn.Module, nn.Module], run: Callable[..., Tensor]) -> float:
        outputs = []
        for network in networks:
            outputs.append(run(network.float()))
            network.to("meta")  # of a large network float32 copies must not add up
        return float((outputs[0] - outputs[1]).abs().max())

    return {
        "unet": difference((one.unet, two.unet), lambda unet: unet(x_t, torch.tensor(500), context)),
        "vae": difference((one.autoencoder, two.autoencoder), lambda autoencoder: autoencoder.decode(latents)),
        "text_encoder": difference((one.text_encoder, two.text_encoder), lambda tower: tower(ids)),
    }
