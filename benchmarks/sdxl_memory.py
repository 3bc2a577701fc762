"""The memory that training SDXL takes, by `estimate_memory`: the numbers of docs/memory.md.

    python benchmarks/sdxl_memory.py

The denoiser has stabilityai/stable-diffusion-xl-base-1.0's size and no weights. Written to results/sdxl_memory.md. The
counts are for CUDA and made on a CPU; nothing was measured on a GPU.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from trl_diffusion_pref import DiffusionDPOConfig, MaPOConfig, estimate_memory


RESULTS = Path(__file__).parent / "results"
COMMON = {"output_dir": "unused", "per_device_train_batch_size": 1, "bf16": True, "use_cpu": True}
RUNS = {
    "Diffusion-DPO, all weights": (DiffusionDPOConfig, None),
    "Diffusion-DPO, LoRA of rank 16": (DiffusionDPOConfig, LoraConfig(r=16)),
    "MaPO, all weights": (MaPOConfig, None),
    "MaPO, LoRA of rank 16": (MaPOConfig, LoraConfig(r=16)),
}


def sdxl_unet() -> UNet2DConditionModel:
    """Of the sizes in the base's unet/config.json, without storage."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def main() -> None:
    parts = ["# Memory of SDXL's training, estimated", "", "`python benchmarks/sdxl_memory.py` wrote this file.", ""]
    for name, (config, lora) in RUNS.items():
        estimate = estimate_memory(sdxl_unet(), config(**COMMON), lora, "cuda")
        parts += [f"## {name}", "", "```", str(estimate), "```", ""]
    text = "\n".join(parts)
    print(text)
    (RESULTS / "sdxl_memory.md").write_text(text)


if __name__ == "__main__":
    main()
