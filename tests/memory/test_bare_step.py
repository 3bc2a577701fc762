"""A step's peak beside that of the bare model: forward and backward on tensors that are there already."""

import pytest
import torch
from peft import LoraConfig

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.diffusion.elbo import denoising_error
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.memory.step import FakeStep
from trl_diffusion_pref.shapes import load_pipeline


def peak(trainer_class, config, lora: bool, *, bare: bool, checkpointing: bool) -> int:
    """Bytes that a step on pairs holds at once, weights and gradients included, the optimizer's state not."""
    pipeline = load_pipeline()
    peft_config = LoraConfig(r=8) if lora else None
    step = FakeStep(trainer_class, pipeline, family_for(pipeline), config.own_copy(), peft_config, "cpu")
    if bare:
        samples = 2 * config.per_device_train_batch_size
        with step.accelerator.fake_tensors:
            noisy, target = (torch.ones(samples, *step.encoder.latent_shape) for _ in range(2))
            time, conditioning = torch.ones(samples), step.encoder.prompts(samples)

        def compute_losses(model, batch, mode):
            prediction = step.trainer.family.predict(model, noisy, time, conditioning)
            return {"loss": denoising_error(prediction, target)}

        step.trainer.compute_losses = compute_losses
    return step.weights + step.run(checkpointing, config.per_device_train_batch_size).peak


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_holds_no_twentieth_more_than_the_bare_model(lora, checkpointing, tmp_path):
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 16, "use_cpu": True}
    mapo = MaPOConfig(**options)
    bare = peak(MaPOTrainer, mapo, lora, bare=True, checkpointing=checkpointing)
    assert peak(MaPOTrainer, mapo, lora, bare=False, checkpointing=checkpointing) <= 1.05 * bare
    dpo = DiffusionDPOConfig(**options, reference="precomputed")
    assert peak(DiffusionDPOTrainer, dpo, lora, bare=False, checkpointing=checkpointing) <= 1.05 * bare
    assert bare > 2 * sum(each.nbytes for each in load_pipeline().unet.parameters())
