"""Computing the rows of a batch as if each were alone, so that a sample does not depend on its batch.

Libraries choose how to divide a matrix product or a convolution by its size, so the last bits of a row's result depend
on how many rows there are. Over the steps of a sampler they grow to 1e-5 of the range of pixels, and now and then to
another byte.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


# Functions of rows and weights, by the position of the rows among the arguments.
_ROWS_AND_WEIGHTS: dict[Callable[..., Any], int] = {
    F.linear: 0,
    F.conv1d: 0,
    F.conv2d: 0,
    F.conv3d: 0,
    F.conv_transpose1d: 0,
    F.conv_transpose2d: 0,
    F.conv_transpose3d: 0,
    torch.mm: 0,
    torch.addmm: 1,
}
# Products of rows with one matrix, or of rows with rows.
_PRODUCTS: tuple[Callable[..., Any], ...] = (
    torch.matmul,
    operator.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
)
# Functions of single numbers that a processor computes several at once, and by another formula at the end of a tensor.
_ELEMENTWISE = frozenset(
    [
        *(F.silu, F.gelu, F.mish, F.elu, F.softplus, F.hardswish, F.logsigmoid, nn.functional.sigmoid),
        *(torch.sigmoid, torch.tanh, torch.exp, torch.sin, torch.cos, torch.pow, torch.log, torch.erf),
        *(Tensor.sigmoid, Tensor.tanh, Tensor.exp, Tensor.sin, Tensor.cos, Tensor.pow, Tensor.__pow__, Tensor.log),
    ]
)
# Twice as many numbers as the widest processors compute at once, in half precision.
_AT_ONCE = 64


class RowByRow(TorchFunctionMode):
    """While it is active, functions that mix the rows of a batch in their last bits are called once per row.

    Everything else, such as normalisation and attention, computes rows independently anyway and stays batched. Rows
    are the first dimension; results are those of batches of one.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        position = self._position(function, args)
        if position is None or kwargs.get("out") is not None or kwargs.get("inplace"):
            return function(*args, **kwargs)
        rows = args[position]
        both = function in _PRODUCTS and args[1].ndim > 2
        calls = []
        for row in range(len(rows)):
            own = list(args)
            # The strides of a batch of one are ambiguous, and libraries take another layout for another algorithm.
            own[position] = rows[row : row + 1].contiguous()
            if both:
                own[1] = args[1][row : row + 1]
            calls.append(function(*own, **kwargs))
        return torch.cat(calls)

    @staticmethod
    def _position(function: Callable[..., Any], args: tuple[Any, ...]) -> int | None:
        """The position of the rows among the arguments, or None where the function is called as usual."""
        position = _ROWS_AND_WEIGHTS.get(function)
        if position is None:
            if function not in _PRODUCTS and function not in _ELEMENTWISE:
                return None
            position = 0
        if len(args) <= position or not isinstance(args[position], Tensor):
            return None
        rows = args[position]
        if rows.ndim < 2 or not len(rows):
            return None
        if function in _PRODUCTS:
            other = args[1] if len(args) > 1 else None
            if not isinstance(other, Tensor) or other.ndim < 2 or rows.ndim < max(other.ndim, 3):
                return None
            return position if other.ndim == 2 or len(other) == len(rows) else None
        if function in _ELEMENTWISE:
            alone = rows.device.type == "cpu" and rows[0].numel() % _AT_ONCE and rows.is_floating_point()
            return position if alone and len(args) == 1 else None
        return position


@contextmanager
def _one_text_at_a_time(encoder: nn.Module) -> Iterator[None]:
    """Calls a text encoder of hidden states `(tokens, B, width)`, whose first dimension is not the rows', for each."""
    before, forward = vars(encoder).get("forward"), encoder.forward

    def encode(**inputs: Any) -> Any:
        outputs = []
        # What is alone needs no division into rows.
        with torch._C.DisableTorchFunction():
            for row in range(len(inputs["input_ids"])):
                own = {name: v[row : row + 1] if isinstance(v, Tensor) else v for name, v in inputs.items()}
                outputs.append(forward(**own))
        layers = zip(*(output.hidden_states for output in outputs), strict=True)
        return type(outputs[0])(hidden_states=tuple(torch.cat(rows, dim=1) for rows in layers))

    vars(encoder)["forward"] = encode
    try:
        yield
    finally:
        del vars(encoder)["forward"]
        if before is not None:
            vars(encoder)["forward"] = before


@contextmanager
def batch_invariant(device: torch.device, tokens_first: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Computes each row of a batch as if it were alone, see `RowByRow`.

    Args:
        device: On a CPU, results also depend on how many threads share the work, so one thread computes meanwhile.
        tokens_first: Text encoders whose hidden states are `(tokens, B, width)`.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1:
        torch.set_num_threads(1)
    try:
        with RowByRow(), ExitStack() as stack:
            for encoder in tokens_first:
                stack.enter_context(_one_text_at_a_time(encoder))
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
