"""A vision-language model on a server with OpenAI's interface (vLLM, SGLang, llama.cpp, OpenAI) as a judge."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from PIL import Image

from ..data.decode.audio import Waveform
from .http import ServerReward
from .media import Media, edited_images, png, wav
from .scoring import RewardError


Mode = Literal["grade", "yes"]

_QUESTIONS: dict[str, str] = {
    "grade": (
        'Grade how well this {kind} shows "{prompt}" and how good it is, from 1 (bad) to 5 (perfect). '
        "Answer with the number alone."
    ),
    "yes": 'Does this {kind} show "{prompt}"? Answer Yes or No.',
}
_EDIT_QUESTIONS: dict[str, str] = {
    "grade": (
        'The last image was made from what is before it by the instruction "{prompt}". Grade how well it follows the '
        "instruction and keeps everything else, from 1 (bad) to 5 (perfect). Answer with the number alone."
    ),
    "yes": (
        'The last image was made from what is before it by the instruction "{prompt}". Does it follow the instruction '
        "and keep everything else? Answer Yes or No."
    ),
}
_GRADE = re.compile(r"(?<![\d.])([1-5](?:\.\d+)?)(?![\d.]*\d)")
_TOP = 20


class OpenAIServerReward(ServerReward):
    """A grade from 1 to 5, or the probability of "Yes", from a chat model.

    Where samples are edits, the model sees the images in the column `image` before the sample.

    Args:
        url: Of the interface, for example "http://localhost:8000/v1"; requests go to `<url>/chat/completions`.
        model: Its name on the server.
        mode: "grade" reads the first number from 1 to 5 in the answer. "yes" reads the probability that the answer
            begins with "Yes", for which the server must return log-probabilities; it is 0 if no spelling of yes is
            among the 20 likeliest tokens.
        question: With `{prompt}`, and `{kind}` for "image", "video" or "audio". None: one that suits `mode` and, for
            edits, asks whether the instruction was followed and all else was kept.
        api_key: None: the environment variable OPENAI_API_KEY, if it is set.
        workers: Requests at the same time.
        max_tokens: Of an answer that is graded.
        max_frames: Of a video, evenly spaced; the model gets them as images.
        name, timeout, retries, retry_wait, headers: See `ServerReward`.

    Raises:
        ValueError: See `ServerReward`; another `mode`, a question without `{prompt}`, or a number below 1.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        mode: Mode = "grade",
        question: str | None = None,
        api_key: str | None = None,
        workers: int = 4,
        max_tokens: int = 16,
        max_frames: int = 8,
        name: str = "openai_server",
        timeout: float = 120.0,
        retries: int = 3,
        retry_wait: float = 1.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(url, name=name, timeout=timeout, retries=retries, retry_wait=retry_wait, headers=headers)
        if mode not in _QUESTIONS:
            raise ValueError(f"mode={mode!r}; choose 'grade' or 'yes'")
        self.question = _QUESTIONS[mode] if question is None else question
        if "{prompt}" not in self.question:
            raise ValueError(f"question={question!r} has no {{prompt}}, where the prompt belongs")
        self.edit_question = _EDIT_QUESTIONS[mode] if question is None else question
        for option, value in (("workers", workers), ("max_tokens", max_tokens), ("max_frames", max_frames)):
            if value < 1:
                raise ValueError(f"{option}={value}; it must be a positive integer")
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        if key:
            self.headers.setdefault("Authorization", f"Bearer {key}")
        self.model, self.mode = model, mode
        self.workers, self.max_tokens, self.max_frames = workers, max_tokens, max_frames

    def __call__(self, prompts: Sequence[str], samples: Sequence[Any], **columns: Any) -> list[float]:
        """Scores images, videos (lists of frames) or audio; samples that were edited with the column `image`.

        Raises:
            RewardError: A sample that cannot be decoded, a server that does not answer, or an answer without a grade
                or without log-probabilities.
            ValueError: Another number of prompts than of samples.
        """
        if len(prompts) != len(samples):
            raise ValueError(f"{len(prompts)} prompts for {len(samples)} samples; pass one prompt per sample")
        with ThreadPoolExecutor(self.workers) as pool:
            edited = edited_images(columns, len(samples))
            rows = zip(range(len(samples)), prompts, samples, edited, strict=True)
            waiting = [pool.submit(self._ask, *row) for row in rows]
            try:
                return [future.result() for future in waiting]
            finally:
                # After an error the others need not be asked.
                for future in waiting:
                    future.cancel()

    def _ask(self, index: int, prompt: str, sample: Any, edited: list[Image.Image]) -> float:
        media = self._decoded(sample, index)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": self._content(prompt, media, edited)}],
            "temperature": 0,
            "max_tokens": self.max_tokens if self.mode == "grade" else 1,
        }
        if self.mode == "yes":
            body |= {"logprobs": True, "top_logprobs": _TOP}
        answer = self._post(f"{self.url}/chat/completions", body, f"sample {index}")
        try:
            choice = answer["choices"][0]
            return _grade(choice["message"]["content"]) if self.mode == "grade" else _yes(choice)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            problem = f"{self.url} answered without a {'grade' if self.mode == 'grade' else 'log-probability'}"
            raise RewardError(self.name, f"{problem} ({error}): {str(answer)[:300]}", index) from error

    def _content(self, prompt: str, media: Media, edited: list[Image.Image]) -> list[dict[str, Any]]:
        if isinstance(media, Waveform):
            kind, parts = "audio", [{"type": "input_audio", "input_audio": {"data": wav(media), "format": "wav"}}]
        else:
            kind, images = ("video", media) if isinstance(media, list) else ("image", [media])
            shown = torch.linspace(0, len(images) - 1, min(len(images), self.max_frames)).round().long().tolist()
            parts = [_image(images[index]) for index in shown]
        # The prompt comes last, since it may contain braces itself.
        question = self.edit_question if edited else self.question
        question = question.replace("{kind}", kind).replace("{prompt}", prompt)
        return [*map(_image, edited), *parts, {"type": "text", "text": question}]


def _image(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}}


def _grade(text: str) -> float:
    """The first number from 1 to 5 in a text.

    Raises:
        ValueError: There is none.
    """
    for found in _GRADE.findall(text):
        if float(found) <= 5:
            return float(found)
    raise ValueError("no number from 1 to 5")


def _yes(choice: Mapping[str, Any]) -> float:
    """The probability of all spellings of yes as the first token.

    Raises:
        KeyError, TypeError, IndexError: The server returned no log-probabilities.
    """
    top = choice["logprobs"]["content"][0]["top_logprobs"]
    return math.fsum(math.exp(entry["logprob"]) for entry in top if entry["token"].strip().lower() == "yes")
