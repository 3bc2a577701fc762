"""Stable Diffusion 3 and 3.5: up to three text encoders, an MMDiT, rectified flow."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from .base import Family, Recommended, call_default
from .kohya import KohyaNames, Rule, joined


_BLOCK = r"transformer_blocks\.(\d+)\."


class StableDiffusion3Family(Family):
    """`StableDiffusion3Pipeline`, with any of its text encoders absent: zeros stand in for what they would give."""

    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    optional_encoder_names = encoder_names[1:]
    guidance_layout = "batched"
    # arXiv 2403.03206, "finetuning on high resolutions" with varying aspect ratios.
    aspect_ratio_buckets = True
    # examples/dreambooth/train_dreambooth_lora_sd3.py
    lora_target_modules = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )
    # diffusers does not load these names of SD 3, ComfyUI and kohya's scripts do.
    kohya = KohyaNames(
        (
            *joined(_BLOCK, ("attn.to_q", "attn.to_k", "attn.to_v"), r"joint_blocks.\1.x_block.attn.qkv"),
            *joined(_BLOCK, ("attn2.to_q", "attn2.to_k", "attn2.to_v"), r"joint_blocks.\1.x_block.attn2.qkv"),
            *joined(
                _BLOCK,
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                r"joint_blocks.\1.context_block.attn.qkv",
            ),
            Rule(_BLOCK + r"attn\.to_out\.0", r"joint_blocks.\1.x_block.attn.proj"),
            Rule(_BLOCK + r"attn2\.to_out\.0", r"joint_blocks.\1.x_block.attn2.proj"),
            Rule(_BLOCK + r"attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
            Rule(_BLOCK + r"ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
            Rule(_BLOCK + r"ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
            Rule(_BLOCK + r"ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
            Rule(_BLOCK + r"ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
            Rule(_BLOCK + r"norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
        )
    )
    flow = True
    recommended = {
        # flow_grpo's own rate belongs to a LoRA in its setting; a default should be one that others found to hold.
        "Diffusion-DPO": Recommended(
            {"beta": 100.0, "learning_rate": 1e-5},
            "beta: flow_grpo's code for SD 3.5 medium; learning rate: Flow-Factory, which reports that 1e-4 to 3e-4 "
            "collapse (flow_grpo has 3e-4, for a LoRA of rank 32)",
        ),
    }

    def conditioning_shapes(self, pipeline: StableDiffusion3Pipeline) -> dict[str, tuple[int, ...]]:
        config = self.denoiser_config(pipeline)
        length = pipeline.tokenizer_max_length + call_default(pipeline, "max_sequence_length")
        return {
            "prompt_embeds": (length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def largest_side(self, pipeline: StableDiffusion3Pipeline) -> int | None:
        # A table of positions, of which the middle is taken.
        positions = self.denoiser_config(pipeline).get("pos_embed_max_size")
        return positions and positions * self.size_step(pipeline)

    def encode_prompts(self, pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        prompts = list(prompts)
        device = self.text_device(pipeline)
        length = call_default(pipeline, "max_sequence_length")
        with torch.no_grad():
            if pipeline.text_encoder is not None and pipeline.text_encoder_2 is not None:
                prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                    prompts,
                    prompt_2=None,
                    prompt_3=None,
                    device=device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=length,
                )
            else:
                # The pipeline's encode_prompt needs both CLIP encoders and only takes the T5 encoder to be optional.
                clip_embeds, pooled_prompt_embeds = self._clip_embeds(pipeline, prompts, device)
                t5_embeds = pipeline._get_t5_prompt_embeds(
                    prompts, max_sequence_length=length, device=device, dtype=clip_embeds.dtype
                )
                missing = t5_embeds.shape[-1] - clip_embeds.shape[-1]
                prompt_embeds = torch.cat([nn.functional.pad(clip_embeds, (0, missing)), t5_embeds], dim=-2)
        return {"prompt_embeds": prompt_embeds.float(), "pooled_prompt_embeds": pooled_prompt_embeds.float()}

    def token_limits(self, pipeline: StableDiffusion3Pipeline) -> dict[str, int]:
        clip, t5 = pipeline.tokenizer_max_length, call_default(pipeline, "max_sequence_length")
        limits = {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5}
        return {name: limit for name, limit in limits.items() if getattr(pipeline, name) is not None}

    @staticmethod
    def _clip_embeds(
        pipeline: StableDiffusion3Pipeline, prompts: list[str], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and pooled embeddings of both CLIP encoders, side by side; at least one is absent."""
        pooled_width = pipeline.transformer.config.pooled_projection_dim
        length = pipeline.tokenizer_max_length
        parts = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
        present = [encoder for _, encoder in parts if encoder is not None]
        if not present:
            states = torch.zeros(len(prompts), length, pipeline.transformer.config.joint_attention_dim, device=device)
            return states, torch.zeros(len(prompts), pooled_width, device=device)
        # In both published CLIP encoders the states are as wide as the pooled embedding.
        absent_width = pooled_width - present[0].config.projection_dim
        hidden, pooled = [], []
        for tokenizer, encoder in parts:
            if encoder is None:
                hidden.append(torch.zeros(len(prompts), length, absent_width, device=device, dtype=present[0].dtype))
                pooled.append(torch.zeros(len(prompts), absent_width, device=device, dtype=present[0].dtype))
                continue
            tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            output = encoder(tokens.input_ids.to(device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0])
        return torch.cat(hidden, dim=-1), torch.cat(pooled, dim=-1)

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            hidden_states=x_t,
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]
