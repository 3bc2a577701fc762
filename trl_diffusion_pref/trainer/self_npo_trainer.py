"""Self-NPO: a model of what is not wanted, from the model's own truncated samples."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn

from ..data import (
    check_columns,
    column_names,
    conditioning_of,
    drop_prompts,
    latent_shape,
    uncropped_conditioning,
)
from ..losses import self_npo_loss
from ..randomness import generator_for
from ..trajectories import advance, clean_estimate, combine_guidance
from .base_config import DiffusionPreferenceConfig
from .references import AdapterOff, FrozenAdapter, FrozenModel, MoveReference, Reference
from .row_trainer import RowTrainer
from .self_npo_config import SelfNPOConfig
from .trajectory_pool import TrajectoryPool


logger = get_logger(__name__)

# With start="data": the column with the samples, by what the pipeline generates.
_DATA_COLUMNS = {"image": "image", "video": "video", "audio": "audio"}


@dataclass(frozen=True)
class _Draws:
    """What is random about B samples, each `(B, ...)`, from one generator per sample.

    Args:
        start_noise, forward_noise, posterior_noise: As the latents.
        start, first_advance, later, dropout: `(B,)` in [0, 1).
    """

    start_noise: Tensor
    forward_noise: Tensor
    posterior_noise: Tensor
    start: Tensor
    first_advance: Tensor
    later: Tensor
    dropout: Tensor


class SelfNPOTrainer(RowTrainer):
    """Trainer for Self-NPO (Self Negative Preference Optimization, truncated diffusion fine-tuning).

    The result is a negative model: sample with it through `guidance.negative_guidance`.

    On a flow model trajectories follow Euler steps on the scheduler's shifted grid, and errors are those of the clean
    latents as everywhere: with `loss_type="l2"` the loss is t^2 times the velocity's mean squared error.

    Args:
        model, args, eval_dataset, data_collator, callbacks, optimizers, peft_config: As in [`MaPOTrainer`], with
            `args` a [`SelfNPOConfig`].
        train_dataset: Column `prompt` (str); with `start="data"` also `image`, or `video` or `audio` where the
            pipeline generates those. With `start="noise"` a trajectory goes on over several training steps with the
            prompt that it began with, so that about one in six prompts of the batches begins one; the others are
            passed over.

    Raises:
        ValueError: As [`MaPOTrainer`]; a moving teacher with sharded weights.
        TypeError: As [`MaPOTrainer`].

    Example:

    ```python
    from datasets import Dataset
    from trl_diffusion_pref import SelfNPOConfig, SelfNPOTrainer

    trainer = SelfNPOTrainer(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        args=SelfNPOConfig(output_dir="self-npo", max_steps=1000, per_device_train_batch_size=20),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    config_class = SelfNPOConfig
    trains_negative = True
    sample_name = "trajectories"
    _tag_names = ["trl", "trl-diffusion-pref", "self-npo"]
    _name = "Self-NPO"
    # Whether `image_columns` is the pipeline's, or still a guess.
    _column_known = False
    _paper = {
        "title": "Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning",
        "id": "2505.11777",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times = self.noise_process.solver_times(self.args.solver_steps)
        self.pool = TrajectoryPool()
        self.teacher = self._make_teacher()
        if self.args.teacher == "ema":
            self.add_callback(MoveReference(self, self.teacher, 1 - self.args.ema_decay))

    def _own_args(self, args: SelfNPOConfig | None, model: Any) -> SelfNPOConfig:
        args = super()._own_args(args, model)
        self.image_columns = (_DATA_COLUMNS["image"],) if args.start == "data" else ()
        return args

    def _make_teacher(self) -> Reference:
        moves = self.args.teacher == "ema"
        if moves and self.shards_weights:
            raise ValueError(
                "teacher='ema' is not supported with FSDP and DeepSpeed, whose checkpoints leave it out. Use "
                "teacher='frozen'."
            )
        if isinstance(self.model, PeftModel):
            return FrozenAdapter(self.model) if self._adapter_before or moves else AdapterOff(self.model)
        module = copy.deepcopy(self.model)
        # In half precision a step of 1 - decay would be rounded away.
        return FrozenModel(module.float() if moves else module, self.accelerator)

    def check_dataset(self, dataset: Any, what: str) -> None:
        if not self._column_known and self.image_columns and isinstance(dataset, (Dataset, IterableDataset)):
            # A pipeline given by name is loaded after this, and only then it is known which column it must be.
            columns = column_names(dataset)
            found = next((name for name in _DATA_COLUMNS.values() if name in columns), "image")
            check_columns(dataset, what, ("prompt", found))
        else:
            super().check_dataset(dataset, what)

    def _prepare_encoding(self, args: DiffusionPreferenceConfig, train_dataset: Any, eval_dataset: Any) -> None:
        if self.image_columns and not self._column_known:
            self.image_columns, self._column_known = (_DATA_COLUMNS[self.family.modality],), True
            self._check_datasets(train_dataset, eval_dataset)
        super()._prepare_encoding(args, train_dataset, eval_dataset)
        size = (args.resolution, args.num_frames)
        self.latent_shape = latent_shape(self.pipeline, self.family, *size)
        self.empty_prompt = {name: tensor.to(args.device) for name, tensor in self.prompt_table([""]).items()}
        # Of trajectories that begin at noise, as the pipeline draws them.
        self.drawn_conditioning = {
            name: tensor.to(args.device)
            for name, tensor in uncropped_conditioning(self.pipeline, self.family, *size).items()
        }

    def start_of_training(self, resumed_from: Path | None) -> None:
        super().start_of_training(resumed_from)
        self.pool.clear()
        # Not with the weights, which DeepSpeed loads elsewhere.
        if resumed_from is not None and self.args.start == "noise":
            self._load_pool(resumed_from)

    # ---- One batch -----------------------------------------------------------------------------------------------

    def sample_values(
        self, model: nn.Module, inputs: dict[str, Tensor], keys: list[tuple[int, ...]]
    ) -> dict[str, Tensor]:
        process, draws = self.noise_process, self._draw(keys, inputs["row"].device)
        conditioning, times = self._conditioning(inputs), self.times.to(inputs["row"].device)
        if model.training and self.args.prompt_dropout:
            conditioning = drop_prompts(conditioning, draws.dropout < self.args.prompt_dropout, self.empty_prompt)
        if self.args.start == "data":
            x, position, steps = self._from_data(inputs, draws, times)
            begun = torch.ones(len(keys), device=x.device)
        elif model.training:
            x, position, steps, conditioning, begun = self._from_pool(draws, conditioning, [key[-1] for key in keys])
        else:
            # A held-out trajectory is no part of the pool; it goes to a random place at once.
            x, position = draws.start_noise, torch.full_like(inputs["row"], self.args.solver_steps)
            steps = 1 + (draws.first_advance * self.args.solver_steps).long()
            begun = torch.ones(len(keys), device=x.device)

        with self.teacher.applied() as teacher:
            predict = self._guided(teacher, conditioning)
            rounds = None
            if self.shards_weights:
                whole = self.args.start == "noise" and not model.training
                rounds = self.args.solver_steps if whole else self.args.truncated_steps
            x_t, position = advance(predict, process, times, x, position, steps, rounds=rounds)
            target = clean_estimate(predict, process, x_t, times[position])
        if self.args.start == "noise" and model.training:
            self.pool.put([key[-1] for key in keys], x_t, position, conditioning)

        later = process.sample_later(times[position], draws.later)
        x_s = process.renoise(x_t, draws.forward_noise, times[position], later)
        prediction = self.call(model, x_s, process.model_time(later), conditioning)
        predicted = process.predict_x0(prediction, x_s, later)
        loss = self_npo_loss(predicted, target, loss_type=self.args.loss_type, huber_c=self.args.huber_c)
        return {
            "loss": loss,
            "x0_error": (predicted.detach() - target).square().flatten(1).mean(dim=1),
            "trajectories/begun": begun,
        }

    def _draw(self, keys: list[tuple[int, ...]], device: torch.device) -> _Draws:
        tensors: list[list[Tensor]] = []
        for key in keys:
            generator = generator_for(*key)
            noise = [torch.randn(self.latent_shape, generator=generator) for _ in range(3)]
            tensors.append([*noise, *torch.rand(4, generator=generator)])
        return _Draws(*(torch.stack(column).to(device) for column in zip(*tensors, strict=True)))

    def _from_data(self, inputs: dict[str, Tensor], draws: _Draws, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noised images at random places of the grid, and how far each advances."""
        column = self.image_columns[0]
        latents = inputs[f"{column}_mean"].float()
        if self.args.latent_sampling == "sample":
            latents = latents + inputs[f"{column}_std"].float() * draws.posterior_noise
        position = 1 + (draws.start * self.args.solver_steps).long()
        x = self.noise_process.corrupt(latents, draws.start_noise, times[position])
        return x, position, torch.full_like(position, self.args.truncated_steps)

    def _from_pool(
        self, draws: _Draws, conditioning: dict[str, Tensor], slots: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
        """The slots' trajectories, new ones where one has ended.

        A new one first advances by 1 to K steps at random: by K always, ends would fall on every K-th time alone. The
        very first go to a random place of the whole grid: all would else be at about the same time for long.
        """
        x, conditioning = draws.start_noise.clone(), {name: tensor.clone() for name, tensor in conditioning.items()}
        reach = torch.tensor(
            [
                # Sharded weights are evaluated equally often by all processes, and that long only once.
                self.args.truncated_steps if slot in self.pool or self.shards_weights else self.args.solver_steps
                for slot in slots
            ],
            device=x.device,
        )
        steps = 1 + (draws.first_advance * reach).long()
        position = torch.full_like(steps, self.args.solver_steps)
        begun = torch.ones(len(slots), device=x.device)
        for row, slot in enumerate(slots):
            if self.pool.unfinished(slot):
                x[row], position[row], stored = self.pool.get(slot)
                for name, tensor in stored.items():
                    conditioning[name][row] = tensor
                steps[row], begun[row] = self.args.truncated_steps, 0.0
        return x, position, steps, conditioning, begun

    def _conditioning(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the prompts, and of the images as they were prepared or as they are drawn."""
        if self.args.start == "data":
            return conditioning_of(inputs, self.image_columns[0])
        count = len(inputs["row"])
        drawn = {name: tensor.expand(count, *tensor.shape) for name, tensor in self.drawn_conditioning.items()}
        return conditioning_of(inputs) | drawn

    def _guided(self, teacher: nn.Module, conditioning: dict[str, Tensor]):
        """The teacher's prediction with the generation's guidance, as `trajectories` calls it."""
        scale, model_time = self.args.guidance_scale, self.noise_process.model_time

        def predict(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            given = {name: tensor[rows] for name, tensor in conditioning.items()}
            # Both sides are told the same of the image.
            empty = given | {
                name: tensor.expand(len(rows), *tensor.shape[1:]) for name, tensor in self.empty_prompt.items()
            }
            if scale in (0.0, 1.0):
                return self.call(teacher, x_t, model_time(t), given if scale else empty)
            both = {name: torch.cat([given[name], empty[name]]) for name in given}
            prediction = self.call(teacher, torch.cat([x_t] * 2), model_time(torch.cat([t] * 2)), both)
            return combine_guidance(*prediction.chunk(2), scale)

        return predict

    # ---- Checkpoints of teacher and pool -------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.start == "noise":
            self.pool.save(folder, self.args.process_index, self._pool_record)
        if self.args.teacher == "ema" and self.args.should_save:
            self.teacher.save(folder)
        # What makes a checkpoint count comes last, and the main process writes it.
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.teacher == "ema":
            self.teacher.load(Path(resume_from_checkpoint))

    @property
    def _pool_record(self) -> dict[str, Any]:
        """What a stored trajectory's place and latents depend on."""
        return {
            "solver_steps": self.args.solver_steps,
            "latent shape": list(self.latent_shape),
            "noise process": self.noise_process.describe(),
        }

    def _load_pool(self, folder: Path) -> None:
        written = len(list(folder.glob(TrajectoryPool.file_name("*"))))
        if written == self.args.world_size:
            self.pool.load(folder, self.args.process_index, self.args.device, self._pool_record)
        else:
            logger.warning(
                f"{folder} holds the trajectories of {written} processes and there are {self.args.world_size} now, so "
                "all trajectories begin anew."
            )
