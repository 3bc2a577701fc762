"""The memory that training SDXL takes, by `estimate_memory`: the numbers of docs/memory.md.

    python benchmarks/sdxl_memory.py

The denoiser has stabilityai/stable-diffusion-xl-base-1.0's size and no weights. Written to results/sdxl_memory.md. The
counts are for CUDA and made on a CPU; nothing was measured on a GPU.
"""

from pathlib import Path

import torch
from diffusers import ModelMixin
from gpu_models import stable_diffusion_xl
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


def sdxl_unet() -> ModelMixin:
    """Without storage."""
    return stable_diffusion_xl(tiny=False).denoiser(torch.device("meta"), torch.float32)


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
