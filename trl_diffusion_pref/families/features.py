"""What the first blocks of a denoiser compute: features of noisy samples, at a share of the denoiser's cost."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


# Names under which diffusers' denoisers keep their blocks in the order of computation; where several are there, as in
# transformers whose first blocks have two streams, the first name is that of the blocks that are computed first.
_BLOCK_LISTS = (
    "down_blocks",
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_stream_blocks",
    "blocks",
    "layers",
)


class _Stop(Exception):
    """Ends a denoiser's forward pass after the last block that is needed."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output


def blocks_of(denoiser: nn.Module) -> nn.ModuleList:
    """The blocks that a denoiser computes first, in their order.

    Raises:
        TypeError: It keeps no list of blocks under a known name.
    """
    for name in _BLOCK_LISTS:
        blocks = getattr(denoiser, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return blocks
    raise TypeError(
        f"A {type(denoiser).__name__} has no list of blocks under a known name ({', '.join(_BLOCK_LISTS)}), so there "
        "are no first blocks to take features from."
    )


def first_features(denoiser: nn.Module, count: int, run: Callable[[], object]) -> list[Tensor]:
    """The output of the last of a denoiser's first blocks, without computing the blocks after it.

    Args:
        denoiser: The module itself, without wrappers.
        count: How many blocks are computed, from 1 on.
        run: Calls the denoiser.

    Returns:
        The block's streams, each `(B, tokens, width)`: a map of features has its places as tokens, and a transformer
        with a stream for the text has two. In the dtype that the denoiser computes in, with gradient if it is on.

    Raises:
        ValueError: The denoiser has fewer blocks.
        TypeError: It has no list of blocks, or they return something other than tensors.
        RuntimeError: `run` did not reach the block.
    """
    blocks = blocks_of(denoiser)
    if not 1 <= count <= len(blocks):
        raise ValueError(f"blocks={count}: the {type(denoiser).__name__} has 1 to {len(blocks)} of them.")

    def stop(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        raise _Stop(output)

    handle: RemovableHandle = blocks[count - 1].register_forward_hook(stop)
    try:
        run()
    except _Stop as stopped:
        streams = _streams(stopped.output)
    else:
        raise RuntimeError(f"The {type(denoiser).__name__} was not called, or skipped its block {count}.")
    finally:
        handle.remove()
    return streams


def _streams(output: object) -> list[Tensor]:
    """Of a block's output: a tensor, or a tuple that may have other things after the streams (a UNet's skips)."""
    parts = output if isinstance(output, (list, tuple)) else [output]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        raise TypeError(f"The block returned {type(output).__name__} without a tensor, which is no feature.")
    # Maps, (B, width, places...), have the width before the places, and sequences after them.
    return [each.flatten(2).transpose(1, 2) if each.ndim > 3 else each for each in tensors]
