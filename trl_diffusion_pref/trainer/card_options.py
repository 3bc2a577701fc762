"""Which options of a run its model card shows."""

from typing import Any

from .base_config import DiffusionPreferenceConfig


_SHOWN = ("learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "seed", "weight_decay", "prompt_dropout")


def card_options(
    args: DiffusionPreferenceConfig, config_class: type[DiffusionPreferenceConfig], sample_name: str, steps: int
) -> dict[str, Any]:
    """Values by the names under which the card shows them.

    Args:
        config_class: The algorithm's; all options of its own are shown.
        sample_name: What a batch is made of.
        steps: That were trained.
    """
    own = set(config_class.__dataclass_fields__) - set(DiffusionPreferenceConfig.__dataclass_fields__)
    options = {name: getattr(args, name) for name in (*_SHOWN, *sorted(own))}
    options = {name: getattr(value, "value", value) for name, value in options.items()}
    options[f"{sample_name} per step"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    options["steps"] = steps
    return options
