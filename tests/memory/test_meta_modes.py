"""The stand-in for autocast against PyTorch's own, which runs on tensors that pretend to be on a device."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from trl_diffusion_pref import MaPOConfig
from trl_diffusion_pref.memory import meta_modes
from trl_diffusion_pref.memory.meta_modes import MetaModes
from trl_diffusion_pref.memory.model import on_meta


sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

import tiny  # noqa: E402


def matrix(x: Tensor) -> Tensor:
    return x.select(0, 0).select(0, 0)


ONE_OF_EACH = ["stable_diffusion_3", "flux_dev", "pixart_sigma", "sana", "qwen_image"]

every_device = pytest.mark.parametrize("device", ["cuda", "cpu"])

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
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def takes(name: str, dtype: torch.dtype) -> bool:
    """Weights here are float32, and what is float64 is left alone."""
    return dtype != torch.float64 or not name.startswith(("linear", "conv"))


class RealAutocast:
    """PyTorch's own autocast to bfloat16, of a device that need not be there."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        # torch.autocast() switches itself off where there is no CUDA.
        torch.set_autocast_enabled(self.device, True)
        torch.set_autocast_dtype(self.device, torch.bfloat16)

    def __exit__(self, *error) -> None:
        torch.set_autocast_enabled(self.device, False)
        torch.clear_autocast_cache()


@every_device
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for dtype in DTYPES for name in CALLS if takes(name, dtype)], ids=str
)
def test_a_call_gives_the_dtype_that_autocast_gives(name, dtype, device):
    def result(on: str) -> torch.dtype:
        with torch.device(on):
            return CALLS[name](torch.empty(2, 8, 4, 4, dtype=dtype), torch.empty(8))

    with FakeTensorMode(), RealAutocast(device):
        expected = result(device).dtype
    with MetaModes(torch.bfloat16, device):
        assert result("meta").dtype == expected


def test_every_function_on_the_lists_is_compared():
    listed = set().union(meta_modes._LOWER, *meta_modes._FLOAT32.values(), *meta_modes._FLOAT32_RESULT.values())
    assert listed
    assert not listed - meta_modes._functions(" ".join(CALLS))


class WithoutDevice(TorchFunctionMode):
    """`tensor[...]` and `contiguous()` in other ways, since they switch to the tensor's device, which is not there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        if function is not Tensor.__getitem__ or args[0].device.type == "cpu":
            return function(*args, **(kwargs or {}))
        tensor, key = args
        key = key if isinstance(key, tuple) else (key,)
        if Ellipsis in key:
            at, named = key.index(Ellipsis), sum(1 for part in key if part is not None) - 1
            key = (*key[:at], *[slice(None)] * (tensor.ndim - named), *key[at + 1 :])
        dim = 0
        for part in key:
            if isinstance(part, int):
                tensor = tensor.select(dim, part)
                continue
            if part is None:
                tensor = tensor.unsqueeze(dim)
            elif part != slice(None):
                start, stop, step = part.indices(tensor.shape[dim])
                tensor = torch.ops.aten.slice(tensor, dim, start, stop, step)
            dim += 1
        return tensor


def fake_copy(module: nn.Module, device: str, mode: FakeTensorMode) -> nn.Module:
    with mode:
        memo = {id(part): torch.empty_like(part, device=device) for part in module.buffers()}
        for part in module.parameters():
            memo[id(part)] = nn.Parameter(torch.empty_like(part, device=device), requires_grad=False)
    return copy.deepcopy(module, memo)


def record_dtypes(denoiser: nn.Module) -> list[tuple[str, torch.dtype]]:
    """Filled by the next call with what each submodule gives."""
    dtypes = []
    for name, part in denoiser.named_modules():

        def hook(part, args, output, name=name):
            outputs = output if isinstance(output, tuple) else (output,)
            dtypes.extend((name, tensor.dtype) for tensor in outputs if isinstance(tensor, Tensor))

        part.register_forward_hook(hook)
    return dtypes


# PyTorch says that on the CPU weights in float32 keep it from a fused kernel.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@every_device
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", *ONE_OF_EACH])
def test_every_part_of_a_denoiser_gives_the_dtype_that_autocast_gives(name, device, tmp_path):
    pipeline = tiny.build(name)
    family, denoiser, sizes = on_meta(
        pipeline, MaPOConfig(output_dir=str(tmp_path), bf16=True, use_cpu=True, resolution=16)
    )
    calls = []
    handle = denoiser.register_forward_pre_hook(
        lambda part, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    dtypes = record_dtypes(denoiser)
    conditioning = {
        key: torch.ones(2, *shape, device="cpu" if key.endswith("_embeds_mask") else "meta")
        for key, shape in sizes.conditioning.items()
    }
    with torch.device("meta"), MetaModes(torch.bfloat16, device):
        family.predict(denoiser, torch.empty(2, *sizes.latents), torch.empty(2), conditioning)
    handle.remove()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = fake_copy(family.denoiser(pipeline), device, mode)
    expected = record_dtypes(real)
    with mode, torch.no_grad(), torch.device(device), WithoutDevice():
        args, kwargs = tree_map(
            lambda value: torch.empty_like(value, device=device) if isinstance(value, Tensor) else value, calls[0]
        )
        with RealAutocast(device):
            real(*args, **kwargs)
    assert dtypes == expected
    assert {dtype for _, dtype in dtypes} >= {torch.float32, torch.bfloat16}
