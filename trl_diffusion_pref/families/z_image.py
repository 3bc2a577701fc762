"""Z-Image: a Qwen3 text encoder, a DiT that takes lists of images and prompts, and time that runs to the image."""

from collections.abc import Sequence

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from .base import Family, call_default
from .kohya import DIFFUSERS_NAMES


class ZImageFamily(Family):
    """`ZImagePipeline`."""

    pipeline_class = "ZImagePipeline"
    denoiser_class = "ZImageTransformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "positive_first"
    # arXiv 2511.22699, pre-training on images of any resolution.
    aspect_ratio_buckets = True
    # examples/dreambooth/train_dreambooth_lora_z_image.py
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    kohya = DIFFUSERS_NAMES
    flow = True
    read_by_value = ("prompt_embeds_mask",)
    prompt_masks = {"prompt_embeds": "prompt_embeds_mask"}
    # It does so within its denoiser, where image and prompt are one sequence.
    pads_to_longest = True

    def distilled(self, pipeline: ZImagePipeline) -> str | None:
        # The distilled weights have the base's configs.
        name = str(pipeline.name_or_path or "")
        return f"its name is {name}" if "turbo" in name.lower() else None

    def conditioning_shapes(self, pipeline: ZImagePipeline) -> dict[str, tuple[int, ...]]:
        length = call_default(pipeline, "max_sequence_length")
        return {
            "prompt_embeds": (length, self.denoiser_config(pipeline).cap_feat_dim),
            "prompt_embeds_mask": (length,),
        }

    def resolution(self, pipeline: ZImagePipeline) -> int:
        # Of the pipeline's `__call__`; no config has it.
        return 1024

    def size_step(self, pipeline: ZImagePipeline) -> int:
        # Two by two latents are one token. The denoiser's config lists the sizes of patches that it could take.
        return 2 * pipeline.vae_scale_factor

    def largest_side(self, pipeline: ZImagePipeline) -> int | None:
        # Tables of positions: of the prompt's tokens, of rows and of columns.
        _, rows, columns = self.denoiser_config(pipeline).axes_lens
        return min(rows, columns) * self.size_step(pipeline)

    def encode_prompts(self, pipeline: ZImagePipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Padded to the pipeline's default `max_sequence_length`; the mask says how much of it is tokens."""
        length = call_default(pipeline, "max_sequence_length")
        with torch.no_grad():
            # A list of its own, since the pipeline puts its template into the one that it gets.
            rows, _ = pipeline.encode_prompt(
                list(prompts),
                device=self.text_device(pipeline),
                do_classifier_free_guidance=False,
                max_sequence_length=length,
            )
        counts = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return {
            "prompt_embeds": torch.stack(
                [nn.functional.pad(row.float(), (0, 0, 0, length - len(row))) for row in rows]
            ),
            "prompt_embeds_mask": (torch.arange(length, device=counts.device) < counts[:, None]).float(),
        }

    def token_limits(self, pipeline: ZImagePipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    def tokenized_text(self, pipeline: ZImagePipeline, prompt: str) -> str:
        return pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        prompt_embeds = conditioning["prompt_embeds"].to(x_t.dtype)
        counts = conditioning["prompt_embeds_mask"].sum(dim=1).long().tolist()
        prediction = denoiser(
            # An image is a video of one frame.
            list(x_t.unsqueeze(2).unbind()),
            # The denoiser counts from noise, 0, to the image, 1, and its velocity points there too.
            (1000 - timestep) / 1000,
            [row[:count] for row, count in zip(prompt_embeds, counts, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(prediction).squeeze(2)
