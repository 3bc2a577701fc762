"""Options of the methods that measure against a reference."""

from dataclasses import dataclass
from typing import Literal

from datasets import IterableDataset

from ..data.layouts import labelled_datasets
from .config import AnyDataset, GuardedConfig
from .documented import documented


# Margins that the comparison with the run's own start allows.
_START_MARGINS = 6


@documented
@dataclass
class ReferenceConfig(GuardedConfig):
    r"""
    Options shared by the algorithms whose losses compare the trained model with a reference.

    > Parameters that control the reference

        reference (`str`, *optional*, defaults to `"auto"`):
            Where the reference's errors come from: `"adapter_off"` (auto for a new LoRA), `"frozen_adapter"` (auto for
            an adapter trained before), `"copy"` (auto for full fine-tuning), or `"precomputed"`: the reference's
            errors are computed once before training for `reference_draws` fixed draws of noise and timestep per row;
            training holds no second model.
        reference_draws (`int`, *optional*, defaults to `8`):
            Fixed draws per row of `"precomputed"`, at least 1. Each costs one forward pass per row before training;
            with few the model learns them by heart, and the training loss no longer says anything.
        reference_errors_dir (`str`, *optional*):
            Folder that keeps the errors of `"precomputed"`; an error if they were made from other weights, data,
            resolution or seed. Default: the cache folder.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Moves the reference towards the policy every `ref_model_sync_steps` steps (TR-DPO), so that it can leave
            the starting weights further. Needs a reference with weights of its own.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy's weights in the moved reference, in (0, 1]; 1 copies them. The default is TRL's and
            TR-DPO's.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Steps between two moves of the reference, at least 1. The default is TRL's and TR-DPO's.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switches dropout off, so that policy and reference differ by their weights alone.
    """

    _ranges = {
        **GuardedConfig._ranges,
        "reference_draws": "[1, inf)",
        "ref_model_mixup_alpha": "(0, 1]",
        "ref_model_sync_steps": "[1, inf)",
    }
    _effective_with = {
        **GuardedConfig._effective_with,
        "reference_draws": ("reference", ("precomputed",)),
        "reference_errors_dir": ("reference", ("precomputed",)),
        "ref_model_mixup_alpha": ("sync_ref_model", (True,)),
        "ref_model_sync_steps": ("sync_ref_model", (True,)),
    }

    reference: Literal["auto", "adapter_off", "frozen_adapter", "copy", "precomputed"] = "auto"
    reference_draws: int = 8
    reference_errors_dir: str | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    disable_dropout: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sync_ref_model and self.reference in ("precomputed", "adapter_off"):
            raise ValueError(
                f"sync_ref_model moves the reference's weights, which reference={self.reference!r} does not have. Use "
                "reference='copy' or 'frozen_adapter'."
            )

    def check_data(
        self, train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
    ) -> None:
        super().check_data(train_dataset, eval_dataset)
        for label, dataset in [("train_dataset", train_dataset), *labelled_datasets(eval_dataset)]:
            if self.reference == "precomputed" and isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"reference='precomputed' needs data sets of known rows, and {label} is streamed. Use another "
                    "reference, or store the data."
                )

    def divergence_margins(self) -> dict[str, float | None]:
        # A reference that moves hides that the model gets worse slowly; the run's own start does not. Other samples
        # stand on the two sides of that comparison, so more is allowed.
        start_margin = _START_MARGINS * self.divergence_margin if self.sync_ref_model else None
        return {"reference_margin": self.divergence_margin, "start_margin": start_margin}
