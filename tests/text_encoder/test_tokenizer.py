"""The tokenizer against those of transformers and open_clip."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import CLIPTokenizer

from text_encoder import Tokenizer
from text_encoder.tokenizer import write_tokenizer

ASCII = [
    "",
    "a red house under a yellow sun",
    "Two BIG fish, left of three small stars!",
    "it's 12,000 (or so): don't -- they'll 'quote' #1 @ $5.00; a/b\\c [x] {y} ~^_`",
    "  spaces \t and\n\nlines  ",
]
UNICODE = [
    "a café, a naïve cafe\u0301, ﬁne ß İstanbul",
    "日本語の絵 and 😀👩‍👩‍👧 emoji",
    "<b>bold</b> &amp; “quotes” — dash … \u00a0 nbsp \u2028 line",
    "a <|endoftext|> b <|startoftext|> c",
    "\x00 \x1f \ufeff control",
]
LONG = ["word " * 75, "word " * 76, "a tree " * 200, "x" * 3000, "!" * 500]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tokenizer"
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def variant(folder: Path, to: Path, drop: tuple[str, ...] = (), **config: Any) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*drop))
    path = to / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return to


def theirs(folder: Path, prompts: list[str]) -> torch.Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_equals_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    prompts = ASCII + UNICODE + LONG
    ids = tokenizer(prompts).ids
    assert ids.dtype == torch.int64
    assert ids.shape == (len(prompts), 77)
    assert torch.equal(ids, theirs(folder, prompts))


def test_equals_open_clip_on_ascii_but_for_the_padding(tokenizer: Tokenizer) -> None:
    expected = open_clip.tokenize(ASCII)
    for row, wanted in zip(tokenizer(ASCII).ids, expected, strict=True):
        length = int(wanted.argmax()) + 1
        assert torch.equal(row[:length], wanted[:length])
        assert bool((row[length:] == 49407).all())


@pytest.mark.parametrize("drop", [("vocab.json", "merges.txt"), ("tokenizer.json",)], ids=["one file", "two files"])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_either_form_on_disk_and_either_padding(folder: Path, tmp_path: Path, drop: tuple[str, ...], pad: str) -> None:
    made = variant(folder, tmp_path / "t", drop)
    special = json.loads((made / "special_tokens_map.json").read_text())
    (made / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    tokenizer = Tokenizer.from_folder(made)
    assert tokenizer.pad_id == {"<|endoftext|>": 49407, "!": 0}[pad]
    assert torch.equal(tokenizer(ASCII + UNICODE).ids, theirs(made, ASCII + UNICODE))


def test_stable_diffusion_1_pads_with_its_end_and_2_with_id_0(folder: Path, tmp_path: Path) -> None:
    """Both as published: version 2 states its padding in `special_tokens_map.json` alone, against the config."""
    first = variant(folder, tmp_path / "1", ("tokenizer.json",), pad_token="<|endoftext|>")
    second = variant(folder, tmp_path / "2", ("tokenizer.json",), pad_token="<|endoftext|>")
    special = json.loads((second / "special_tokens_map.json").read_text())
    (second / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "!"}))
    start, a, house, end = 49406, 320, 1212, 49407
    for made, pad, mark in ((first, end, 256), (second, 0, 0)):
        tokenizer = Tokenizer.from_folder(made)
        assert tokenizer(["a house", "a house!", ""]).ids.tolist() == [
            [start, a, house, end] + [pad] * 73,
            [start, a, house, mark, end] + [pad] * 72,
            [start, end] + [pad] * 75,
        ]
        assert tokenizer.row([a, house]) == [start, a, house, end] + [pad] * 73
        assert tokenizer.words("a house!") == [a, house, 256]
        assert torch.equal(tokenizer(ASCII).ids, theirs(made, ASCII))


def test_words_of_any_length_and_none_special(tokenizer: Tokenizer) -> None:
    assert tokenizer.words("") == []
    assert tokenizer.words("a house, " * 100) == [320, 1212, tokenizer.comma_id] * 100
    assert not {tokenizer.start_id, tokenizer.end_id} & set(tokenizer.words("a <|startoftext|> b <|endoftext|>"))
    assert tokenizer.words("a \ud800 b") == tokenizer.words("a ? b")
    for text in (*ASCII, *UNICODE[:3]):
        words = tokenizer.words(text)
        assert tokenizer([text]).ids[0].tolist() == tokenizer.row(words)


def test_padding_may_be_stated_as_an_object_and_the_config_alone(folder: Path, tmp_path: Path) -> None:
    stated = {
        "__type": "AddedToken",
        "content": "!",
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    made = variant(folder, tmp_path / "t", ("special_tokens_map.json",), pad_token=stated, model_max_length=20)
    tokenizer = Tokenizer.from_folder(made)
    ids = tokenizer(["a house!"]).ids
    assert ids.shape == (1, 20)
    assert ids[0, -1] == 0
    assert torch.equal(ids, theirs(made, ["a house!"]))


def test_what_does_not_fit_is_told(tokenizer: Tokenizer) -> None:
    fits = "word " * 74 + "end"
    prompts = ["short", "", fits, fits + " and  the Rest, café!", "x" * 100_000, "word" + " " * 100_000]
    cut = tokenizer(prompts).cut
    assert cut[:4] == ["", "", "", "and  the Rest, café!"]
    assert cut[4]
    assert set(cut[4]) == {"x"}
    assert cut[5] == ""
    assert bool((tokenizer([fits]).ids == tokenizer([fits + " and more"]).ids).all())


def test_a_huge_prompt_is_cut_before_it_is_read(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Spy:
        def encode(self, text: str, add_special_tokens: bool) -> Any:
            read.append(len(text))
            return backend.encode(text, add_special_tokens=add_special_tokens)

    backend = tokenizer._backend
    monkeypatch.setattr(tokenizer, "_backend", Spy())
    ids, cut = tokenizer(["a tree " * 1_000_000])
    assert read[0] < 30_000
    assert torch.equal(ids, tokenizer(["a tree " * 75]).ids)
    assert len(cut[0]) > 6_000_000


def test_half_a_surrogate_pair_becomes_a_question_mark(tokenizer: Tokenizer) -> None:
    assert torch.equal(tokenizer(["a \ud800 b"]).ids, tokenizer(["a ? b"]).ids)


def test_no_prompts(tokenizer: Tokenizer) -> None:
    assert tokenizer([]).ids.shape == (0, 77)
    assert tokenizer([]).cut == []


def test_the_written_file_is_what_transformers_writes(folder: Path, tmp_path: Path) -> None:
    simple = open_clip.tokenizer.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {renamed.get(token, token): index for token, index in simple.encoder.items()}
    CLIPTokenizer(vocab=vocab, merges=list(simple.bpe_ranks), model_max_length=77).save_pretrained(tmp_path)
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads((tmp_path / "tokenizer.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_the_vocabulary_is_clips(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)


def test_writing_without_open_clip_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(ValueError, match="needs open-clip-torch; install the extra 'train'"):
        write_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("drop", "config", "message"),
    [
        (("tokenizer_config.json",), {}, "tokenizer_config.json does not exist"),
        (("*.txt", "tokenizer.json"), {}, "neither tokenizer.json nor vocab.json with merges.txt"),
        ((), {"model_max_length": 2}, "model_max_length is 2, but must be a whole number from 3 to 4096"),
        ((), {"model_max_length": 10**30}, "must be a whole number from 3 to 4096"),
        (("special_tokens_map.json",), {"pad_token": "<pad>"}, "the vocabulary has no token '<pad>'"),
    ],
)
def test_a_folder_that_makes_no_sense(
    folder: Path, tmp_path: Path, drop: tuple[str, ...], config: dict[str, Any], message: str
) -> None:
    made = tmp_path / "t"
    shutil.copytree(folder, made)
    if config:
        path = made / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    for pattern in drop:
        for path in made.glob(pattern):
            path.unlink()
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_folder(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("drop", "name", "content", "message"),
    [
        ((), "tokenizer_config.json", "{", "tokenizer_config.json is no valid JSON"),
        ((), "tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
        ((), "tokenizer.json", "{}", "tokenizer.json cannot be read"),
        (("tokenizer.json",), "merges.txt", "one\n", "vocab.json and merges.txt do not make a tokenizer"),
        (("tokenizer.json",), "merges.txt", "nowhere tobefound\n", "vocab.json and merges.txt do not make a tokenizer"),
        (("tokenizer.json",), "vocab.json", '{"a": 0}', "vocab.json and merges.txt do not make a tokenizer"),
    ],
)
def test_a_broken_file_is_named(
    folder: Path, tmp_path: Path, drop: tuple[str, ...], name: str, content: str, message: str
) -> None:
    made = variant(folder, tmp_path / "t", drop)
    (made / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_folder(made)
    assert "\n" not in str(caught.value)


def test_ids_that_are_left_out_count(folder: Path, tmp_path: Path) -> None:
    """What an embedding needs is a row for the largest id."""
    made = variant(folder, tmp_path / "t", ("tokenizer.json",))
    vocabulary = json.loads((made / "vocab.json").read_text())
    (made / "vocab.json").write_text(json.dumps({**vocabulary, "<|endoftext|>": 60_000}))
    assert Tokenizer.from_folder(made).vocab_size == 60_001
