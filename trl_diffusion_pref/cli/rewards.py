"""Rewards by what a command line calls them."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import isclass
from typing import Any, cast

from .. import rewards as known
from ..shapes import shapes_reward
from .parser import UsageError, nearest


def rewards_named(names: Sequence[str], arguments: Mapping[str, Any]) -> list[Callable[..., list[float]]]:
    """The rewards of a command line.

    Args:
        names: Classes of `trl_diffusion_pref.rewards`, `package.module:name`, or `shapes`.
        arguments: Of the constructors, by a name among `names`.

    Raises:
        UsageError: A name that leads to no reward, or arguments for a reward that is not asked for.
    """
    unused = next((name for name in arguments if name not in names), None)
    if unused is not None:
        raise UsageError(f"reward_kwargs has {unused!r}, which is not among the rewards {', '.join(names)}.")
    return [_reward(name, arguments.get(name)) for name in names]


def _reward(name: str, arguments: Any) -> Callable[..., list[float]]:
    if name == "shapes":
        found: Any = shapes_reward
    elif ":" in name:
        found = _imported(name)
    else:
        classes = [entry for entry in known.__all__ if isclass(getattr(known, entry)) and entry[0].isupper()]
        # A latent reward rates noisy latents while they are sampled, not samples.
        others = ("Error", "ModelReward", "LatentReward")
        classes = [entry for entry in classes if not entry.endswith(others) and entry != "Reward"]
        if name not in classes:
            similar = nearest(name, [*classes, "shapes"]) or ", ".join([*classes, "shapes"])
            raise UsageError(f"There is no reward {name!r}; the nearest is {similar}. Your own: package.module:name.")
        found = getattr(known, name)
    if isclass(found):
        try:
            return cast(Callable[..., list[float]], found(**(arguments or {})))
        except TypeError as error:
            raise UsageError(f"reward {name}: {error}. Set its arguments by --reward_kwargs.") from error
    if arguments is not None:
        raise UsageError(f"reward {name} is a function, which takes no reward_kwargs.")
    return found


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"reward {name!r} cannot be imported: {error}. It must be package.module:name.") from error
    if not callable(found):
        raise UsageError(f"reward {name!r} is a {type(found).__name__}, which cannot be called.")
    return found
