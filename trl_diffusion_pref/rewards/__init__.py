"""Rewards: callables `(prompts, samples, **columns) -> list[float]` that say how good generated samples are.

It is the convention of TRL's `reward_funcs`, so that a function of the user's own is a reward too:

    from trl_diffusion_pref.rewards import PickScore, combine, score

    def brightness(prompts, samples, **columns):
        return [ImageStat.Stat(image.convert("L")).mean[0] for image in samples]

    score([PickScore(), brightness], prompts, images)  # {"pickscore": [...], "brightness": [...]}

Models are loaded when a reward is first called, from the Hub or from a folder, and leave the device after each call.

A `LatentReward` is another kind: it rates noisy latents with the denoiser's own features, so that sampling can follow
its gradient (`guidance.reward_guidance`); `train_latent_reward` makes it from pairs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..host_libraries import quiet_imports


if TYPE_CHECKING:
    from .aesthetic import Aesthetic
    from .clap import CLAPScore
    from .clip_score import CLIPScore
    from .combined import combine
    from .hps import HPS
    from .http import HTTPReward
    from .image_reward import ImageReward
    from .latent import LatentReward
    from .latent_training import latent_reward_accuracy, train_latent_reward
    from .model_reward import ModelReward
    from .openai_server import OpenAIServerReward
    from .pickscore import PickScore
    from .scoring import Reward, RewardError, reward_name, score
    from .video_reward import VideoReward
    from .vision_language import VisionLanguageReward


__all__ = [
    "Aesthetic",
    "CLAPScore",
    "CLIPScore",
    "HPS",
    "HTTPReward",
    "ImageReward",
    "LatentReward",
    "ModelReward",
    "OpenAIServerReward",
    "PickScore",
    "Reward",
    "RewardError",
    "VideoReward",
    "VisionLanguageReward",
    "combine",
    "latent_reward_accuracy",
    "reward_name",
    "score",
    "train_latent_reward",
]

# Each is imported when it is first used: together they import five models of transformers.
_MODULES = {
    "Aesthetic": "aesthetic",
    "CLAPScore": "clap",
    "CLIPScore": "clip_score",
    "HPS": "hps",
    "HTTPReward": "http",
    "ImageReward": "image_reward",
    "LatentReward": "latent",
    "ModelReward": "model_reward",
    "OpenAIServerReward": "openai_server",
    "PickScore": "pickscore",
    "Reward": "scoring",
    "RewardError": "scoring",
    "VideoReward": "video_reward",
    "VisionLanguageReward": "vision_language",
    "combine": "combined",
    "latent_reward_accuracy": "latent_training",
    "reward_name": "scoring",
    "score": "scoring",
    "train_latent_reward": "latent_training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quiet_imports():
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
