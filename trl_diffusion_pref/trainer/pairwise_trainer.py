"""Trainers on preference pairs: from a batch of encoded pairs to one denoising error per image. Knows no loss."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from ..data import (
    CONDITIONING_PREFIX,
    EncodingOptions,
    PairCollator,
    PromptTable,
    check_pair_columns,
    encode_pairs,
    encode_prompt_table,
    stream_pairs,
)
from ..likelihood import denoising_error
from .base_config import DiffusionPreferenceConfig
from .base_trainer import DiffusionPreferenceTrainer
from .randomness import EVALUATION, TRAINING, draw_pairs


class PairwiseTrainer(DiffusionPreferenceTrainer):
    """Trainer on rows with a prompt, a chosen and a rejected image.

    Args:
        model: Hub id, folder or loaded pipeline. A loaded one is trained in place: afterwards it samples with the
            tuned weights or the LoRA.
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

    @abstractmethod
    def pair_loss(self, chosen_error: Tensor, rejected_error: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The algorithm: losses `(B,)` float32 from errors `(B,)`, and `rewards/chosen` and `rewards/rejected`."""

    def check_dataset(self, dataset: Any, what: str) -> None:
        check_pair_columns(dataset, what)

    def _prepare_encoding(self, args: DiffusionPreferenceConfig, train_dataset: Any, eval_dataset: Any) -> None:
        prompts: list[Any] = []
        for dataset in self._all_datasets(train_dataset, eval_dataset):
            if isinstance(dataset, Dataset):
                prompts += [prompt for prompt in dataset["prompt"] if isinstance(prompt, str)]
        if self.prompt_table is not None:
            prompts = [prompt for prompt in prompts if prompt not in self.prompt_table]
        table = encode_prompt_table(
            prompts,
            self.pipeline,
            self.family,
            cache_folder=self._cache_folder(args),
            batch_size=args.encode_batch_size,
        )
        if self.prompt_table is None:
            self.prompt_table = table
        elif prompts:
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
        common = {"what": what, "batch_size": args.encode_batch_size}
        if isinstance(dataset, IterableDataset):
            return stream_pairs(dataset, self.pipeline, self.family, options, **common)
        return encode_pairs(
            dataset, self.pipeline, self.family, options, cache_folder=self._cache_folder(args), **common
        )

    def make_collator(self) -> Callable:
        return PairCollator(self.prompt_table)

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

    def sample_values(
        self, model: nn.Module, inputs: dict[str, Tensor], keys: list[tuple[int, ...]]
    ) -> dict[str, Tensor]:
        chosen_error, rejected_error = self.pair_errors(model, inputs, keys)
        loss, rewards = self.pair_loss(chosen_error, rejected_error)
        margins = rewards["rewards/chosen"] - rewards["rewards/rejected"]
        return {
            "loss": loss,
            **rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "mse/chosen": chosen_error.detach(),
            "mse/rejected": rejected_error.detach(),
        }

    def pair_errors(
        self, model: nn.Module, inputs: dict[str, Tensor], keys: list[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor]:
        """Denoising errors `(B,)` of the chosen and the rejected images, from one call of the denoiser on 2B samples.

        Both images of a pair get the same noise, timestep and prompt, so that their errors differ by the images alone.
        """
        process = self.noise_process
        draws = draw_pairs(keys, tuple(inputs["chosen_mean"].shape[1:]), process, inputs["chosen_mean"].device)
        latents = [inputs["chosen_mean"].float(), inputs["rejected_mean"].float()]
        if self.args.latent_sampling == "sample":
            stds = (inputs["chosen_std"], inputs["rejected_std"])
            latents = [
                mean + std.float() * noise
                for mean, std, noise in zip(latents, stds, draws.posterior_noise, strict=True)
            ]
        x0 = torch.cat(latents)
        noise, timesteps = draws.noise.repeat(2, *[1] * (draws.noise.ndim - 1)), draws.timesteps.repeat(2)
        conditioning = {
            name: torch.cat([tensor] * 2) for name, tensor in self._conditioning(inputs, draws.uniform).items()
        }
        prediction = self.family.predict(
            model,
            process.corrupt(x0, noise, timesteps).to(self._denoiser_dtype),
            process.model_time(timesteps),
            conditioning,
        )
        chosen_error, rejected_error = denoising_error(prediction, process.target(x0, noise, timesteps)).chunk(2)
        return chosen_error, rejected_error

    def _conditioning(self, inputs: dict[str, Tensor], uniform: Tensor) -> dict[str, Tensor]:
        conditioning = {
            name.removeprefix(CONDITIONING_PREFIX): tensor
            for name, tensor in inputs.items()
            if name.startswith(CONDITIONING_PREFIX)
        }
        if self.args.prompt_dropout == 0.0 or not self.model.training:
            return conditioning
        dropped = uniform < self.args.prompt_dropout
        empty = self.prompt_table([""])
        return {
            name: torch.where(dropped.reshape(-1, *[1] * (tensor.ndim - 1)), empty[name].to(tensor), tensor)
            for name, tensor in conditioning.items()
        }
