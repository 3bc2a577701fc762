"""Options that all trainers of this package share, on top of TRL's and transformers'."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import datasets
import torch
from trl.trainer.base_config import _BaseConfig

from ..data import as_resolution
from ..noise import TIMESTEP_SAMPLINGS


@dataclass
class DiffusionPreferenceConfig(_BaseConfig):
    r"""
    Options shared by all trainers of this package. See [`~transformers.TrainingArguments`] for the rest.

    > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `DiffusionPipeline.from_pretrained` when `model` is a Hub id or a folder, such as
            `{"variant": "fp16", "revision": "main"}`. Weights are loaded in float32 unless `dtype` is given
            here.

    > Parameters that control the data

        resolution (`int` or `str`, *optional*):
            Side length in pixels of the square that every image is scaled and cropped to; of clips the shorter side.
            Or height and width, of images and clips: `"768x1360"`. Default: what the pipeline generates.
        num_frames (`int`, *optional*):
            Frames that every clip must have. Default: what the pipeline generates. Refused where it generates no
            clips.
        crop (`str`, *optional*, defaults to `"center"`):
            Where the square is cut from an image that is not one: `"center"`, or `"random"`, one relative place for
            both images of a pair, drawn once at encoding.
        random_flip (`bool`, *optional*, defaults to `False`):
            Mirror a pair with probability 1/2, both images alike, decided once at encoding.
        latent_sampling (`str`, *optional*, defaults to `"sample"`):
            `"sample"` draws latents from the VAE's posterior at every step, as the authors' released code does;
            `"mean"` takes its mean.
        prompt_dropout (`float`, *optional*, defaults to `0.0`):
            Share of pairs, in [0, 1), that are trained with the empty prompt. One decision for both images of a pair.
        encode_batch_size (`int`, *optional*, defaults to `8`):
            Pairs that the VAE, and prompts that the text encoders, take at once before training.
        timestep_sampling (`str`, *optional*):
            How a flow model's training times are drawn: `"logit_normal"` (the default there), `"uniform"` or `"mode"`
            (arXiv 2403.03206). Other models' times are uniform, and this option is refused.
        timestep_shift (`float`, *optional*):
            s of `t' = s t / (1 + (s - 1) t)`, which moves a flow model's training times, and Self-NPO's solver grid,
            towards the noise. Default: what the scheduler's config says, by the image's size where it says so; 1
            leaves times as they are drawn, as diffusers' examples train Flux. Refused for other models.
        eval_draws (`int`, *optional*, defaults to `8`):
            Noisy versions of each held-out image, stratified over timesteps, from which evaluation estimates
            likelihoods for the preference accuracy; 0 leaves it out.
        dataset_cache_dir (`str`, *optional*):
            Folder of encoded data sets. Default: `trl_diffusion_pref` in the cache folder of `datasets`.

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]: `logging_steps=10`,
    > `activation_checkpointing=True` (off where the denoiser computes something else with it), `bf16=True` on CUDA
    > devices that support it and False elsewhere (so that the default runs on a CPU machine),
    > `dataloader_pin_memory` only where there is CUDA, `lr_scheduler_type="constant"`,
    > `ddp_find_unused_parameters=False`, `data_seed=seed` (without which a resumed run and a second process would
    > shuffle differently).
    """

    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of `DiffusionPipeline.from_pretrained` when `model` is a Hub id or a folder."},
    )
    resolution: int | str | None = field(
        default=None,
        metadata={
            "help": "Side length in pixels of the training images, shorter side of clips, or height and width, "
            "'768x1360'. Default: what the pipeline generates."
        },
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "Frames of the training clips. Default: what the pipeline generates."}
    )
    crop: str = field(
        default="center",
        metadata={
            "help": "Where the square is cut from an image that is not one, the same for both images of a pair.",
            "choices": ["center", "random"],
        },
    )
    random_flip: bool = field(
        default=False,
        metadata={"help": "Mirror a pair with probability 1/2, both images alike, decided once at encoding."},
    )
    latent_sampling: str = field(
        default="sample",
        metadata={
            "help": "`sample` draws latents from the VAE's posterior at every step, `mean` takes its mean.",
            "choices": ["sample", "mean"],
        },
    )
    prompt_dropout: float = field(
        default=0.0, metadata={"help": "Share of pairs, in [0, 1), that are trained with the empty prompt."}
    )
    encode_batch_size: int = field(
        default=8, metadata={"help": "Pairs or prompts that are encoded at once before training."}
    )
    timestep_sampling: str | None = field(
        default=None,
        metadata={
            "help": "How a flow model's training times are drawn. Default: logit_normal.",
            "choices": list(TIMESTEP_SAMPLINGS),
        },
    )
    timestep_shift: float | None = field(
        default=None, metadata={"help": "Shift of a flow model's training times. Default: the scheduler's."}
    )
    eval_draws: int = field(
        default=8,
        metadata={"help": "Noisy versions of each held-out image for the preference accuracy; 0 leaves it out."},
    )
    dataset_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of encoded data sets. Default: `trl_diffusion_pref` in the cache folder of `datasets`."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to use bfloat16 mixed precision. Default: True on CUDA devices that support it and when "
            "`fp16` is not set, False elsewhere."
        },
    )
    # TRL's default of True would go through transformers' deprecated name; see __post_init__.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of `activation_checkpointing`, which is on by default."}
    )
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Whether to pin memory in data loaders. Default: where there is CUDA."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type to use."})

    def __post_init__(self) -> None:
        if self.deepspeed and (self.learning_rate is None or self.weight_decay is None):
            raise ValueError(
                "With DeepSpeed, which reads them before the model is known, set learning_rate and weight_decay "
                "yourself; docs/hyperparameters.md has each model's."
            )
        cuda = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = cuda
        # A denoiser that cannot do it trains without where nobody asked.
        self.checkpointing_is_default = self.activation_checkpointing is None and self.gradient_checkpointing is None
        if self.checkpointing_is_default:
            self.activation_checkpointing = True
        super().__post_init__()
        self._check_choices("crop", "latent_sampling")
        self.resolution = as_resolution(self.resolution)
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames}: it must be at least 1.")
        if not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout={self.prompt_dropout} is outside [0, 1).")
        if self.encode_batch_size < 1:
            raise ValueError(f"encode_batch_size={self.encode_batch_size}: it must be at least 1.")
        if self.timestep_sampling is not None:
            self._check_choices("timestep_sampling")
        if self.timestep_shift is not None and not self.timestep_shift > 0:
            raise ValueError(f"timestep_shift={self.timestep_shift}: it must be positive; 1 shifts nothing.")
        if self.eval_draws < 0:
            raise ValueError(f"eval_draws={self.eval_draws}: it must be 0 or more.")

    def own_copy(self) -> Self:
        """A trainer's copy, which it can change without the caller noticing."""
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

    def cache_folder(self) -> Path:
        """The folder of encoded data sets; made if it is not there."""
        folder = Path(self.dataset_cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "trl_diffusion_pref")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def check_filled_in(self) -> None:
        """Checks the options that depend on the model; trainers call it when those that were None have their values.

        Raises:
            ValueError: A value is outside its range.
        """

    def _check_choices(self, *names: str) -> None:
        for name in names:
            value, choices = getattr(self, name), self.__dataclass_fields__[name].metadata["choices"]
            if value not in choices:
                raise ValueError(f"{name}={value!r} is none of {', '.join(choices)}.")
