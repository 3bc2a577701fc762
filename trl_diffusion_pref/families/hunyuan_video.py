"""HunyuanVideo (text to video): Llama's states of a template, CLIP's pooled embedding, an MMDiT, a video VAE."""

from collections.abc import Sequence

import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor, nn

from .base import call_default
from .modalities import VideoFamily


class HunyuanVideoFamily(VideoFamily):
    """`HunyuanVideoPipeline`.

    Args:
        training_guidance: The guidance that the transformer's guidance embedding is conditioned on in training. At 1
            the embedding asks for no guidance, and the loss's target is what the model should predict; the sampler's
            default is 6. To change it: `register_family(HunyuanVideoFamily(training_guidance=6.0))`.
    """

    pipeline_class = "HunyuanVideoPipeline"
    denoiser_class = "HunyuanVideoTransformer3DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "text_encoder_2")
    guidance_layout = "separate"
    # diffusers has no LoRA example for HunyuanVideo; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    flow = True
    prompt_masks = {"prompt_embeds": "prompt_attention_mask"}

    def __init__(self, training_guidance: float = 1.0) -> None:
        self.training_guidance = training_guidance

    def video_size(self, pipeline: HunyuanVideoPipeline) -> tuple[int, int, int]:
        frames, height, width = (call_default(pipeline, name) for name in ("num_frames", "height", "width"))
        return frames, height, width

    def conditioning_shapes(self, pipeline: HunyuanVideoPipeline) -> dict[str, tuple[int, ...]]:
        config, length = self.denoiser_config(pipeline), call_default(pipeline, "max_sequence_length")
        return {
            "prompt_embeds": (length, config.text_embed_dim),
            "prompt_attention_mask": (length,),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
            "guidance": (),
        }

    def encode_prompts(self, pipeline: HunyuanVideoPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Includes `guidance`, `(len(prompts),)`, which a transformer without guidance embedding does not read."""
        device = self.text_device(pipeline)
        with torch.no_grad():
            prompt_embeds, pooled_prompt_embeds, mask = pipeline.encode_prompt(
                list(prompts),
                prompt_template=call_default(pipeline, "prompt_template"),
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
                device=device,
            )
        return {
            "prompt_embeds": prompt_embeds.float(),
            "prompt_attention_mask": mask.float(),
            "pooled_prompt_embeds": pooled_prompt_embeds.float(),
            "guidance": torch.full((len(prompts),), self.training_guidance, device=device),
        }

    def token_limits(self, pipeline: HunyuanVideoPipeline) -> dict[str, int]:
        # Of Llama's, besides the template before the prompt. CLIP's is a constant in the pipeline's code.
        return {"tokenizer": call_default(pipeline, "max_sequence_length"), "tokenizer_2": 77}

    def encode_samples(self, pipeline: HunyuanVideoPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_frames(pipeline, pixels)
        return super().encode_samples(pipeline, pixels)

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            hidden_states=x_t,
            timestep=timestep.to(x_t.dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            encoder_attention_mask=conditioning["prompt_attention_mask"].to(x_t.dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(x_t.dtype),
            # In the unit of the time, in which the transformer embeds it too.
            guidance=conditioning["guidance"].to(x_t.dtype) * 1000.0,
            return_dict=False,
        )[0]
