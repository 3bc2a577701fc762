"""Trains the UNet of the embedded editing pipeline, from the `mixed` base's."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from .drawing import Scene
from .edits import random_edit, redrawn_elsewhere
from .training_steps import PROMPT_DROPOUT, as_pixels, minimise


# In the second phase of training, the share of edits whose result has another size and position. A model that learns
# from them redraws elsewhere in a share of cases too, which preference training can then unlearn.
REDRAWN_SHARE = 0.5
# Share of the steps that the first phase takes, in which all edits are in place.
_FIRST_PHASE = 0.7
# Of the rows without a prompt, the share that has no image either: the sampler has both kinds.
_IMAGE_DROPOUT = 0.5


def build_editing_unet(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy that takes the latents of the image to edit as four more channels, whose weights are zero.

    It predicts what the base predicts, whatever the image, as InstructPix2Pix does before its training
    (arXiv:2211.09800, section 3.2).
    """
    channels = base.config.in_channels
    # Options that begin with an underscore say where the base was loaded from.
    options = {name: value for name, value in base.config.items() if not name.startswith("_")}
    unet = UNet2DConditionModel(**{**options, "in_channels": 2 * channels})
    weights = base.state_dict()
    kernel = weights["conv_in.weight"]
    unet.load_state_dict({**weights, "conv_in.weight": torch.cat([kernel, torch.zeros_like(kernel)], dim=1)})
    return unet


def train_editing_unet(
    base: StableDiffusionPipeline,
    steps: int,
    *,
    seed: int,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    count: int = 8192,
) -> UNet2DConditionModel:
    """Trains a widened copy of the base's UNet on random edits; text encoder and VAE stay the base's.

    The first phase has edits in place only, from which the UNet learns sooner what the image shows.

    Args:
        base: The `mixed` base.
        steps: Of training, both phases together.
        seed: Of the edits and of training.
        learning_rate: Largest of each phase's schedule.
        batch_size: Edits in a step.
        count: How many edits are drawn.

    Returns:
        The exponential moving average of its weights, float32.
    """
    unet = build_editing_unet(base.unet)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    edits = [random_edit(rng) for _ in range(count)]
    asked = ["", *sorted({edit.instruction for edit in edits})]

    def encode(scenes: Sequence[Scene]) -> Tensor:
        with torch.inference_mode():
            chunks = as_pixels(scenes).split(256)
            return torch.cat([base.vae.encode(chunk).latent_dist.mean for chunk in chunks]).clone()

    # The pipeline does not scale the latents of the image to edit.
    sources = encode([edit.source for edit in edits])
    in_place = encode([edit.target for edit in edits]) * base.vae.config.scaling_factor
    elsewhere = encode([redrawn_elsewhere(edit.target, rng) for edit in edits]) * base.vae.config.scaling_factor
    with torch.no_grad():
        embeddings, _ = base.encode_prompt(asked, "cpu", 1, do_classifier_free_guidance=False)
    numbers = torch.tensor([asked.index(edit.instruction) for edit in edits])

    def loss_of_a_batch(redrawn_share: float) -> Tensor:
        rows = torch.randint(count, (batch_size,), generator=generator)

        def chosen_rows(share: float) -> Tensor:
            return (torch.rand(batch_size, generator=generator) < share).reshape(-1, 1, 1, 1)

        latents = torch.where(chosen_rows(redrawn_share), elsewhere[rows], in_place[rows])
        without_prompt = chosen_rows(PROMPT_DROPOUT)
        images = sources[rows].masked_fill(without_prompt & chosen_rows(_IMAGE_DROPOUT), 0.0)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(base.scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        noisy = base.scheduler.add_noise(latents, noise, timesteps)
        prompt_embeds = embeddings[numbers[rows].masked_fill(without_prompt.flatten(), 0)]
        prediction = unet(torch.cat([noisy, images], dim=1), timesteps, prompt_embeds).sample
        return (prediction - noise).square().mean()

    first = round(_FIRST_PHASE * steps)
    for redrawn_share, phase in ((0.0, first), (REDRAWN_SHARE, steps - first)):
        minimise(partial(loss_of_a_batch, redrawn_share), list(unet.parameters()), phase, learning_rate)
    return unet
