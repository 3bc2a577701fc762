"""Reads what VideoReward's authors published: weights with LoRA beside them, and the instructions for the model."""

import ast
import math
import urllib.request
from pathlib import Path
from typing import Any

from torch import Tensor


# One for each score, in the order in which the instructions have them.
SPECIAL_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
_TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
_TIMEOUT_SECONDS = 30


def from_peft(weights: dict[str, Tensor], lora: dict[str, Any]) -> dict[str, Tensor]:
    """Weights with LoRA merged, named `qwen.visual...`, `qwen.language_model...`, `head.weight`.

    Args:
        weights: Of the authors' model, wrapped by PEFT or not, with the names of transformers before or since 4.52.
        lora: `lora_alpha` and `use_rslora`; read only if there are LoRA weights.
    """
    weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".lora_" in name or ".original_module." in name or name == "lm_head.weight":
            continue
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        module = name.removesuffix(".base_layer.weight")
        if f"{module}.lora_A.default.weight" in weights:
            down, up = (weights[f"{module}.lora_{part}.default.weight"].float() for part in "AB")
            rank = down.shape[0]
            scale = lora["lora_alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank)
            value = (value.float() + scale * up @ down).to(value.dtype)
        merged[_renamed(plain)] = value
    return merged


def _renamed(name: str) -> str:
    if name == "rm_head.weight":
        return "head.weight"
    inner = name.removeprefix("model.")
    if inner.startswith(("visual.", "language_model.")):
        return f"qwen.{inner}"
    return f"qwen.language_model.{inner}"


def read_template(source: str) -> str:
    """The instructions, with `{text_prompt}` where the prompt belongs.

    Args:
        source: Path or URL of the authors' `prompt_template.py`, which is parsed and not run, or of a text file.

    Raises:
        OSError: It cannot be read.
        ValueError: It does not have `{text_prompt}` and the three special tokens, each once and in order.
    """
    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=_TIMEOUT_SECONDS) as response:
                text = response.read().decode()
        except OSError as error:
            raise OSError(
                f"VideoReward's instructions cannot be read from {source} ({error}). Without a connection pass "
                "template='prompt_template.py', a copy of that file."
            ) from error
    else:
        text = Path(source).read_text()
    if source.endswith(".py"):
        text = _assigned_text(text, source)
    places = [text.find(token) for token in SPECIAL_TOKENS]
    if (
        min(places) < 0
        or places != sorted(places)
        or any(text.count(part) != 1 for part in (*SPECIAL_TOKENS, "{text_prompt}"))
    ):
        raise ValueError(
            f"{source} must have {{text_prompt}} and {', '.join(SPECIAL_TOKENS)}, each once, in this order"
        )
    return text


def _assigned_text(code: str, source: str) -> str:
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if names == [_TEMPLATE_NAME] and isinstance(statement.value.value, str):
                return statement.value.value
    raise ValueError(f"{source} assigns no text to {_TEMPLATE_NAME}")
