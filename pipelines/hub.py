"""`hub:owner/name`: a model folder from Hugging Face's cache, else downloaded. Nothing else here opens a socket."""

import re
from pathlib import Path

from pipelines.errors import one_line

PREFIX = "hub:"
PARTS = ("unet", "vae", "text_encoder")
PATTERNS = [
    *("model_index.json", "ldm.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"),
    *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "safetensors")),
]


def fetch(source: str) -> Path:
    """The folder of `hub:owner/name` in the cache; nothing is asked of the network if it is whole.

    Raises:
        ValueError: the name is none, or the model is neither in the cache nor can it be downloaded.
    """
    name = source.removeprefix(PREFIX)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(f"{source} names no model; write {PREFIX}OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=PATTERNS, local_files_only=True))
        if _is_whole(folder):
            return folder
    except OSError:
        pass  # not in the cache
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:  # beside OSError, whatever the library's own HTTP client happens to raise
        raise ValueError(f"{source} is not in the cache and cannot be downloaded: {one_line(error)}") from None


def _is_whole(folder: Path) -> bool:
    """Whether nothing is missing that a model needs; a download may have been cut off."""
    from pipelines.stored_model import CONFIGS, WEIGHTS_STEM
    from pipelines.weights import files_of, find_weights

    vocabulary = ("tokenizer.json",), ("vocab.json", "merges.txt")
    try:
        for part, stem in WEIGHTS_STEM.items():
            files_of(find_weights(folder / part, stem))
    except ValueError:
        return False
    tokenizer = folder / "tokenizer"
    return all((folder / name).is_file() for name in (*CONFIGS, "tokenizer/tokenizer_config.json")) and any(
        all((tokenizer / name).is_file() for name in names) for names in vocabulary
    )
