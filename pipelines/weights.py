"""Weights on disk: held in memory once, checked key by key and for finite values before a module gets them."""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipelines.json_files import read_json

ModuleT = TypeVar("ModuleT", bound=nn.Module)
MadeT = TypeVar("MadeT")
NAMED_KEYS = 5
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
ALIGNMENT = 16  # bytes
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHARD = re.compile(r"[\w.-]+\.safetensors")


class Weights(NamedTuple):
    """Tensors by name, and the file that messages about them name."""

    path: Path
    tensors: Mapping[str, Tensor]


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


def on_meta(make: Callable[[], MadeT]) -> MadeT:
    """What `make` makes, its tensors without memory: a config is checked before any weight is read."""
    with torch.device("meta"), WithoutInitialValues():
        return make()


def find_weights(folder: Path, stem: str) -> Path:
    """The weights of a part: one file or the index of several, in full precision if there is a choice.

    Raises:
        ValueError: there are none; pickled weights are named and refused.
    """
    for name in (
        "{}.safetensors",
        "{}.safetensors.index.json",
        "{}.fp16.safetensors",
        "{}.safetensors.index.fp16.json",
    ):
        if (path := folder / name.format(stem)).is_file():
            return path
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickled:
        raise ValueError(f"{folder} holds only pickled weights ({pickled[0]}); save them as {stem}.safetensors first")
    raise ValueError(f"{folder / stem}.safetensors does not exist; a model folder needs it")


def files_of(path: Path) -> list[Path]:
    """The safetensors files behind what `find_weights` found: itself, or the shards of an index, in order.

    Raises:
        ValueError: the index is broken or names a shard that does not exist.
    """
    if path.suffix != ".json":
        return [path]
    return [path.parent / name for name in sorted(set(_shard_names(path).values()))]


def read_weights(path: Path) -> Weights:
    """All tensors of what `find_weights` found, mapped from disk where they lie well there.

    Raises:
        ValueError: a file is broken, or does not hold what its index says.
    """
    shards = {file.name: in_place(file, read_safetensors(file)[0]) for file in files_of(path)}
    if path.name in shards:
        return Weights(path, shards[path.name])
    names = _shard_names(path)
    refuse(path, "names what its shards lack:", [name for name, shard in names.items() if name not in shards[shard]])
    return Weights(path, {name: shards[shard][name] for name, shard in names.items()})


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file, mapped from disk, and its metadata.

    Raises:
        ValueError: the file is broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensors(), dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from None


def in_place(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that `read_safetensors` mapped, those read into memory that lie where a CPU's kernels would be slower and
    round differently: a picture must depend on the weights alone. One tensor of odd size, such as the bias of three
    colours, shifts all that come after it in a file.
    """
    with safe_open(path, framework="pt", backend="pread") as file:
        return {
            name: file.get_tensor(name) if tensor.data_ptr() % ALIGNMENT else tensor for name, tensor in tensors.items()
        }


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint and its `global_step`; nothing in it but tensors and numbers is ever built.

    Raises:
        ValueError: the file is broken, or holds something else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors and numbers, which could run code; it is not read") from None
    except Exception as error:  # a broken pickle raises whatever its bytes happen to make
        raise ValueError(f"{path} is no intact checkpoint: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no dictionary of tensors")
    inner = found.get("state_dict", found)
    if not isinstance(inner, dict):
        raise ValueError(f"{path} holds no dictionary of tensors")
    tensors = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if isinstance(step := found.get("global_step"), int):
        tensors["global_step"] = torch.tensor(step)
    return tensors


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to one safetensors file.

    Args:
        dtype: that they get on disk; None keeps each one's own.

    Raises:
        ValueError: a value is too large for `dtype`.
    """
    cast = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    if dtype == torch.float16:
        large = [name for name, tensor in cast.items() if tensor.dtype != tensors[name].dtype and not is_finite(tensor)]
        refuse(path, "cannot hold in float16 (use bfloat16)", large)
    path.touch()
    mode = path.stat().st_mode
    save_file(cast, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(mode)  # safetensors makes its files private whatever the umask says


def fill(module: ModuleT, weights: Weights) -> ModuleT:
    """Gives a module made on the meta device its weights without a copy.

    Raises:
        ValueError: keys are missing, unexpected, of the wrong shape or dtype, or not finite (up to five are named).
    """
    path, found = weights
    expected = module.state_dict()
    refuse(path, "lacks", expected.keys() - found.keys())
    refuse(path, "holds the unknown", found.keys() - expected.keys())
    misshapen = [
        f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape
    ]
    refuse(path, "does not fit its config:", misshapen)
    strange = [f"{name} of {tensor.dtype}" for name, tensor in found.items() if tensor.dtype not in DTYPES]
    refuse(path, "holds what is no usual number:", strange)
    for name, tensor in found.items():
        if not is_finite(tensor):
            raise ValueError(f"{path}: {name} holds NaN or infinity; the file is damaged or its training diverged")
    module.load_state_dict(found, strict=True, assign=True)
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


def refuse(path: Path, verb: str, faults: Iterable[str]) -> None:
    """Raises ValueError with the first few of the faults, if there are any."""
    if found := sorted(faults):
        raise ValueError(f"{path} {verb} {some(found)}")


def some(names: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # one pass, and NaN wins in both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _shard_names(index: Path) -> dict[str, str]:
    """The shard of each tensor."""
    names = read_json(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names.values())
    ):
        raise ValueError(f"{index}: weight_map must name, for each tensor, the safetensors file beside it")
    missing = {name for name in names.values() if not (index.parent / name).is_file()}
    refuse(index, "names shards that do not exist:", missing)
    return names
