"""How sure a vision-language model is that an image shows its prompt (Lin et al. 2024, VQAScore, arXiv:2404.01291)."""

import inspect
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..data.decode.cell import CellProblem
from .loading import load_processor
from .media import edited_images
from .model_reward import ModelReward, wide
from .scoring import RewardError


_QUESTION = 'Does this image show "{prompt}"? Answer Yes or No.'
_EDIT_QUESTION = (
    'The last image was made from what is before it by the instruction "{prompt}". Does it follow the instruction and '
    "keep everything else? Answer Yes or No."
)


class VisionLanguageReward(ModelReward):
    """The probability that the model's answer to a question about the image begins with "Yes", in [0, 1].

    Where samples are edits, the model sees the images in the column `image` before the sample.

    Args:
        model: Any chat model of transformers' `AutoModelForImageTextToText`; a repository on the Hub or a folder.
        question: With `{prompt}` where the prompt belongs. None: whether the image shows the prompt or, for edits,
            whether the instruction was followed and all else was kept.
        answer: Its first token is the one whose probability counts.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.

    Raises:
        ValueError: `question` without `{prompt}`.
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen3-VL-4B-Instruct",
        question: str | None = None,
        answer: str = "Yes",
        *,
        name: str = "vision_language",
        batch_size: int = 4,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        keep_on_device: bool = False,
    ) -> None:
        super().__init__(name=name, batch_size=batch_size, device=device, dtype=dtype, keep_on_device=keep_on_device)
        self.model, self.answer = model, answer
        self.question = _QUESTION if question is None else question
        self.edit_question = _EDIT_QUESTION if question is None else question
        if "{prompt}" not in self.question:
            raise ValueError(f"question={question!r} has no {{prompt}}, where the prompt belongs")

    def _load(self) -> PreTrainedModel:
        self._processor = load_processor(self.model)
        # The answer is read from the last position, so padding comes before.
        self._processor.tokenizer.padding_side = "left"
        self._token = self._processor.tokenizer.encode(self.answer, add_special_tokens=False)[0]
        # Loaded in the precision in which it runs: in float32 a model of 7 billion weights takes 28 GB.
        self._vlm = AutoModelForImageTextToText.from_pretrained(self.model, dtype=self.dtype)
        return self._vlm

    def _score(self, prompts: list[str], samples: list[Image.Image], columns: dict[str, Any]) -> Tensor:
        try:
            edited = edited_images(columns, len(samples))
        except CellProblem as problem:
            raise RewardError(self.name, f"column 'image': {problem}") from problem
        texts = [self._chat(prompt, len(images)) for prompt, images in zip(prompts, edited, strict=True)]
        beginning = self._processor.tokenizer.bos_token
        inputs = self._processor(
            text=texts,
            images=[[*images, image] for images, image in zip(edited, samples, strict=True)],
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

    def _chat(self, prompt: str, edited: int) -> str:
        # Not `format`, since prompts and questions may contain other braces.
        question = (self.edit_question if edited else self.question).replace("{prompt}", prompt)
        content = [*[{"type": "image"}] * (edited + 1), {"type": "text", "text": question}]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
