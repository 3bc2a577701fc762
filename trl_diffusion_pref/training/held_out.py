"""Held-out accuracies of a run on pairs."""

from ..data.layouts import named_datasets
from ..evaluation import HeldOutPreferences
from .model_setup import starting_fingerprint
from .run import Run


def held_out_preferences(trainer: Run) -> HeldOutPreferences | None:
    """Accuracies on a trainer's held-out pairs, with the starting weights' likelihoods; None where there are none.

    Called while the model still has the weights that the run starts from.
    """
    args = trainer.args
    if not args.eval_draws or not trainer.layout.is_pairs:
        return None
    region = trainer.denoise.region if args.loss_on_mask else None
    held_out = HeldOutPreferences(trainer.noise_process, args.seed, args.eval_draws, region)
    record = held_out.record(starting_fingerprint(trainer.model, trainer.checkpointer.record))
    for name, dataset in named_datasets(trainer.eval_dataset) if not trainer.shards_weights else ():
        held_out.base[f"eval {name}"] = trainer.row_cache.load_or_compute(
            dataset,
            lambda batch: held_out.elbos(trainer.denoise.of(trainer.model), batch),
            record,
        )
    return held_out
