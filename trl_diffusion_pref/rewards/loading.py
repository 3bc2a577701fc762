"""Reads published weights, configs and processors from the Hub or from a folder, by the same calls."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file


def published_file(repository: str, name: str) -> Path:
    """A file of a repository on the Hub, downloaded if necessary, or of a folder.

    Raises:
        OSError: There is no such file or repository, or no connection.
    """
    # None only for options that are not used here.
    return Path(str(cached_file(repository, name)))


def load_weights(path: Path) -> dict[str, Any]:
    """Tensors by name, from safetensors or from a PyTorch file, which is not allowed to hold code.

    Raises:
        ValueError: The file does not hold tensors by name.
        pickle.UnpicklingError: A PyTorch file that holds more than tensors and plain values.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds a {type(weights).__name__}, not tensors by name")
    return weights


def load_renamed(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Loads weights into a model, all of them and nothing else.

    Raises:
        ValueError: Weights are missing, have another shape, or are left over.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of this reward's model: {error}") from error


def load_image_processor(repository: str) -> Any:
    """The published image processor on Pillow, with which the published scores were computed.

    transformers' other backend needs torchvision and interpolates a little differently.
    """
    # Before 5.4 or so the backend had another name.
    backend: dict[str, Any] = {"backend": "pil"} if hasattr(transformers, "CLIPImageProcessorPil") else {}
    return AutoImageProcessor.from_pretrained(repository, **(backend or {"use_fast": False}))


def load_processor(repository: str) -> Any:
    """The processor of a vision-language model. Without torchvision, those that also take videos take images only."""
    try:
        return AutoProcessor.from_pretrained(repository)
    except ImportError as error:
        # Only the part that prepares videos needs torchvision.
        if "torchvision" not in str(error).lower():
            raise
    published: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(repository))]

    class ImagesOnly(published):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

    options, _ = published.get_processor_dict(repository)
    return ImagesOnly(
        image_processor=load_image_processor(repository),
        tokenizer=AutoTokenizer.from_pretrained(repository),
        chat_template=options.get("chat_template"),
    )
