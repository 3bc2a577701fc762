"""What is written for others to load: weights, LoRA files, model cards, run records."""

from .lora import export_lora, merge_lora


__all__ = ["export_lora", "merge_lora"]
