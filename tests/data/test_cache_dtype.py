"""What 16 bits on disk change in the loss, on the embedded pipeline."""

import pytest
import torch

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs


METHODS = {"MaPO": (MaPOTrainer, MaPOConfig), "DPO": (DiffusionDPOTrainer, DiffusionDPOConfig)}


def loss(method: str, cache_dtype: str, folder) -> float:
    """Of 32 pairs at fixed noise, with weights that a few large steps have moved away from the base's."""
    trainer_class, config_class = METHODS[method]
    config = config_class(
        output_dir=str(folder),
        dataset_cache_dir=str(folder),
        cache_dtype=cache_dtype,
        per_device_train_batch_size=16,
        activation_checkpointing=False,
        use_cpu=True,
    )
    trainer = trainer_class(load_pipeline(), config, preference_pairs(32))
    generator, total = torch.Generator().manual_seed(0), 0.0
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.01 * parameter.std(unbiased=False) * torch.randn(parameter.shape, generator=generator)
        for batch in trainer._batches_in_order(trainer.train_dataset, 16):
            values = trainer.compute_losses(trainer.model, batch, trainer.modes.evaluation(batch.rows, None))
            total += values["loss"].sum().item()
    return total / 32


@pytest.mark.parametrize(
    ("method", "dtypes"),
    # DPO multiplies differences of errors by thousands: bfloat16's 8 bits are seen in the loss of few pairs.
    [("MaPO", ("float16", "bfloat16")), ("DPO", ("float16",))],
)
def test_16_bit_caches_change_the_loss_by_less_than_a_thousandth(method, dtypes, tmp_path):
    exact = loss(method, "float32", tmp_path)
    for dtype in dtypes:
        other = loss(method, dtype, tmp_path)
        assert other != exact
        assert abs(other - exact) < 1e-3 * abs(exact), dtype
