"""Trainers on preference pairs: from a batch of encoded pairs to predictions for both images. Knows no loss."""

from abc import abstractmethod
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction

from ..data import NoisyPairs, corrupt_pairs, dataset_fingerprint, image_conditioning_prefix, latent_columns
from ..evaluation import bootstrap_interval, pair_elbos, wins
from ..randomness import draw_pairs
from .metrics import joined
from .row_tables import load_or_compute
from .row_trainer import RowTrainer


_LATENTS = latent_columns(("chosen", "rejected"))
_CONDITIONING = (image_conditioning_prefix("chosen"), image_conditioning_prefix("rejected"))
_DIFFUSION_NPO = {
    "title": "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of Diffusion "
    "Models",
    "id": "2505.11245",
}


class PairwiseTrainer(RowTrainer):
    """Trainer on rows with a prompt, a chosen and a rejected image.

    Args:
        model: Hub id, folder or loaded pipeline. A loaded one is trained in place: afterwards it samples with the
            tuned weights or the LoRA. One that carries an adapter (`load_lora_weights`) goes on training that adapter.
        args: Options; they are copied, never changed. Default: the defaults, with an output folder named after the
            model.
        train_dataset: Columns `prompt` (str), `chosen`, `rejected`: what the pipeline generates, images
            (`datasets.Image`, or paths), clips (lists of such frames, or files) or sound (`datasets.Audio`, paths, or
            arrays). A streamed data set is encoded as it is read, any other once before training.
        eval_dataset: The same, or a dictionary of such data sets.
        data_collator: Takes encoded rows; default [`RowCollator`].
        callbacks, optimizers: As in [`~transformers.Trainer`].
        peft_config: Trains a LoRA instead of all weights. Without `target_modules` the family's default is used.

    Raises:
        ValueError: A data set is missing, empty, lacks columns, or has a row that cannot be used (row and column
            named); float16 weights for full training; an output folder with checkpoints of another base model.
        TypeError: The model is no supported pipeline.
    """

    image_columns = ("chosen", "rejected")

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
        return self.call(model, noisy.x_t, noisy.model_time, noisy.conditioning)

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

    # ---- One batch -----------------------------------------------------------------------------------------------

    def _own_args(self, args: Any, model: Any) -> Any:
        args = super()._own_args(args, model)
        if args.negative:
            self.trains_negative = True
            self._method, self._paper = f"Diffusion-NPO ({self._name})", _DIFFUSION_NPO
            self._tag_names = [*self._tag_names, "diffusion-npo"]
        return args

    def arranged(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not self.args.negative:
            return inputs
        turned = {"chosen": "rejected", "rejected": "chosen"}
        return {
            f"{turned[name.split('_')[0]]}_{name.split('_', 1)[1]}"
            if name in _LATENTS or name.startswith(_CONDITIONING)
            else name: value
            for name, value in inputs.items()
        }

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
            return self.call(model, x_t, model_time, conditioning)

        return pair_elbos(predict, inputs, self.noise_process, seed=self.args.seed, draws=self.args.eval_draws)

    def _compute_base_elbos(self, dataset: Dataset) -> Tensor:
        record = {
            "what": "ELBOs of the base",
            "negative": self.args.negative,
            "weights": self._base_fingerprint,
            "data": dataset_fingerprint(dataset),
            "prompts": self.prompt_table.encoded_with,
            "rows": len(dataset),
            "noise process": self.noise_process.describe(),
            "seed": self.args.seed,
            "draws": self.args.eval_draws,
            "precision": self.accelerator.mixed_precision,
        }
        return load_or_compute(
            self.args.cache_folder(),
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
                order = np.argsort(joined(prediction.label_ids), kind="stable")
                values = joined(prediction.predictions)[order, self._evaluated_names.index(name)]
                metrics[f"{name}_low"], metrics[f"{name}_high"] = bootstrap_interval(values)
                break
        return metrics
