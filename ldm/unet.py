"""The cross-attention U-Net of latent diffusion (Rombach et al. 2022, arXiv 2112.10752) as Stable Diffusion 1.x and 2.x
use it. Parameters and config keys are named as in diffusers' `UNet2DConditionModel`: a published folder loads as it is.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from ldm.blocks import BLOCKS, Block, BlockType, DownBlock, MidBlock, UpBlock
from ldm.layers import Downsample, GroupNorm, TimeEmbedding, Upsample, as_many, silu, zeroed
from ldm.transformer import Attention, Context, Reading, SpatialTransformer, TransformerBlock

Count = Annotated[int, Field(ge=1, le=65536)]
Depth = Annotated[int, Field(ge=1, le=64)]
DownType = Literal["CrossAttnDownBlock2D", "DownBlock2D"]
UpType = Literal["CrossAttnUpBlock2D", "UpBlock2D"]


class UNetConfig(BaseModel, frozen=True):
    """Keys, defaults and meanings of diffusers' `UNet2DConditionModel`; keys that it does not know are ignored.

    A key without a part in this network may hold only its neutral value. `attention_head_dim` is the *number* of heads,
    as in every published folder; `num_attention_heads`, where given, goes before it. `upcast_attention` may be either,
    and changes nothing: fused attention keeps its scores in float32 anyway, and the plain formula, by which short
    sequences train on a CPU, in the network's dtype. `sample_size` is the latent size trained at, in cells.

    `block_type` alone is not diffusers': what stands where its networks have residual blocks (`ldm.blocks`).
    """

    sample_size: Count | tuple[Count, Count] | None = None
    in_channels: Count = 4
    out_channels: Count = 4
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1, max_length=16)] = (320, 640, 1280, 1280)
    down_block_types: tuple[DownType, ...] = (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D")
    up_block_types: tuple[UpType, ...] = ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",))
    layers_per_block: Depth = 2
    transformer_layers_per_block: Depth | tuple[Depth, ...] = 1
    attention_head_dim: Count | tuple[Count, ...] = 8
    num_attention_heads: Count | tuple[Count, ...] | None = None
    cross_attention_dim: Count = 1280
    norm_num_groups: Count = 32
    norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    use_linear_projection: bool = False
    upcast_attention: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    class_embed_type: Literal[None, "timestep", "identity"] = None
    num_class_embeds: Count | None = None
    block_type: BlockType = "residual"

    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] = "UNetMidBlock2DCrossAttn"
    act_fn: Literal["silu", "swish"] = "silu"
    reverse_transformer_layers_per_block: Literal[None] = None
    center_input_sample: Literal[False] = False
    only_cross_attention: Literal[False] = False
    mid_block_only_cross_attention: Literal[None, False] = None
    dual_cross_attention: Literal[False] = False
    downsample_padding: Literal[1] = 1
    mid_block_scale_factor: Literal[1] = 1
    dropout: Literal[0] = 0
    encoder_hid_dim: Literal[None] = None
    encoder_hid_dim_type: Literal[None] = None
    class_embeddings_concat: Literal[False] = False
    projection_class_embeddings_input_dim: Literal[None] = None
    addition_embed_type: Literal[None] = None
    addition_embed_type_num_heads: Literal[64] = 64
    addition_time_embed_dim: Literal[None] = None
    resnet_skip_time_act: Literal[False] = False
    resnet_out_scale_factor: Literal[1] = 1
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Literal[None] = None
    time_embedding_act_fn: Literal[None] = None
    timestep_post_act: Literal[None] = None
    time_cond_proj_dim: Literal[None] = None
    conv_in_kernel: Literal[3] = 3
    conv_out_kernel: Literal[3] = 3
    attention_type: Literal["default"] = "default"
    cross_attention_norm: Literal[None] = None

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A network that diffusers has too is written in diffusers' keys alone."""
        written: dict[str, Any] = handler(self)
        if self.block_type == "residual":
            written.pop("block_type", None)
        return written

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level, from the largest feature map to the smallest."""
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks at each place of attention, by levels like `heads`; the last are the middle's too."""
        depths = self.transformer_layers_per_block
        return (depths,) * len(self.block_out_channels) if isinstance(depths, int) else depths

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each level attends to the context on the way down or up; the last one always does, in the middle."""
        pairs = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        *levels, _ = ("CrossAttn" in down + up for down, up in pairs)
        return (*levels, True)

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        levels = len(self.block_out_channels)
        lists = {
            "down_block_types": self.down_block_types,
            "up_block_types": self.up_block_types,
            "heads": self.heads,
            "transformer_layers_per_block": self.depths,
        }
        for name, value in lists.items():
            if len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries, but block_out_channels has {levels}")
        for level, width in enumerate(self.block_out_channels):
            if width % self.norm_num_groups:
                raise ValueError(f"block_out_channels.{level} is {width}, no multiple of {self.norm_num_groups} groups")
            if self.attends[level] and width % self.heads[level]:
                raise ValueError(f"block_out_channels.{level} is {width}, no multiple of {self.heads[level]} heads")
        first = self.block_out_channels[0]
        if first % 2 or first <= 2 * self.freq_shift:
            raise ValueError(f"block_out_channels.0 is {first}, but must be even and more than twice freq_shift")
        return self


class UNet(nn.Module):
    """Predict from noisy latents: `unet(latents [B,C,h,w], t [B], context [B,L,D]) -> [B,C',h,w]`.

    Of k contexts for each of the latents, [kB,L,D], all the first before all the second, the output is [kB,C',h,w], and
    what comes before the first attention to the context is made once for all k.

    `t` is in training steps, 0 the least noisy, of any integer or real dtype; one number stands for the whole batch.
    `latents` and `context` have the weights' dtype, except under autocast. Any h and w of at least one cell will do.
    An unconditional network is given a context of one token of zeros.

    A network with classes takes `class_labels` too (`ldm.conditioning.Labelled` holds them fixed): indices [B]; or, by
    `class_embed_type`, numbers [B] ("timestep") or embeddings [B, 4 * width] ("identity"). An index beyond the classes'
    own can stand for none of them, as classifier-free guidance needs it.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
        features = 4 * widths[0]

        def embedding() -> TimeEmbedding:
            return TimeEmbedding(widths[0], features, cosine_first=config.flip_sin_to_cos, shift=config.freq_shift)

        def block(in_channels: int, out_channels: int) -> Block:
            scale_shift = config.resnet_time_scale_shift == "scale_shift"
            shape = in_channels, out_channels, features, groups, config.norm_eps
            return BLOCKS[config.block_type](*shape, scale_shift=scale_shift)

        def transformer(level: int) -> SpatialTransformer:
            shape = widths[level], config.heads[level], config.cross_attention_dim, groups
            return SpatialTransformer(*shape, depth=config.depths[level], linear=config.use_linear_projection)

        self.time_embedding = embedding()
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = embedding()
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, features)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            above, below = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
            resnets = [block(width if i else above, width) for i in range(layers)]
            attending = layers if config.down_block_types[level] == "CrossAttnDownBlock2D" else 0
            attentions = [transformer(level) for _ in range(attending)]
            last = level + 1 == len(widths)
            self.down_blocks.append(DownBlock(resnets, attentions, None if last else Downsample(width)))
            # The way up meets this level's feature maps in reverse; the last one is what came into the level.
            sources = [width if i else below for i in range(layers + 1)]
            resnets = [block(x + skip, width) for x, skip in zip(sources, [width] * layers + [above], strict=True)]
            attending = layers + 1 if config.up_block_types[-1 - level] == "CrossAttnUpBlock2D" else 0
            attentions = [transformer(level) for _ in range(attending)]
            self.up_blocks.insert(0, UpBlock(resnets, attentions, None if level == 0 else Upsample(width)))
        self.mid_block = MidBlock([block(widths[-1], widths[-1]) for _ in range(2)], [transformer(-1)])
        self.conv_norm_out = GroupNorm(groups, widths[0], config.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(widths[0], config.out_channels, 3, padding=1))

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from the contents of a `unet/config.json`.

        Raises `pydantic.ValidationError`, a `ValueError` that names each key whose value is not supported.
        """
        return cls(UNetConfig.model_validate(config))

    def read(self, context: Tensor) -> Reading:
        """What the network makes of context [B,L,D] by itself; `forward` takes it in the context's place.

        It is out of date once the weights change.
        """
        return Reading({attention: attention.read(context) for attention in self.cross_attentions()})

    def cross_attentions(self) -> list[Attention]:
        """Every attention to the context."""
        return [module.attn2 for module in self.modules() if isinstance(module, TransformerBlock)]

    def forward(self, latents: Tensor, t: Tensor, context: Context, class_labels: Tensor | None = None) -> Tensor:
        """Raises ValueError for class labels that are missing, too many or too few, or given to a network without
        classes, and for contexts whose number is no multiple of the latents'.
        """
        emb = self._embed(latents, t, context, class_labels)
        skips = [self.conv_in(latents)]
        for block in self.down_blocks:
            skips += block(skips[-1], emb, context)
        x = self.mid_block(skips[-1], emb, context)
        skips = [as_many(skip, context) for skip in skips]
        for block in self.up_blocks:
            x = block(x, skips, emb, context)
        out: Tensor = self.conv_out(silu(self.conv_norm_out(x)))
        return out

    def _embed(self, latents: Tensor, t: Tensor, context: Context, class_labels: Tensor | None = None) -> Tensor:
        """Embedding of t plus that of the classes, activated once for all the blocks, for each context:
        [kB, 4 * width].
        """
        emb: Tensor = self.time_embedding(t.to(latents.device).expand(len(latents)))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels are given, but the network has no classes: leave them out")
        elif class_labels is None:
            raise ValueError("class_labels are missing, but the network has classes: give one for each of the latents")
        elif len(class_labels) != len(latents):
            given, needed = len(class_labels), len(latents)
            raise ValueError(f"there are {given} class_labels, but {needed} latents: give one for each")
        else:
            emb = emb + self.class_embedding(class_labels.to(emb.device)).to(emb.dtype)
        return as_many(silu(emb), context)
