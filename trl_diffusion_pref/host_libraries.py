"""What the host libraries print while they are imported, load and save pipelines; a name that differs by version."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


# By logger: a part of the message. This package never needs torchvision, and 4-bit weights only where a user loads
# some. PEFT imports bitsandbytes whenever it is installed, and diffusers' pipelines import image processors. Its LoRAs
# are never of text encoders, which diffusers remarks on for each.
_NOTICES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    "diffusers.loaders.lora_base": "This is safe to ignore if LoRA state dict didn't originally have any",
    "diffusers.loaders.peft": "This is safe to ignore if LoRA state dict didn't originally have any",
}


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides the messages above, which mean nothing to a user of this package, while it imports the host libraries."""
    with ExitStack() as stack:
        for name, notice in _NOTICES.items():
            logger = logging.getLogger(name)

            def wanted(record: logging.LogRecord, notice: str = notice) -> bool:
                return notice not in record.getMessage()

            logger.addFilter(wanted)
            stack.callback(logger.removeFilter, wanted)
        yield


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides diffusers' and transformers' bars, which count the parts of a pipeline that is loaded or saved; those of
    downloads stay."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    # transformers switches huggingface_hub's bars together with its own.
    switch_downloads = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    with quiet_imports():
        for module in shown:
            module.disable_progress_bar()
        switch_downloads()
        try:
            yield
        finally:
            for module in shown:
                module.enable_progress_bar()
            switch_downloads()


def dtypes_of_torch(options: "Mapping[str, Any]") -> "dict[str, Any]":
    """Arguments of `from_pretrained` whose dtypes may be text, as YAML and command lines have them.

    Raises:
        ValueError: A dtype that torch does not have; diffusers would take float32 for it.
    """
    import torch

    options = dict(options)
    for name in ("dtype", "torch_dtype"):
        given = options.get(name)
        if isinstance(given, str):
            options[name] = getattr(torch, given.removeprefix("torch."), None)
            if not isinstance(options[name], torch.dtype):
                raise ValueError(
                    f"model_init_kwargs: {name}={given!r} is no dtype of torch. Take 'float32', 'bfloat16' or "
                    "'float16'."
                )
    return options


def dtype_option(dtype: "torch.dtype") -> "dict[str, torch.dtype]":
    """The option of diffusers' `from_pretrained`: `torch_dtype` before 0.40, where a pipeline ignores `dtype`."""
    new = tuple(int(part) for part in version("diffusers").split(".")[:2]) >= (0, 40)
    return {"dtype" if new else "torch_dtype": dtype}
