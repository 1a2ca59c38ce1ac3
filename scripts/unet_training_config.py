"""What `train_unet.py` can be told, and what of that is refused before anything is computed."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, model_validator
from unet_objective import ObjectiveConfig

from autoencoder import IdentityAutoencoder
from ldm.training.data import DataConfig
from ldm.training.loop import LoopConfig
from ldm.unet import UNetConfig
from pipelines.loading import load_autoencoder, load_model, load_text_encoder
from pipelines.request import find_sampler
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings

HISTORY = {"recipe", "scores", "words", "notes"}
"""What a model's settings say of its past."""


class UNetTrainingConfig(BaseModel, frozen=True, extra="forbid"):
    data: DataConfig
    loop: LoopConfig
    autoencoder: str | None = None
    """A model folder: its `vae` is used. None trains on pixels."""
    text_encoder: str | None = None
    """A model folder: its `text_encoder` and `tokenizer` are used, unless there is `init`."""
    model: UNetConfig = UNetConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    settings: Settings = Settings()
    """Default steps and guidance of the model that is written."""
    train_text_encoder: bool = True
    text_encoder_rate: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The text encoder's learning rate, as a share of the U-Net's. One that is trained already wants a small share."""
    cache_contexts: bool = False
    """Encode every distinct caption once, before training. Needs 77 x width numbers of memory each, and a text encoder
    that does not train."""
    whiten_contexts: bool = False
    """Train on contexts that vary alike in all directions (`ldm/training/whitening.py`), those of the text encoder as
    it was at the start. The model that is written takes them as they are."""
    heldout: str | None = None
    """Pictures that are not trained on, given as `data.path` is. Before the first step and with each sample sheet the
    averaged network's loss on the first 256 is logged, with their own captions and with others': the difference is what
    the words are worth. A student's is how far it is from its teacher, whatever the caption."""
    init: str | None = None
    """A model folder whose U-Net and text encoder to start from. What is not said of autoencoder, model, scheduler and
    of the settings that render is its, too."""

    @model_validator(mode="before")
    @classmethod
    def _go_on(cls, said: dict[str, Any]) -> dict[str, Any]:
        if said.get("init") is None:
            return said
        init = load_model(said["init"])
        pixels = isinstance(init.autoencoder, IdentityAutoencoder)
        own: dict[str, BaseModel] = {"model": init.unet.config, "scheduler": init.scheduler, "settings": init.settings}
        merged: dict[str, Any] = {"autoencoder": None if pixels else said["init"], **said}
        for name, part in own.items():
            if isinstance(of_part := said.get(name, {}), dict):
                merged[name] = part.model_dump(exclude_defaults=True, exclude=HISTORY) | of_part
        return merged

    @model_validator(mode="after")
    def _check(self) -> Self:
        channels, wanted = (
            self.model.out_channels,
            self.model.in_channels * (2 if self.scheduler.learns_variance else 1),
        )
        if channels != wanted:
            raise ValueError(
                f"model.out_channels is {channels}, but must be {wanted} with scheduler.variance_type"
                f" {self.scheduler.variance_type}"
            )
        if self.text_encoder is None and self.init is None:
            raise ValueError("text_encoder is missing: name a model folder whose text encoder to use, or an init")
        if self.text_encoder_rate != 1 and not self.train_text_encoder:
            raise ValueError("text_encoder_rate goes with train_text_encoder: true, or it says nothing")
        if self.cache_contexts and self.train_text_encoder:
            raise ValueError("cache_contexts goes with train_text_encoder: false, or the contexts would be out of date")
        if self.data.flip and self.autoencoder is not None:
            raise ValueError("data.flip mirrors pictures as they are read, but latents are encoded once: leave it out")
        if self.settings.steps > self.scheduler.num_train_timesteps:
            raise ValueError(
                f"settings.steps is {self.settings.steps}, but there are {self.scheduler.num_train_timesteps} times"
            )
        if self.settings.sampler is not None:
            find_sampler(self.settings.sampler)
        sampler, spacing = self.settings.sampler or self.scheduler.sampler, self.settings.spacing
        self.scheduler.time_grid(self.scheduler.make_schedule(), self.settings.steps, sampler, spacing)
        if self.objective.distill_guidance is not None:
            if self.settings.guidance != 1:
                raise ValueError("objective.distill_guidance goes with settings.guidance: 1, or it is guided twice")
            if self.init is None:
                raise ValueError("objective.distill_guidance goes with init: say whose guidance to learn")
            if self.train_text_encoder:
                raise ValueError(
                    "objective.distill_guidance goes with train_text_encoder: false, for both must read alike"
                )
        return self

    @property
    def text_folder(self) -> Path:
        """The model folder whose text encoder and tokenizer to start from."""
        folder = self.init or self.text_encoder
        assert folder is not None, "_check saw to it"
        return Path(folder)


def check_parts(config: UNetTrainingConfig) -> None:
    """Raises ValueError unless the U-Net takes what its autoencoder and its text encoder give."""
    channels, source, mend = 3, "pixels", "make it 3, or name an autoencoder"
    if config.autoencoder is not None:
        channels = load_autoencoder(Path(config.autoencoder) / "vae").config.latent_channels
        source, mend = f"latents of {config.autoencoder}", "make them agree"
    if config.model.in_channels != channels:  # and so model.out_channels, as `_check` saw to it
        raise ValueError(
            f"{source} have {channels} channels, but model.in_channels is {config.model.in_channels}: {mend}"
        )
    width = load_text_encoder(config.text_folder / "text_encoder").config.hidden_size
    if config.model.cross_attention_dim != width:
        raise ValueError(
            f"the text encoder of {config.text_folder} is {width} wide, but model.cross_attention_dim is "
            f"{config.model.cross_attention_dim}: make them agree"
        )


def check_size(config: UNetTrainingConfig, cells: int) -> None:
    """Raises ValueError unless the model that is written will render at the size that it is trained at."""
    wanted = config.model.sample_size
    if wanted is not None and wanted not in (cells, (cells, cells)):
        raise ValueError(
            f"pictures of data.size {config.data.size} are {cells} cells wide to the U-Net, but model.sample_size is "
            f"{wanted}: make them agree"
        )
