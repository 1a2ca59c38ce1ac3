"""Sixteen small pictures and a tiny random model, for the training scripts."""

import json
from collections.abc import Iterator
from pathlib import Path

import picturebook
import pytest
import torch
from tiny_models import TINY_AUTOENCODER, forget_accelerator

from autoencoder import Autoencoder, AutoencoderConfig
from pipelines.loading import save_part
from text_encoder import TextEncoder, TextEncoderConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz,"
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(autouse=True)
def _one_run_after_another(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pictures of 32 pixels."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "metadata.jsonl").open("w") as lines:
        for i in range(16):
            scene, image = picturebook.picture(i, seed=0, size=32)
            image.save(folder / f"{i:06}.png")
            lines.write(json.dumps(scene.metadata(f"{i:06}.png", 32)) + "\n")
    return folder


@pytest.fixture(scope="session")
def parts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vae`, `text_encoder` and `tokenizer` of a model folder; the tokenizer knows letters alone."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    save_part(folder / "vae", Autoencoder(AutoencoderConfig(**TINY_AUTOENCODER)))
    config = TextEncoderConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    save_part(folder / "text_encoder", TextEncoder(config))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return folder
