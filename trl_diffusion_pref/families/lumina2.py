"""Lumina Image 2.0: Gemma's states of a system prompt and the prompt, a DiT whose time runs towards the image."""

from collections.abc import Sequence

import torch
from diffusers import Lumina2Pipeline
from torch import Tensor, nn

from .base import Family, call_default


# What the pipeline puts between its system prompt and the prompt.
_PROMPT_START = " <Prompt Start> "


class Lumina2Family(Family):
    """`Lumina2Pipeline`."""

    pipeline_class = "Lumina2Pipeline"
    denoiser_class = "Lumina2Transformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "separate"
    # The authors' training code crops images to the nearest of several shapes (imgproc.var_center_crop).
    aspect_ratio_buckets = True
    # examples/dreambooth/train_dreambooth_lora_lumina2.py
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    flow = True
    # The denoiser joins as many tokens of each prompt to its image as the mask says.
    read_by_value = ("prompt_attention_mask",)
    prompt_masks = {"prompt_embeds": "prompt_attention_mask"}
    # It does so within its denoiser, where image and prompt are one sequence.
    pads_to_longest = True

    def conditioning_shapes(self, pipeline: Lumina2Pipeline) -> dict[str, tuple[int, ...]]:
        length = call_default(pipeline, "max_sequence_length")
        return {
            "prompt_embeds": (length, self.denoiser_config(pipeline).cap_feat_dim),
            "prompt_attention_mask": (length,),
        }

    def largest_side(self, pipeline: Lumina2Pipeline) -> int | None:
        # Tables of positions: of the prompt's tokens, of rows and of columns.
        _, rows, columns = self.denoiser_config(pipeline).axes_lens
        return min(rows, columns) * self.size_step(pipeline)

    def image_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """The number of channels, which the pipeline takes for the number of tokens.

        The published scheduler shifts times by a constant, so that it makes no difference there.
        """
        return latent_shape[0]

    def encode_prompts(self, pipeline: Lumina2Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each with the system prompt before it."""
        prompt_embeds, mask, _, _ = self._encode(pipeline, prompts, guidance=False)
        return {"prompt_embeds": prompt_embeds.float(), "prompt_attention_mask": mask.float()}

    def encode_unconditional(self, pipeline: Lumina2Pipeline) -> dict[str, Tensor]:
        """The empty prompt, without the system prompt that precedes every other prompt."""
        _, _, prompt_embeds, mask = self._encode(pipeline, [""], guidance=True)
        return {"prompt_embeds": prompt_embeds.float(), "prompt_attention_mask": mask.float()}

    def _encode(self, pipeline: Lumina2Pipeline, prompts: Sequence[str], guidance: bool) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=guidance,
                device=self.text_device(pipeline),
                system_prompt=call_default(pipeline, "system_prompt"),
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
            )

    def token_limits(self, pipeline: Lumina2Pipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    def tokenized_text(self, pipeline: Lumina2Pipeline, prompt: str) -> str:
        return (call_default(pipeline, "system_prompt") or pipeline.system_prompt) + _PROMPT_START + prompt

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        prediction = denoiser(
            hidden_states=x_t,
            # The denoiser counts from noise, 0, to the image, 1, and its velocity points there too.
            timestep=1 - timestep / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            encoder_attention_mask=conditioning["prompt_attention_mask"].long(),
            return_dict=False,
        )[0]
        return -prediction
