"""The text tower against transformers and open_clip."""

from typing import Any

import pytest
import torch
from open_clip import CLIP
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from text_encoder import TextEncoder, TextEncoderConfig
from text_encoder.clip import from_open_clip, with_prefix

CONFIG = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 118,
    "eos_token_id": 119,
    "pad_token_id": 0,
}


def ids(length: int = 77) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(120, (3, length), generator=generator)


def randomized(module: torch.nn.Module) -> None:
    """Weights far from their initial values: norms and biases, which start at ones and zeros, must count."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("length", [77, 9])
@torch.no_grad()
def test_equals_transformers(act: str, length: int) -> None:
    theirs = CLIPTextModel(CLIPTextConfig(**CONFIG, hidden_act=act)).eval()
    randomized(theirs)
    ours = TextEncoder.from_transformers_config(theirs.config.to_dict())
    ours.load_state_dict(with_prefix(theirs.state_dict()), strict=True)
    expected = theirs(ids(length)).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ids(length)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
@torch.no_grad()
def test_clip_skip_equals_transformers(clip_skip: int) -> None:
    theirs = CLIPTextModel(CLIPTextConfig(**CONFIG)).eval()
    randomized(theirs)
    ours = TextEncoder.from_transformers_config(theirs.config.to_dict())
    ours.load_state_dict(with_prefix(theirs.state_dict()), strict=True)
    hidden = theirs(ids(), output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    norm = getattr(theirs, "text_model", theirs).final_layer_norm  # where it is depends on the version
    torch.testing.assert_close(ours(ids(), clip_skip), norm(hidden), atol=1e-5, rtol=0)


def test_keys_are_saved_with_the_prefix_and_read_either_way() -> None:
    config = CLIPTextConfig(**CONFIG)
    wrapped = CLIPTextModelWithProjection(config).state_dict()
    projection = wrapped.pop("text_projection.weight")
    assert all(key.startswith("text_model.") for key in wrapped)
    ours = TextEncoder.from_transformers_config(CONFIG)
    assert ours.state_dict().keys() == wrapped.keys()
    position_ids = torch.arange(77)[None]
    bare = {key.removeprefix("text_model."): tensor for key, tensor in wrapped.items()}
    for state_dict in (
        wrapped,
        bare,
        wrapped | {"text_model.embeddings.position_ids": position_ids},
        bare | {"embeddings.position_ids": position_ids},
    ):
        assert with_prefix(state_dict) == wrapped
    assert with_prefix({"text_projection.weight": projection}).keys() == {"text_projection.weight"}


def open_clip_model(quick_gelu: bool) -> CLIP:
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 120, "width": 48, "heads": 4, "layers": 3}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    model = CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).eval()
    randomized(model)
    return model


@pytest.mark.parametrize("layers", [3, 2])
@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_equals_open_clip(layers: int, quick_gelu: bool) -> None:
    theirs = open_clip_model(quick_gelu)
    x = theirs.token_embedding(ids()) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:layers]:
        x = block(x, attn_mask=theirs.attn_mask)
    expected = theirs.ln_final(x)
    act = "quick_gelu" if quick_gelu else "gelu"
    config = {**CONFIG, "num_hidden_layers": layers, "intermediate_size": 4 * 48, "hidden_act": act}
    ours = TextEncoder.from_transformers_config(config)
    ours.load_state_dict(from_open_clip(theirs.state_dict(), layers), strict=True)
    torch.testing.assert_close(ours(ids()), expected, atol=1e-5, rtol=0)


def test_the_whole_open_clip_tower_ends_in_its_text_features() -> None:
    theirs = open_clip_model(quick_gelu=False)
    config = {**CONFIG, "intermediate_size": 4 * 48, "hidden_act": "gelu"}
    ours = TextEncoder.from_transformers_config(config)
    ours.load_state_dict(from_open_clip(theirs.state_dict(), 3), strict=True)
    tokens = ids()
    last = ours(tokens)[torch.arange(3), tokens.argmax(dim=1)]
    torch.testing.assert_close(last @ theirs.text_projection, theirs.encode_text(tokens), atol=1e-4, rtol=1e-4)


def test_converted_weights_share_no_memory() -> None:
    converted = from_open_clip(open_clip_model(quick_gelu=False).state_dict(), 2)
    storages = [tensor.untyped_storage().data_ptr() for tensor in converted.values()]
    assert len(set(storages)) == len(storages)


def test_no_position_sees_a_later_one() -> None:
    encoder = TextEncoder.from_transformers_config(CONFIG)
    tokens = ids(9)
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % 120
    before, after = encoder(tokens), encoder(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_trains_and_runs_in_bfloat16() -> None:
    encoder = TextEncoder.from_transformers_config(CONFIG)
    encoder(ids()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.bfloat16()(ids()).dtype == torch.bfloat16


def test_defaults_are_those_of_transformers() -> None:
    theirs, ours = CLIPTextConfig().to_dict(), TextEncoderConfig().model_dump()
    assert {key: theirs[key] for key in ours if key in theirs} == {key: ours[key] for key in ours if key in theirs}


def test_every_key_that_a_published_folder_holds_is_known() -> None:
    published = CLIPTextConfig(architectures=["CLIPTextModel"]).to_dict()
    declared = set(TextEncoderConfig.model_fields)
    added_in_memory = set(CLIPTextModel(CLIPTextConfig(**CONFIG)).config.to_dict()) - set(
        CLIPTextConfig().to_diff_dict()
    )
    assert set(CLIPTextConfig().to_diff_dict()) <= declared, added_in_memory
    stable_diffusion_1 = {"_name_or_path", "architectures", "attention_dropout", "dropout", "model_type", "torch_dtype"}
    assert stable_diffusion_1 - declared == {"_name_or_path"}
    assert TextEncoderConfig.model_validate(published).architectures == ["CLIPTextModel"]


def test_marks_of_transformers_are_not_written_again() -> None:
    config = TextEncoderConfig.model_validate({"torch_dtype": "float16", "transformers_version": "4.8.1"})
    assert not {"torch_dtype", "dtype", "transformers_version", "architectures"} & config.model_dump().keys()
    assert CLIPTextConfig(**config.model_dump()).hidden_size == 512


def test_too_many_tokens_are_an_error() -> None:
    encoder = TextEncoder.from_transformers_config(CONFIG)
    with pytest.raises(ValueError, match="78 tokens are too many for the text encoder's 77 positions"):
        encoder(ids(78))


@pytest.mark.parametrize("clip_skip", [-1, 3])
def test_leaving_no_layer_is_an_error(clip_skip: int) -> None:
    encoder = TextEncoder.from_transformers_config(CONFIG)
    with pytest.raises(ValueError, match=f"clip_skip is {clip_skip}; this text encoder has 3 layers: give 0 to 2"):
        encoder(ids(), clip_skip)


def test_missing_layers_of_open_clip_are_an_error() -> None:
    with pytest.raises(ValueError, match="the open_clip text tower has 3 layers, but 4 were asked for"):
        from_open_clip(open_clip_model(quick_gelu=True).state_dict(), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_act": "relu"},
            "hidden_act\n  Input should be 'quick_gelu' or 'gelu'",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout\n  Input should be 0"),
        ({"hidden_size": "wide"}, "hidden_size\n  Input should be a valid integer"),
        ({"num_attention_heads": 5}, "hidden_size 48 is no multiple of 5 heads"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_transformers_config({**CONFIG, **change})
