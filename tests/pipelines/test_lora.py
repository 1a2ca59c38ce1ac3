import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pipelines.loading import Model, load_model
from pipelines.lora import METADATA, LoRA, apply_loras, parse_lora, read_lora
from pipelines.runtime import prepare

ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.0."
ORIGINAL_ATTENTION = "unet.input_blocks.3.1.transformer_blocks.0."
MODULES = {  # some of the tiny model's, and what the original code called those of the U-Net
    ATTENTION + "attn1.to_q": ORIGINAL_ATTENTION + "attn1.to_q",
    ATTENTION + "attn2.to_k": ORIGINAL_ATTENTION + "attn2.to_k",
    ATTENTION + "attn2.to_out.0": ORIGINAL_ATTENTION + "attn2.to_out.0",
    ATTENTION + "ff.net.0.proj": ORIGINAL_ATTENTION + "ff.net.0.proj",
    "unet.down_blocks.0.resnets.0.conv1": "unet.input_blocks.1.0.in_layers.2",
    "unet.down_blocks.0.downsamplers.0.conv": "unet.input_blocks.2.0.op",
    "unet.down_blocks.1.resnets.0.time_emb_proj": "unet.input_blocks.3.0.emb_layers.1",
    "unet.down_blocks.1.resnets.0.conv_shortcut": "unet.input_blocks.3.0.skip_connection",
    "unet.mid_block.attentions.0.proj_in": "unet.middle_block.1.proj_in",
    "unet.mid_block.resnets.1.conv2": "unet.middle_block.2.out_layers.3",
    "unet.up_blocks.0.attentions.1.proj_out": "unet.output_blocks.1.1.proj_out",
    "unet.up_blocks.0.upsamplers.0.conv": "unet.output_blocks.1.2.conv",
    "unet.conv_in": "unet.input_blocks.0.0",
    "unet.conv_out": "unet.out.2",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": "",
    "text_encoder.text_model.encoder.layers.1.self_attn.out_proj": "",
    "text_encoder.text_model.encoder.layers.1.mlp.fc1": "",
}
FORMER = {".q_proj": ".to_q", ".out_proj": ".to_out", ".to_out.0": ".to_out"}
Spelling = Callable[[str], tuple[str, str, str]]


@pytest.fixture
def model(model_folder: Path) -> Model:
    return load_model(model_folder)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(model_folder, local_files_only=True)


@pytest.fixture
def stock(loaded: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """The same model in diffusers; every LoRA that a test gives it is taken out again."""
    yield loaded
    loaded.unload_lora_weights()


def weight_of(model: Model, module: str) -> Tensor:
    part, _, name = module.partition(".")
    return getattr(model, part).get_submodule(name).weight


def all_weights(model: Model) -> dict[str, Tensor]:
    return {**model.unet.state_dict(prefix="unet."), **model.text_encoder.state_dict(prefix="text_encoder.")}


def snapshot(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in all_weights(model).items()}


def unchanged(model: Model, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in all_weights(model).items())


def make_pairs(model: Model, modules: list[str], rank: int = 3, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random `down` and `up` of each module, a convolution's as LoCon has them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module in modules:
        out, *inner = weight_of(model, module).shape
        up = (out, rank, 1, 1) if len(inner) == 3 else (out, rank)
        pairs[module] = tuple(0.3 * torch.randn(*shape, generator=generator) for shape in ((rank, *inner), up))
    return pairs


def peft(module: str) -> tuple[str, str, str]:
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight", f"{module}.alpha"


def diffusers(module: str) -> tuple[str, str, str]:
    kind = "lora_linear_layer" if module.startswith("text_encoder") else "lora"
    return f"{module}.{kind}.down.weight", f"{module}.{kind}.up.weight", ""


def former_diffusers(module: str) -> tuple[str, str, str]:
    if not re.search(r"attn\d?\.\w+(\.0)?$", module):
        return diffusers(module)
    for ours, theirs in FORMER.items():
        module = module.removesuffix(ours) + theirs if module.endswith(ours) else module
    module = re.sub(r"\.(attn\d)\.", r".\1.processor.", module)
    return f"{module}_lora.down.weight", f"{module}_lora.up.weight", ""


def kohya(module: str) -> tuple[str, str, str]:
    start, _, name = module.partition(".")
    name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[start] + name.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def original_kohya(module: str) -> tuple[str, str, str]:
    return kohya(MODULES[module] or module)


def spelled(
    pairs: dict[str, tuple[Tensor, Tensor]], spelling: Spelling, alpha: float | None = None
) -> dict[str, Tensor]:
    tensors = {}
    for module, (down, up) in pairs.items():
        down_key, up_key, alpha_key = spelling(module)
        tensors |= {down_key: down, up_key: up} | ({} if alpha is None else {alpha_key: torch.tensor(alpha)})
    return tensors


def write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | str | None = None) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(tensors, path, metadata={"format": "pt"} | ({} if config is None else {METADATA: text}))
    return path


def apply(model: Model, *files: tuple[Path, float], originals: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    loras = [(read(model, path), weight) for path, weight in files]
    return apply_loras(model.unet, model.text_encoder, loras, originals or {})


def read(model: Model, path: Path) -> LoRA:
    return read_lora(path, model.unet, model.text_encoder)


def assert_same_outputs(model: Model, stock: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 500, (2, 77), generator=generator)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700])
    with torch.no_grad():
        context = stock.text_encoder(tokens)[0]
        torch.testing.assert_close(model.text_encoder(tokens), context, rtol=1e-5, atol=1e-5)
        theirs = stock.unet(x, t, context).sample
        torch.testing.assert_close(model.unet(x, t, context), theirs, rtol=1e-5, atol=1e-5)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("module", "kernel"),
    [
        ("unet.down_blocks.0.downsamplers.0.conv", "a 3x3 convolution"),
        ("unet.mid_block.attentions.0.proj_in", "a 1x1 convolution"),
        ("unet.mid_block.attentions.0.proj_out", "a matrix for a 1x1 convolution"),
        (ATTENTION + "attn1.to_q", "a matrix"),
        (ATTENTION + "attn2.to_v", "a 1x1 convolution for a matrix"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_weights_are_those_of_two_layers_in_parallel(
    model: Model, tmp_path: Path, module: str, kernel: str, alpha: float | None
) -> None:
    """W x + weight alpha / r B A x, equation 3 and section 4.1, of which A alone has a kernel."""
    pairs = make_pairs(model, [module])
    down, up = pairs[module]
    if kernel == "a matrix for a 1x1 convolution":
        pairs = {module: (down[:, :, 0, 0].contiguous(), up[:, :, 0, 0].contiguous())}
    elif kernel == "a 1x1 convolution for a matrix":
        down, up = down[:, :, None, None], up[:, :, None, None]
        pairs = {module: (down, up)}
    as_kernel = (slice(None), slice(None), *(None,) * (4 - weight_of(model, module).ndim))
    before = weight_of(model, module).clone()[as_kernel]
    others = {name: tensor for name, tensor in snapshot(model).items() if name != f"{module}.weight"}
    apply(model, (write(tmp_path / "x.safetensors", spelled(pairs, peft, alpha)), 0.7))
    x = torch.randn(2, before.shape[1], 5, 5)
    down, up = (tensor if tensor.ndim == 4 else tensor[:, :, None, None] for tensor in (down, up))
    scale = 0.7 * (1 if alpha is None else alpha / 3)
    wanted = F.conv2d(x, before) + scale * F.conv2d(F.conv2d(x, down), up)
    torch.testing.assert_close(F.conv2d(x, weight_of(model, module)[as_kernel]), wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(all_weights(model)[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize(
    ("spelling", "alpha"),
    [(peft, None), (diffusers, None), (former_diffusers, None), (kohya, None), (kohya, 2.0), (original_kohya, 5.0)],
)
def test_every_spelling_is_read_as_diffusers_reads_it(
    model: Model,
    stock: StableDiffusionPipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spelling: Spelling,
    alpha: float | None,
) -> None:
    path = write(tmp_path / "x.safetensors", spelled(make_pairs(model, list(MODULES)), spelling, alpha))
    assert sorted(read(model, path).updates) == sorted(MODULES)
    assert capsys.readouterr().err == ""
    apply(model, (path, 0.6))
    stock.load_lora_weights(path, adapter_name="one", unet_config=stock.unet.config)
    stock.set_adapters("one", 0.6)
    assert_same_outputs(model, stock)


def test_spellings_that_leave_something_out(model: Model, tmp_path: Path) -> None:
    """Old U-Net files have no `unet.`, towers of new transformers no `text_model.`, and kohya may number the tower."""
    pairs = make_pairs(model, list(MODULES))
    wanted = read(model, write(tmp_path / "x.safetensors", spelled(pairs, peft))).updates
    for number, (spelling, old, new) in enumerate(
        [
            (former_diffusers, "unet.", ""),
            (peft, "text_model.", ""),
            (kohya, "lora_te_", "lora_te1_"),
            (kohya, "lora_te_text_model_", "lora_te1_"),
        ]
    ):
        tensors = {key.replace(old, new): tensor for key, tensor in spelled(pairs, spelling).items()}
        found = read(model, write(tmp_path / f"{number}.safetensors", tensors)).updates
        assert found.keys() == wanted.keys()
        for name, (up, down, scale) in found.items():
            assert torch.equal(up, wanted[name].up)
            assert torch.equal(down, wanted[name].down)
            assert scale == wanted[name].scale


def test_what_diffusers_converts_to_kohya(model: Model, tmp_path: Path) -> None:
    pairs = make_pairs(model, list(MODULES))
    path = write(tmp_path / "x.safetensors", convert_state_dict_to_kohya(spelled(pairs, peft)))
    updates = read(model, path).updates  # its alphas are whole numbers
    assert sorted(updates) == sorted(MODULES)
    assert {update.scale for update in updates.values()} == {1.0}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("stabilised", [False, True])
def test_a_file_that_peft_and_diffusers_saved(
    model: Model, stock: StableDiffusionPipeline, tmp_path: Path, stabilised: bool
) -> None:
    unet_config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "to_out.0", "proj_in", "conv1", "conv2", "conv_in"],
        rank_pattern={"attn1.to_v": 2},
        alpha_pattern={"attn1.to_v": 5, "^conv_in": 3, "resnets.0.conv1": 1, "v": 100},
        init_lora_weights=False,
        use_rslora=stabilised,
    )
    tower_config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc2"], init_lora_weights=False)
    torch.manual_seed(0)
    stock.unet.add_adapter(unet_config, "default")
    # As its own `add_adapter` does, which in transformers 5.24 refuses every peft that there is.
    inject_adapter_in_model(tower_config, stock.text_encoder, "default")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(stock.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(stock.text_encoder),
        unet_lora_adapter_metadata=json.loads(json.dumps(unet_config.to_dict(), default=sorted)),
        text_encoder_lora_adapter_metadata=json.loads(json.dumps(tower_config.to_dict(), default=sorted)),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    scales = {name: update.scale for name, update in read(model, path).updates.items()}
    assert scales["unet.conv_in"] == 3 / (2 if stabilised else 4)
    assert scales[ATTENTION + "attn1.to_v"] == 5 / (math.sqrt(2) if stabilised else 2)
    assert scales[ATTENTION + "attn2.to_v"] == 6 / (2 if stabilised else 4)  # "v" is no end of a name
    apply(model, (path, 1.0))
    assert_same_outputs(model, stock)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_several_at_once_are_a_sum(model: Model, stock: StableDiffusionPipeline, tmp_path: Path) -> None:
    modules = list(MODULES)
    one = write(tmp_path / "1.safetensors", spelled(make_pairs(model, modules, seed=1), kohya, 4.0))
    two = write(tmp_path / "2.safetensors", spelled(make_pairs(model, modules[::2], rank=5, seed=2), peft))
    apply(model, (one, 0.5), (two, -0.8))
    for name, path in (("one", one), ("two", two)):
        stock.load_lora_weights(path, adapter_name=name)
    stock.set_adapters(["one", "two"], [0.5, -0.8])
    assert_same_outputs(model, stock)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_bit_remains(model: Model, tmp_path: Path, dtype: torch.dtype | None) -> None:
    if dtype is not None:  # else the weights are still mapped from the model's file
        for network in (model.unet, model.text_encoder):
            prepare(network, torch.device("cpu"), dtype)
    modules = list(MODULES)
    one = write(tmp_path / "1.safetensors", spelled(make_pairs(model, modules, seed=1), kohya, 4.0))
    two = write(tmp_path / "2.safetensors", spelled(make_pairs(model, modules[::2], seed=2), peft))
    before, addresses = snapshot(model), {name: tensor.data_ptr() for name, tensor in all_weights(model).items()}
    strides = {name: tensor.stride() for name, tensor in all_weights(model).items()}

    originals = apply(model, (one, 0.5))
    assert sorted(originals) == sorted(modules)
    assert not unchanged(model, before)
    assert {name: tensor.stride() for name, tensor in all_weights(model).items()} == strides
    assert {tensor.dtype for tensor in all_weights(model).values()} == {dtype or torch.float32}
    first = snapshot(model)
    originals = apply(model, (one, 0.5), (two, -0.8), originals=originals)
    both = snapshot(model)
    originals = apply(model, (two, -0.8), originals=originals)
    assert sorted(originals) == sorted(modules[::2])
    originals = apply(model, (one, 0.5), originals=originals)
    assert unchanged(model, first)
    assert apply(model, originals=originals) == {}
    assert unchanged(model, before)
    assert {name: tensor.data_ptr() for name, tensor in all_weights(model).items()} == addresses
    apply(model, (one, 0.5), (two, -0.8))
    assert unchanged(model, both)


def test_the_sum_is_rounded_once(model: Model, tmp_path: Path) -> None:
    prepare(model.unet, torch.device("cpu"), torch.bfloat16)
    pairs = [make_pairs(model, ["unet.conv_in"], seed=seed)["unet.conv_in"] for seed in range(3)]
    files = [
        (write(tmp_path / f"{index}.safetensors", spelled({"unet.conv_in": pair}, peft)), 0.1)
        for index, pair in enumerate(pairs)
    ]
    wanted = weight_of(model, "unet.conv_in").double()
    wanted = wanted + sum(0.1 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down).double() for down, up in pairs)
    apply(model, *files)
    found = weight_of(model, "unet.conv_in")
    assert found.dtype == torch.bfloat16
    assert (found != wanted.bfloat16()).float().mean() < 0.01


def test_what_does_not_fit_is_skipped_and_named(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = make_pairs(model, ["unet.conv_in"])
    tensors = spelled(pairs, kohya, 3.0)
    for layer in (8, 9):
        tensors |= spelled(
            {f"text_encoder.text_model.encoder.layers.{layer}.mlp.fc1": (torch.ones(1), torch.ones(1))}, kohya, 1
        )
    path = write(tmp_path / "x.safetensors", {**tensors, "bundle_emb.cat.string_to_param.*": torch.ones(1)})
    assert list(read(model, path).updates) == ["unet.conv_in"]
    assert capsys.readouterr().err == (
        f"notice: {path}: skipped what has no place in this model: bundle_emb.cat.string_to_param.*, "
        "lora_te_text_model_encoder_layers_8_mlp_fc1, lora_te_text_model_encoder_layers_9_mlp_fc1\n"
    )


def test_a_file_that_fits_nothing(model: Model, tmp_path: Path) -> None:
    tensors = {f"unet.down_blocks.{index}.strange.lora_A.weight": torch.ones(1) for index in range(9)}
    path = write(tmp_path / "x.safetensors", tensors)
    message = refusal(lambda: read(model, path))
    assert message.startswith(f"{path} fits nothing in this model; it holds unet.down_blocks.0.strange.lora_A.weight, ")
    assert message.endswith("and 4 more")
    path = write(tmp_path / "y.safetensors", {})
    assert refusal(lambda: read(model, path)) == f"{path} fits nothing in this model; it holds no tensors"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "Stable Diffusion XL"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "Stable Diffusion XL"),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight", "Stable Diffusion XL"),
        ("lora_unet_middle_block_1_transformer_blocks_1_attn1_to_q.lora_down.weight", "Stable Diffusion XL"),
        ("transformer.transformer_blocks.1.attn.to_q.lora_A.weight", "Stable Diffusion 3 or another"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight", "Stable Diffusion 3"),
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w1", "LoKr"),
        ("lora_unet_conv_in.oft_blocks", "OFT"),
        ("lora_unet_conv_in.dora_scale", "DoRA"),
        ("unet.conv_in.lora_magnitude_vector", "DoRA"),
        ("lora_unet_conv_in.lora_mid.weight", "Tucker"),
        ("unet.conv_in.lora_B.bias", "biases"),
        ("lora_unet_conv_in.diff", "full difference"),
        ("lora_unet_conv_in.diff_b", "full difference"),
    ],
)
def test_other_families_and_kinds_are_named(model: Model, tmp_path: Path, key: str, kind: str) -> None:
    tensors = spelled(make_pairs(model, ["unet.conv_in"]), kohya, 3.0) | {key: torch.ones(1)}
    path = write(tmp_path / "x.safetensors", tensors)
    message = refusal(lambda: read(model, path))
    assert message.startswith(f"{path} is ")
    assert kind in message.partition("(")[0]
    assert f"(it holds {key}); only LoRA and LoCon for Stable Diffusion 1.x and 2.x" in message


DOWN, UP, ALPHA = kohya("unet.conv_in")  # 16 channels from 4, 3x3
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no up": ({UP: None}, "lacks up of lora_unet_conv_in"),
    "no down": ({DOWN: None}, "lacks down of lora_unet_conv_in"),
    "only alpha": ({DOWN: None, UP: None}, "lacks down of lora_unet_conv_in, up of lora_unet_conv_in"),
    "integers": ({UP: torch.ones(16, 3, 1, 1, dtype=torch.uint8)}, "no usual number: lora_unet_conv_in of torch.uint8"),
    "ranks differ": ({UP: torch.ones(16, 2, 1, 1)}, "[16, 2, 1, 1] times [3, 4, 3, 3] in lora_unet_conv_in makes no"),
    "no rank": ({UP: torch.ones(16, 0, 1, 1), DOWN: torch.ones(0, 4, 3, 3)}, "made for a model of other sizes"),
    "wide": ({DOWN: torch.ones(3, 9, 3, 3)}, "[3, 9, 3, 3] in lora_unet_conv_in makes no [16, 4, 3, 3]"),
    "transposed": ({DOWN: torch.ones(3, 3, 3, 4)}, "made for a model of other sizes"),
    "flat": ({DOWN: torch.ones(3, 36)}, "made for a model of other sizes"),
    "tall": ({UP: torch.ones(8, 3, 1, 1)}, "made for a model of other sizes"),
    "kernel in up": ({UP: torch.ones(16, 3, 3, 3)}, "made for a model of other sizes"),
    "numbers": ({UP: torch.ones(()), DOWN: torch.ones(())}, "made for a model of other sizes"),
    "too many axes": ({UP: torch.ones(16, 3, 1, 1, 1)}, "made for a model of other sizes"),
    "NaN": ({UP: torch.full((16, 3, 1, 1), math.nan)}, "lora_unet_conv_in holds NaN or infinity"),
    "infinity": ({DOWN: torch.full((3, 4, 3, 3), math.inf)}, "lora_unet_conv_in holds NaN or infinity"),
    "alpha is NaN": ({ALPHA: torch.tensor(math.nan)}, "lora_unet_conv_in holds NaN or infinity"),
    "two alphas": ({ALPHA: torch.ones(2)}, "alpha of lora_unet_conv_in has shape [2]; it must be one number"),
    "twice": (
        {"unet.conv_in.lora_A.weight": torch.ones(3, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(16, 3, 1, 1)},
        "holds two updates of unet.conv_in; one of them is ",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_updates(model: Model, tmp_path: Path, fault: str) -> None:
    changes, words = BROKEN[fault]
    good = spelled(make_pairs(model, ["unet.conv_in"]), kohya, 3.0)
    tensors = {key: tensor for key, tensor in {**good, **changes}.items() if tensor is not None}
    path = write(tmp_path / "x.safetensors", tensors)
    message = refusal(lambda: read(model, path))
    assert message.startswith(str(path))
    assert words in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", f"{METADATA} is no valid JSON"),
        ("[" * 100_000, f"{METADATA} is no valid JSON"),
        ("[]", f"{METADATA} is no JSON object"),
        ({"unet.lora_alpha": "much"}, "unet.lora_alpha is 'much'"),
        ({"unet.lora_alpha": math.inf}, "unet.lora_alpha is inf"),
        ({"unet.alpha_pattern": {"(a+)+$": 1}}, "(a+)+$"),
    ],
)
def test_broken_metadata(model: Model, tmp_path: Path, config: Any, words: str) -> None:
    path = write(tmp_path / "x.safetensors", spelled(make_pairs(model, ["unet.conv_in"]), peft), config)
    message = refusal(lambda: read(model, path))
    assert message.startswith(f"{path}: ")
    assert words in message


def test_files_that_are_not_read(model: Model, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    for name in ("x.pt", "x.bin", "x.ckpt", "x.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        message = refusal(lambda name=name: read(model, tmp_path / name))
        assert message == f"{tmp_path / name} is a pickle, which can run code; save the LoRA as .safetensors first"
    path = tmp_path / "x.safetensors"
    assert refusal(lambda: read(model, path)) == f"LoRA {path} does not exist; give a .safetensors file"
    path.write_bytes(pickle.dumps(Trap()))
    assert refusal(lambda: read(model, path)).startswith(f"{path} is no intact safetensors file: ")
    assert not (tmp_path / "sprung").exists()
    assert refusal(lambda: read(model, tmp_path)) == f"{tmp_path} is a folder; name the .safetensors file in it"


def test_impossible_weights_change_nothing(model: Model, tmp_path: Path) -> None:
    prepare(model.unet, torch.device("cpu"), torch.float16)
    path = write(tmp_path / "x.safetensors", spelled(make_pairs(model, list(MODULES)), peft))
    before = snapshot(model)
    originals = apply(model, (path, 1.0))
    first = snapshot(model)
    for weight in (math.nan, math.inf):
        message = refusal(lambda weight=weight: apply(model, (path, weight), originals=originals))
        assert message == f"the weight of LoRA {path} is {weight}; give a finite number"
    message = refusal(lambda: apply(model, (path, 1e6), originals=originals))
    assert re.fullmatch(
        r"LoRAs of such weights make unet\.[\w.]+ too large for torch.float16; give smaller ones", message
    )
    assert unchanged(model, first)
    apply(model, originals=originals)
    assert unchanged(model, before)


def test_a_saved_file_can_be_read_back_in_half_precision(model: Model, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", spelled(make_pairs(model, list(MODULES)), kohya, 2.0))
    halves = write(tmp_path / "half.safetensors", {key: tensor.half() for key, tensor in load_file(path).items()})
    apply(model, (path, 1.0))
    full, half = snapshot(model), load_model(model.source)
    apply(half, (halves, 1.0))
    for name, tensor in all_weights(half).items():
        torch.testing.assert_close(tensor, full[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("x.safetensors", "x.safetensors", 1.0),
        ("x.safetensors:0.8", "x.safetensors", 0.8),
        ("a:b/x.safetensors:-1e-1", "a:b/x.safetensors", -0.1),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
        (r"C:\loras\x.safetensors:2", r"C:\loras\x.safetensors", 2.0),
        ("C:x.safetensors", "C:x.safetensors", 1.0),
        ("x.pt:0.5", "x.pt", 0.5),
        ("folder", "folder", 1.0),
    ],
)
def test_file_and_weight(text: str, file: str, weight: float) -> None:
    assert parse_lora(text) == (Path(file), weight)


@pytest.mark.parametrize("weight", ["", "much", "nan", "-inf", "0,8"])
def test_a_weight_that_is_no_number(weight: str) -> None:
    message = refusal(lambda: parse_lora(f"x.safetensors:{weight}"))
    assert message == (f"the weight of LoRA x.safetensors is {weight!r}; give a finite number, as in x.safetensors:0.8")
