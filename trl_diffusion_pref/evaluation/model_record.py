"""What decides the samples of a pipeline beside prompts, seeds and the arguments of its call."""

import json
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..fingerprint import weights_fingerprint
from ..guidance.guide import guidance_of
from ..guidance.noisy_inputs import TrainedReward
from ..guidance.reward_guidance import reward_guidance_of


def model_record(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The pipeline's class, scheduler, weights, active adapters and guidance, as JSON can hold them.

    Weights are told apart by their fingerprints, see `fingerprint.weights_fingerprint`.

    Raises:
        ValueError: Weights are not in memory, as with sequential offloading; or the pipeline is guided by a reward
            function, of which nothing says what it computes.
    """
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name, module in modules.items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"The weights of the pipeline's {name} are not in memory (sequential offloading), so its samples "
                "cannot be told from another model's. Use enable_model_cpu_offload(), or sample without output."
            )
    scheduler = getattr(pipeline, "scheduler", None)
    record: dict[str, Any] = {
        "pipeline": type(pipeline).__name__,
        "scheduler": type(scheduler).__name__,
        "scheduler options": {name: value for name, value in _config(scheduler).items() if not name.startswith("_")},
        "weights": {name: weights_fingerprint(module) for name, module in sorted(modules.items())},
    }
    adapters = {name: found for name, module in modules.items() if (found := _adapters(module))}
    if adapters:
        record["adapters"] = adapters
    guidance = guidance_of(pipeline)
    if guidance is not None:
        record["negative guidance"] = {
            "alpha": guidance.alpha,
            "beta": guidance.beta,
            "second denoiser": None if guidance.second is None else weights_fingerprint(guidance.second),
            # Each is of another denoiser of the pipeline.
            **{
                f"second denoiser, {number}": other.second and weights_fingerprint(other.second)
                for number, other in enumerate(guidance.others, 2)
            },
        }
    towards = reward_guidance_of(pipeline)
    if towards is not None and towards.acts:
        if not isinstance(towards.reward, TrainedReward):
            raise ValueError(
                "The pipeline is guided by a reward function, and nothing tells its samples from those of another "
                "function. Sample without output, or with a LatentReward."
            )
        record["reward guidance"] = {
            "reward": towards.reward.record(),
            "weights": towards.weights,
            "scale": towards.scale,
        }
    # Tuples and numbers of numpy become what JSON reads back.
    return json.loads(json.dumps(record, default=str, sort_keys=True))


def _config(part: Any) -> dict[str, Any]:
    return dict(getattr(part, "config", None) or {})


def _adapters(module: nn.Module) -> list[Any]:
    """Which adapters act in a module, and at which scale; each different case once."""
    found = []
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            scaling = getattr(layer, "scaling", {})
            active = [] if layer.disable_adapters else list(layer.active_adapters)
            state = [[name, scaling.get(name)] for name in active], sorted(layer.merged_adapters)
            if state not in found:
                found.append(state)
    return found
