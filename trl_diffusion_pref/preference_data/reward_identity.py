"""What a reward computes, to reuse stored scores of the same reward only."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from ..data.shards import key_of
from ..rewards.scoring import Reward


# Attributes of a reward that say how it computes, not what, and what must not be written to a file.
_HOW = ("batch_size", "device", "dtype", "keep_on_device", "timeout", "retries", "retry_wait", "workers", "headers")
_SIMPLE = (str, int, float, bool, bytes, type(None))


def reward_identity(reward: Reward) -> str:
    """A digest of a reward: equal for two rewards that compute the same.

    A function counts with its own code, defaults and the values that it encloses; not with what it calls. An object
    counts with its class and its public attributes that are texts, numbers, other rewards, or lists and dictionaries
    of these.
    """
    return key_of(_described(reward)).hex()


def _described(value: Any) -> Any:
    """A value as JSON can hold it, or None for what cannot be told apart."""
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_described(item) for item in value]
        return sorted(parts, key=repr) if isinstance(value, (set, frozenset)) else parts
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return ["partial", _described(value.func), _described(value.args), _described(value.keywords)]
    if inspect.ismethod(value):
        return ["method", _described(value.__self__), _described(value.__func__)]
    if inspect.isfunction(value):
        return _function(value)
    if callable(value) and not isinstance(value, type):
        return [
            _name(type(value)),
            {name: _described(item) for name, item in sorted(vars(value).items()) if _counts(name, item)},
        ]
    return _name(value) if hasattr(value, "__qualname__") else _name(type(value))


def _counts(name: str, value: Any) -> bool:
    """Whether an attribute says what a reward computes; private ones hold what was loaded, or the parts of a sum."""
    parts = value.values() if isinstance(value, Mapping) else ()
    return name not in _HOW and (not name.startswith("_") or bool(parts and all(map(callable, parts))))


def _function(function: Callable[..., Any]) -> Any:
    enclosed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    defaults = [getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__")]
    return [_name(function), _code(function.__code__), _described(defaults), _described(enclosed)]


def _code(code: types.CodeType) -> Any:
    constants = [_code(item) if isinstance(item, types.CodeType) else _described(item) for item in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
