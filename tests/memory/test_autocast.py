"""Autocast on tensors that are on no GPU, against PyTorch's own on tensors that pretend to be on one."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from trl_diffusion_pref.memory.autocast import autocast


def matrix(x: Tensor) -> Tensor:
    return x.select(0, 0).select(0, 0)


# Each gets a tensor (2, 8, 4, 4) and a weight (8,). Not indexed, which needs the device.
CALLS = {
    "linear": lambda x, w: functional.linear(x, torch.empty(3, 4)),
    "conv1d": lambda x, w: functional.conv1d(x.select(0, 0), torch.empty(3, 4, 1)),
    "conv2d": lambda x, w: functional.conv2d(x, torch.empty(3, 8, 1, 1)),
    "conv3d": lambda x, w: functional.conv3d(x.unsqueeze(0), torch.empty(3, 2, 1, 1, 1)),
    "conv_transpose1d": lambda x, w: functional.conv_transpose1d(x.select(0, 0), torch.empty(4, 3, 1)),
    "conv_transpose2d": lambda x, w: functional.conv_transpose2d(x, torch.empty(8, 3, 1, 1)),
    "conv_transpose3d": lambda x, w: functional.conv_transpose3d(x.unsqueeze(0), torch.empty(2, 3, 1, 1, 1)),
    "scaled_dot_product_attention": lambda x, w: functional.scaled_dot_product_attention(x, x, x),
    "matmul": lambda x, w: torch.matmul(x, x),
    "__matmul__": lambda x, w: x @ x,
    "__rmatmul__": lambda x, w: x.__rmatmul__(x),
    "mm": lambda x, w: torch.mm(matrix(x), matrix(x)),
    "bmm": lambda x, w: x.select(0, 0).bmm(x.select(0, 0)),
    "addmm": lambda x, w: torch.addmm(matrix(x), matrix(x), matrix(x)),
    "addbmm": lambda x, w: torch.addbmm(matrix(x), x.select(0, 0), x.select(0, 0)),
    "baddbmm": lambda x, w: torch.baddbmm(x.select(0, 0), x.select(0, 0), x.select(0, 0)),
    "einsum": lambda x, w: torch.einsum("bchw,bchv->bcwv", x, x),
    "prelu": lambda x, w: functional.prelu(x, w.to(x.dtype)),
    "layer_norm": lambda x, w: functional.layer_norm(x, (4,)),
    "group_norm": lambda x, w: functional.group_norm(x, 2),
    "rms_norm": lambda x, w: functional.rms_norm(x, (4,)),
    "interpolate": lambda x, w: functional.interpolate(x, scale_factor=2.0),
    "pow": lambda x, w: x.pow(2),
    "__pow__": lambda x, w: x**2,
    "__rpow__": lambda x, w: 2**x,
    "exp": lambda x, w: torch.exp(x),
    "expm1": lambda x, w: x.expm1(),
    "log": lambda x, w: x.log(),
    "log1p": lambda x, w: x.log1p(),
    "log2": lambda x, w: x.log2(),
    "log10": lambda x, w: x.log10(),
    "rsqrt": lambda x, w: torch.rsqrt(x),
    "reciprocal": lambda x, w: x.reciprocal(),
    "__rtruediv__": lambda x, w: 1 / x,
    "softplus": lambda x, w: functional.softplus(x),
    "logsumexp": lambda x, w: x.logsumexp(-1),
    "mse_loss": lambda x, w: functional.mse_loss(x, x),
    "sum": lambda x, w: x.sum(-1),
    "prod": lambda x, w: x.prod(),
    "cumsum": lambda x, w: x.cumsum(0),
    "cumprod": lambda x, w: x.cumprod(0),
    "softmax": lambda x, w: functional.softmax(x, dim=-1),
    "log_softmax": lambda x, w: x.log_softmax(-1),
    # Not on the lists.
    "add": lambda x, w: x + x,
    "mul": lambda x, w: x * w.reshape(8, 1, 1),
    "mean": lambda x, w: x.mean(),
    "div": lambda x, w: x / 2,
    "cat": lambda x, w: torch.cat([x, x.float()]),
    "gelu": lambda x, w: functional.gelu(x),
    "silu": lambda x, w: functional.silu(x),
    "sigmoid": lambda x, w: x.sigmoid(),
    "sqrt": lambda x, w: x.sqrt(),
    "avg_pool2d": lambda x, w: functional.avg_pool2d(x, 2),
    "pad": lambda x, w: functional.pad(x, (1, 1)),
    "cos": lambda x, w: x.cos(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_call_gives_the_dtype_that_cuda_s_autocast_gives(dtype):
    # Weights here are float32, and what is float64 is left alone.
    names = [name for name in CALLS if dtype != torch.float64 or not name.startswith(("linear", "conv"))]

    def result(name: str, device: str) -> torch.dtype:
        with torch.device(device):
            return CALLS[name](torch.empty(2, 8, 4, 4, dtype=dtype), torch.empty(8)).dtype

    with FakeTensorMode():
        # torch.autocast() switches itself off where there is no CUDA.
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            expected = {name: result(name, "cuda") for name in names}
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        with autocast("cuda", torch.bfloat16):
            found = {name: result(name, "cpu") for name in names}
    assert found == expected


def test_gradients_pass_through_casts_and_weights_are_cast_once():
    with FakeTensorMode():
        x, weight = torch.empty(2, 4), torch.nn.Parameter(torch.empty(4, 4))
        with autocast("cuda", torch.bfloat16):
            first, second = (functional.linear(x, weight) for _ in range(2))
        (first + second).sum().backward()
    assert first.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    casts = [result.grad_fn.next_functions[-1][0].next_functions[0][0] for result in (first, second)]
    assert casts[0] is casts[1] and casts[0].name() == "ToCopyBackward0"


def test_attention_keeps_no_matrix():
    with FakeTensorMode():
        query = torch.empty(1, 2, 64, 8, requires_grad=True)
        with autocast("cuda", torch.bfloat16):
            result = functional.scaled_dot_product_attention(query, query, query)
    assert result.dtype == torch.bfloat16 and "Efficient" in result.grad_fn.name()
