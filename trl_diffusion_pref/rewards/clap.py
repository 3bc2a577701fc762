"""The similarity of audio and its prompt by CLAP (Wu et al. 2023, LAION-CLAP, arXiv:2211.06687)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

from ..data.decode.audio import Waveform, decode_audio, mix, resample
from .clip import pooled, unit
from .model_reward import ModelReward


class CLAPScore(ModelReward):
    """The cosine of the embeddings of audio and prompt.

    Audio longer than CLAP's ten seconds is cut into pieces of that length, the last of which ends where the audio
    ends, and the score is the mean over them. CLAP's own processor takes one piece at random, so that the score of one
    sample would differ between two calls.

    Args:
        model: Weights and processor; a repository on the Hub or a folder.
        name, batch_size, device, dtype, keep_on_device: See `ModelReward`.
    """

    def __init__(
        self,
        model: str = "laion/clap-htsat-unfused",
        *,
        name: str = "clap_score",
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        keep_on_device: bool = False,
    ) -> None:
        super().__init__(name=name, batch_size=batch_size, device=device, dtype=dtype, keep_on_device=keep_on_device)
        self.model = model

    def _load(self) -> ClapModel:
        self._extractor = AutoFeatureExtractor.from_pretrained(self.model)
        self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._clap = ClapModel.from_pretrained(self.model)
        return self._clap

    def _decode(self, sample: Any) -> list[np.ndarray]:
        """Pieces `(samples,)` at CLAP's rate, none longer than it takes."""
        waveform = sample if isinstance(sample, Waveform) else decode_audio(sample)
        rate, longest = self._extractor.sampling_rate, self._extractor.nb_max_samples
        mono = resample(mix(waveform.samples, 1), waveform.rate, rate)[0]
        last = max(len(mono) - longest, 0)
        return [mono[start : start + longest].double().numpy() for start in [*range(0, last, longest), last]]

    def _score(self, prompts: list[str], samples: list[list[np.ndarray]], columns: dict[str, Any]) -> Tensor:
        tokens = self._tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        texts = unit(
            pooled(self._clap.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]))
        )
        counts = torch.tensor([len(pieces) for pieces in samples], device=self.device)
        # Long audio has many pieces, so they are split into batches again.
        flat = [piece for pieces in samples for piece in pieces]
        groups = [flat[first : first + self.batch_size] for first in range(0, len(flat), self.batch_size)]
        audio = torch.cat([self._audio_vectors(group) for group in groups])
        cosines = (audio * texts.repeat_interleave(counts, dim=0)).sum(dim=-1)
        return torch.stack([found.mean() for found in cosines.split(counts.tolist())])

    def _audio_vectors(self, pieces: list[np.ndarray]) -> Tensor:
        # The extractor marks a random piece as longer than ten seconds if none is, with numpy's global generator.
        state = np.random.get_state()
        features = self._extractor(pieces, sampling_rate=self._extractor.sampling_rate, return_tensors="pt")
        np.random.set_state(state)
        longer = torch.zeros(len(pieces), 1, dtype=torch.bool, device=self.device)
        vectors = self._clap.get_audio_features(features.input_features.to(self.device, self.dtype), is_longer=longer)
        return unit(pooled(vectors))
