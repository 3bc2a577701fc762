"""Reckons with the flow base's 256 silent T5 tokens as one, which is exact and several times cheaper."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


# What StableDiffusion3Pipeline takes of the T5 encoder: its max_sequence_length.
T5_TOKENS = 256


class CountedKey(TorchFunctionMode):
    """Attention in which the last key counts as many.

    Within it, the zero vectors of the silent T5 encoder can be given as one: without positions they stay alike
    through all layers, and training and sampling cost a quarter.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logarithm = math.log(count)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            query, keys = args[0], args[1].shape[-2]
            mask = query.new_tensor([0.0] * (keys - 1) + [self.logarithm])
            kwargs = {**kwargs, "attn_mask": mask.expand(1, 1, 1, keys)}
        return function(*args, **kwargs)


class _CountingProcessor(JointAttnProcessor2_0):
    """diffusers' own, with the number that the last token stands for."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        last_token_counts: int = 1,
    ) -> Any:
        with CountedKey(last_token_counts) if last_token_counts > 1 else nullcontext():
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def count_silent_tokens(transformer: SD3Transformer2DModel) -> None:
    """Makes the transformer replace T5 embeddings that are all zero by one of them that counts as many.

    Outputs and gradients stay what they are, up to rounding; other embeddings pass unchanged. Copies of the
    transformer do the same. Nothing of it is saved.
    """
    transformer.set_attn_processor(_CountingProcessor())
    # A hook and not another `forward`, which in a deep copy would still be the original's.
    transformer.register_forward_pre_hook(_shorten, with_kwargs=True)


def _shorten(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    embeddings = kwargs.get("encoder_hidden_states")
    # Without values, as for a memory estimate, nobody knows that they are zero.
    if embeddings is None or embeddings.is_meta or embeddings.shape[1] <= T5_TOKENS:
        return None
    if torch.any(embeddings[:, -T5_TOKENS:]):
        return None
    if not all(isinstance(processor, _CountingProcessor) for processor in transformer.attn_processors.values()):
        return None  # replaced since, by one that would not count
    attention = {**(kwargs.get("joint_attention_kwargs") or {}), "last_token_counts": T5_TOKENS}
    shortened = embeddings[:, : embeddings.shape[1] - T5_TOKENS + 1]
    return args, {**kwargs, "encoder_hidden_states": shortened, "joint_attention_kwargs": attention}
