"""A prompt becomes a picture: prompt -> context -> latents -> images; another picture may be where it starts."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Generator, Tensor

from autoencoder.tiling import decode_tiled
from ldm.hardware import fit_threads_to_quota, keep_freed_memory
from ldm.pictures import to_pil
from ldm.samplers import StepInfo
from ldm.schedule import Spacing
from pipelines.configs_digest import configs_sha256
from pipelines.denoising import make_guided
from pipelines.errors import notice
from pipelines.image_to_image import ImageSource, InitImage, Start, open_init, start_from
from pipelines.loading import Model, load_model, save_model
from pipelines.lora import LoRA, apply_loras, read_lora
from pipelines.request import Request, checked_negatives, checked_prompts, checked_seeds, find_sampler, takes_eta
from pipelines.runtime import (
    CudaGraph,
    compile_in_place,
    full_float32,
    pick_device,
    pick_dtype,
    prepare,
)
from pipelines.settings import words_in
from text_encoder import encode_prompts

BATCH = 8  # pictures that go through the networks at once; bounds memory, and changes no picture beyond rounding
TILE, OVERLAP = 64, 16  # latents
OUTPUT_TYPES = ("pil", "pt", "latent")
FAR = 1.5  # a side this many times the model's own, or its inverse, is worth a notice


@dataclass(frozen=True)
class TextToImageOutput:
    """`images`: a list of PIL images; or float32 [N,3,H,W] in [0, 1] ("pt"); or float32 latents [N,C,h,w] ("latent").

    `seeds` has one entry per picture, None where the caller brought a generator or latents. `request` is what was
    rendered, with every default filled in.
    """

    images: list[Image.Image] | Tensor
    seeds: list[int | None]
    request: Request


class TextToImagePipeline:
    """Renders prompts with one model; `unet`, `autoencoder`, `text_encoder` and `schedule` are its parts."""

    def __init__(
        self,
        model: Model,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        """Readies the model's modules in place. Raises ValueError for a device or dtype that cannot be had."""
        self.device = pick_device(device)
        self.dtype = self.autoencoder_dtype = pick_dtype(dtype, self.device)
        self.model = model
        self.unet, self.autoencoder, self.text_encoder = model.unet, model.autoencoder, model.text_encoder
        self.tokenizer, self.settings = model.tokenizer, model.settings
        self.schedule = model.scheduler.make_schedule()
        for module in (self.unet, self.autoencoder, self.text_encoder):
            prepare(module, self.device, self.dtype)
        if self.device.type == "cpu":
            fit_threads_to_quota()
            keep_freed_memory()
        self.ema = False
        """Whether the U-Net's weights are a single file's moving average."""
        self.compiled = compile
        if compile:
            compile_in_place(self.unet, self.device)
            compile_in_place(self.autoencoder.get_submodule("decoder"), self.device)
        self.loras: list[tuple[LoRA, float]] = []
        self._originals: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        prediction: str | None = None,
        ema: bool = False,
        allow_pickle: bool = False,
        compile: bool = False,
    ) -> "TextToImagePipeline":
        """Reads a Stable Diffusion folder, a single file or `hub:owner/name`; None is the embedded default.

        `prediction`, `ema` and `allow_pickle` are those of `pipelines.loading.load_model`. `compile` goes through
        `torch.compile`, and on a GPU through a CUDA graph: the first picture of each size and batch takes minutes, but
        torch keeps what it compiled, in the folder that the environment names in TORCHINDUCTOR_CACHE_DIR (by default
        a temporary one), and the next process finds it there.

        Raises:
            ValueError: one line that names the file, device or dtype and what is wrong with it.
        """
        device = pick_device(device)  # before the weights are read, which may take long
        pipe = cls(load_model(source, prediction, ema, allow_pickle), device, pick_dtype(dtype, device), compile)
        pipe.ema = ema
        return pipe

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes a Stable Diffusion folder that diffusers loads too; `dtype` None keeps the pipeline's own.

        With LoRAs loaded, the weights that are written are the merged ones.
        """
        save_model(folder, self.model, dtype)

    def load_loras(self, files: Sequence[tuple[str | os.PathLike[str], float]]) -> None:
        """Adds LoRA files, each with its weight, to those there are.

        Raises:
            ValueError: one line that names the file and what is wrong with it; then nothing has changed.
        """
        self._set_loras([*self.loras, *((read_lora(file, self.unet, self.text_encoder), w) for file, w in files)])

    def unload_loras(self) -> None:
        """Takes all LoRAs out; every weight is what it was, to the bit."""
        self._set_loras([])

    def _set_loras(self, loras: list[tuple[LoRA, float]]) -> None:
        if loras or self.loras:
            self._originals = apply_loras(self.unet, self.text_encoder, loras, self._originals)
        self.loras = loras

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        image: ImageSource | None = None,
        mask_image: ImageSource | None = None,
        strength: float | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        prompt_syntax: Literal["plain", "weighted"] = "plain",
        clip_skip: int = 0,
        strict_tokens: bool = False,
        tiled: bool = False,
        spacing: Spacing | None = None,
        guidance_interval: tuple[float, float] | None = None,
        reuse: int = 1,
        merge_tokens: float = 0.0,
        output_type: Literal["pil", "pt", "latent"] = "pil",
    ) -> TextToImageOutput:
        """Renders each prompt `num_images_per_prompt` times; pictures come prompt by prompt, then copy by copy.

        Picture i draws the latents of an image to start from, its initial noise and then each step's noise from its own
        CPU generator of `seed + i`, in float32, so it depends neither on the device nor on the rest of the batch.

        Args:
            sampler: None is the model's own, or the one that its scheduler stands for.
            guidance_scale: 1 is unguided (Ho and Salimans 2022; their w is this minus 1).
            guidance_rescale: 0 to 1 (Lin et al. 2023, section 3.4).
            height, width: pixels; None is the model's own size, or the image's, rounded to what the model can make.
            generator: one for all pictures or one for each, instead of `seed`.
            latents: unit noise [N,C,h,w] to start from; then `seed` must stay 0 and only feeds the steps' noise.
            image: picture or file to start from; it is resized to cover the size, and cut to the middle.
            mask_image: white where to paint, black where to keep the image; any size. Needed by an inpainting model.
            strength: 0 to 1, how much of the image gives way: this part of the steps is made. None is 0.8, or 1 under a
                mask.
            on_step: called after each step with a `StepInfo` of all pictures; may raise to cancel.
            prompt_syntax, clip_skip: what the text means; see `text_encoder.prompt`.
            strict_tokens: refuse a prompt that would be cut, instead of saying what was cut.
            tiled: decode in tiles of 64 latents, one picture at a time, for large pictures in little memory.
            spacing: of the steps' times; leading, trailing, linspace, karras or exponential, see
                `NoiseSchedule.timesteps`; None is the model's own.
            guidance_interval: noise levels sigma / alpha above the first and up to the second alone are guided, and the
                others cost half (`ldm.guidance.interval`).
            reuse: steps for which the U-Net's deep features are kept (`ldm.feature_reuse`); 1 is exact.
            merge_tokens: share of the tokens that self-attention merges (`ldm.token_merging`); 0 is exact.

        Raises:
            ValueError: one line that names the argument and what is allowed, or says that the result is not finite.
        """
        prompts = checked_prompts(prompt, num_images_per_prompt)
        copies = num_images_per_prompt
        init = open_init(image, mask_image, strength)
        request = self.request(
            prompts,
            checked_negatives(negative_prompt, len(prompts) // copies, copies),
            init,
            steps=num_inference_steps,
            guidance=guidance_scale,
            rescale=guidance_rescale,
            sampler=sampler,
            eta=eta,
            height=height,
            width=width,
            syntax=prompt_syntax,
            clip_skip=clip_skip,
            tiled=tiled,
            spacing=spacing,
            guidance_interval=guidance_interval,
            reuse=reuse,
            merge_tokens=merge_tokens,
        )
        if init is not None and height is None and width is None:
            init.tell_if_fitted(request.height, request.width)
        return self.render(
            request,
            init,
            seed=seed,
            generator=generator,
            latents=latents,
            on_step=on_step,
            strict_tokens=strict_tokens,
            output_type=output_type,
        )

    @full_float32()
    def render(
        self,
        request: Request,
        init: InitImage | None = None,
        *,
        seed: int = 0,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        strict_tokens: bool = False,
        output_type: Literal["pil", "pt", "latent"] = "pil",
    ) -> TextToImageOutput:
        """Renders a request of `self.request`, as a call does, with the same other arguments and errors."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is unknown; there are {', '.join(OUTPUT_TYPES)}")
        self.check(request, init)
        grid = self._time_grid(request)
        generators, seeds = self._generators(len(request.prompts), seed, generator, latents is not None)
        start = self._start(request, init, grid[0], generators, latents)
        contexts = self._encode(request, strict_tokens)
        self._give_notices(request)
        latents = self._sample(request, contexts, start, grid, generators, on_step)
        if output_type == "latent":
            return TextToImageOutput(latents, seeds, request)
        images = self._decode(latents, request.tiled)
        return TextToImageOutput(images if output_type == "pt" else to_pil(images), seeds, request)

    def request(
        self,
        prompts: tuple[str, ...],
        negatives: tuple[str, ...],
        init: InitImage | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        spacing: Spacing | None = None,
        **others: Any,
    ) -> Request:
        """What is asked for, checked, with the model's own defaults for what is None; `others` are `Request`'s fields.

        Raises:
            ValueError: one line that names the argument and what is allowed.
        """
        own_height, own_width = self.own_size if init is None else init.size(height, width, self.multiple)
        request = Request(
            prompts,
            negatives,
            steps=self.settings.steps if steps is None else steps,
            guidance=self.settings.guidance if guidance is None else guidance,
            sampler=sampler or self.settings.sampler or self.model.scheduler.sampler,
            height=own_height if height is None else height,
            width=own_width if width is None else width,
            strength=None if init is None else init.strength,
            spacing=self.own_spacing if spacing is None else spacing,
            **others,
        )
        self.check(request, init)
        return request

    def check(self, request: Request, init: InitImage | None) -> None:
        """Raises ValueError, one line, for what this pipeline cannot render, as far as that needs no computing."""
        request.check_steps(self.schedule.steps)
        request.check_size(self.multiple)
        request.check_clip_skip(self.text_encoder.config.num_hidden_layers)
        if self.compiled and (request.reuse > 1 or request.merge_tokens > 0 or request.tiled):
            raise ValueError("reuse, merge tokens and tiled do not go with compile; leave out one or the other")
        if self.inpaints and (init is None or init.mask is None):
            raise ValueError("this is an inpainting model; give an image and a mask, white where to paint")
        self._time_grid(request)

    @property
    def multiple(self) -> int:
        """Pixels that both sides of a picture are multiples of."""
        return max(8, self.autoencoder.downsampling_factor)

    @property
    def own_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        return self.model.own_size

    @property
    def own_spacing(self) -> Spacing:
        """How the model spaces the steps' times, unless a request says otherwise."""
        return self.settings.spacing or self.model.scheduler.spacing

    @cached_property
    def configs_sha256(self) -> str:
        """That of the model (`pipelines.configs_digest`), which every picture's record has."""
        return configs_sha256(self.model)

    @property
    def inpaints(self) -> bool:
        """Whether the network is told a mask and a masked image beside the latents."""
        return self.unet.config.in_channels == 2 * self.autoencoder.config.latent_channels + 1

    def _time_grid(self, request: Request) -> Tensor:
        """The times of the steps that are made, and where the last of them ends."""
        spacing = request.spacing or self.own_spacing
        times = self.model.scheduler.time_grid(self.schedule, request.steps, request.sampler, spacing)
        grid = times[request.first_step :]
        if request.strength is not None and len(grid) < 2:
            raise ValueError(
                f"strength {request.strength:g} of {request.steps} steps leaves none to make; give more of either"
            )
        return grid

    def _generators(
        self, count: int, seed: int, generator: Generator | Sequence[Generator] | None, has_latents: bool
    ) -> tuple[Generator | list[Generator], list[int | None]]:
        if seed != 0 and (generator is not None or has_latents):
            raise ValueError("seed goes with neither generator nor latents; leave out one of them")
        if generator is None:
            seeds = checked_seeds(seed, count)
            return [Generator().manual_seed(each) for each in seeds], [None] * count if has_latents else list(seeds)
        if isinstance(generator, Generator):
            return generator, [None] * count
        if len(generator) != count:
            raise ValueError(f"there are {len(generator)} generators for {count} pictures; give one, or one for each")
        return list(generator), [None] * count

    def _start(
        self,
        request: Request,
        init: InitImage | None,
        t: Tensor,
        generators: Generator | list[Generator],
        latents: Tensor | None,
    ) -> Start:
        draw_noise = partial(self._initial_noise, request, generators, latents)
        if init is None:
            return Start(draw_noise())
        return start_from(
            init,
            request.height,
            request.width,
            encode=partial(self._encode_image, generators=generators, count=len(request.prompts)),
            draw_noise=draw_noise,
            add_noise=partial(self.schedule.add_noise, t=t),
            network_inpaints=self.inpaints,
        )

    @torch.no_grad()
    def _encode_image(self, image: Tensor, generators: Generator | list[Generator], count: int) -> Tensor:
        """Latents float32 [N,C,h,w] of one image [1,3,H,W]; with a single generator one sample serves all pictures."""
        image = image.to(self.device, self.autoencoder_dtype)
        latents = self.autoencoder.encode(image, generators).float()
        _refuse_non_finite(latents, "the image's latents")
        return latents.expand(count, -1, -1, -1)

    def _initial_noise(
        self, request: Request, generators: Generator | list[Generator], latents: Tensor | None
    ) -> Tensor:
        factor = self.autoencoder.downsampling_factor
        cells = (request.height // factor, request.width // factor)
        shape = torch.Size((len(request.prompts), self.autoencoder.config.latent_channels, *cells))
        if latents is None:
            return _randn(shape, generators).to(self.device)
        if latents.shape != shape:
            raise ValueError(f"latents are {list(latents.shape)}; these pictures need {list(shape)}")
        _refuse_non_finite(latents, "the given latents")
        return latents.to(self.device, torch.float32)

    def _give_notices(self, request: Request) -> None:
        if self.settings.words is not None:
            texts = {text for text in (*request.prompts, *request.negatives)}
            seen = {*self.settings.words, *(["break"] if request.syntax == "weighted" else [])}
            if unseen := sorted({word for text in texts for word in words_in(text)} - seen):
                notice(f"the model never saw these words: {', '.join(unseen)}")
        if request.guidance < 1 and request.guidance != self.settings.guidance:
            notice(
                f"guidance {request.guidance:g} leads away from the prompt; 1 is unguided, which diffusers calls 0 too"
            )
        own = self.own_size
        if any(
            not 1 / FAR < side / at_home < FAR
            for side, at_home in zip((request.height, request.width), own, strict=True)
        ):
            notice(f"{request.width}x{request.height} is far from the {own[1]}x{own[0]} that the model was trained at")

    def _encode(self, request: Request, strict: bool) -> list[tuple[Tensor, Tensor]]:
        """(cond, uncond), both [b,L,D], of the pictures in their order, `BATCH` at most at once."""
        # Unguided, negative prompts play no part, so a long one must not lengthen the context.
        negatives = request.negatives if request.guidance != 1 else ("",) * len(request.prompts)
        contexts = encode_prompts(
            self.text_encoder,
            self.tokenizer,
            request.prompts,
            negatives,
            syntax=request.syntax,
            clip_skip=request.clip_skip,
            strict=strict,
            batch=BATCH,
        )
        for line in contexts.notices:
            notice(line)
        return contexts.batches

    def _sample(
        self,
        request: Request,
        contexts: list[tuple[Tensor, Tensor]],
        start: Start,
        grid: Tensor,
        generators: Generator | list[Generator],
        on_step: Callable[[StepInfo], None] | None,
    ) -> Tensor:
        scheduler, first = self.model.scheduler, grid[0].item()
        denoise = make_guided(self.unet, self.schedule, scheduler, request, contexts, start, first)
        alike = request.guidance_interval is None  # what else a recording could not follow is refused with compile
        if self.compiled and self.device.type == "cuda" and len(contexts) == 1 and alike:
            denoise = CudaGraph(denoise)  # of one part alone, since each graph has memory of its own
        options = {"eta": request.eta} if takes_eta(request.sampler) else {}
        sample = find_sampler(request.sampler)
        x = sample(
            denoise,
            start.x,
            self.schedule,
            grid,
            randn=lambda shape: _randn(shape, generators),
            on_step=on_step,
            **options,
        )
        # A grid that ends at time 0 (set_alpha_to_one: false) leaves a trace of noise also on what is known.
        return x if start.known is None else torch.lerp(start.known.latents, x, start.known.mask)

    @torch.no_grad()
    def _decode(self, latents: Tensor, tiled: bool) -> Tensor:
        """Images [N,3,H,W] in [0,1]. Where float16 is too narrow for the autoencoder, it goes on in float32."""
        decode = (
            partial(decode_tiled, self.autoencoder, tile=TILE, overlap=OVERLAP) if tiled else self.autoencoder.decode
        )
        images = torch.cat([decode(some.to(self.autoencoder_dtype)).float() for some in torch.split(latents, BATCH)])
        if self.autoencoder_dtype == torch.float16 and not bool(images.isfinite().all()):
            notice("this autoencoder's values exceed float16; it decodes in float32")
            self.autoencoder_dtype = torch.float32
            self.autoencoder.float()
            return self._decode(latents, tiled)
        _refuse_non_finite(images, "the decoded images")
        return (images / 2 + 0.5).clamp(0, 1)


def _randn(shape: torch.Size, generators: Generator | list[Generator]) -> Tensor:
    """Unit noise in float32; with a list, picture i's from generator i alone, as diffusers draws it."""

    def draw(generator: Generator, some: Sequence[int]) -> Tensor:
        return torch.randn(*some, generator=generator, device=generator.device, dtype=torch.float32)

    if isinstance(generators, Generator):
        return draw(generators, shape)
    return torch.cat([draw(generator, (1, *shape[1:])) for generator in generators])


def _refuse_non_finite(tensor: Tensor, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} hold NaN or infinity; try dtype float32, less guidance, or another model")
