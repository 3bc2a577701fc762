"""Options of `DiffusionNFTTrainer`."""

from dataclasses import dataclass
from typing import Any, Literal

from datasets import IterableDataset

from ...data.layouts import labelled_datasets
from ...training.config import AnyDataset
from ...training.documented import documented
from ...training.reference_config import ReferenceConfig
from .loss import DiffusionNFTOptions


_ONLINE = ("start", ("noise",))


@documented
@dataclass
class DiffusionNFTConfig(ReferenceConfig):
    r"""
    Configuration of [`DiffusionNFTTrainer`]: the options of [`ReferenceConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the method

        start (`str`, *optional*, defaults to `"data"`):
            Where samples come from. `"data"` (offline): from the data set, with votes, scores or pairs, and the old
            policy is the reference. `"noise"` (online): the model generates them from the data set's prompts, and the
            trainer's `reward_funcs` score them.
        nft_beta (`float`, *optional*, defaults to `1.0`):
            b, positive: the loss pulls `b v + (1 - b) v_old` towards liked samples and `(1 + b) v_old - b v` towards
            disliked ones, so that a smaller one moves the model further from the old policy. The released code has 1
            with one reward and 0.1 with several.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            c, positive: normalised scores are clipped to [-c, c] and become `p = A / (2 c) + 1/2`, how likely a sample
            is a liked one; also the loss's factor. The default is the released code's.
        self_normalized (`bool`, *optional*, defaults to `True`):
            Divides each squared error by the sample's mean absolute error, as the released code does. False leaves the
            squared errors of the paper's equation.
        kl_weight (`float`, *optional*, defaults to `1e-4`):
            Weight of the mean squared difference from the reference's prediction, at least 0. The default is the
            released code's; 0 saves the reference's forward pass where samples are generated.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            By which standard deviation scores are divided, less the mean of their prompt: `"group"`, that of the
            prompt's samples, or `"batch"`, that of all samples of the phase or the data set, so that a prompt whose
            samples hardly differ weighs little.

    > Parameters that control the generated samples

        num_generations (`int`, *optional*, defaults to `24`):
            Samples of each prompt, at least 2. The default is the published one.
        prompts_per_rollout (`int`, *optional*, defaults to `48`):
            Prompts that are sampled in a phase, at least 1. Together with `num_generations` it must make whole steps
            of `per_device_train_batch_size` times `gradient_accumulation_steps` times processes. The default is the
            published one.
        num_iterations (`int`, *optional*, defaults to `1`):
            How often each sample of a phase is trained on, at least 1, with other noise each time. More save sampling
            and lag further behind the model.
        reward_weights (`list[float]`, *optional*):
            Weights of the rewards in their sum, one for each of `reward_funcs`. Default: 1 for all.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Sampling steps, at least 1. Published: 10 with one reward, 25 with several.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Guidance while sampling, as the pipeline's call takes it. The default, which is published, samples without.
        sampling_scheduler (`str`, *optional*):
            Class of diffusers that samples, such as `"DPMSolverMultistepScheduler"`, made from the config of the
            pipeline's scheduler. Any solver may, since training does not depend on it. Default: the pipeline's own.
        sampling_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the pipeline's call. Height, width and number of frames are those of `resolution` and
            `num_frames` unless they are given here.
        sampling_batch_size (`int`, *optional*, defaults to `8`):
            Samples in one call of the pipeline, at least 1.
        old_policy_decay (`str`, *optional*, defaults to `"half"`):
            Share of the old policy that stays when it moves towards the trained weights at the end of a phase:
            `"half"`, `min(0.001 step, 0.5)`, or `"slow"`, 0 up to step 75 and then `min(0.0075 (step - 75), 0.999)`.
            Both are the released code's.

    > Parameters of transformers with another default

        learning_rate (`float`, *optional*):
            Initial learning rate, at least 0. Default: the model's, see docs/hyperparameters.md; 1e-5 for all so far,
            which is ours. LoRAs take several times as much.
        weight_decay (`float`, *optional*, defaults to `1e-2`):
            Weight decay of matrices, at least 0; norms and biases have none.
    """

    _VALID_DICT_FIELDS = [*ReferenceConfig._VALID_DICT_FIELDS, "sampling_kwargs"]
    _ranges = {
        **ReferenceConfig._ranges,
        "nft_beta": "(0, inf)",
        "advantage_clip": "(0, inf)",
        "kl_weight": "[0, inf)",
        "num_generations": "[2, inf)",
        "prompts_per_rollout": "[1, inf)",
        "num_iterations": "[1, inf)",
        "num_inference_steps": "[1, inf)",
        "sampling_batch_size": "[1, inf)",
    }
    _effective_with = {
        **ReferenceConfig._effective_with,
        "num_generations": _ONLINE,
        "prompts_per_rollout": _ONLINE,
        "num_iterations": _ONLINE,
        "reward_weights": _ONLINE,
        "num_inference_steps": _ONLINE,
        "guidance_scale": _ONLINE,
        "sampling_scheduler": _ONLINE,
        "sampling_kwargs": _ONLINE,
        "sampling_batch_size": _ONLINE,
        "old_policy_decay": _ONLINE,
    }

    start: Literal["data", "noise"] = "data"
    nft_beta: float = 1.0
    advantage_clip: float = 5.0
    self_normalized: bool = True
    kl_weight: float = 1e-4
    scale_rewards: Literal["group", "batch"] = "group"
    num_generations: int = 24
    prompts_per_rollout: int = 48
    num_iterations: int = 1
    reward_weights: list[float] | None = None
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    sampling_scheduler: str | None = None
    sampling_kwargs: dict[str, Any] | str | None = None
    sampling_batch_size: int = 8
    old_policy_decay: Literal["half", "slow"] = "half"
    learning_rate: float | None = None  # type: ignore[assignment]  # None until the model is known
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        if self.start == "noise" and self.load_best_model_at_end and self.metric_for_best_model is None:
            # There is no loss on prompts that were not trained on.
            self.metric_for_best_model = "reward"
            self.greater_is_better = True if self.greater_is_better is None else self.greater_is_better
        super().__post_init__()
        DiffusionNFTOptions(self.nft_beta, self.advantage_clip, self.self_normalized)
        if self.reference == "precomputed":
            raise ValueError(
                "reference='precomputed' keeps the reference's errors, and DiffusionNFT mixes its predictions with "
                "the model's. Use reference='auto'."
            )

    @property
    def online(self) -> bool:
        """Whether the model generates what it is trained on."""
        return self.start == "noise"

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimiser step in all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def samples_per_phase(self) -> int:
        """Samples that all processes generate in a phase."""
        return self.prompts_per_rollout * self.num_generations

    @property
    def steps_per_phase(self) -> int:
        """Optimiser steps between two phases of sampling."""
        return self.samples_per_phase * self.num_iterations // self.samples_per_step

    def check_data(
        self, train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
    ) -> None:
        super().check_data(train_dataset, eval_dataset)
        if not self.online:
            return
        for label, dataset in [("train_dataset", train_dataset), *labelled_datasets(eval_dataset)]:
            if isinstance(dataset, IterableDataset):
                raise ValueError(f"start='noise' needs prompts that are stored, and {label} is streamed. Store them.")
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps={self.max_steps}: with start='noise' samples are generated without end, so set the number "
                "of steps."
            )
        if self.samples_per_phase % self.samples_per_step:
            raise ValueError(
                f"prompts_per_rollout={self.prompts_per_rollout} and num_generations={self.num_generations} make "
                f"{self.samples_per_phase} samples, which is no multiple of the {self.samples_per_step} samples of a "
                f"step (per_device_train_batch_size={self.train_batch_size}, gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}, {self.world_size} processes). Change one of them."
            )
