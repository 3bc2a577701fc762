"""How sure a vision-language model is that an image shows its prompt (Lin et al. 2024, VQAScore, arXiv:2404.01291)."""

import inspect
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from .loading import load_processor
from .model_reward import ModelReward, wide


class VisionLanguageReward(ModelReward):
    """The probability that the model's answer to a question about the image begins with "Yes", in [0, 1].

    Args:
        model: Any chat model of transformers' `AutoModelForImageTextToText`; a repository on the Hub or a folder.
        question: With `{prompt}` where the prompt belongs.
        answer: Its first token is the one whose probability counts.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.

    Raises:
        ValueError: `question` without `{prompt}`.
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen3-VL-4B-Instruct",
        question: str = 'Does this image show "{prompt}"? Answer Yes or No.',
        answer: str = "Yes",
        *,
        name: str = "vision_language",
        batch_size: int = 4,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        keep_on_device: bool = False,
    ) -> None:
        super().__init__(name=name, batch_size=batch_size, device=device, dtype=dtype, keep_on_device=keep_on_device)
        if "{prompt}" not in question:
            raise ValueError(f"question={question!r} has no {{prompt}}, where the prompt belongs")
        self.model, self.question, self.answer = model, question, answer

    def _load(self) -> PreTrainedModel:
        self._processor = load_processor(self.model)
        # The answer is read from the last position, so padding comes before.
        self._processor.tokenizer.padding_side = "left"
        self._token = self._processor.tokenizer.encode(self.answer, add_special_tokens=False)[0]
        # Loaded in the precision in which it runs: in float32 a model of 7 billion weights takes 28 GB.
        self._vlm = AutoModelForImageTextToText.from_pretrained(self.model, dtype=self.dtype)
        return self._vlm

    def _score(self, prompts: list[str], samples: list[Image.Image], columns: dict[str, Any]) -> Tensor:
        texts = [self._chat(prompt) for prompt in prompts]
        beginning = self._processor.tokenizer.bos_token
        inputs = self._processor(
            text=texts,
            images=[[image] for image in samples],
            padding=True,
            # A template that writes the first token itself must not get it twice.
            add_special_tokens=not (beginning and texts[0].startswith(beginning)),
            return_tensors="pt",
        ).to(self.device)
        inputs = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        # The logits of all positions would take gigabytes.
        if "logits_to_keep" in inspect.signature(self._vlm.forward).parameters:
            inputs["logits_to_keep"] = 1
        logits = self._vlm(**inputs).logits[:, -1]
        return wide(logits).softmax(dim=-1)[:, self._token]

    def _chat(self, prompt: str) -> str:
        # Not `format`, since prompts and questions may contain other braces.
        question = self.question.replace("{prompt}", prompt)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
