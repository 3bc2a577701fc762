"""Steps of real size on a GPU: the trainers beside the bare step and the released recipes, in one table.

    python benchmarks/gpu.py

Needs a CUDA device with memory for the models, and downloads nothing: weights are random, of the published sizes, at
1024 pixels. Takes at most about `--seconds`; what fits no more is named. A measurement that fails is a row with its
error. Written to results/gpu.json after each measurement, and to results/gpu.md at the end. `--tiny` runs the same
with small models on a CPU, to check the script itself, and writes where `--output` says.

Of each case, seconds per pair are those of `trainer.train()`: data loader, callbacks and logging are in them. Between
its rounds of steps come rounds of the bare step, with the same model and optimizer: forward, backward, clipping and
update on a batch that is ready. After them comes the released recipe with the same model: the VAE on both images at
every step, and for DPO a live reference. The share of the card's rate counts FLOPs of forward and backward, none of
what checkpointing computes again, against a large bfloat16 product of the same run.
"""

import argparse
import gc
import json
import logging
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from gpu_models import flux_dev, in_4_bit, pairs_of, stable_diffusion_3_5_medium, stable_diffusion_xl
from gpu_steps import (
    InTurn,
    ReleasedRecipe,
    counted_flops,
    matrix_rate,
    prepared_batch,
    rounds_of,
    summary,
)
from peft import LoraConfig, PeftModel
from torch import nn

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.data import NoisyBatch
from trl_diffusion_pref.export.files import write_whole
from trl_diffusion_pref.training.trainer import DiffusionTrainer


RESULTS = Path(__file__).parent / "results"
Trained = Literal["all weights", "all weights in bf16", "LoRA", "LoRA on nf4"]
Method = Literal["MaPO", "DPO, precomputed", "DPO, adapter off"]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        trained: "all weights" are float32 under bf16 autocast, trained by 8-bit Adam; a LoRA's base is bfloat16.
        pairs: Of a batch.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    model: str
    method: Method
    trained: Trained
    pairs: int = 1
    checkpointing: bool = True

    @property
    def name(self) -> str:
        return ", ".join(
            [self.model, self.method, self.trained, f"{self.pairs} pair{'s' * (self.pairs > 1)}"]
            + ([] if self.checkpointing else ["no checkpointing"])
        )


CASES = (
    Case("SDXL", "MaPO", "all weights"),
    Case("SDXL", "MaPO", "all weights", pairs=4),
    Case("SDXL", "MaPO", "all weights", checkpointing=False),
    Case("SDXL", "MaPO", "all weights in bf16"),
    Case("SDXL", "DPO, precomputed", "all weights"),
    Case("SDXL", "MaPO", "LoRA"),
    Case("SDXL", "DPO, precomputed", "LoRA"),
    Case("SDXL", "DPO, adapter off", "LoRA"),
    Case("SDXL", "MaPO", "LoRA on nf4"),
    Case("SD 3.5-medium", "MaPO", "LoRA"),
    Case("SD 3.5-medium", "DPO, adapter off", "LoRA"),
    Case("Flux-dev", "MaPO", "LoRA"),
    Case("Flux-dev", "MaPO", "LoRA on nf4"),
    Case("Flux-dev", "DPO, adapter off", "LoRA on nf4"),
)


class Bench:
    """What all cases share: models, the parts of their pipelines, encoded data, and the time that is left.

    Args:
        folder: Of encoded data and of the trainers.
        deadline: Of `time.monotonic`.
    """

    def __init__(self, device: torch.device, folder: Path, deadline: float, *, tiny: bool) -> None:
        self.device, self.folder, self.deadline, self.tiny = device, folder, deadline, tiny
        models = [make(tiny) for make in (stable_diffusion_xl, stable_diffusion_3_5_medium, flux_dev)]
        self.models = {model.name: model for model in models}
        self.others: dict[str, dict[str, Any]] = {}
        self.flops: dict[tuple[str, bool], tuple[int, int]] = {}
        self.rate = matrix_rate(device)

    def measure(self, case: Case) -> dict[str, Any]:
        """The numbers of a case."""
        model = self.models[case.model]
        cuda, dpo, lora = self.device.type == "cuda", case.method != "MaPO", case.trained.startswith("LoRA")
        steps, rounds = (1, 2) if self.tiny else (1 if model.heavy else 3, 4)
        held = torch.cuda.memory_allocated() / 2**30 if cuda else None
        half = torch.bfloat16 if cuda else torch.float32
        denoiser = model.denoiser(self.device, torch.float32 if case.trained == "all weights" else half)
        if case.trained == "LoRA on nf4":
            denoiser = in_4_bit(denoiser)
        if case.model not in self.others:
            self.others[case.model] = model.make_others()
        options: dict[str, Any] = {
            "output_dir": str(self.folder / "output"),
            "dataset_cache_dir": str(self.folder / "cache"),
            "resolution": model.resolution,
            "min_image_side": 1,
            "encode_batch_size": 1,
            "per_device_train_batch_size": case.pairs,
            "activation_checkpointing": case.checkpointing,
            "max_steps": steps * rounds,
            "learning_rate": 1e-6,
            "use_cpu": not cuda,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        if not lora:
            options["optim"] = "adamw_bnb_8bit"
        if case.method == "DPO, precomputed":
            options |= {"reference": "precomputed", "reference_draws": 1}
        trainer = (DiffusionDPOTrainer if dpo else MaPOTrainer)(
            model.pipeline(denoiser, self.others[case.model]),
            (DiffusionDPOConfig if dpo else MaPOConfig)(**options),
            pairs_of(model.resolution, steps * rounds * case.pairs),
            peft_config=LoraConfig(r=16) if lora else None,
        )
        del denoiser
        noisy = prepared_batch(trainer)
        in_turn = InTurn(trainer, noisy, steps, self.deadline)
        trainer.add_callback(in_turn)
        trainer.train()
        seconds, peak = summary(in_turn.rounds)
        bare_seconds, bare_peak = summary(in_turn.bare_rounds)
        flops = self._flops_of_pair(case, trainer, noisy)
        numbers = {
            "seconds_per_pair": seconds / case.pairs,
            "bare_seconds_per_pair": bare_seconds / case.pairs,
            "of_bare": seconds / bare_seconds,
            "held_before_gib": held,  # by what other cases left: next to nothing, or something is wrong here
            "peak_gib": peak,
            "bare_peak_gib": bare_peak,
            "tflop_per_pair": flops / 1e12,
            "share_of_rate": flops * case.pairs / seconds / self.rate,
        }
        try:
            recipe_seconds, recipe_peak, vae = self._recipe(case, trainer, noisy, steps, rounds)
        except Exception as error:  # a recipe that needs more memory than the trainer leaves the trainer's numbers
            return numbers | {"recipe_error": first_line(error)}
        return numbers | {
            "recipe_seconds_per_pair": recipe_seconds / case.pairs,
            "times_the_recipe": recipe_seconds / seconds,
            "recipe_peak_gib": recipe_peak,
            "recipe_vae": vae,
        }

    def _flops_of_pair(self, case: Case, trainer: DiffusionTrainer, noisy: NoisyBatch) -> int:
        """What a step has to compute for a pair: forward and backward, and forward of a reference that is called."""
        lora = trainer.model.peft_config["default"] if isinstance(trainer.model, PeftModel) else None
        key = case.model, lora is not None
        if key not in self.flops:
            self.flops[key] = counted_flops(self.models[case.model], trainer.family, noisy, lora)
        training, forward = self.flops[key]
        return 2 * (training + (forward if case.method == "DPO, adapter off" else 0))

    def _recipe(
        self, case: Case, trainer: DiffusionTrainer, noisy: NoisyBatch, steps: int, rounds: int
    ) -> tuple[float, float | None, str]:
        """Seconds of a step, the most memory, and the VAE's dtype."""
        model, dpo = self.models[case.model], case.method != "MaPO"
        lora, half = case.trained.startswith("LoRA"), torch.bfloat16 if trainer.args.bf16 else torch.float32
        # MaPO's script and diffusers' for DPO with a LoRA keep SDXL's VAE in float32, the one for DPO of all weights
        # does not, and other models' VAEs do not need it.
        dtype = torch.float32 if case.model == "SDXL" and (lora or not dpo) else half
        # diffusers' to() warns at every cast.
        vae = trainer.encoders.pipeline.vae
        pixels = torch.rand(len(noisy.x_t), 3, model.resolution, model.resolution, device=self.device) * 2 - 1
        try:
            nn.Module.to(vae, self.device, dtype)
            reference = model.denoiser(self.device, half).eval().requires_grad_(False) if dpo and not lora else None
            trainer.model.train()
            recipe = ReleasedRecipe(trainer, noisy, pixels, reference, dpo=dpo)
            measured = rounds_of(recipe.step, self.device, steps, rounds, self.deadline)
        finally:
            # The next case encodes as this one did.
            nn.Module.to(vae, torch.device("cpu"), torch.float32)
        return *summary(measured), str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".strip(" :")


def row_of(case: Case, bench: Bench) -> dict[str, Any]:
    """A case with its numbers, or with the first line of what went wrong."""
    row: dict[str, Any] = {"name": case.name, **asdict(case)}
    if time.monotonic() > bench.deadline:
        return row | {"error": "skipped: the time was over"}
    try:
        # What the loop logs does not belong into the table.
        with redirect_stdout(sys.stderr):
            return row | bench.measure(case)
    except Exception as error:  # the other rows are worth having
        logging.getLogger(__name__).debug(case.name, exc_info=True)
        return row | {"error": first_line(error)}
    finally:
        # The model of a case is in circles with its trainer.
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    versions = {name: version_of(name) for name in ("peft", "accelerate", "bitsandbytes", "trl")}
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
        **versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }
    return found


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip() or None
    except OSError:  # some images with CUDA come without it
        return None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    described = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = [
        "# Steps of real size on a GPU",
        "",
        "`python benchmarks/gpu.py` wrote this file, and its docstring says what is compared.",
        "",
        f"Machine: {described}. Matrix product in bfloat16: {result['matrix_tflop_per_second']:.4g} TFLOP/s.",
        "",
        "| case | s per pair | of the bare step | times the recipe | peak GiB | its bare step | the recipe "
        "| TFLOP a pair | share of the rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    columns = {
        "seconds_per_pair": "{:.4f}",
        "of_bare": "{:.3f}",
        "times_the_recipe": "{:.2f}",
        "peak_gib": "{:.1f}",
        "bare_peak_gib": "{:.1f}",
        "recipe_peak_gib": "{:.1f}",
        "tflop_per_pair": "{:.4g}",
        "share_of_rate": "{:.2f}",
    }
    for row in result["rows"]:
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, form in columns.items()]
        if "error" in row:
            cells = [row["error"].replace("|", "/"), *[""] * (len(columns) - 1)]
        elif "recipe_error" in row:
            cells[2] = row["recipe_error"].replace("|", "/")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="after which no further case begins")
    parser.add_argument("--only", default="", help="measure the cases alone whose names contain this")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU, to check the script")
    parser.add_argument("--output", type=Path, help="folder of gpu.json and gpu.md (default: benchmarks/results)")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    # Modules stay; without them the collections between cases are short.
    gc.freeze()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device. Run it on a machine with one, or with --tiny, which needs none.")
    if not args.tiny and torch.cuda.device_count() > 1:
        parser.error(
            "there are several CUDA devices, over which the trainers would divide batches. Set CUDA_VISIBLE_DEVICES=0."
        )
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        parser.error(
            f"--only {args.only!r}: no case has it in its name. They are: {'; '.join(c.name for c in CASES)}."
        )
    output = args.output or (None if args.tiny else RESULTS)
    device = torch.device("cpu" if args.tiny else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, Path(folder), deadline, tiny=args.tiny)
        result: dict[str, Any] = {
            "machine": machine(device),
            "matrix_tflop_per_second": bench.rate / 1e12,
            "rows": [],
        }
        for case in cases:
            began = time.monotonic()
            result["rows"].append(row_of(case, bench))
            print(f"{case.name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
            if output is not None:
                write_whole(output / "gpu.json", json.dumps(result, indent=1).encode())
    text = table(result)
    print(text)
    if output is not None:
        write_whole(output / "gpu.md", text.encode())


if __name__ == "__main__":
    main()
