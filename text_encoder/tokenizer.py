"""CLIP's byte-pair tokenizer, read from the files of a Stable Diffusion folder by `tokenizers`."""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# No token of CLIP's vocabulary is half as long as 256 characters, so what lies beyond could never fit in 77 tokens.
MAX_CHARACTERS_PER_TOKEN = 256
MAX_LENGTH = 4096


class Tokens(NamedTuple):
    """Prompts as the text encoder takes them."""

    ids: Tensor
    """int64 [B, max_length]: start, words, end, padding."""
    cut: list[str]
    """What of each prompt did not fit, empty if all did."""


class Tokenizer:
    """`tokenizer([prompts]) -> Tokens`: rows of `max_length` ids, at most `room` of them text."""

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int, pad_token: str = END) -> None:
        """Raises `ValueError` if the vocabulary lacks a special token."""
        self.max_length, self.room = max_length, max_length - 2
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)  # an id may be left out
        self.start_id, self.end_id, self.pad_id = (_id(backend, token) for token in (START, END, pad_token))
        self.comma_id: int | None = backend.token_to_id(",</w>")
        # Both are done here, where the text that is cut can be told.
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([_special(token) for token in (START, END, pad_token)])
        self._backend = backend

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Self:
        """Read `tokenizer.json`, else `vocab.json` and `merges.txt`, with `tokenizer_config.json`.

        Raises `ValueError`, one line that names the file, if one is missing or makes no sense.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        config = _read_json(path)
        if (folder / "special_tokens_map.json").exists() and "added_tokens_decoder" not in config:
            # Stable Diffusion 2 states its padding there, and older transformers let that file win.
            config |= _read_json(folder / "special_tokens_map.json")
        length = config.get("model_max_length", 77)
        if not isinstance(length, int) or not 3 <= length <= MAX_LENGTH:
            raise ValueError(
                f"{path}: model_max_length is {length!r}, but must be a whole number from 3 to {MAX_LENGTH}"
            )
        pad = config.get("pad_token") or END
        pad = str(pad.get("content")) if isinstance(pad, dict) else str(pad)
        try:
            return cls(_read_backend(folder), length, pad)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def __call__(self, prompts: list[str]) -> Tokens:
        """Raises nothing: any text has tokens, and what does not fit is in `cut`."""
        ids, cut = zip(*(self._one(prompt) for prompt in prompts), strict=True) if prompts else ((), ())
        return Tokens(torch.tensor(ids, dtype=torch.int64).reshape(len(prompts), self.max_length), list(cut))

    def _one(self, prompt: str) -> tuple[list[int], str]:
        # Half of a surrogate pair cannot be written in UTF-8.
        text = prompt.encode("utf-8", "replace").decode()
        head = self.max_length * MAX_CHARACTERS_PER_TOKEN
        encoding = self._backend.encode(text[:head], add_special_tokens=False)
        end = encoding.offsets[self.room][0] if len(encoding.ids) > self.room else head
        return self.row(encoding.ids[: self.room]), text[end:].strip()

    def row(self, words: Sequence[int]) -> list[int]:
        """Start, words (at most `room`), end, padding: `max_length` ids."""
        return [self.start_id, *words, self.end_id, *[self.pad_id] * (self.room - len(words))]

    def words(self, text: str) -> list[int]:
        """The ids of a text of any length. No token is special: "!" is a word here even where it is the padding."""
        return self._reads_all_as_text.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    @cached_property
    def _reads_all_as_text(self) -> tokenizers.Tokenizer:
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        return copy


def write_tokenizer(folder: str | os.PathLike[str], max_length: int = 77) -> None:
    """Write the files of CLIP's tokenizer, as Stable Diffusion 1 has them, from the merges that ship in open_clip.

    Raises `ValueError` if open-clip-torch is not installed.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        raise ValueError("writing a tokenizer needs open-clip-torch; install the extra 'train'") from None
    theirs = SimpleTokenizer()
    renamed = {"<start_of_text>": START, "<end_of_text>": END}
    vocab = {renamed.get(token, token): index for token, index in theirs.encoder.items()}
    merges = list(theirs.bpe_ranks)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _build(vocab, merges).save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    config = {**special, "model_max_length": max_length, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", config)


def _build(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's tokenizer, word for word what transformers makes of the same vocabulary and merges."""
    model = models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    start, end = _id(backend, START), _id(backend, END)
    backend.post_processor = processors.RobertaProcessing(
        (END, end), (START, start), trim_offsets=False, add_prefix_space=False
    )
    backend.add_special_tokens([_special(START), _special(END)])
    return backend


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    whole = folder / "tokenizer.json"
    if whole.exists():
        try:
            return tokenizers.Tokenizer.from_str(whole.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"tokenizer.json cannot be read: {error}") from None
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.exists() and merges.exists()):
        raise ValueError("there is neither tokenizer.json nor vocab.json with merges.txt")
    try:
        pairs = [(left, right) for left, right in map(str.split, _merge_lines(merges))]
        return _build(_read_json(vocab), pairs)
    except Exception as error:
        raise ValueError(f"vocab.json and merges.txt do not make a tokenizer: {error}") from None


def _merge_lines(path: Path) -> list[str]:
    # Not splitlines(): some merges hold characters that Unicode counts as line ends.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line.strip() and not line.startswith("#version")]


def _id(backend: tokenizers.Tokenizer, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise ValueError(f"the vocabulary has no token {token!r}")
    return int(index)


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a tokenizer folder needs it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
