"""Sixteen small pictures and a tiny random model, for the training scripts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import picturebook
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from autoencoder import Autoencoder, AutoencoderConfig
from pipelines.loading import save_part
from text_encoder import TextEncoder, TextEncoderConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz,"
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
TINY_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 32,
}
TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def _one_run_after_another(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its state for the whole process, as if there were one run in each."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerator()
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


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
