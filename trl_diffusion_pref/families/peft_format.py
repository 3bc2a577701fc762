"""What families share whose pipelines have no `load_lora_weights`."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from .base import Family, LoraFormat


# PEFT writes names as seen from PeftModel.
PEFT_PREFIX = "base_model.model."


class PeftFormatFamily(Family):
    """For pipelines without `load_lora_weights`: LoRA is written and loaded as PEFT does it."""

    lora_format: LoraFormat = "peft"

    def save_lora(
        self, pipeline: DiffusionPipeline, folder: str | Path, state_dict: dict[str, Tensor], metadata: dict[str, Any]
    ) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` for `PeftModel.from_pretrained`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # PEFT's own method writes every field of its newest version, of which older ones warn. Sets become lists.
        config = json.dumps({"peft_type": "LORA", **metadata}, indent=2, sort_keys=True, default=sorted)
        (folder / PEFT_CONFIG_NAME).write_text(config + "\n")
        layers = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in state_dict.items()}
        save_file(layers, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
