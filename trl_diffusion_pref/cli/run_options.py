"""The options of a training run that are no options of its config: what is trained, on what, and how it is started."""

from dataclasses import dataclass, fields
from typing import Literal

from peft import LoraConfig

from ..shapes import pipeline_folder
from ..training.documented import documented
from .parser import UsageError


@documented
@dataclass(kw_only=True)
class ModelOptions:
    """
    > Model

        model_name_or_path (`str`):
            A diffusers pipeline: Hub id or folder. Or `shapes`, the small pipeline that comes with this package, and
            `shapes:flow`, its rectified flow.
    """

    model_name_or_path: str

    @property
    def model(self) -> str:
        return model_named(self.model_name_or_path)


@documented
@dataclass(kw_only=True)
class LoraOptions:
    """
    > LoRA

        use_peft (`bool`, *optional*, defaults to `False`):
            Trains a LoRA instead of all weights.
        lora_r (`int`, *optional*, defaults to `16`):
            Its rank.
        lora_alpha (`int`, *optional*, defaults to `16`):
            Its outputs are scaled by lora_alpha / lora_r.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Share of the inputs, in [0, 1), that the LoRA does not see.
        lora_target_modules (`list[str]`, *optional*):
            Names of the layers that get one. Default: the attention projections of the family, see docs/models.md.
        lora_init (`str`, *optional*, defaults to `"default"`):
            How its first matrix begins: `"default"` as in PEFT, or `"gaussian"` as in diffusers' scripts.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Divides the scale by the root of the rank.
        use_dora (`bool`, *optional*, defaults to `False`):
            Trains magnitudes beside directions.
    """

    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    lora_init: Literal["default", "gaussian"] = "default"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if changed and not self.use_peft:
            raise UsageError(f"{changed[0]} has no effect without a LoRA. Add --use_peft, or leave it out.")

    @property
    def peft_config(self) -> LoraConfig | None:
        if not self.use_peft:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            # PEFT has a word for all, which is no layer's name.
            target_modules="all-linear" if self.lora_target_modules == ["all-linear"] else self.lora_target_modules,
            init_lora_weights=True if self.lora_init == "default" else "gaussian",
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


@documented
@dataclass(kw_only=True)
class DataOptions:
    """
    > Data sets

        dataset_name (`list[str]`):
            Data sets, each a name on the Hub, a file, a folder or a glob of what `load_pairs` takes, or a folder that
            `encode` wrote. Or `shapes:512`, so many pairs of drawn shapes that prefer outlines. For trainers that need
            prompts alone also a file of prompts.
        dataset_weights (`list[float]`, *optional*):
            Share of the rows that each data set gives, in any unit. Rows are then drawn with these probabilities until
            one data set is used up. Default: all rows of all data sets, one after the other.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split that is trained on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split for evaluation, read where `eval_strategy` asks for one.
        eval_dataset_name (`list[str]`, *optional*):
            Other data sets for evaluation. Default: those of `dataset_name`.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Reads rows when they are needed, in place of encoding them before training. Needs `max_steps`.
    """

    dataset_name: list[str]
    dataset_weights: list[float] | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    eval_dataset_name: list[str] | None = None
    dataset_streaming: bool = False


@documented
@dataclass(kw_only=True)
class LaunchOptions:
    """
    > How the run is started

        accelerate_config (`str`, *optional*):
            Starts the run through `accelerate launch`: `single_gpu`, `multi_gpu`, `fsdp2`, `zero2` or `zero3`, which
            come with this package, or a file that `accelerate config` wrote. Leave it out under `accelerate launch`
            and `torchrun`.
        num_processes (`int`, *optional*):
            Processes, with `accelerate_config`. Default: one for each GPU for those that come with this package, and
            what the file says for others.
        dry_run (`bool`, *optional*, defaults to `False`):
            Does everything up to the first step, which includes encoding: prints the options with where each value
            came from, the data, the room on disk and the memory that training needs, and stops.
    """

    accelerate_config: str | None = None
    num_processes: int | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise UsageError(f"num_processes={self.num_processes}: at least one is needed.")
        if self.num_processes is not None and self.accelerate_config is None:
            raise UsageError(
                "num_processes has no effect without accelerate_config. Add --accelerate_config multi_gpu."
            )


def model_named(name: str) -> str:
    """A model as the trainers take it; `shapes` stands for the folder of an embedded pipeline."""
    base = name.removeprefix("shapes").removeprefix(":") if name.partition(":")[0] == "shapes" else None
    return name if base is None else str(pipeline_folder(base or "mixed"))
