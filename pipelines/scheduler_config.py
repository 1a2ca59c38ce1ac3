"""`scheduler/scheduler_config.json`: the forward process and the time grid that a folder was made for."""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from ldm.denoiser import Denoiser
from ldm.guidance import threshold
from ldm.prediction import PREDICTIONS, Prediction
from ldm.schedule import NoiseSchedule, ScheduleKind, Spacing

# what diffusers' classes assume where the file says nothing
LEADING_CLASSES = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DDIMInverseScheduler", "")
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "": "ddim",
}
"""Our samplers by the class that a folder names; the other classes are driven through diffusers."""
CLIPPING_CLASSES = ("DDIMScheduler", "DDPMScheduler", "")
"""Those that heed `clip_sample`; diffusers' others pass over it."""
ENDS_AT_ZERO = ("ddim", "diffusers:PNDMScheduler")
"""The samplers that know `set_alpha_to_one: false`."""
BY_NOISE: tuple[Spacing, ...] = ("karras", "exponential")
"""Spacings of the noise level."""
LIKE_EULER = (
    "euler",
    "euler_ancestral",
    "heun",
    "diffusers:EulerDiscreteScheduler",
    "diffusers:EulerAncestralDiscreteScheduler",
    "diffusers:HeunDiscreteScheduler",
    "diffusers:LMSDiscreteScheduler",
    "diffusers:KDPM2DiscreteScheduler",
    "diffusers:KDPM2AncestralDiscreteScheduler",
)
"""The samplers whose linspace is not rounded, and whose karras and exponential stay within `timestep_spacing`."""
LIKE_DPM_SOLVER = (
    "dpm++",
    "dpm++sde",
    "diffusers:DPMSolverMultistepScheduler",
    "diffusers:DPMSolverSinglestepScheduler",
    "diffusers:DEISMultistepScheduler",
    "diffusers:UniPCMultistepScheduler",
)
"""The samplers whose leading and linspace are those of one step more, of which they leave out the last."""
PASSED_OVER = {
    "DPMSolverSinglestepScheduler": ("timestep_spacing",),
    **dict.fromkeys(
        ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"),
        ("use_karras_sigmas", "use_exponential_sigmas"),
    ),
}
"""What a class has no such setting for; a file keeps it from the scheduler that its own was made from."""
SOLVERS: dict[str, tuple[Any, ...]] = {
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "algorithm_type": ("dpmsolver++", "deis"),
    "predict_x0": (True,),
}
"""The defaults of diffusers' solvers, with which they are driven."""
NEUTRAL: tuple[tuple[str, str, Any], ...] = (
    ("DPMSolverMultistepScheduler", "lambda_min_clipped", -math.inf),
    ("DPMSolverSinglestepScheduler", "lambda_min_clipped", -math.inf),
    ("UniPCMultistepScheduler", "disable_corrector", []),
    ("UniPCMultistepScheduler", "lower_order_final", True),
    ("DEISMultistepScheduler", "lower_order_final", True),
    ("PNDMScheduler", "skip_prk_steps", True),
)
"""Of a class, a setting and the only value of it that is supported."""
SCHEDULES: dict[str, ScheduleKind] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}


class SchedulerConfig(BaseModel, frozen=True, extra="ignore", validate_by_name=True, validate_by_alias=True):
    """Every key of diffusers' DDIM, DDPM, PNDM, Euler, Heun, LMS, DPM-Solver, DEIS, KDPM2 and UniPC schedulers.

    The first block is used. The second changes the process or the grid in ways that are not supported, so it must be
    neutral. The third only tunes samplers which a caller picks by name, so any value is read and none is used.
    """

    num_train_timesteps: int = Field(default=1000, ge=2, le=1_000_000)
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = Field(default=1, ge=0, le=1000)
    """How far "leading" is shifted. diffusers' class has 0, which its pipelines mend to 1 with a warning."""
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    variance_type: Literal["fixed_small", "learned_range"] | None = None
    clip_sample: bool = False
    """Keep each step's estimate of x0 within `clip_sample_range`, as pixels are and latents are not. A model of pixels
    wants it: without, some pictures run away to black or white."""
    clip_sample_range: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    class_name: str = Field(default="", alias="_class_name")

    trained_betas: Literal[None] = None
    thresholding: Literal[False] = False
    use_beta_sigmas: Literal[False] | None = False
    use_lu_lambdas: Literal[False] | None = False
    use_flow_sigmas: Literal[False] | None = False
    use_dynamic_shifting: Literal[False] | None = False
    shift_terminal: Literal[None] = None
    sigma_min: Literal[None] = None
    sigma_max: Literal[None] = None
    final_sigmas_type: Literal["zero"] = "zero"
    interpolation_type: Literal["linear"] = "linear"
    timestep_type: Literal["discrete"] = "discrete"

    sample_max_value: float = 1.0
    dynamic_thresholding_ratio: float = 0.995
    skip_prk_steps: Any = None
    solver_order: Any = None
    solver_type: Any = None
    solver_p: Any = None
    algorithm_type: Any = None
    lower_order_final: Any = None
    euler_at_final: Any = None
    lambda_min_clipped: Any = None
    predict_x0: Any = None
    disable_corrector: Any = None
    flow_shift: Any = None
    time_shift_type: Any = None

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end {self.beta_end} is below beta_start {self.beta_start}")
        return self

    @model_validator(mode="after")
    def _check_clipping(self) -> Self:
        if self.clip_sample and self.class_name not in CLIPPING_CLASSES:
            raise ValueError(f"clip_sample of {self.class_name} is not supported; write false")
        return self

    @model_validator(mode="after")
    def _check_solver(self) -> Self:
        if self.sampler.startswith("diffusers:"):
            for name, known in SOLVERS.items():
                if (value := getattr(self, name)) not in (None, *known):
                    raise ValueError(f"{name} {value!r} of {self.class_name} is not supported; null is its default")
        for name, key, neutral in NEUTRAL:
            if self.class_name == name and (value := getattr(self, key)) not in (None, neutral):
                raise ValueError(f"{key} {value!r} of {name} is not supported; write {json.dumps(neutral)}")
        return self

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads a scheduler's dictionary, with the defaults of the class that it names.

        Raises:
            pydantic.ValidationError: a ValueError that names each key whose value is not supported.
        """
        name = str(config.get("_class_name", ""))
        own_defaults = {
            "timestep_spacing": "leading" if name in LEADING_CLASSES else "linspace",
            "steps_offset": 0,
            "set_alpha_to_one": name != "PNDMScheduler",
            "skip_prk_steps": False if name == "PNDMScheduler" else None,
        }
        known = {key: value for key, value in config.items() if key not in PASSED_OVER.get(name, ())}
        return cls.model_validate({**own_defaults, **known})

    @property
    def learns_variance(self) -> bool:
        """Whether the network has as many channels again for the variance (Nichol and Dhariwal 2021, eq. 15)."""
        return self.variance_type == "learned_range"

    def to_diffusers_config(self) -> dict[str, Any]:
        """A DDIMScheduler's dictionary with every field of the process written out, `clip_sample` above all, which
        diffusers takes for true where it is missing.

        A learned variance makes it a DDPMScheduler's, the only one that knows what to do with it.
        """
        if self.learns_variance:
            fields = (*_COMMON_FIELDS, "variance_type")
            return {"_class_name": "DDPMScheduler", **self.model_dump(include=set(fields))}
        return {"_class_name": "DDIMScheduler", **self.model_dump(include={*_COMMON_FIELDS, "set_alpha_to_one"})}

    @property
    def prediction(self) -> Prediction:
        """What the network predicts, by this project's name."""
        return PREDICTIONS[self.prediction_type]

    @property
    def sampler(self) -> str:
        """The sampler that the folder's scheduler stands for, by its command-line name."""
        if self.class_name == "DPMSolverMultistepScheduler" and self.solver_order in (None, 2):
            kind = self.algorithm_type or "dpmsolver++"
            if self.solver_type in (None, "midpoint") and kind in ("dpmsolver++", "sde-dpmsolver++"):
                return "dpm++" if kind == "dpmsolver++" else "dpm++sde"
        return SAMPLERS.get(self.class_name, f"diffusers:{self.class_name}")

    @property
    def spacing(self) -> Spacing:
        """That of the time grid; with karras, `timestep_spacing` may still give its ends, as `time_grid` says."""
        if self.use_karras_sigmas:
            return "karras"
        return "exponential" if self.use_exponential_sigmas else self.timestep_spacing

    def make_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(
            SCHEDULES[self.beta_schedule],
            steps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            zero_terminal_snr=self.rescale_betas_zero_snr,
        )

    def bounded(self, denoise: Denoiser) -> Denoiser:
        """The denoiser as it is, or where `clip_sample` says so with its x0 in range."""
        return threshold(denoise, self.clip_sample_range) if self.clip_sample else denoise

    def time_grid(self, schedule: NoiseSchedule, steps: int, sampler: str, spacing: Spacing | None = None) -> Tensor:
        """The times that `sampler` visits in `steps` steps; float64, decreasing, the last where sampling ends.

        Spacing None is the scheduler's own. Each sampler has the grid that its class in diffusers lays with this
        scheduler's `timestep_spacing` and `steps_offset`, whatever class the folder names: so a sampler that is asked
        for renders as with diffusers' `from_config`, and the folder's own as in its pipeline. A spacing that is asked
        for goes before `timestep_spacing`; but karras or exponential, as there, is an option beside it. With
        DPM-Solver, UniPC and DEIS these two go from the noisiest time to 0, and so with samplers that have no such
        option (ddim, ddpm, ode). With Euler, Heun, LMS and KDPM2 they go from the first to the last time of the grid
        of `timestep_spacing`, and euler_ancestral, which has no such option either, follows euler.

        Raises:
            ValueError: more steps than the schedule and the offset allow.
        """
        spacing = spacing or self.spacing
        between = None
        if sampler in LIKE_EULER and spacing in BY_NOISE:
            plain = self.time_grid(schedule, steps, sampler, self.timestep_spacing)
            between = plain[0].item(), plain[-2].item()
        grid = schedule.timesteps(
            steps,
            spacing,
            self.steps_offset,
            spare=1 if sampler in LIKE_DPM_SOLVER and spacing in ("leading", "linspace") else 0,
            rounded=sampler not in LIKE_EULER,
            between=between,
        )
        if self.set_alpha_to_one or sampler not in ENDS_AT_ZERO or spacing in BY_NOISE:
            return grid
        # the last step goes to time 0, and is no step at all from there
        clean_is_zero = grid.clamp(min=0)
        if clean_is_zero[-2] > 0:
            return clean_is_zero
        return clean_is_zero[:-1] if len(grid) > 2 else grid  # a single step at time 0 can only end clean


_COMMON_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
    "trained_betas",
    "clip_sample",
    "thresholding",
    "clip_sample_range",
    "sample_max_value",
    "dynamic_thresholding_ratio",
)
