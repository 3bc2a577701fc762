"""CogView4: a GLM text encoder whose padding counts, sizes and crops as conditions, and times before their shift."""

import math
from collections.abc import Sequence

import torch
from diffusers import CogView4Pipeline
from torch import Tensor, nn

from .base import Family, call_default


# The published scheduler's options, from which the pipeline computes the shift of a size.
_BASE_TOKENS, _MAX_TOKENS, _BASE_SHIFT, _MAX_SHIFT = 256, 4096, 0.25, 0.75
_PUBLISHED: dict[str, object] = {
    "use_dynamic_shifting": True,
    "time_shift_type": "linear",
    "base_image_seq_len": _BASE_TOKENS,
    "max_image_seq_len": _MAX_TOKENS,
    "base_shift": _BASE_SHIFT,
    "max_shift": _MAX_SHIFT,
}
_PATCH = 2
# Each wraps a denoiser whose weights are spread over processes.
_SHARDED = ("FSDP", "FullyShardedDataParallel", "DeepSpeedEngine")


class CogView4Family(Family):
    """`CogView4Pipeline`.

    A time of the denoiser means more noise in larger images: the sampler shifts the noise by the image's size, and
    passes the time as it was before. Training's times are those of the noise, and `predict` undoes the shift.
    """

    pipeline_class = "CogView4Pipeline"
    denoiser_class = "CogView4Transformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "separate"
    # The model card: trained with sides from 512 to 2048 pixels.
    aspect_ratio_buckets = True
    # diffusers has no LoRA example for CogView4; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    flow = True
    read_by_value = ("prompt_embeds_mask",)
    prompt_masks = {"prompt_embeds": "prompt_embeds_mask"}
    pads_to_longest = True

    def check_complete(self, pipeline: CogView4Pipeline) -> None:
        """See `Family.check_complete`.

        Raises:
            ValueError: Also where the scheduler shifts times in another way than the published one.
        """
        super().check_complete(pipeline)
        config = pipeline.scheduler.config
        other = {name: config.get(name) for name, value in _PUBLISHED.items() if config.get(name) != value}
        if other:
            described = ", ".join(f"{name}={value!r} instead of {_PUBLISHED[name]!r}" for name, value in other.items())
            raise ValueError(
                f"The scheduler of this {type(pipeline).__name__} has {described}. The denoiser's times are those "
                "before the published scheduler's shift, and only that one can be undone. Load the scheduler of the "
                "published pipeline."
            )

    def resolution(self, pipeline: CogView4Pipeline) -> int:
        return self.denoiser_config(pipeline).sample_size * pipeline.vae_scale_factor

    def conditioning_shapes(self, pipeline: CogView4Pipeline) -> dict[str, tuple[int, ...]]:
        length = call_default(pipeline, "max_sequence_length")
        return {
            "prompt_embeds": (length, self.denoiser_config(pipeline).text_embed_dim),
            "prompt_embeds_mask": (length,),
            "original_size": (2,),
            "target_size": (2,),
            "crop_coords": (2,),
        }

    def image_tokens(self, latent_shape: tuple[int, ...]) -> float:
        """The number at which the schedulers' straight line has the shift that the pipeline computes.

        The pipeline's shift is `0.25 + 0.75 sqrt(n / 256)` of n tokens.
        """
        slope = (_MAX_SHIFT - _BASE_SHIFT) / (_MAX_TOKENS - _BASE_TOKENS)
        return _BASE_TOKENS + (_shift(*latent_shape[1:]) - _BASE_SHIFT) / slope

    def encode_prompts(self, pipeline: CogView4Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Padded to the pipeline's default `max_sequence_length`; the mask says how much the denoiser is given."""
        length = call_default(pipeline, "max_sequence_length")
        rows = []
        with torch.no_grad():
            for prompt in prompts:
                # One at a time: the text encoder sees padding, and that of a batch depends on its longest prompt.
                prompt_embeds, _ = pipeline.encode_prompt(
                    [prompt],
                    do_classifier_free_guidance=False,
                    device=self.text_device(pipeline),
                    max_sequence_length=length,
                )
                rows.append(prompt_embeds[0].float())
        counts = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return {
            "prompt_embeds": torch.stack([nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows]),
            "prompt_embeds_mask": (torch.arange(length, device=counts.device) < counts[:, None]).float(),
        }

    def token_limits(self, pipeline: CogView4Pipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    def image_conditioning(
        self,
        pipeline: CogView4Pipeline,
        original_size: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """As SDXL's, in three tensors `(2,)`."""
        sizes = {"original_size": original_size, "target_size": target_size, "crop_coords": crop_top_left}
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in sizes.items()}

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Calls the denoiser once for each length of prompt in the batch, since it takes no mask.

        Raises:
            ValueError: Several lengths, and weights that are sharded over processes: these must call equally often.
        """
        counts = conditioning["prompt_embeds_mask"].sum(dim=1).long().tolist()
        lengths = sorted(set(counts))
        if len(lengths) > 1 and type(denoiser).__name__.startswith(_SHARDED):
            raise ValueError(
                "The prompts of a batch have several lengths, for each of which CogView4's denoiser is called, and a "
                "sharded denoiser must be called equally often in all processes. Train with "
                "per_device_train_batch_size=1 and prompt_dropout=0, or without sharding."
            )
        noise = timestep / 1000
        before = 1000 * noise / (noise + _shift(*x_t.shape[2:]) * (1 - noise))
        order, parts = [], []
        for length in lengths:
            rows = [row for row, count in enumerate(counts) if count == length]
            order += rows
            own = slice(None) if len(lengths) == 1 else torch.tensor(rows, device=x_t.device)
            parts.append(
                denoiser(
                    hidden_states=x_t[own],
                    encoder_hidden_states=conditioning["prompt_embeds"][own, :length].to(x_t.dtype),
                    timestep=before[own],
                    **{
                        name: conditioning[name][own].to(x_t.dtype)
                        for name in ("original_size", "target_size", "crop_coords")
                    },
                    return_dict=False,
                )[0]
            )
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.tensor(order, device=x_t.device).argsort()]


def _shift(height: int, width: int) -> float:
    """The factor by which the sampler shifts the noise of latents of this size."""
    tokens = height * width // _PATCH**2
    return _BASE_SHIFT + _MAX_SHIFT * math.sqrt(tokens / _BASE_TOKENS)
