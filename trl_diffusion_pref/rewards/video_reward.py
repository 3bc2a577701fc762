"""VideoReward (Liu et al. 2025, arXiv:2501.13918): visual quality, motion and alignment of videos, on Qwen2-VL."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

from ..data.decode.cell import CellProblem
from ..data.decode.video import decode_video
from .loading import load_renamed, load_weights, published_file
from .model_reward import ModelReward, wide
from .scoring import RewardError, checked_scores
from .video_frames import Patches, frame_indices, patchify, resize_frames
from .video_weights import SPECIAL_TOKENS, from_peft, read_template


Dimension = Literal["overall", "VQ", "MQ", "TA"]
_DIMENSIONS = ("VQ", "MQ", "TA")
# The authors' instructions, of which the weights are a part, are published with their code alone.
_TEMPLATE = (
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/3e5ebc600aebc4d28300e9132b0a23ee8e1bc47c/prompt_template.py"
)
_MIN_FRAME_PIXELS = 128 * 28 * 28


class VideoReward(ModelReward):
    """Three scores of a video, each with mean 0 and deviation 1 on the authors' data, and their sum.

    Qwen2-VL reads frames and instructions that end in one special token for each score; a linear layer turns the
    states of these tokens into numbers.

    Args:
        model: Where `model_config.json` and the checkpoint are; a repository on the Hub or a folder.
        checkpoint: File of the weights, Qwen2-VL's with LoRA beside them or merged.
        base: Qwen2-VL, of which configuration and tokenizer are read; likewise. None: as `model_config.json` says.
        template: The instructions: a text file with `{text_prompt}` and the three tokens, or the authors'
            `prompt_template.py`, of which only that text is read; a path or URL.
        dimension: "VQ" (visual quality), "MQ" (motion quality), "TA" (alignment with the prompt), or their sum.
        fps: Frames per second of the videos that are scored; a column `fps` has priority. The model sees two frames
            per second.
        name: None: `video_reward`, or with its dimension, `video_reward_vq`.
        batch_size, device, dtype, keep_on_device: See `ModelReward`.

    Raises:
        ValueError: Another `dimension`, or `fps` that is not positive.
    """

    def __init__(
        self,
        model: str = "KwaiVGI/VideoReward",
        checkpoint: str = "checkpoint-11352/model.pth",
        base: str | None = None,
        template: str = _TEMPLATE,
        *,
        dimension: Dimension = "overall",
        fps: float | None = None,
        name: str | None = None,
        batch_size: int = 1,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        keep_on_device: bool = False,
    ) -> None:
        if dimension not in ("overall", *_DIMENSIONS):
            raise ValueError(f"dimension={dimension!r}; choose 'overall', 'VQ', 'MQ' or 'TA'")
        if fps is not None and not fps > 0:
            raise ValueError(f"fps={fps}; it must be frames per second, above 0")
        suffix = "" if dimension == "overall" else f"_{dimension.lower()}"
        super().__init__(
            name=name or f"video_reward{suffix}",
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            keep_on_device=keep_on_device,
        )
        self.model, self.checkpoint, self.base, self.template = model, checkpoint, base, template
        self.dimension, self.fps = dimension, fps

    def __call__(self, prompts: Sequence[str], samples: Sequence[Any], **columns: Any) -> list[float]:
        """Scores videos by `dimension`.

        Args:
            prompts: One per video.
            samples: Lists of frames, as `data.decode.video.decode_video` takes them.
            **columns: `fps`, one number per video or one for all.

        Raises:
            RewardError: A video that cannot be decoded, has fewer than two frames, or whose `fps` is unknown.
        """
        return self.scores(prompts, samples, **columns)[self.dimension]

    def scores(self, prompts: Sequence[str], samples: Sequence[Any], **columns: Any) -> dict[str, list[float]]:
        """All scores from one pass over the videos: "VQ", "MQ", "TA" and "overall". Arguments as in a call."""
        rates = columns.get("fps", self.fps)
        rates = list(rates) if isinstance(rates, (list, tuple)) else [rates] * len(samples)
        if not len(rates) == len(samples) == len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(rates)} values of fps for {len(samples)} videos")
        for index, (prompt, rate) in enumerate(zip(prompts, rates, strict=True)):
            if rate is None or not rate > 0:
                problem = f"its frames per second are {rate}; pass fps=, or a column 'fps' with one value per video"
                raise RewardError(self.name, problem, index)
            if any(token in prompt for token in SPECIAL_TOKENS):
                raise RewardError(self.name, f"its prompt contains one of {', '.join(SPECIAL_TOKENS)}", index)
        columns = {"fps": rates}
        rows = self._rows(prompts, samples, columns).reshape(len(samples), len(_DIMENSIONS))
        named = {dimension: rows[:, column] for column, dimension in enumerate(_DIMENSIONS)}
        named["overall"] = rows.sum(dim=1)
        return {dimension: checked_scores(self.name, values, len(samples)) for dimension, values in named.items()}

    def _decode(self, sample: Any) -> list[Image.Image]:
        if not isinstance(sample, (list, tuple)):
            raise CellProblem(f"found a {type(sample).__name__}; pass a video as a list of its frames", "wrong type")
        if len(sample) < 2:
            raise CellProblem("the video has fewer than two frames", "wrong length")
        return decode_video(sample, len(sample))

    def _load(self) -> nn.Module:
        options = json.loads(published_file(self.model, "model_config.json").read_text())
        self._data, model_options = options["data_config"], options["model_config"]
        for section, option, wanted in (
            ("data_config", "prompt_template_type", "detailed_special"),
            ("data_config", "sample_type", "uniform"),
            ("model_config", "use_special_tokens", True),
        ):
            found = options[section].get(option, wanted)
            if found != wanted:
                raise ValueError(
                    f"model_config.json of {self.model} has {option}={found!r}; only {wanted!r} is supported"
                )
        means = options.get("inference_config") or {}
        self._mean = torch.tensor([means.get(f"{name}_mean", 0.0) for name in _DIMENSIONS], dtype=torch.float64)
        self._std = torch.tensor([means.get(f"{name}_std", 1.0) for name in _DIMENSIONS], dtype=torch.float64)
        self._template = read_template(self.template)
        base = self.base or model_options["model_name_or_path"]
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
        self._tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        self._special = self._tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        path = published_file(self.model, self.checkpoint)
        weights = from_peft(load_weights(path), options.get("peft_lora_config") or {})
        config = AutoConfig.from_pretrained(base)
        # The authors resized the embeddings to the tokenizer.
        config.text_config.vocab_size = weights["qwen.language_model.embed_tokens.weight"].shape[0]
        self._vision: Any = config.vision_config
        self._qwen = Qwen2VLModel(config)
        outputs, width = weights["head.weight"].shape
        self._head = nn.Linear(width, outputs, bias=False)
        model = nn.ModuleDict({"qwen": self._qwen, "head": self._head})
        load_renamed(model, weights, path)
        return model

    def _score(self, prompts: list[str], samples: list[list[Image.Image]], columns: dict[str, Any]) -> Tensor:
        videos = [self._patches(frames, rate) for frames, rate in zip(samples, columns["fps"], strict=True)]
        rows = [self._tokens(prompt, video) for prompt, video in zip(prompts, videos, strict=True)]
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        for index, (row, video) in enumerate(zip(rows, videos, strict=True)):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
            positions[:, index, : len(row)] = self._positions(row, video)
        states = self._qwen(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            pixel_values_videos=torch.cat([video.values for video in videos]).to(self.device, self.dtype),
            video_grid_thw=torch.tensor([video.grid for video in videos], device=self.device),
            use_cache=False,
        ).last_hidden_state
        # Each row has the three tokens once and in their order, so the mask keeps (rows, 3).
        special = torch.isin(ids, torch.tensor(self._special)).to(self.device)
        chosen = wide(states[special].view(len(rows), len(_DIMENSIONS), -1))
        logits = nn.functional.linear(chosen, self._head.weight.to(chosen.dtype))
        raw = logits.diagonal(dim1=1, dim2=2) if logits.shape[-1] == len(_DIMENSIONS) else logits.squeeze(-1)
        return (raw.cpu().double() - self._mean) / self._std

    def _patches(self, frames: list[Image.Image], rate: float) -> Patches:
        chosen = [frames[index] for index in frame_indices(len(frames), rate, self._data["fps"])]
        vision = self._vision
        step = vision.patch_size * vision.spatial_merge_size
        pixels = resize_frames(chosen, step, _MIN_FRAME_PIXELS, self._data["max_frame_pixels"])
        return patchify(pixels, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)

    def _tokens(self, prompt: str, video: Patches) -> Tensor:
        """Ids of the chat with the video and the instructions."""
        content: Any = [{"type": "video"}, {"type": "text", "text": self._template.format(text_prompt=prompt)}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        count = self._merged(video).prod()
        repeats = torch.where(ids == self._qwen.config.video_token_id, count, 1)
        return ids.repeat_interleave(repeats)

    def _merged(self, video: Patches) -> Tensor:
        """Frames, rows and columns of the video's tokens."""
        merge = self._vision.spatial_merge_size
        return torch.tensor(video.grid) // torch.tensor([1, merge, merge])

    def _positions(self, ids: Tensor, video: Patches) -> Tensor:
        """Of each token in time, height and width, `(3, tokens)`, as Qwen2-VL was trained (section 2.1).

        Text counts on in all three from the largest position before it. Newer versions of transformers count on from
        the largest in height and width only, which differs for videos of more frames than a frame has token rows.
        """
        first = int((ids == self._qwen.config.video_token_id).nonzero()[0])
        grid = torch.cartesian_prod(*(torch.arange(int(size)) for size in self._merged(video))).T + first
        after = len(ids) - first - grid.shape[1]
        text = torch.arange(after) + grid.max() + 1
        return torch.cat([torch.arange(first).expand(3, -1), grid, text.expand(3, -1)], dim=1)
