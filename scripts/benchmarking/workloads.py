"""What the benchmark measures: models by name, and the same work done by our modules and by diffusers'."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoencoder import Autoencoder, AutoencoderConfig
from benchmarking import rivals
from ldm.denoiser import make_denoiser
from ldm.guidance import classifier_free
from ldm.samplers import sample_ddim
from ldm.unet import UNet, UNetConfig
from pipelines.families import PUBLISHED, PUBLISHED_SCHEDULER, NetworkConfigs
from pipelines.loading import DEFAULT_MODEL, Model, load_model, save_model
from pipelines.prediction_type import VELOCITY
from pipelines.runtime import prepare
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings
from pipelines.stored_model import stock_config
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer, encode_prompts

STEPS = 20  # of which a single step is the middle one
CONTEXT = 77  # tokens
PROMPT = "a red house under a yellow sun"
TOKENIZER = DEFAULT_MODEL / "tokenizer"
TINY = NetworkConfigs(
    UNetConfig(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    ),
    AutoencoderConfig(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    ),
    TextEncoderConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
)
ModuleT = TypeVar("ModuleT", UNet, Autoencoder)


@dataclass(frozen=True)
class Preset:
    """A model's shapes and process, and `size`, the pixels of its side; without a folder its weights are random."""

    configs: NetworkConfigs
    scheduler: SchedulerConfig
    size: int
    settings: Settings = field(default_factory=Settings)
    folder: Path | None = None

    def make(self, part: str) -> Any:
        """diffusers' "unet" or "vae", in float32."""
        cells = self.size // self.configs.vae.downsampling_factor
        name, config, side = {
            "unet": ("UNet2DConditionModel", self.configs.unet, cells),
            "vae": ("AutoencoderKL", self.configs.vae, self.size),
        }[part]
        stock = stock_config(name, config.model_copy(update={"sample_size": side}))
        return rivals.make_part(part, stock, self.folder)

    @property
    def process(self) -> dict[str, Any]:
        return self.scheduler.to_diffusers_config()


def _default_model() -> Preset:
    model = load_model()
    configs = NetworkConfigs(model.unet.config, model.autoencoder.config, model.text_encoder.config)
    size = model.unet.config.sample_size * model.autoencoder.downsampling_factor
    return Preset(configs, model.scheduler, size, model.settings, DEFAULT_MODEL)


PRESETS: Mapping[str, Callable[[], Preset]] = {
    "default": _default_model,
    "sd15": lambda: Preset(PUBLISHED[0], PUBLISHED_SCHEDULER, 512),
    "sd21": lambda: Preset(PUBLISHED[1], PUBLISHED_SCHEDULER.model_copy(update={"prediction_type": VELOCITY}), 768),
    "tiny": lambda: Preset(TINY, PUBLISHED_SCHEDULER, 32),
}
"""The built-in model, the shapes of Stable Diffusion 1.5 and 2.1, and one for trying the benchmark itself."""


@dataclass(frozen=True)
class Setup:
    """What is to be done: `batch` pictures of `size` pixels; ours, and diffusers tuned, in `dtype`."""

    preset: Preset
    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    against: bool
    """Whether diffusers does it too."""
    compile: bool
    """Whether it does it once more, compiled."""

    def noise(self, *shape: int, seed: int = 0) -> Tensor:
        """Unit noise, the same on every device."""
        return torch.randn(self.batch, *shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def latents(self) -> Tensor:
        cells = self.size // self.preset.configs.vae.downsampling_factor
        return self.noise(self.preset.configs.vae.latent_channels, cells, cells)

    def contexts(self) -> tuple[Tensor, Tensor]:
        """Those of a prompt and of none, [B,L,D] both; of a model of random weights unit noise.

        To trained weights noise is far from any prompt, and they magnify its rounding to errors of a tenth.
        """
        if self.preset.folder is None:
            shape = CONTEXT, self.preset.configs.unet.cross_attention_dim
            return self.noise(*shape, seed=1), self.noise(*shape, seed=2)
        model = load_model(self.preset.folder)
        prompts, empty = [PROMPT] * self.batch, [""] * self.batch
        with torch.no_grad():
            encoded = encode_prompts(model.text_encoder.float(), model.tokenizer, prompts, empty, batch=self.batch)
        ((cond, uncond),) = encoded.batches
        return cond.to(self.device), uncond.to(self.device)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its work, the bytes of its weights, and what is compared if not what `run` returns."""

    run: Callable[[], Tensor | None]
    weights: int = 0
    probe: Callable[[], Tensor] | None = None
    compile_seconds: float | None = None


Sides = dict[str, Side]
"""By name: "ours", and of diffusers "default", "tuned" and "compiled", as far as wanted."""


def size_of(*modules: nn.Module) -> int:
    return sum(each.nbytes for module in modules for each in (*module.parameters(), *module.buffers()))


def ours_like(kind: type[ModuleT], theirs: Any) -> ModuleT:
    """Our module with a copy of the weights of diffusers', whose names must all be the same."""
    with torch.device("meta"):
        ours = kind.from_diffusers_config(theirs.config)
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=True, assign=True)
    return ours


def ready(kind: type[ModuleT], part: str, setup: Setup) -> tuple[ModuleT, dict[str, Any]]:
    """Our part as the pipeline readies it, and diffusers' of the same weights, as it comes and tuned."""
    theirs = setup.preset.make(part).to(setup.device)
    ours = ours_like(kind, theirs)
    prepare(ours, setup.device, setup.dtype)
    if not setup.against:
        return ours, {}
    fast = rivals.tuned(theirs, setup.dtype)
    return ours, {"default": theirs, "tuned": fast, **({"compiled": fast} if setup.compile else {})}


def timed_if_compiled(name: str, run: Callable[[], Tensor], weights: int, device: torch.device) -> Side:
    """diffusers' side of that name; compiled, it runs twice here: in the second run a CUDA graph is recorded."""
    if name != "compiled":
        return Side(run, weights)
    began = time.perf_counter()
    run()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return Side(run, weights, compile_seconds=time.perf_counter() - began)


def guided_step(setup: Setup) -> Sides:
    """One guided step from the middle of 20."""
    preset, device = setup.preset, setup.device
    unet, theirs = ready(UNet, "unet", setup)
    x, (cond, uncond) = setup.latents(), setup.contexts()
    schedule, scale, middle = preset.scheduler.make_schedule(), preset.settings.guidance, STEPS // 2
    grid = preset.scheduler.time_grid(schedule, STEPS, "ddim")[middle : middle + 2]
    denoise = classifier_free(make_denoiser(unet, schedule, preset.scheduler.prediction), cond, uncond, scale)

    @torch.inference_mode()
    def our_run() -> Tensor:
        return sample_ddim(denoise, x, schedule, grid)

    def their_side(name: str, unet: Any) -> Side:
        scheduler = rivals.make_scheduler(preset.process, STEPS, device)
        times = scheduler.timesteps[middle : middle + 1]
        latents, context = x.to(unet.dtype), torch.cat([uncond, cond]).to(unet.dtype)
        network = rivals.compiled(unet, device) if name == "compiled" else unet

        @torch.inference_mode()
        def run() -> Tensor:
            return rivals.guided_steps(network, scheduler, latents, context, times, scale)

        return timed_if_compiled(name, run, size_of(unet), device)

    return {"ours": Side(our_run, size_of(unet)), **{name: their_side(name, each) for name, each in theirs.items()}}


def picture(setup: Setup, steps: int) -> Sides:
    """Pictures in so many guided steps, from noise and contexts to pixels."""
    preset, device = setup.preset, setup.device
    unet, their_unets = ready(UNet, "unet", setup)
    autoencoder, their_vaes = ready(Autoencoder, "vae", setup)
    x, (cond, uncond) = setup.latents(), setup.contexts()
    schedule, scale = preset.scheduler.make_schedule(), preset.settings.guidance
    grid = preset.scheduler.time_grid(schedule, steps, "ddim")

    @torch.inference_mode()
    def our_run() -> Tensor:
        denoise = classifier_free(make_denoiser(unet, schedule, preset.scheduler.prediction), cond, uncond, scale)
        return autoencoder.decode(sample_ddim(denoise, x, schedule, grid).to(setup.dtype))

    def their_side(name: str) -> Side:
        unet, vae = their_unets[name], their_vaes[name]
        network = rivals.compiled(unet, device) if name == "compiled" else unet

        @torch.inference_mode()
        def run() -> Tensor:
            scheduler = rivals.make_scheduler(preset.process, steps, device)
            context = torch.cat([uncond, cond]).to(unet.dtype)
            latents = x.to(unet.dtype)
            latents = rivals.guided_steps(network, scheduler, latents, context, scheduler.timesteps, scale)
            return rivals.decode(vae, latents)

        return timed_if_compiled(name, run, size_of(unet, vae), device)

    ours = Side(our_run, size_of(unet, autoencoder))
    return {"ours": ours, **{name: their_side(name) for name in their_unets}}


def coding(setup: Setup, encode: bool) -> Sides:
    """Pictures decoded from latents, or encoded to the mode of their latents."""
    autoencoder, theirs = ready(Autoencoder, "vae", setup)
    inputs = setup.noise(3, setup.size, setup.size).clamp(-1, 1) if encode else setup.latents()
    our_function = autoencoder.encode if encode else autoencoder.decode

    @torch.inference_mode()
    def our_run() -> Tensor:
        return our_function(inputs.to(setup.dtype))

    def their_side(name: str, vae: Any) -> Side:
        function = rivals.encode if encode else rivals.decode
        function = rivals.compiled(function, setup.device) if name == "compiled" else function

        @torch.inference_mode()
        def run() -> Tensor:
            return function(vae, inputs.to(vae.dtype))

        return timed_if_compiled(name, run, size_of(vae), setup.device)

    ours = Side(our_run, size_of(autoencoder))
    return {"ours": ours, **{name: their_side(name, vae) for name, vae in theirs.items()}}


def write_model(preset: Preset, folder: Path) -> Path:
    """The folder of the preset's model; of random weights a new one, in float16."""
    if preset.folder is not None:
        return preset.folder
    torch.manual_seed(0)
    text_encoder = TextEncoder(preset.configs.text_encoder)
    model = Model(
        unet=ours_like(UNet, preset.make("unet")),
        autoencoder=ours_like(Autoencoder, preset.make("vae")),
        text_encoder=text_encoder,
        tokenizer=Tokenizer.from_folder(TOKENIZER),
        tokenizer_folder=TOKENIZER,
        scheduler=preset.scheduler,
        settings=preset.settings,
    )
    save_model(folder, model, torch.float16)
    return folder
