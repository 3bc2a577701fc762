"""What a trainer on this base says of its own: its options, its data and the values of its samples."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from .base_config import DiffusionPreferenceConfig


class TrainerHooks:
    """The methods that the base trainer calls and its subclasses fill in, in the order in which a run calls them."""

    config_class: ClassVar[type[DiffusionPreferenceConfig]]
    # Whether the result is a model of what is not wanted, for `guidance.negative_guidance`.
    trains_negative = False
    # What the model card says, where it is not the algorithm's name.
    _method: str | None = None
    # What a batch is made of.
    sample_name = "pairs"

    @abstractmethod
    def check_dataset(self, dataset: Any, what: str) -> None:
        """Raises where a data set cannot be trained on."""

    @abstractmethod
    def _prepare_encoding(self, args: DiffusionPreferenceConfig, train_dataset: Any, eval_dataset: Any) -> None:
        """Called once before `encode_dataset`, with the encoders on their device."""

    @abstractmethod
    def encode_dataset(
        self, dataset: Dataset | IterableDataset, args: DiffusionPreferenceConfig, what: str
    ) -> Dataset | IterableDataset:
        """Rows as the collator wants them, with a column `row`."""

    @abstractmethod
    def is_encoded(self, dataset: Dataset | IterableDataset) -> bool:
        """Whether a data set came out of `encode_dataset`."""

    @abstractmethod
    def make_collator(self) -> Callable:
        """The default collator of encoded rows."""

    def start_of_training(self, resumed_from: Path | None) -> None:
        """Forgets what an earlier call of `train` left.

        Args:
            resumed_from: The checkpoint that this call goes on from.
        """

    def arranged(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on its device as the algorithm takes it."""
        return inputs

    @abstractmethod
    def random_keys(self, inputs: dict[str, Tensor], training: bool) -> list[tuple[int, ...]]:
        """One key per sample of the batch."""

    @abstractmethod
    def sample_values(
        self, model: nn.Module, inputs: dict[str, Tensor], keys: list[tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """Per-sample values of a batch.

        Args:
            model: Possibly wrapped; call it through `self.family.predict`.
            inputs: A collated batch with `row`.
            keys: One key per sample for `randomness.generator_for`.

        Returns:
            `(B,)` float32 tensors: `loss` with gradient, and the metrics by their logged names.
        """

    def record_step(self, means: dict[str, float]) -> None:
        """Sees a training micro-batch's means over all processes."""
