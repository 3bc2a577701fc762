"""Options of `SelfNPOTrainer`."""

from dataclasses import dataclass
from typing import Literal, cast

from ...training.config import DiffusionPreferenceConfig, documented
from .loss import SelfNPOLossType, SelfNPOOptions


# What an option is where neither the user nor the model's published values say anything else.
PRESETS: dict[str, dict[str, str | float]] = {
    "default": {"start": "noise", "teacher": "ema", "loss_type": "huber"},
    "released_code": {"start": "data", "teacher": "ema", "loss_type": "huber"},
    "paper": {"start": "noise", "teacher": "frozen", "loss_type": "l2", "guidance_scale": 1.0},
}


@documented
@dataclass
class SelfNPOConfig(DiffusionPreferenceConfig):
    r"""
    Configuration of [`SelfNPOTrainer`]: the options of [`DiffusionPreferenceConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the method

        preset (`str`, *optional*, defaults to `"default"`):
            Sets `start`, `teacher`, `loss_type` and `guidance_scale` where they are not given. `"released_code"`:
            data, ema, huber, the model's scale (0 for Stable Diffusion 1.x, -4 for SDXL). `"paper"`: noise,
            frozen, l2, 1. `"default"`: noise, ema, huber, the model's scale. docs/self_npo.md says where the two
            sources differ.
        start (`str`, *optional*):
            Where trajectories begin. `"noise"` needs prompts alone; `"data"` begins at a noised sample of the column
            `image` (`video`, `audio`), at a random place of the solver's grid. Default: the preset's.
        teacher (`str`, *optional*):
            Who generates: `"ema"`, an exponential moving average of the trained weights, or `"frozen"`, the weights
            before training, which need no second adapter with a new LoRA. Default: the preset's.
        ema_decay (`float`, *optional*, defaults to `0.999`):
            Share of the `"ema"` teacher's weights that each optimiser step keeps, in [0, 1). The default is the
            released code's.
        solver_steps (`int`, *optional*, defaults to `25`):
            Steps of the deterministic solver from pure noise to the end, at least 1 and no fewer than
            `truncated_steps`. The default is the published one.
        truncated_steps (`int`, *optional*, defaults to `5`):
            K: solver steps that a trajectory advances in one training step, at least 1. Costs K + 1 evaluations of
            the teacher, each with one forward pass at `guidance_scale` 0 and 1 and two otherwise. The default is the
            published one.
        guidance_scale (`float`, *optional*):
            Guidance of the generating teacher, in pipelines' convention: 1 is the conditional prediction alone, 0 the
            unconditional one, below 0 away from the prompt. The released code's w is this minus 1. Default: the
            preset's, else the model's.
        loss_type (`str`, *optional*):
            Distance of clean latents: `"huber"` (pseudo-Huber, released code) or `"l2"` (paper). Default: the
            preset's.
        huber_c (`float`, *optional*, defaults to `1e-3`):
            c of the pseudo-Huber loss, positive: distances well below it are squared. The default is the released
            code's.

    > Parameters whose default is the authors'

        learning_rate (`float`, *optional*):
            Initial learning rate, at least 0. Default: 1e-6 for Stable Diffusion 1.x, 1e-7 for SDXL (released code,
            constant, 1,000 steps of 20 and 10 images), 1e-6 for models without a published value.
        weight_decay (`float`, *optional*):
            Weight decay of matrices, at least 0; norms and biases have none. Default: 1e-3, and 0 for SDXL (released
            code).

    > [!NOTE]
    > `prompt_dropout` is the share of trajectories with the empty prompt.
    """

    _ranges = {
        **DiffusionPreferenceConfig._ranges,
        "ema_decay": "[0, 1)",
        "solver_steps": "[1, inf)",
        "truncated_steps": "[1, inf)",
        "huber_c": "(0, inf)",
    }
    _effective_with = {"ema_decay": ("teacher", ("ema",)), "huber_c": ("loss_type", ("huber",))}
    metric_names = ("loss", "x0_error", "trajectories/begun")

    preset: Literal["default", "released_code", "paper"] = "default"
    start: Literal["noise", "data"] | None = None
    teacher: Literal["ema", "frozen"] | None = None
    ema_decay: float = 0.999
    solver_steps: int = 25
    truncated_steps: int = 5
    guidance_scale: float | None = None
    loss_type: Literal["huber", "l2"] | None = None
    huber_c: float = 1e-3
    learning_rate: float | None = None  # type: ignore[assignment]  # None until the model is known
    weight_decay: float | None = None  # type: ignore[assignment]  # None until the model is known

    def __post_init__(self) -> None:
        # The base class rejects an unknown preset.
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        SelfNPOOptions(cast(SelfNPOLossType, self.loss_type), self.huber_c)
        if self.timestep_sampling is not None:
            raise ValueError(
                f"timestep_sampling={self.timestep_sampling!r} plays no part in Self-NPO: its times are places of the "
                "solver's grid, and uniform over those later than such a place. Leave it out."
            )
        if self.solver_steps < self.truncated_steps:
            raise ValueError(
                f"solver_steps={self.solver_steps} is less than truncated_steps={self.truncated_steps}: a trajectory "
                "cannot advance by more steps than the solver has. Raise the one or lower the other."
            )

    @property
    def reads_empty_prompt(self) -> bool:
        # The teacher generates with guidance.
        return True
