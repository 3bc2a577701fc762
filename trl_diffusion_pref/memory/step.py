"""A trainer's own step on fake tensors."""

from contextlib import nullcontext
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ..data import Encoders
from ..data.batch import Batch, Posterior
from ..data.preparation import preparation_for
from ..data.resolution import as_resolution
from ..diffusion.noise import NoiseProcess, RectifiedFlow
from ..families import Family
from ..families.base import model_inside
from ..training.blocks import SomeBlocks
from ..training.config import DiffusionPreferenceConfig
from ..training.denoiser import Denoiser
from ..training.held_reference import HeldReference
from ..training.loaders import layout_of
from ..training.modes import Modes
from ..training.recommended import fill_in
from ..training.reference_config import ReferenceConfig
from ..training.trainer import DiffusionTrainer
from .autocast import autocast
from .live_bytes import LiveBytes
from .model import make_fake, meta_copy, trainable
from .quantised import check_countable, number_of_parameters, quantise


def bytes_of(*modules: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


class _Encoder:
    """What a step asks the encoder of the data sets; all conditioning counts as the prompt's."""

    uncropped_conditioning: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, pipeline: DiffusionPipeline, family: Family, args: DiffusionPreferenceConfig) -> None:
        self.preparation = preparation_for(pipeline, family, as_resolution(args.resolution), args.num_frames)
        self.shapes, self.family = family.input_shapes(pipeline, self.preparation.shape), family
        self.pipeline, self.latent_shape = pipeline, self.shapes.latents

    def prompts(self, rows: int) -> dict[str, Tensor]:
        prompts = {}
        for name, shape in self.shapes.conditioning.items():
            # Some families read the length of the longest prompt off its mask, which needs values.
            with unset_fake_temporarily() if name in self.family.read_by_value else nullcontext():
                prompts[name] = torch.ones(rows, *shape)
        return prompts

    @cached_property
    def empty_prompt(self) -> dict[str, Tensor]:
        return self.prompts(1)


class _OneProcess:
    """What a step asks of what surrounds it in one process: accelerate, and the cache of values by row.

    Models come to the device, and have autocast around their forward passes, where accelerate does both.
    """

    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None)
    num_processes = 1
    numbers_per_row: int

    def __init__(self, device_type: str, dtype: torch.dtype | None) -> None:
        self.device_type, self.dtype = device_type, dtype
        self.fake_tensors = FakeTensorMode(allow_non_fake_inputs=True)
        self.prepared: list[nn.Module] = []

    def autocast(self) -> Any:
        return autocast(self.device_type, self.dtype)

    def prepare_model(self, model: nn.Module, evaluation_mode: bool = False) -> nn.Module:
        with self.fake_tensors:
            make_fake(model)
        self.prepared.append(model)
        forward = model.forward

        def in_autocast(*args: Any, **kwargs: Any) -> Any:
            with self.autocast():
                return forward(*args, **kwargs)

        vars(model)["forward"] = in_autocast if self.dtype is None else convert_outputs_to_fp32(in_autocast)
        return model

    def unwrap_model(self, model: nn.Module, **options: Any) -> nn.Module:
        return model

    def free_memory(self) -> None:
        pass

    def load_or_compute(self, *args: Any) -> Tensor:
        """What is stored by row, of which a batch takes its own: fake, so that every row and draw is in it."""
        with self.fake_tensors:
            return torch.zeros(1, 1, self.numbers_per_row)


class Counts(NamedTuple):
    """What one step takes.

    Args:
        peak: The most bytes that exist at once beside weights and what is held.
        activations: The same without gradients.
        flops: Operations of matrix products, convolutions and attention in one batch, forward and backward.
    """

    peak: int
    activations: int
    flops: int


class FakeStep:
    """Forward and backward of one batch, as the trainer of a config runs them, on fake tensors.

    Args:
        device_type: Whose autocast is counted, see `autocast.DEVICE_TYPES`.
    """

    def __init__(
        self,
        kind: type[DiffusionTrainer],
        pipeline: DiffusionPipeline,
        family: Family,
        args: DiffusionPreferenceConfig,
        peft_config: LoraConfig | None,
        device_type: str,
    ) -> None:
        family = family.with_denoiser(args.denoiser)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.args, self.accelerator = args, _OneProcess(device_type, dtype)
        self.encoder = _Encoder(pipeline, family, args)
        process = self._noise_process(pipeline, family)
        self.rows = torch.zeros(args.per_device_train_batch_size, dtype=torch.int64)
        fill_in(args, kind._name, family, flow=isinstance(process, RectifiedFlow))
        args.check_filled_in()
        denoiser = family.denoiser(pipeline)
        check_countable(denoiser)
        denoiser = meta_copy(denoiser)
        if args.quantize is not None:
            quantise(denoiser, args)
        self.model, carried = trainable(denoiser, family, peft_config, args, device_type)
        self.base = model_inside(self.model)
        self.parameters = number_of_parameters(self.model)
        self.weights = bytes_of(self.model)
        # Without its constructor, which loads and encodes, and transformers', which looks for devices.
        trainer = self.trainer = kind.__new__(kind)
        vars(trainer).update(
            args=args,
            family=family,
            encoders=Encoders(pipeline, family),
            encoder=self.encoder,
            noise_process=process,
            model=self.model,
            carried_adapter=carried,
            accelerator=self.accelerator,
            is_fsdp_enabled=False,
            is_deepspeed_enabled=False,
            modes=Modes(args, self.encoder),  # type: ignore[arg-type]
            checkpointer=SimpleNamespace(parts={}, record={"base_fingerprint": ""}),
            row_cache=self.accelerator,
            add_callback=lambda callback: None,
            train_dataset={"row": self.rows},
            eval_dataset=None,
            denoise=Denoiser(family, self.accelerator, sharded=False, loss_on_mask=args.loss_on_mask),
        )
        if isinstance(args, ReferenceConfig):
            vars(trainer).update(reference=HeldReference(None, args))
        trainer.layout = layout_of(trainer.make_layout(), family, None, None, loss_on_mask=args.loss_on_mask)
        # Errors, and what stands beside them.
        self.accelerator.numbers_per_row = 4 * trainer.layout.num_samples
        trainer.check_step(peft_config)
        trainer.setup_step()
        self.accelerator.prepare_model(self.model)
        # A reference or teacher: a model, or an adapter in the trained one.
        self.held = bytes_of(*self.accelerator.prepared) - self.weights
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.live, self.steps = LiveBytes(*self.accelerator.prepared), 0

    def _noise_process(self, pipeline: DiffusionPipeline, family: Family) -> NoiseProcess:
        scheduler = pipeline.scheduler
        if scheduler is None:
            scheduler = FlowMatchEulerDiscreteScheduler() if family.flow else DDPMScheduler()
        process = self.args.noise_process(scheduler)
        if isinstance(process, RectifiedFlow) and process.shift is None:
            process = self.args.noise_process(scheduler, family.image_tokens(self.encoder.latent_shape))
        return process

    def run(self, checkpointing: bool, batch_size: int) -> Counts:
        """Counts one step of so many rows, with activations kept or computed again."""
        self.rows = torch.zeros(batch_size, dtype=torch.int64)
        if checkpointing:
            # The backward pass runs outside of the model's forward pass.
            self.base.enable_gradient_checkpointing(
                SomeBlocks(
                    self.args.checkpointing_share, context_fn=lambda: (nullcontext(), self.accelerator.autocast())
                )
            )
        else:
            self.base.disable_gradient_checkpointing()
        self.model.train()
        live, self.steps = self.live, self.steps + 1
        with self.accelerator.fake_tensors, live:
            live.start()
            self._forward_and_backward()
            activations, flops = live.peak_beside_gradients, live.flops
            if self.args.gradient_accumulation_steps > 1:
                # From the second micro-batch on, gradients are there from the start.
                self._forward_and_backward()
        for parameter in self.trained:
            parameter.grad = None
        return Counts(live.peak, activations, flops)

    def _forward_and_backward(self) -> None:
        batch = self._batch()
        values = self.trainer.compute_losses(self.model, batch, self.trainer.modes.training(batch.rows, self.steps))
        loss = values["loss"].mean()
        del values
        loss.backward()

    def _batch(self) -> Batch:
        encoder, layout, rows = self.encoder, self.trainer.layout, len(self.rows)
        if not layout.samples:
            # A trainer that generates its samples reads prompts alone, and is trained on more.
            layout = getattr(self.trainer, "trained_layout", layout)
        samples, latents = layout.num_samples, None
        per_sample = () if layout.samples_per_cell is None else (samples,)
        if samples:
            mean, std = (torch.ones(rows, samples, *encoder.latent_shape).transpose(0, 1) for _ in range(2))
            latents = Posterior(mean, std)
        conditions = layout.condition_shapes(encoder.pipeline, encoder.family, encoder.preparation.shape)
        return Batch(
            rows=self.rows,
            latents=latents,
            prompts=encoder.prompts(rows),
            sample_conditioning={},
            conditions={name: torch.ones(rows, *shape) for name, shape in conditions.items()},
            scalars={name: torch.ones(rows, *per_sample) for name in layout.scalars},
        )
