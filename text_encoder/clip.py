"""CLIP's text tower (Radford et al. 2021, arXiv 2103.00020): token ids to the context that a U-Net attends to.

Parameter names and config keys are those of transformers' `CLIPTextModel`, as Stable Diffusion folders hold it.
"""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

Count = Annotated[int, Field(ge=1, le=2**20)]
TokenId = Annotated[int, Field(ge=0)]
Noted = Annotated[Any, Field(exclude=True)]


class TextEncoderConfig(BaseModel, frozen=True):
    """Keys and defaults of transformers' `CLIPTextConfig`; keys that it does not know are ignored."""

    vocab_size: Count = 49408
    hidden_size: Count = 512
    intermediate_size: Count = 2048
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 12
    num_attention_heads: Count = 8
    max_position_embeddings: Count = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    # The tower itself needs none of these; they are for whoever reads the folder.
    bos_token_id: TokenId | None = 49406
    eos_token_id: TokenId | tuple[TokenId, ...] | None = 49407
    pad_token_id: int | None = 1
    projection_dim: Count | None = 512
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    dropout: Literal[0] = 0
    attention_dropout: Literal[0] = 0
    use_attention_mask: Literal[False] = False
    model_type: Literal["clip_text_model"] = "clip_text_model"
    # Marks that transformers leaves in the file: known, without effect, not written again.
    architectures: Noted = None
    dtype: Noted = None
    torch_dtype: Noted = None
    transformers_version: Noted = None

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        return self


class Embeddings(nn.Module):
    """Token plus position: int64 [B,L] -> [B,L,D]."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        out: Tensor = self.token_embedding(token_ids) + self.position_embedding.weight[: token_ids.shape[1]]
        return out


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (arXiv 1706.03762, equation 1) over earlier positions and one's own: all [B,H,L,d].

    On a CPU the fused kernel's backward pass is 4 times slower than the plain formula's for a prompt's few tokens.
    """
    if q.requires_grad and q.device.type == "cpu":
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        out: Tensor = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return out
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CausalAttention(nn.Module):
    """Multi-head self-attention in which no position sees a later one: [B,L,D] -> [B,L,D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tokens in projected)
        mixed = attend_causally(q, k, v)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Perceptron(nn.Module):
    """The two-layer perceptron of each position: [B,L,D] -> [B,L,D]."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.quick = config.hidden_act == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        out: Tensor = self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
        return out


class Layer(nn.Module):
    """One pre-norm transformer layer: [B,L,D] -> [B,L,D]."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CausalAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Perceptron(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class TextEncoder(nn.Module):
    """The text tower: `text_encoder(token_ids int64 [B,L]) -> context [B,L,D]`, L at most `max_position_embeddings`.

    The context is the output of the last layer there is but for `clip_skip`, through the final norm. Raises
    `ValueError` if L is too long or no layer is left.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        layers = nn.Sequential(*(Layer(config) for _ in range(config.num_hidden_layers)))
        self.text_model = nn.Sequential(
            OrderedDict(
                embeddings=Embeddings(config),
                encoder=nn.Sequential(OrderedDict(layers=layers)),
                final_layer_norm=nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
            )
        )

    @classmethod
    def from_transformers_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from the contents of a `text_encoder/config.json`.

        Raises `pydantic.ValidationError`, a `ValueError` that names each key whose value is not supported.
        """
        return cls(TextEncoderConfig.model_validate(config))

    def forward(self, token_ids: Tensor, clip_skip: int = 0) -> Tensor:
        length, positions = token_ids.shape[1], self.config.max_position_embeddings
        layers = self.config.num_hidden_layers
        if length > positions:
            raise ValueError(
                f"{length} tokens are too many for the text encoder's {positions} positions; cut the prompt"
            )
        if not 0 <= clip_skip < layers:
            raise ValueError(f"clip_skip is {clip_skip}; this text encoder has {layers} layers: give 0 to {layers - 1}")
        embeddings, encoder, final_layer_norm = self.text_model
        x = embeddings(token_ids)
        for layer in islice(encoder.get_submodule("layers").children(), layers - clip_skip):
            x = layer(x)
        context: Tensor = final_layer_norm(x)
        return context


def with_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `CLIPTextModel` with every key under `text_model.`, and without the buffer `position_ids`.

    Which of the two spellings a file has depends on the version of transformers that wrote it and on how.
    """
    bare = ("embeddings.", "encoder.", "final_layer_norm.")
    return {
        f"text_model.{key}" if key.startswith(bare) else key: tensor
        for key, tensor in state_dict.items()
        if not key.endswith("embeddings.position_ids")
    }


OPEN_CLIP_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def from_open_clip(state_dict: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """State dict for a `TextEncoder` of `num_layers` from that of an open_clip model; picture keys are left out.

    One layer fewer than the tower has gives the penultimate layer's context, as in Stable Diffusion 2. Raises
    `ValueError` if the tower has fewer than `num_layers`.
    """
    out = {
        "text_model.embeddings.token_embedding.weight": state_dict["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state_dict["positional_embedding"],
        **{f"text_model.final_layer_norm.{kind}": state_dict[f"ln_final.{kind}"] for kind in ("weight", "bias")},
    }
    for index in range(num_layers):
        theirs, ours = f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        if f"{theirs}.ln_1.weight" not in state_dict:
            raise ValueError(f"the open_clip text tower has {index} layers, but {num_layers} were asked for")
        for kind in ("weight", "bias"):
            fused = state_dict[f"{theirs}.attn.in_proj_{kind}"]
            for letter, part in zip("qkv", fused.chunk(3), strict=True):
                out[f"{ours}.self_attn.{letter}_proj.{kind}"] = part.clone()
            for old, new in OPEN_CLIP_NAMES.items():
                out[f"{ours}.{new}.{kind}"] = state_dict[f"{theirs}.{old}.{kind}"]
    return out
