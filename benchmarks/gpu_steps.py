"""What gpu.py compares the trainers with, the bare step and the released recipe, and what it measures them by."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from gpu_models import Model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, mse_loss
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from trl_diffusion_pref.algorithms.mapo.loss import MaPOOptions, mapo_loss
from trl_diffusion_pref.data import NoisyBatch, corrupt
from trl_diffusion_pref.families import Family
from trl_diffusion_pref.training.trainer import DiffusionTrainer


# As many images as the released scripts encode at once.
_ENCODED_AT_ONCE = 8
_GIB = 2**30


class Round(NamedTuple):
    """Some steps in a row, without waiting for the device between them."""

    seconds_per_step: float
    peak_gib: float | None  # None on a CPU


class Meter:
    """Reads the clock and the most memory that was allocated since `start`, when the device has done all its work."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def stop(self, steps: int) -> Round:
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        return Round(seconds / steps, torch.cuda.max_memory_allocated() / _GIB if self.cuda else None)


def summary(rounds: list[Round]) -> tuple[float, float | None]:
    """Median seconds of a step, and the most memory, of all rounds but the first, which warms up.

    Raises:
        TimeoutError: The time was over before a second round.
    """
    if len(rounds) < 2:
        raise TimeoutError("the time was over before a round of steps was measured")
    peaks = [each.peak_gib for each in rounds[1:] if each.peak_gib is not None]
    return median(each.seconds_per_step for each in rounds[1:]), max(peaks, default=None)


def prepared_batch(trainer: DiffusionTrainer) -> NoisyBatch:
    """A batch as the trainer's step sees it: noisy latents, times, targets and conditioning, on the device."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return corrupt(batch, trainer.modes.training(batch.rows, 0), trainer.noise_process)


class InTurn(TrainerCallback):
    """After every few steps of a trainer takes as many bare ones, with the same model and optimizer; measures both.

    A bare step is what no trainer can do without: forward, backward, clipping and update on tensors that are ready.
    All that `train` does between its steps, logging and loading included, is in the trainer's time.

    Args:
        steps: That make a round.
        deadline: Of `time.monotonic`, when training stops.
    """

    def __init__(self, trainer: DiffusionTrainer, noisy: NoisyBatch, steps: int, deadline: float) -> None:
        self.trainer, self.noisy, self.steps, self.deadline = trainer, noisy, steps, deadline
        self.meter = Meter(trainer.args.device)
        self.rounds: list[Round] = []
        self.bare_rounds: list[Round] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        self.rounds.append(self.meter.stop(self.steps))
        self.meter.start()
        for _ in range(self.steps):
            prediction = predict(self.trainer, self.trainer.model, self.noisy)
            update(self.trainer, mse_loss(prediction.float(), self.noisy.target))
        self.bare_rounds.append(self.meter.stop(self.steps))
        control.should_training_stop |= time.monotonic() > self.deadline
        self.meter.start()


def predict(trainer: DiffusionTrainer, model: nn.Module, noisy: NoisyBatch) -> Tensor:
    """One call of a denoiser; the trainer's own has autocast around it since `train` prepared it."""
    dtype = trainer.family.denoiser(trainer.encoders.pipeline).dtype
    return trainer.family.predict(model, noisy.x_t.to(dtype), noisy.model_time, noisy.conditioning)


def update(trainer: DiffusionTrainer, loss: Tensor) -> None:
    """Backward, clipping and update."""
    loss.backward()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
    # Within what accelerate wraps around it.
    trainer.optimizer.optimizer.step()
    trainer.model.zero_grad()


class ReleasedRecipe:
    """The released scripts' step as a plain loop: both images through the VAE at every step, and a live reference.

    Faster than the scripts, which also decode images and run the text encoders.

    Args:
        trainer: After `train`; its model, optimizer and VAE are used, the VAE in its own dtype.
        noisy: Conditioning and times of a batch.
        pixels: `(S B, 3, H, W)` in [-1, 1], as many as the noisy samples; they are on the device already.
        reference: A frozen model for full fine-tuning, or None: a LoRA's adapter is switched off.
        dpo: Whether the loss is Diffusion-DPO's, or MaPO's.
    """

    def __init__(
        self, trainer: DiffusionTrainer, noisy: NoisyBatch, pixels: Tensor, reference: nn.Module | None, *, dpo: bool
    ) -> None:
        self.trainer, self.noisy, self.pixels, self.reference, self.dpo = trainer, noisy, pixels, reference, dpo
        self.vae: AutoencoderKL = trainer.encoders.pipeline.vae
        self.process = trainer.noise_process.sized(tuple(noisy.x_t.shape[1:]))
        self.options = MaPOOptions("mapo", beta=0.1, snr_value=0.5, num_train_timesteps=1000)

    def step(self) -> None:
        noisy = self._noisy_batch()
        chosen, rejected = self._errors(self.trainer.model, noisy).chunk(2)
        if not self.dpo:
            return update(self.trainer, mapo_loss(chosen, rejected, self.options)[0].mean())
        model = self.trainer.model
        assert self.reference is not None or isinstance(model, PeftModel)
        adapter_off: AbstractContextManager[Any] = (
            model.disable_adapter() if self.reference is None else nullcontext()  # type: ignore[operator]
        )
        with (
            torch.no_grad(),
            adapter_off,
            torch.autocast(self.pixels.device.type, torch.bfloat16, self.trainer.args.bf16),
        ):
            ref_chosen, ref_rejected = self._errors(self.reference or model, noisy).chunk(2)
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
        update(self.trainer, -logsigmoid(-self.trainer.args.beta / 2 * margin).mean())

    def _noisy_batch(self) -> NoisyBatch:
        with torch.no_grad():
            parts = self.pixels.to(self.vae.dtype).split(_ENCODED_AT_ONCE)
            latents = torch.cat([self.vae.encode(part).latent_dist.sample() for part in parts]).float()
        latents = (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        noise = torch.randn_like(latents[: len(latents) // 2]).repeat(2, 1, 1, 1)
        t = self.process.time_of(self.noisy.model_time)
        x_t, target = self.process.corrupt(latents, noise, t), self.process.target(latents, noise, t)
        return NoisyBatch(x_t, self.noisy.model_time, target, self.noisy.conditioning)

    def _errors(self, model: nn.Module, noisy: NoisyBatch) -> Tensor:
        prediction = predict(self.trainer, model, noisy)
        return (prediction.float() - noisy.target).square().flatten(1).mean(dim=1)


def rounds_of(step: Callable[[], None], device: torch.device, steps: int, rounds: int, deadline: float) -> list[Round]:
    """Rounds of steps, the first of which warms up, until the time is over."""
    meter, measured = Meter(device), list[Round]()
    while len(measured) < rounds and time.monotonic() < deadline:
        meter.start()
        for _ in range(steps):
            step()
        measured.append(meter.stop(steps))
    return measured


def counted_flops(model: Model, family: Family, noisy: NoisyBatch, lora: LoraConfig | None) -> tuple[int, int]:
    """Floating point operations of a sample, of forward and backward, and of forward alone; on the meta device.

    What checkpointing computes again is not counted: it is no progress.
    """
    meta = torch.device("meta")
    denoiser: nn.Module = model.denoiser(meta, torch.float32)
    if lora is not None:
        with meta:
            denoiser = get_peft_model(denoiser, lora)  # type: ignore[arg-type]
    conditioning = {name: tensor[:1].float().to(meta) for name, tensor in noisy.conditioning.items()}
    counts = []
    with FlopCounterMode(display=False) as counter:
        prediction = family.predict(denoiser, noisy.x_t[:1].to(meta), noisy.model_time[:1].to(meta), conditioning)
        counts.append(counter.get_total_flops())
        prediction.sum().backward()
        counts.append(counter.get_total_flops())
    return counts[1], counts[0]


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product in bfloat16, on a CPU of a small one in float32: the best of five."""
    cuda = device.type == "cuda"
    side, repeats = (8192, 20) if cuda else (256, 2)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    measured = rounds_of(lambda: torch.matmul(a, b), device, repeats, 6, float("inf"))
    return 2 * side**3 / min(each.seconds_per_step for each in measured[1:])
