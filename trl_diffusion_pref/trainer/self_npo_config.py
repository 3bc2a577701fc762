"""Options of `SelfNPOTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from ..losses import SELF_NPO_LOSS_TYPES, check_self_npo_options
from .base_config import DiffusionPreferenceConfig


STARTS = ("noise", "data")
TEACHERS = ("ema", "frozen")
# What an option is where neither the user nor the model's published values say anything else.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"start": "noise", "teacher": "ema", "loss_type": "huber"},
    "released_code": {"start": "data", "teacher": "ema", "loss_type": "huber"},
    "paper": {"start": "noise", "teacher": "frozen", "loss_type": "l2", "guidance_scale": 1.0},
}


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
            `"noise"` needs prompts alone: trajectories begin at pure noise. `"data"` begins at a noised image of the
            column `image` (`video`, `audio`), at a random place of the solver's grid.
        teacher (`str`, *optional*):
            Who generates: `"ema"`, an exponential moving average of the trained weights, or `"frozen"`, the weights
            before training.
        ema_decay (`float`, *optional*, defaults to `0.999`):
            Per optimiser step, in [0, 1).
        solver_steps (`int`, *optional*, defaults to `25`):
            Steps of the deterministic solver from pure noise to the end.
        truncated_steps (`int`, *optional*, defaults to `5`):
            K: solver steps that a trajectory advances in one training step. Costs K + 1 evaluations of the teacher,
            each with one forward at `guidance_scale` 0 and 1 and two otherwise.
        guidance_scale (`float`, *optional*):
            Of the generating teacher, in pipelines' convention: 1 is the conditional prediction alone, 0 the
            unconditional one, below 0 away from the prompt. The released code's w is this minus 1.
        loss_type (`str`, *optional*):
            `"huber"` (pseudo-Huber) or `"l2"`, on clean latents.
        huber_c (`float`, *optional*, defaults to `1e-3`):
            c of the pseudo-Huber loss.

    > Parameters whose default is the authors'

        learning_rate (`float`, *optional*):
            1e-6 for Stable Diffusion 1.x, 1e-7 for SDXL (released code, constant, 1,000 steps of 20 and 10 images),
            1e-6 for models without a published value.
        weight_decay (`float`, *optional*):
            1e-3, 0 for SDXL (released code).

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]: those of [`DiffusionPreferenceConfig`],
    > `learning_rate` and `weight_decay`. `prompt_dropout` is the share of trajectories with the empty prompt.
    """

    preset: str = field(
        default="default",
        metadata={
            "help": "Sets `start`, `teacher`, `loss_type` and `guidance_scale` where they are not given.",
            "choices": list(PRESETS),
        },
    )
    start: str | None = field(
        default=None,
        metadata={"help": "Where trajectories begin: `noise` (prompts alone), `data` (prompts and images)."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Who generates: `ema` of the trained weights, or `frozen`, the weights before training."},
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Of the `ema` teacher, per optimiser step, in [0, 1)."})
    solver_steps: int = field(default=25, metadata={"help": "Solver steps from pure noise to the end."})
    truncated_steps: int = field(default=5, metadata={"help": "Solver steps a trajectory advances in a step, K."})
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Of the generating teacher: 1 conditional, 0 unconditional. Default: the model's."},
    )
    loss_type: str | None = field(default=None, metadata={"help": "`huber` or `l2`, on clean latents."})
    huber_c: float = field(default=1e-3, metadata={"help": "c of the pseudo-Huber loss."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "The initial learning rate. Default: the model's published one."}
    )
    weight_decay: float | None = field(
        default=None,
        metadata={"help": "Weight decay of matrices; norms and biases have none. Default: the model's published one."},
    )

    def __post_init__(self) -> None:
        self._check_choices("preset")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        check_self_npo_options(self.loss_type, self.huber_c)
        for name, choices in (("start", STARTS), ("teacher", TEACHERS), ("loss_type", SELF_NPO_LOSS_TYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(choices)}.")
        if self.timestep_sampling is not None:
            raise ValueError(
                f"timestep_sampling={self.timestep_sampling!r} plays no part in Self-NPO: its times are places of the "
                "solver's grid, and uniform over those later than such a place. Leave it out."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is outside [0, 1).")
        if self.truncated_steps < 1:
            raise ValueError(f"truncated_steps={self.truncated_steps}: it must be at least 1.")
        if self.solver_steps < self.truncated_steps:
            raise ValueError(
                f"solver_steps={self.solver_steps} is less than truncated_steps={self.truncated_steps}: a trajectory "
                "cannot advance by more steps than the solver has. Raise the one or lower the other."
            )
