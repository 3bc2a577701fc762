"""One call of a denoiser on a noisy batch."""

from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from peft import PeftModel
from torch import Tensor, nn

from ..data import NoisyBatch
from ..diffusion.elbo import denoising_error
from ..families import Family


class Denoiser:
    """Calls a trained model, or a reference, as its pipeline does, with latents in the dtype of its weights.

    Weights change their dtype meanwhile: a full half-precision evaluation and DeepSpeed cast them. A walk through all
    modules takes longer than small models' kernels, so one weight of each model is kept. Casting leaves the parameters
    the same objects, sharding does not.

    Args:
        sharded: Whether weights are sharded by FSDP or DeepSpeed.
        loss_on_mask: Whether errors are means over the latents that the condition images' mask marks, not over all.
    """

    def __init__(self, family: Family, accelerator: Accelerator, *, sharded: bool, loss_on_mask: bool = False) -> None:
        self.family, self.accelerator, self.sharded = family, accelerator, sharded
        self.loss_on_mask = loss_on_mask
        self._weights: WeakKeyDictionary[nn.Module, nn.Parameter] = WeakKeyDictionary()

    def __call__(self, model: nn.Module, noisy: NoisyBatch) -> Tensor:
        """Predictions `(S B, ...)` of a possibly wrapped model."""
        return self.family.predict(model, noisy.x_t.to(self._dtype(model)), noisy.model_time, noisy.conditioning)

    def region(self, conditioning: Mapping[str, Tensor]) -> Tensor | None:
        """Where errors count, `(S B, 1, ...)`, as `denoising_error` takes it; None for everywhere."""
        return self.family.loss_region(conditioning) if self.loss_on_mask else None

    def error(self, prediction: Tensor, noisy: NoisyBatch) -> Tensor:
        """The error of each prediction, `(S B,)` float32."""
        return denoising_error(prediction, noisy.target, self.region(noisy.conditioning))

    def of(self, model: nn.Module) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
        """The same of one model, as a function of noisy latents, the denoiser's times and conditioning."""
        return lambda x_t, time, conditioning: self(model, NoisyBatch(x_t, time, x_t, conditioning))

    def _dtype(self, model: nn.Module) -> torch.dtype:
        if model in self._weights:
            return self._weights[model].dtype
        inside = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        base: ModelMixin = inside.get_base_model() if isinstance(inside, PeftModel) else inside
        dtype = base.dtype
        # Under layerwise casting no weight has the dtype that is computed in.
        weight = next((weight for weight in inside.parameters() if weight.dtype == dtype), None)
        if weight is not None and not self.sharded:
            self._weights[model] = weight
        return dtype
