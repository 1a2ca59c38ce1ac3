"""Weights on disk: safetensors only, checked key by key and for finite values before a module gets them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ModuleT = TypeVar("ModuleT", bound=nn.Module)
NAMED_KEYS = 5
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class WithoutInitialValues(TorchFunctionMode):
    """Within it, `torch.nn.init` leaves tensors as they are: on the meta device its normal draw alone would import
    torch's compiler, which takes seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def find_weights(folder: Path, stem: str) -> Path:
    """The one weights file of a part: `stem.safetensors`, or `stem.fp16.safetensors` if that is all there is.

    Raises:
        ValueError: there is neither; pickled weights are named and refused.
    """
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return folder / name
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickled:
        raise ValueError(f"{folder} holds only pickled weights ({pickled[0]}); save them as {stem}.safetensors first")
    raise ValueError(f"{folder / stem}.safetensors does not exist; a model folder needs it")


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped from disk.

    Raises:
        ValueError: the file is broken, or a tensor holds NaN or infinity (the tensor is named).
    """
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from None
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            raise ValueError(f"{path}: {name} holds NaN or infinity; the file is damaged or its training diverged")
    return weights


def fill(module: ModuleT, weights: Mapping[str, Tensor], path: Path) -> ModuleT:
    """Gives a module made on the meta device its weights without a copy; `path` is for the messages.

    Raises:
        ValueError: keys are missing, unexpected or of the wrong shape (up to five are named).
    """
    expected = module.state_dict()
    _refuse(path, "lacks", sorted(expected.keys() - weights.keys()))
    _refuse(path, "holds the unknown", sorted(weights.keys() - expected.keys()))
    misshapen = [
        f"{name} {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if weights[name].shape != tensor.shape
    ]
    _refuse(path, "does not fit its config:", misshapen)
    module.load_state_dict(weights, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    return module


def with_current_attention_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames an autoencoder's attention, whose keys in published SD 1 and 2 folders are those of old diffusers."""
    renames = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

    def current(name: str) -> str:
        for old, new in renames.items():
            if ".attentions." in name:
                name = name.replace(old, new)
        return name

    return {current(name): tensor for name, tensor in weights.items()}


def _is_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # one pass, and NaN wins in both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _refuse(path: Path, verb: str, faults: Sequence[str]) -> None:
    if faults:
        more = f" and {len(faults) - NAMED_KEYS} more" if len(faults) > NAMED_KEYS else ""
        raise ValueError(f"{path} {verb} {', '.join(faults[:NAMED_KEYS])}{more}")
