"""Options that all trainers of this package share, on top of TRL's and transformers'."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, TypeAlias, cast

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import SchedulerType
from transformers.training_args import ParallelMode

from ..data.layouts import labelled_datasets
from ..diffusion.noise import NoiseProcess, noise_process
from ..host_libraries import dtypes_of_torch
from .data_config import DataConfig
from .documented import documented
from .option_checks import check_effects, check_loop, check_ranges, check_schedule, check_trackers, check_types


# What an evaluation on pairs returns, without its prefix.
PAIR_METRICS = (
    "loss",
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    *("mse/chosen", "mse/rejected", "base_likelihood_accuracy"),
    *(f"{name}_accuracy{end}" for name in ("preference", "likelihood") for end in ("", "_low", "_high")),
)

# Options of loading that are not to be written anywhere; addresses of proxies often have a password.
_SECRET = re.compile("(.*_)?token|proxies")

AnyDataset: TypeAlias = Dataset | IterableDataset


@documented
@dataclass
class DiffusionPreferenceConfig(DataConfig):
    r"""
    Options shared by all trainers of this package, with those of [`DataConfig`] about data. See
    [`~transformers.TrainingArguments`] for the rest.

    A value that cannot be used, and an option that has no effect beside the others, raise a `ValueError` when the
    config is made.

    > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `DiffusionPipeline.from_pretrained` when `model` is a Hub id or a folder, such as
            `{"variant": "fp16", "revision": "main"}`. Weights are loaded in float32 unless `dtype` is given
            here, because small updates are lost in half precision.
        quantize (`str`, *optional*):
            Loads the denoiser with quantised weights, for a LoRA on a small card: `"nf4"`, 4 bits with a float32
            scale for every 64 weights, or `"int8"`. For `model` by name, where bitsandbytes can quantise (CUDA and
            some other accelerators); a pipeline that was loaded with a `quantization_config` is trained as it is. See
            docs/memory.md. Default: weights as they are stored.
        activation_checkpointing (`bool`, *optional*):
            Computes activations again in the backward pass instead of keeping them: less memory, about a fifth
            slower. Default: True; if the model does not support it and the option was not set, it is switched off
            with a warning.
        gradient_checkpointing (`bool`, *optional*):
            Older name of `activation_checkpointing`.
        checkpointing_share (`float`, *optional*, defaults to `1.0`):
            Share of the blocks, in (0, 1], whose activations are computed again; with 0.5 every second block. Less
            saves less memory and time. An error without activation checkpointing.

        denoiser (`str`, *optional*):
            Which one to train where the pipeline has several, each for a range of noise: the pipeline's attribute,
            such as `"transformer"` or `"transformer_2"`. Times are then drawn from its range alone, and the others
            leave the accelerator. Default: all of them at once. An error for other pipelines, except their only name.
        lora_format (`str`, *optional*, defaults to `"diffusers"`):
            Under which names a LoRA is saved: `"diffusers"` for `load_lora_weights` (or PEFT, for pipelines without
            it), `"kohya"` for ComfyUI and kohya's scripts too, in the file `kohya_lora_weights.safetensors` beside.
            Raises before training where the model's layers have no names there.

    > Parameters that control training

        prompt_dropout (`float`, *optional*, defaults to `0.0`):
            Share of rows, in [0, 1), that are trained with the empty prompt, which classifier-free guidance needs.
            One decision for all images of a row. The default trains on every prompt.
        timestep_sampling (`str`, *optional*):
            Distribution of a flow model's training times: `"logit_normal"` (the default there, as Stable Diffusion
            3 was trained), `"uniform"` or `"mode"` (arXiv 2403.03206). An error for other models, whose times are
            uniform.
        timestep_shift (`float`, *optional*):
            s of `t' = s t / (1 + (s - 1) t)`, positive: moves a flow model's training times, and Self-NPO's solver
            grid, towards the noise. Default: what the scheduler's config says, by the image's size where it says so;
            1 leaves times unchanged, as diffusers' examples train Flux. An error for other models.
        loss_on_mask (`bool`, *optional*, defaults to `False`):
            Takes errors over the part of each sample alone that the column `mask_image` marks: with inpainting
            pipelines the part that they generate, with others a part that the preference is about. For losses, metrics
            and held-out likelihoods. An error for pipelines that generate audio. See docs/data.md.
        eval_draws (`int`, *optional*, defaults to `8`):
            Noisy versions of each held-out image, stratified over timesteps, from which evaluation estimates
            likelihoods for the preference accuracy; at least 0, which leaves it out. More cost more and vary less.

    > Parameters that control the moving average of the weights

        use_ema (`bool`, *optional*, defaults to `False`):
            Keeps an exponential moving average of the trained weights in float32 (diffusers' `EMAModel`), evaluates
            it beside them, under the names `eval_ema_*`, which doubles an evaluation's time, and saves it beside
            them: see docs/ema.md. An error with FSDP and DeepSpeed.
        ema_max_decay (`float`, *optional*, defaults to `0.9999`):
            Largest decay, in [0, 1). The decay after step k is `1 - (1 + (k - 1) / ema_inv_gamma) ** -ema_power`
            until then, so that the first weights are forgotten. This and the next two are those of diffusers' script.
        ema_inv_gamma (`float`, *optional*, defaults to `1.0`):
            Slows the growth of the decay down where it is above 1; positive.
        ema_power (`float`, *optional*, defaults to `0.75`):
            Power of that growth, positive: with 1 the average is over all steps alike, with less over the latest ones
            more; with 0.75 the decay is 0.994 at step 1,000 and 0.999 at step 10,000.

    > Parameters of transformers with another default

        bf16 (`bool`, *optional*):
            Whether to use bfloat16 mixed precision. Default: True on CUDA devices that support it, unless `fp16` is
            set, and False elsewhere, so that the default runs on a CPU.
        dataloader_pin_memory (`bool`, *optional*):
            Whether data loaders pin memory. Default: where there is CUDA.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Schedule of the learning rate. The authors' is constant.

    > [!NOTE]
    > Further defaults that differ from [`~transformers.TrainingArguments`]: `logging_steps=10`,
    > `ddp_find_unused_parameters=False`, `data_seed=seed` (without which a resumed run and a second process would
    > shuffle differently), `greater_is_better=False` for the metrics `mse/*` and `x0_error`.
    > `torch_compile=True` compiles the blocks that the denoiser repeats, each kind once and in place, instead of the
    > whole model; models that do not say which these are, and modes with CUDA graphs, are errors.
    """

    _VALID_DICT_FIELDS = [*DataConfig._VALID_DICT_FIELDS, "model_init_kwargs"]
    # For subclasses: intervals of their numbers, options that count only with some values of another one (see
    # `check_effects`), and the names that `metric_for_best_model` may have (none: any).
    _ranges: ClassVar[dict[str, str]] = {
        **DataConfig._ranges,
        "checkpointing_share": "(0, 1]",
        "prompt_dropout": "[0, 1)",
        "timestep_shift": "(0, inf)",
        "eval_draws": "[0, inf)",
        "ema_max_decay": "[0, 1)",
        "ema_inv_gamma": "(0, inf)",
        "ema_power": "(0, inf)",
    }
    _effective_with: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        **DataConfig._effective_with,
        "ema_max_decay": ("use_ema", (True,)),
        "ema_inv_gamma": ("use_ema", (True,)),
        "ema_power": ("use_ema", (True,)),
    }
    metric_names: ClassVar[tuple[str, ...]] = ()

    model_init_kwargs: dict[str, Any] | str | None = None
    quantize: Literal["nf4", "int8"] | None = None
    # Older versions of transformers know gradient_checkpointing alone.
    activation_checkpointing: bool | None = None
    # TRL's default of True would go through transformers' deprecated name; see __post_init__.
    gradient_checkpointing: bool | None = None  # type: ignore[assignment]  # None says that it was not set
    checkpointing_share: float = 1.0
    denoiser: str | None = None
    lora_format: Literal["diffusers", "kohya"] = "diffusers"
    prompt_dropout: float = 0.0
    timestep_sampling: Literal["logit_normal", "uniform", "mode"] | None = None
    timestep_shift: float | None = None
    loss_on_mask: bool = False
    eval_draws: int = 8
    use_ema: bool = False
    ema_max_decay: float = 0.9999
    ema_inv_gamma: float = 1.0
    ema_power: float = 0.75
    bf16: bool | None = None  # type: ignore[assignment]  # None until __post_init__
    dataloader_pin_memory: bool | None = None  # type: ignore[assignment]  # None until __post_init__
    lr_scheduler_type: SchedulerType | str = "constant"

    def __post_init__(self) -> None:
        # On a command line this option is text, where YAML has a boolean.
        resume = str(self.resume_from_checkpoint).lower()
        if resume in ("true", "false"):
            self.resume_from_checkpoint = resume == "true"  # type: ignore[assignment]
        check_types(self)
        check_ranges(self, self._ranges)
        check_effects(self, self._effective_with)
        check_loop(self)
        if self.deepspeed and (self.learning_rate is None or self.weight_decay is None):
            raise ValueError(
                "With DeepSpeed, which reads them before the model is known, set learning_rate and weight_decay "
                "yourself; docs/hyperparameters.md has each model's."
            )
        if self.use_ema and self.shards_weights:
            raise ValueError(
                "use_ema=True: with FSDP and DeepSpeed no process has all weights to average. Leave it out, or train "
                "with DDP."
            )
        cuda = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = cuda
        metric = self.metric_for_best_model or ""
        if self.greater_is_better is None and ("mse/" in metric or metric.endswith("x0_error")):
            self.greater_is_better = False
        # If the user did not set it and the model does not support it, the trainer switches it off.
        self.checkpointing_is_default = self.activation_checkpointing is None and self.gradient_checkpointing is None
        if self.checkpointing_is_default:
            self.activation_checkpointing = True
        super().__post_init__()
        # Newer versions of transformers have done this.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        self.gradient_checkpointing = self.activation_checkpointing
        if self.checkpointing_share < 1 and not self.activation_checkpointing:
            raise ValueError(
                f"checkpointing_share={self.checkpointing_share} has no effect with activation_checkpointing=False. "
                "Leave one of them out."
            )
        check_trackers(self.report_to or ())
        check_schedule(self)
        self._check_metric(None)
        # A dtype that torch does not have is an error here already.
        _ = self.loading

    def check_data(
        self, train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
    ) -> None:
        """Checks the options that depend on which data sets there are; trainers call it before they load a model.

        Raises:
            ValueError: An evaluation without a data set, a metric that these data sets do not give, a stream without a
                number of steps; or FSDP in a single process.
        """
        if self.fsdp and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError(
                f"fsdp={self.fsdp!r} shards weights over several processes, and there is one. Start the script with "
                "accelerate launch or torchrun, or leave fsdp out."
            )
        if eval_dataset is None or eval_dataset == {}:
            for name, off in (("eval_strategy", "no"), ("eval_on_start", False)):
                value = getattr(self, name)
                if value != off:
                    value = getattr(value, "value", value)
                    raise ValueError(f"{name}={value!r} needs an eval_dataset. Pass one, or set {name}={off!r}.")
        else:
            self._check_metric([f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""])
        for label, dataset in [("train_dataset", train_dataset), *labelled_datasets(eval_dataset)]:
            if self.aspect_ratio_buckets and isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"aspect_ratio_buckets=True: {label} is streamed, and a batch of a stream has images of any "
                    "shape. Leave the option out, or store the data."
                )
        if isinstance(train_dataset, IterableDataset) and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: train_dataset is streamed, so set the number of steps.")

    def _check_metric(self, prefixes: list[str] | None) -> None:
        """Checks `metric_for_best_model`; None stands for evaluation data sets of any names."""
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        names = [name for name in self.metric_names if self.eval_draws or "_accuracy" not in name]
        names += [f"ema_{name}" for name in names] if self.use_ema else []
        if not metric or not names:
            return
        known = [prefix + name for prefix in prefixes or [""] for name in names]
        if metric not in known and (prefixes or not metric.endswith(tuple(f"_{name}" for name in names))):
            raise ValueError(
                f"metric_for_best_model={self.metric_for_best_model!r} is not returned by this evaluation, which has "
                f"{', '.join(known)}{'' if self.eval_draws else ' (and preference_accuracy with eval_draws above 0)'}."
            )

    @property
    def shards_weights(self) -> bool:
        """Whether FSDP or DeepSpeed is asked for, here or by `accelerate launch`."""
        launched = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
        return bool(self.fsdp or self.deepspeed) or launched

    @property
    def loading(self) -> dict[str, Any]:
        """`model_init_kwargs`, of which transformers made a dictionary where it was text, with dtypes of torch.

        Raises:
            ValueError: A dtype that torch does not have; diffusers would take float32 for it.
        """
        return dtypes_of_torch(cast(dict[str, Any], self.model_init_kwargs or {}))

    @property
    def reads_empty_prompt(self) -> bool:
        """Whether training needs the conditioning on the empty prompt."""
        return bool(self.prompt_dropout)

    def noise_process(self, scheduler: Any, image_tokens: float | None = None) -> NoiseProcess:
        """A pipeline's noise process with this config's training times; see `diffusion.noise.noise_process`."""
        sampling, shift = self.timestep_sampling, self.timestep_shift
        return noise_process(scheduler, image_tokens, timestep_sampling=sampling, timestep_shift=shift)

    def own_options(self) -> list[str]:
        """Names of the options that the algorithm adds to those that all share."""
        shared = {option.name for option in fields(DiffusionPreferenceConfig)}
        return sorted(option.name for option in fields(self) if option.name not in shared)

    def without_secrets(self) -> Self:
        """A copy without tokens, for files."""
        args = copy.copy(self)
        args.hub_token = None
        args.model_init_kwargs = {name: value for name, value in self.loading.items() if not _SECRET.fullmatch(name)}
        return args

    def to_dict(self) -> dict[str, Any]:
        """What trackers get.

        transformers' method hides `hub_token`, but not a token in `model_init_kwargs`, and turns a dtype in there into
        text, with which a pipeline would no longer load.
        """
        with self.changed(model_init_kwargs=self.without_secrets().model_init_kwargs or None):
            return super().to_dict()

    def __str__(self) -> str:
        options = "".join(f"{name}={value},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{options})"

    __repr__ = __str__

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # dataclasses would write one with all tokens.
        cls.__repr__ = DiffusionPreferenceConfig.__str__  # type: ignore[assignment,method-assign]

    def own_copy(self) -> Self:
        """A trainer's copy, which it can change without changing the caller's."""
        args = copy.copy(self)
        # transformers writes into this one.
        args.accelerator_config = copy.deepcopy(args.accelerator_config)
        # The columns of encoded rows are all needed, and differ between stored and streamed data sets.
        args.remove_unused_columns = False
        # Without a data seed, resuming and several processes shuffle differently.
        if args.data_seed is None:
            args.data_seed = args.seed
        # accelerate looks for unused parameters in every model that is not transformers' own, at a cost per step.
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        return args

    @contextmanager
    def changed(self, **options: Any) -> Iterator[None]:
        """Gives options other values for the duration, also where it ends in an error."""
        before = {name: getattr(self, name) for name in options}
        vars(self).update(options)
        try:
            yield
        finally:
            vars(self).update(before)

    def check_filled_in(self) -> None:
        """Checks the options that depend on the model; trainers call it when those that were None have their values.

        Raises:
            ValueError: A value is outside its range.
        """


@documented
@dataclass
class GuardedConfig(DiffusionPreferenceConfig):
    r"""
    Options shared by the algorithms that prefer some samples to others, and whose runs a guard watches.

    > Parameters that control the divergence guard

        divergence_guard (`str`, *optional*, defaults to `"stop"`):
            What happens when the preferred samples' denoising error rises too far: `"stop"` saves a checkpoint and
            raises, `"warn"` logs, `"off"` does not look.
        divergence_margin (`float`, *optional*, defaults to `0.25`):
            How far, relative to the reference's error on the same noise and times, the preferred samples' mean error
            over the window may rise, positive. The default leaves room for noise between batches.
        divergence_window (`int`, *optional*, defaults to `5`):
            Steps that the guard averages over, at least 1. More react later and are disturbed less by single batches.
    """

    _ranges = {
        **DiffusionPreferenceConfig._ranges,
        "divergence_margin": "(0, inf)",
        "divergence_window": "[1, inf)",
    }
    _effective_with = {
        **DiffusionPreferenceConfig._effective_with,
        "divergence_margin": ("divergence_guard", ("stop", "warn")),
        "divergence_window": ("divergence_guard", ("stop", "warn")),
    }

    divergence_guard: Literal["stop", "warn", "off"] = "stop"
    divergence_margin: float = 0.25
    divergence_window: int = 5

    def divergence_margins(self) -> dict[str, float | None]:
        """The guard's margins, by the names of [`DivergenceGuard`]'s arguments."""
        return {"reference_margin": self.divergence_margin, "start_margin": None}
