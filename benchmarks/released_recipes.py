"""The bare step, and the steps of the methods' released scripts as plain loops, for step_time.py.

A bare step is forward, backward, clipping and the optimizer's update on tensors that are there already. A released
script decodes both images of each pair, and runs the VAE, the text encoders and, for Diffusion-DPO, a live reference
at every step. Losses and the denoiser's call are the package's: what is compared is everything around them.
"""

import copy
import io
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

from trl_diffusion_pref.algorithms.diffusion_dpo.loss import (
    DiffusionDPOOptions,
    diffusion_dpo_logits,
    diffusion_dpo_loss,
)
from trl_diffusion_pref.algorithms.mapo.loss import MaPOOptions, mapo_loss
from trl_diffusion_pref.data import corrupt
from trl_diffusion_pref.diffusion.elbo import denoising_error
from trl_diffusion_pref.training.trainer import DiffusionTrainer


_MAPO = MaPOOptions("mapo", 0.1, 1.0, 1000)
_DPO = DiffusionDPOOptions("sigmoid", 2000.0, 0.0, 0.5, None)
Step = Callable[[], float]


def _update(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(_trained(model), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=1e-6, fused=True)


def bare_step(trainer: DiffusionTrainer, *, reference: bool = False) -> Step:
    """A step of MaPO, or of Diffusion-DPO with a live reference, without anything around it.

    Args:
        trainer: Its model is trained, on its first batch; it is used for nothing else.
        reference: Whether there is one: the model without its adapter, or a copy.
    """
    model, family = trainer.model, trainer.family
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    noisy = corrupt(batch, trainer.modes.training(batch.rows, 0), trainer.noise_process)
    optimizer = _optimizer(model)
    frozen = None if isinstance(model, PeftModel) or not reference else copy.deepcopy(model).requires_grad_(False)

    def errors(denoiser: nn.Module) -> Tensor:
        prediction = family.predict(denoiser, noisy.x_t, noisy.model_time, noisy.conditioning)
        return denoising_error(prediction, noisy.target)

    def step() -> float:
        began = time.perf_counter()
        model.train()
        _update(model, _loss(model, frozen, errors, reference), optimizer)
        return time.perf_counter() - began

    return step


def _loss(
    model: nn.Module, frozen: nn.Module | None, errors: Callable[[nn.Module], Tensor], reference: bool
) -> Tensor:
    chosen, rejected = errors(model).chunk(2)
    if not reference:
        return mapo_loss(chosen, rejected, _MAPO)[0].mean()
    with torch.no_grad(), model.disable_adapter() if frozen is None else nullcontext():  # type: ignore[operator]
        ref_chosen, ref_rejected = errors(model if frozen is None else frozen).chunk(2)
    logits = diffusion_dpo_logits(chosen, rejected, ref_chosen, ref_rejected, beta=_DPO.beta, margin_clip=None)
    return diffusion_dpo_loss(logits, _DPO).mean()


def released_step(trainer: DiffusionTrainer, rows: list[dict], batch_size: int, *, reference: bool) -> Step:
    """A step of MaPO's released script, or, with a reference, of Diffusion-DPO's.

    Args:
        trainer: Its pipeline is used, and its model trained.
        rows: Pairs: `prompt`, and `chosen` and `rejected` as the bytes of files.
        batch_size: Pairs.
    """
    model, family, pipeline = trainer.model, trainer.family, trainer.encoders.whole_pipeline()
    optimizer, scheduler = _optimizer(model), pipeline.scheduler
    frozen = None if isinstance(model, PeftModel) or not reference else copy.deepcopy(model).requires_grad_(False)
    side = trainer.encoder.preparation.shape[-1]
    position = 0

    def conditioning(prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, *pooled = pipeline.encode_prompt(
            prompt=prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        given = {"prompt_embeds": embeds}
        if pooled:
            ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).expand(len(prompts), -1)
            given |= {"pooled_prompt_embeds": pooled[0], "time_ids": ids}
        return {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in given.items()}

    def step() -> float:
        nonlocal position
        began = time.perf_counter()
        model.train()
        chosen = [rows[(position + offset) % len(rows)] for offset in range(batch_size)]
        position += batch_size
        pixels = torch.stack([_pixels(row[column], side) for column in ("chosen", "rejected") for row in chosen])
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            given = conditioning([row["prompt"] for row in chosen])
        noise = torch.randn_like(latents[:batch_size]).repeat(2, 1, 1, 1)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,)).repeat(2)
        x_t = scheduler.add_noise(latents, noise, t)

        def errors(denoiser: nn.Module) -> Tensor:
            return denoising_error(family.predict(denoiser, x_t, t, given), noise)

        loss = _loss(model, frozen, errors, reference)
        _update(model, loss, optimizer)
        loss.item()  # for the progress bar
        return time.perf_counter() - began

    return step


def _pixels(file: bytes, side: int) -> Tensor:
    """Scaled to its shorter side, cropped and normalised."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    array = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)


def photographs(count: int, size: tuple[int, int]) -> list[bytes]:
    """JPEG files of so many pixels, of smooth noise, which compresses about as photographs do."""
    generator, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def pipeline_with(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline with a denoiser of its own and the encoders of another."""
    return type(pipeline)(**{**pipeline.components, "unet": copy.deepcopy(pipeline.unet)}, **_flags(pipeline))


def _flags(pipeline: DiffusionPipeline) -> dict[str, bool]:
    return {"requires_safety_checker": False} if "safety_checker" in pipeline.components else {}
