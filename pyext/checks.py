"""Argument checks shared by everyone, with one wording: who, what came, what is taken.

Each returns the value it was given, so a check can stand where the value is used.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Set
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")

INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1


def show(value: Any, limit: int = 60) -> str:
    """A value as an error message quotes it, on one line: strings in double quotes, long things cut."""
    try:
        text = f'"{value}"' if isinstance(value, str) else repr(value)
    except Exception:  # a number of too many digits, or somebody else's __repr__
        text = f"a {type(value).__name__}"
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listed(choices: Iterable[Any]) -> str:
    """Choices as a message lists them: a, b or c."""
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def at_least(name: str, value: Any, low: float, caller: str = "") -> Any:
    """A number not below `low`. TypeError if it is no number, ValueError if it is too small or NaN."""
    number(name, value, caller)
    if not value >= low:
        raise ValueError(f"{_who(caller)}{name} is {show(value)}; takes {low} or more.")
    return value


def between(name: str, value: Any, low: float, high: float, caller: str = "") -> Any:
    """A number in [low, high]."""
    number(name, value, caller)
    if not low <= value <= high:
        raise ValueError(f"{_who(caller)}{name} is {show(value)}; takes {low} to {high}.")
    return value


def number(name: str, value: Any, caller: str = "") -> Any:
    """A real number that is finite; bool is refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{_who(caller)}{name} is {show(value)}; takes a number.")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite:
        raise ValueError(f"{_who(caller)}{name} is {show(value)}; takes a finite number.")
    return value


def whole(name: str, value: Any, low: int | None = None, caller: str = "", high: int | None = None) -> int:
    """A whole number (Python or numpy), not below `low` nor above `high`, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{_who(caller)}{name} is {show(value)}; takes a whole number.")
    value = int(value)
    if low is not None and value < low:
        raise ValueError(f"{_who(caller)}{name} is {show(value)}; takes {low} or more.")
    if high is not None and value > high:
        raise ValueError(f"{_who(caller)}{name} is {show(value)}; takes at most {high}.")
    return value


def one_of(name: str, value: T, choices: Collection[T], caller: str = "") -> T:
    """One of a few values."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):  # an array would answer `in` with an array
        raise ValueError(f"{_who(caller)}{name} is {show(value)}; takes {' or '.join(show(c) for c in choices)}.")
    return value


def flag(name: str, value: Any, caller: str = "") -> bool:
    """True or False, and nothing that merely counts as such."""
    if not isinstance(value, bool):
        raise TypeError(f"{_who(caller)}{name} is {show(value)}; takes True or False.")
    return value


def sequence(value: Any) -> list[Any] | None:
    """What a list, a tuple, an array, a tensor or an iterator holds, in order; None for what has no order, for bytes and for text."""
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set)):
        return None
    try:
        items = value.tolist() if hasattr(value, "tolist") else list(value)
    except (TypeError, RuntimeError):  # no iterable; a tensor without values
        return None
    return items if isinstance(items, list) else None  # an array without axes is a number


def is_model(value: Any) -> bool:
    """Whether this is a model such as `ramify.load` gives, told by what it has."""
    return not isinstance(value, type) and all(hasattr(value, part) for part in ("config", "forward", "new_cache", "prefill"))


def loaded_model(name: str, value: Any, caller: str = "") -> Any:
    """A model such as `ramify.load` gives."""
    if not is_model(value):
        use = f"ramify.load({show(value)})" if isinstance(value, str) else "ramify.load(path)"
        if hasattr(value, "generate"):
            use = "its own generate with custom_generate=ramify.CustomGenerate()"
        raise TypeError(f"{_who(caller)}{name} is {show(value)}; takes a loaded model. Use {use}.")
    return value


def _who(caller: str) -> str:
    return f"{caller}: " if caller else ""
