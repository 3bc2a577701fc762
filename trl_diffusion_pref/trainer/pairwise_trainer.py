"""Trainers on preference pairs: from a batch of encoded pairs to predictions for both images. Knows no loss."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import EvalPrediction

from ..data import (
    LATENT_COLUMNS,
    EncodingOptions,
    NoisyPairs,
    PairCollator,
    PromptTable,
    check_pair_columns,
    corrupt_pairs,
    dataset_fingerprint,
    encode_pairs,
    encode_prompt_table,
    stream_pairs,
)
from ..evaluation import bootstrap_interval, pair_elbos, wins
from ..randomness import EVALUATION, TRAINING, draw_pairs
from .base_config import DiffusionPreferenceConfig
from .base_trainer import DiffusionPreferenceTrainer
from .row_tables import load_or_compute


class PairwiseTrainer(DiffusionPreferenceTrainer):
    """Trainer on rows with a prompt, a chosen and a rejected image.

    Args:
        model: Hub id, folder or loaded pipeline. A loaded one is trained in place: afterwards it samples with the
            tuned weights or the LoRA. One that carries an adapter (`load_lora_weights`) goes on training that adapter.
        args: Options; they are copied, never changed. Default: the defaults, with an output folder named after the
            model.
        train_dataset: Columns `prompt` (str), `chosen`, `rejected` (`datasets.Image`, or paths). A streamed data set
            is encoded as it is read, any other once before training.
        eval_dataset: The same, or a dictionary of such data sets.
        data_collator: Takes encoded rows; default [`PairCollator`].
        callbacks, optimizers: As in [`~transformers.Trainer`].
        peft_config: Trains a LoRA instead of all weights. Without `target_modules` the family's default is used.

    Raises:
        ValueError: A data set is missing, empty, lacks columns, or has a row that cannot be used (row and column
            named); float16 weights for full training; an output folder with checkpoints of another base model.
        TypeError: The model is no supported pipeline.
    """

    prompt_table: PromptTable | None = None
    # Step, and how many of its pairs have been drawn for, since the micro-batches of a step share its count.
    _drawn: tuple[int, int] = (-1, 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # ELBOs of the starting weights on each held-out pair, so that evaluation has the base beside it at no cost.
        self._base_elbos: dict[str, Tensor] = {}
        if self.args.eval_draws and not self.shards_weights:
            for name, dataset in self.named_eval_datasets():
                if isinstance(dataset, Dataset):
                    self._base_elbos[name] = self._compute_base_elbos(dataset)

    # ---- For subclasses ------------------------------------------------------------------------------------------

    @abstractmethod
    def pair_values(
        self, model: nn.Module, noisy: NoisyPairs, inputs: dict[str, Tensor], keys: list
    ) -> dict[str, Tensor]:
        """The algorithm: `(B,)` float32 tensors, see `pair_metrics`.

        Args:
            model: The trained model, possibly wrapped; `self.predictions(model, noisy)` calls it.
            noisy: Noisy versions of both images of each pair.
            inputs: The collated batch.
            keys: What the noise was drawn from, one per pair.
        """

    def predictions(self, model: nn.Module, noisy: NoisyPairs) -> Tensor:
        """Predictions `(2B, ...)`, from one call of a denoiser on both images of each pair."""
        x_t = noisy.x_t.to(self.dtype_of(model))
        return self.family.predict(model, x_t, noisy.model_time, noisy.conditioning)

    @staticmethod
    def pair_metrics(loss: Tensor, rewards: tuple[Tensor, Tensor], errors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """What every pairwise trainer logs, from losses, and rewards and errors of (chosen, rejected), each `(B,)`."""
        chosen, rejected = (reward.detach() for reward in rewards)
        return {
            "loss": loss,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "mse/chosen": errors[0].detach(),
            "mse/rejected": errors[1].detach(),
        }

    # ---- Data ----------------------------------------------------------------------------------------------------

    def check_dataset(self, dataset: Any, what: str) -> None:
        check_pair_columns(dataset, what)

    def _prepare_encoding(self, args: DiffusionPreferenceConfig, train_dataset: Any, eval_dataset: Any) -> None:
        prompts: list[Any] = []
        for dataset in self._all_datasets(train_dataset, eval_dataset):
            if isinstance(dataset, Dataset):
                prompts += [prompt for prompt in dataset["prompt"] if isinstance(prompt, str)]
        if self.prompt_table is not None:
            prompts = [prompt for prompt in prompts if prompt not in self.prompt_table]
            if not prompts:
                return
        table = encode_prompt_table(
            prompts,
            self.pipeline,
            self.family,
            cache_folder=self._cache_folder(args),
            batch_size=args.encode_batch_size,
        )
        if self.prompt_table is None:
            self.prompt_table = table
        else:
            self.prompt_table.add(table)

    def encode_dataset(
        self, dataset: Dataset | IterableDataset, args: DiffusionPreferenceConfig, what: str
    ) -> Dataset | IterableDataset:
        options = EncodingOptions(
            resolution=args.resolution or self.family.resolution(self.pipeline),
            crop=args.crop,
            random_flip=args.random_flip,
            seed=args.data_seed,
        )
        common = {
            "what": what,
            "batch_size": args.encode_batch_size,
            "extra_columns": self.extra_columns(dataset, args),
        }
        if isinstance(dataset, IterableDataset):
            return stream_pairs(dataset, self.pipeline, self.family, options, **common)
        return encode_pairs(
            dataset, self.pipeline, self.family, options, cache_folder=self._cache_folder(args), **common
        )

    def extra_columns(self, dataset: Dataset | IterableDataset, args: DiffusionPreferenceConfig) -> tuple[str, ...]:
        """Numeric columns that reach the batch besides the pair."""
        return ()

    def is_encoded(self, dataset: Dataset | IterableDataset) -> bool:
        return set(LATENT_COLUMNS) <= set(dataset.column_names or ())

    def make_collator(self) -> Callable:
        return PairCollator(self.prompt_table)

    def start_of_training(self) -> None:
        self._drawn = (-1, 0)

    # ---- One batch -----------------------------------------------------------------------------------------------

    def random_keys(self, inputs: dict[str, Tensor], training: bool) -> list[tuple[int, ...]]:
        rows = inputs["row"].tolist()
        if not training:
            return [(self.args.seed, EVALUATION, row) for row in rows]
        step = self.state.global_step
        first = self._drawn[1] if self._drawn[0] == step else 0
        self._drawn = (step, first + len(rows))
        return [
            (self.args.seed, TRAINING, self.args.process_index, step, first + position)
            for position in range(len(rows))
        ]

    def noisy_pairs(self, inputs: dict[str, Tensor], keys: list[tuple[int, ...]], prompt_dropout: float) -> NoisyPairs:
        """Noisy versions of a batch's images, pair i by the numbers of `keys[i]`."""
        means = inputs["chosen_mean"]
        draws = draw_pairs(keys, tuple(means.shape[1:]), self.noise_process, means.device)
        return corrupt_pairs(
            inputs,
            draws,
            self.noise_process,
            sample_posterior=self.args.latent_sampling == "sample",
            prompt_dropout=prompt_dropout,
            empty_prompt=self.prompt_table([""]) if prompt_dropout else None,
        )

    def sample_values(
        self, model: nn.Module, inputs: dict[str, Tensor], keys: list[tuple[int, ...]]
    ) -> dict[str, Tensor]:
        dropout = self.args.prompt_dropout if model.training else 0.0
        values = self.pair_values(model, self.noisy_pairs(inputs, keys, dropout), inputs, keys)
        if not model.training and self.args.eval_draws:
            values |= self._likelihood_values(model, inputs)
        return values

    # ---- Held-out preference accuracy ------------------------------------------------------------------------------

    def _elbos(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        def predict(x_t: Tensor, model_time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
            return self.family.predict(model, x_t.to(self.dtype_of(model)), model_time, conditioning)

        return pair_elbos(predict, inputs, self.noise_process, seed=self.args.seed, draws=self.args.eval_draws)

    def _compute_base_elbos(self, dataset: Dataset) -> Tensor:
        record = {
            "what": "ELBOs of the base",
            "weights": self._base_fingerprint,
            "data": dataset_fingerprint(dataset),
            "rows": len(dataset),
            "noise process": self.noise_process.describe(),
            "seed": self.args.seed,
            "draws": self.args.eval_draws,
            "precision": self.accelerator.mixed_precision,
        }
        return load_or_compute(
            self._cache_folder(self.args),
            record,
            lambda: self.map_rows(
                dataset, lambda inputs: self._elbos(self.model, inputs), self.args.per_device_eval_batch_size
            ),
            self.accelerator,
        )

    def _likelihood_values(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        elbos = self._elbos(model, inputs)
        values = {"likelihood_accuracy": wins(elbos[:, 0] - elbos[:, 1])}
        table = self._base_elbos.get(self.evaluated_name)
        if table is not None:
            base = table[inputs["row"].cpu()].to(elbos.device)
            gains = elbos - base
            values["preference_accuracy"] = wins(gains[:, 0] - gains[:, 1])
            values["base_likelihood_accuracy"] = wins(base[:, 0] - base[:, 1])
        return values

    def _mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = super()._mean_metrics(prediction)
        for name in ("preference_accuracy", "likelihood_accuracy"):
            if name in metrics:
                # In order of rows, so that the interval does not depend on how processes shared them.
                order = np.argsort(self._stacked(prediction.label_ids), kind="stable")
                values = self._stacked(prediction.predictions)[order, self._evaluated_names.index(name)]
                metrics[f"{name}_low"], metrics[f"{name}_high"] = bootstrap_interval(values)
                break
        return metrics
