"""CLAPScore on a tiny random CLAP, against float64."""

import numpy as np
import pytest
import torch
from helpers.media import wav
from helpers.reward_models import PROMPTS, fill
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, RobertaTokenizer

from trl_diffusion_pref.data.decode.audio import Waveform
from trl_diffusion_pref.rewards import CLAPScore, RewardError


RATE = 1000
# One second is the longest piece.
OPTIONS = {"feature_size": 8, "sampling_rate": RATE, "hop_length": 10, "max_length_s": 1, "fft_window_size": 64}


def build(folder, fusion: bool) -> str:
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    tokenizer = RobertaTokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    extractor = ClapFeatureExtractor(
        **OPTIONS, frequency_min=50, frequency_max=500, truncation="fusion" if fusion else "rand_trunc"
    )
    extractor.save_pretrained(folder)
    model = ClapModel(
        ClapConfig(
            text_config={
                "vocab_size": len(letters),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "projection_dim": 16,
                "max_position_embeddings": 80,
            },
            audio_config={
                "spec_size": 32,
                "window_size": 4,
                "num_mel_bins": 8,
                "depths": [1, 1],
                "num_attention_heads": [1, 1],
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "patch_embeds_hidden_size": 16,
                "projection_dim": 16,
                "patch_size": 2,
                "patch_stride": [2, 2],
                "enable_fusion": fusion,
            },
            projection_dim=16,
        )
    )
    weights = fill(model.state_dict())
    # Variances are positive, and counts and indices of positions are no weights.
    kept = {
        name: value for name, value in model.state_dict().items() if not value.is_floating_point() or "running" in name
    }
    model.load_state_dict({**weights, **kept})
    model.save_pretrained(folder)
    return str(folder)


def sound(samples: int, rate: int = RATE, channels: int = 1, seed: int = 0) -> Waveform:
    values = np.random.default_rng(seed).normal(0, 0.2, (channels, samples)).astype(np.float32)
    return Waveform(torch.from_numpy(values), rate)


def cosine(folder: str, prompt: str, mono: Tensor) -> float:
    """Of one prompt without padding and at most one second of audio."""
    model = ClapModel.from_pretrained(folder, dtype=torch.float64).eval()
    ids = RobertaTokenizer.from_pretrained(folder)(prompt, truncation=True, return_tensors="pt")["input_ids"]
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    features = extractor(mono.double().numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"].double()
    with torch.no_grad():
        text = model.get_text_features(input_ids=ids).pooler_output
        audio = model.get_audio_features(input_features=features, is_longer=torch.zeros(1, 1, dtype=torch.bool))
    return torch.nn.functional.cosine_similarity(audio.pooler_output, text).item()


@pytest.fixture(scope="module", params=[False, True], ids=["unfused", "fused"])
def clap(request, tmp_path_factory) -> str:
    return build(tmp_path_factory.mktemp("clap"), request.param)


def test_clap_score_is_the_cosine_whatever_the_batch(clap):
    samples = [sound(1000), sound(700, seed=1), sound(230, channels=2, seed=2)]
    expected = [cosine(clap, prompt, sample.samples.mean(0)) for prompt, sample in zip(PROMPTS, samples, strict=True)]
    assert np.ptp(expected) > 1e-3
    for batch_size in (1, 3):
        assert CLAPScore(clap, batch_size=batch_size)(PROMPTS, samples) == pytest.approx(expected, abs=1e-5)


def test_long_audio_is_scored_in_pieces_without_chance(clap):
    """Two seconds and a third: pieces at 0 s and 1 s, and one that ends with the audio."""
    long = sound(2300)
    pieces = [long.samples[0, start : start + 1000] for start in (0, 1000, 1300)]
    expected = np.mean([cosine(clap, PROMPTS[0], piece) for piece in pieces])
    state = np.random.get_state()[1].copy()
    assert CLAPScore(clap)(PROMPTS[:1], [long]) == pytest.approx([expected], abs=1e-5)
    assert (np.random.get_state()[1] == state).all()


def test_audio_files_are_resampled_and_others_named(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("clap"), False)
    times = np.arange(1600) / 2000
    tone = (np.sin(2 * np.pi * 100 * times) * 20000).astype(np.int16)[:, None]
    slow = Waveform(torch.sin(2 * torch.pi * 100 * torch.arange(800) / RATE)[None] * 20000 / 2**15, RATE)
    found = CLAPScore(folder)(PROMPTS[:2], [wav(tone, rate=2000), slow])[0]
    expected = cosine(folder, PROMPTS[0], slow.samples[0])
    # Resampling differs at the ends.
    assert found == pytest.approx(expected, abs=5e-3)
    with pytest.raises(RewardError, match="reward 'clap_score', sample 1: .*not audio"):
        CLAPScore(folder)(PROMPTS[:2], [slow, 3])
