"""Self-NPO: a negative model from prompts alone, trained towards a teacher's own truncated samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from ...data import Batch, Layout, Mode, NoisyBatch, with_dropout
from ...data.layouts import sample_column
from ...diffusion.elbo import denoising_error
from ...diffusion.randomness import SampleKey, generator_for
from ...diffusion.trajectories import Predict, advance, clean_estimate, combine_guidance
from ...training.blocks import copy_of
from ...training.callbacks import MoveReference
from ...training.references import AdapterOff, FrozenAdapter, FrozenModel, Reference
from ...training.trainer import DiffusionTrainer
from .config import SelfNPOConfig
from .loss import SelfNPOLossType, SelfNPOOptions, self_npo_loss
from .trajectory_pool import TrajectoryPool


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


class SelfNPOTrainer(DiffusionTrainer):
    """Trainer for Self-NPO (Self Negative Preference Optimization, truncated diffusion fine-tuning).

    The result is a negative model: sample with it through `guidance.negative_guidance`.

    On a flow model trajectories follow Euler steps on the scheduler's shifted grid, and errors are those of the clean
    latents as everywhere: with `loss_type="l2"` the loss is t^2 times the velocity's mean squared error.

    Args:
        model, args, eval_dataset, data_collator, callbacks, optimizers, peft_config: As in [`DiffusionTrainer`], with
            `args` a [`SelfNPOConfig`].
        train_dataset: Column `prompt` (str); with `start="data"` also `image`, or `video` or `audio` where the
            pipeline generates those; for a pipeline that edits images always `image`, the source, and the sample
            is `edited_image`. With `start="noise"` a trajectory goes on over several training steps with the
            prompt that it began with, so that about one in six prompts of the batches begins one; the others are
            passed over.

    Raises:
        ValueError: As [`DiffusionTrainer`]; a moving teacher with sharded weights.
        TypeError: As [`DiffusionTrainer`].

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

    args: SelfNPOConfig
    config_class = SelfNPOConfig
    trains_negative = True
    # The pool keeps trajectories of one shape.
    several_sizes = False
    sample_name = "trajectories"
    _tag_names = ["trl", "trl-diffusion-pref", "self-npo"]
    _name = "Self-NPO"
    _paper = {
        "title": "Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning",
        "id": "2505.11777",
        "citation": """\
@misc{wang2025selfnpo,
    title         = {{Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning}},
    author        = {Fu-Yun Wang and Keqiang Sun and Yao Teng and Xihui Liu and Jiale Yuan and Jiaming Song and
                     Hongsheng Li},
    year          = 2025,
    eprint        = {2505.11777},
    archivePrefix = {arXiv}
}""",
    }

    # ---- Before the first step -----------------------------------------------------------------------------------

    def make_layout(self) -> Layout:
        if self.args.start == "noise":
            return Layout()
        return Layout(samples=(sample_column(self.family),))

    def check_step(self, peft_config: LoraConfig | None) -> None:
        if self.args.denoiser is not None and self.family.trained_times(self.encoders.pipeline) != (0.0, 1.0):
            raise ValueError(
                f"denoiser={self.args.denoiser!r}: Self-NPO's trajectories go through all times, and this denoiser is "
                "for some of them. Leave it out, which trains all denoisers."
            )
        if self.args.start == "noise" and self.family.prompts_see_images and self.layout.conditions:
            raise ValueError(
                "start='noise' keeps the conditioning of trajectories from one step to the next, which for "
                f"{self.family.pipeline_class} is as long as each row's prompt and condition images. Use start='data'."
            )
        if self.args.teacher == "ema" and self.args.shards_weights:
            raise ValueError(
                "teacher='ema' is not supported with FSDP and DeepSpeed, whose checkpoints leave it out. Use "
                "teacher='frozen'."
            )

    def setup_step(self) -> None:
        args = self.args
        self.options = SelfNPOOptions(cast(SelfNPOLossType, args.loss_type), args.huber_c)
        self.times = self.noise_process.solver_times(args.solver_steps)
        # Now, while the encoders are in memory.
        self.uncropped = self.encoder.uncropped_conditioning
        self.teacher = self._make_teacher()
        if args.teacher == "ema":
            self.checkpointer.parts["reference"] = self.teacher
            self.add_callback(MoveReference(self.teacher, lambda: self.unwrapped, 1 - args.ema_decay))
        # What a stored trajectory's place and latents depend on.
        self.pool = TrajectoryPool(
            args.device,
            {
                "solver_steps": args.solver_steps,
                "latent shape": list(self.encoder.latent_shape),
                "noise process": self.noise_process.describe(),
            },
        )
        if args.start == "noise":
            self.checkpointer.parts["trajectory_pool"] = self.pool

    def _make_teacher(self) -> Reference:
        moves = self.args.teacher == "ema"
        if isinstance(self.model, PeftModel):
            return FrozenAdapter(self.model) if self.carried_adapter or moves else AdapterOff(self.model)
        module = copy_of(self.model)
        # In half precision a step of 1 - decay would be rounded away.
        return FrozenModel(module.float() if moves else module, self.accelerator)

    # ---- One batch -----------------------------------------------------------------------------------------------

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        process, device = self.noise_process, batch.rows.device
        draws, times, slots = self._draw(mode.keys, device), self.times.to(device), [key[-1] for key in mode.keys]
        conditioning = with_dropout(self._conditioning(batch), draws.dropout, mode, batch)

        # 1. Where each trajectory is, and how far it advances.
        begun = torch.ones(len(slots), device=device)
        if self.args.start == "data":
            x, position, steps = self._from_data(batch, draws, times, sample_posterior=mode.sample_posterior)
        elif mode.training:
            x, position, steps, conditioning, begun = self._from_pool(draws, conditioning, slots)
        else:
            # A held-out trajectory is no part of the pool; it goes to a random place at once.
            x, position = draws.start_noise, torch.full_like(batch.rows, self.args.solver_steps)
            steps = 1 + (draws.first_advance * self.args.solver_steps).long()

        # 2. The teacher advances it and estimates its end.
        with self.teacher.applied() as teacher:
            predict = self._guided(teacher, conditioning, batch.empty_prompts)
            rounds = None
            if self.shards_weights:
                # Slots are new in all processes alike, so that all evaluate equally often.
                new = not mode.training or any(slot not in self.pool for slot in slots)
                whole = self.args.start == "noise" and new
                rounds = self.args.solver_steps if whole else self.args.truncated_steps
            x_t, position = advance(predict, process, times, x, position, steps, rounds=rounds)
            target = clean_estimate(predict, process, x_t, times[position])
        if self.args.start == "noise" and mode.training:
            self.pool.put(slots, x_t, position, conditioning)

        # 3. The student estimates the same end from a noisier time.
        later = process.sample_later(times[position], draws.later)
        x_s = process.renoise(x_t, draws.forward_noise, times[position], later)
        prediction = self.denoise(model, NoisyBatch(x_s, process.model_time(later), target, conditioning))
        predicted = process.predict_x0(prediction, x_s, later)
        region = self.denoise.region(conditioning)
        loss = self_npo_loss(predicted, target, self.options, region)
        return {
            "loss": loss,
            "x0_error": denoising_error(predicted.detach(), target, region),
            "trajectories/begun": begun,
        }

    def _draw(self, keys: Sequence[SampleKey], device: torch.device) -> _Draws:
        tensors: list[list[Tensor]] = []
        for key in keys:
            generator = generator_for(*key)
            noise = [torch.randn(self.encoder.latent_shape, generator=generator) for _ in range(3)]
            tensors.append([*noise, *torch.rand(4, generator=generator)])
        return _Draws(*(torch.stack(column).to(device) for column in zip(*tensors, strict=True)))

    def _from_data(
        self, batch: Batch, draws: _Draws, times: Tensor, *, sample_posterior: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noised samples at random places of the grid, and how far each advances."""
        latents = batch.posterior.at(draws.posterior_noise[None] if sample_posterior else None)[0]
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
            [self.args.truncated_steps if slot in self.pool else self.args.solver_steps for slot in slots],
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

    def _conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """Of the prompts, and of the samples as they were prepared or as the pipeline generates them."""
        if self.args.start == "data":
            return batch.conditioning()
        count = len(batch.rows)
        return batch.conditioning() | {
            name: tensor.to(batch.rows.device).expand(count, *tensor.shape) for name, tensor in self.uncropped.items()
        }

    def _guided(
        self, teacher: nn.Module, conditioning: dict[str, Tensor], empty_prompts: dict[str, Tensor]
    ) -> Predict:
        """The teacher's prediction with the generation's guidance, as `trajectories` calls it.

        Args:
            empty_prompts: Of each row, where rows have one each, see `Batch`.
        """
        scale, model_time = cast(float, self.args.guidance_scale), self.noise_process.model_time
        # Once for all evaluations of a step: a long text encoder's output takes a while to the device.
        device = next(iter(conditioning.values())).device
        empty_prompt = {
            name: tensor.to(device) for name, tensor in (empty_prompts or self.encoder.empty_prompt).items()
        }

        def predict(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            given = {name: tensor[rows] for name, tensor in conditioning.items()}
            # Conditioning on a sample's preparation is the same on both sides.
            empty = given | {
                name: tensor[rows] if empty_prompts else tensor.expand(len(rows), *tensor.shape[1:])
                for name, tensor in empty_prompt.items()
            }
            if scale in (0.0, 1.0):
                return self.denoise(teacher, NoisyBatch(x_t, model_time(t), x_t, given if scale else empty))
            both = {name: torch.cat([given[name], empty[name]]) for name in given}
            noisy = NoisyBatch(torch.cat([x_t] * 2), model_time(torch.cat([t] * 2)), x_t, both)
            conditional, unconditional = self.denoise(teacher, noisy).chunk(2)
            return combine_guidance(conditional, unconditional, scale)

        return predict
