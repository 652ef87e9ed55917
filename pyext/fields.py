"""The fields of a JSON object, each read as what it has to be. A field that is null counts as absent.

Whatever a file holds, the complaint is one line: the file, the field, what came, what is taken.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ramify.checks import INT32_MAX, show
from ramify.errors import CheckpointError


@dataclass(frozen=True)
class Fields:
    """`values` of one object of `file`; `inside` is the path to the field that holds the object when it is not the whole file.

    caller: what the user has called, for messages.
    """

    values: Mapping[str, Any]
    file: str = "config.json"
    inside: str = ""
    caller: str = "load"

    def get(self, key: str, default: Any = None) -> Any:
        """As it stands, or the default."""
        value = self.values.get(key)
        return default if value is None else value

    def said(self, key: str) -> str:
        """What the file says of a field, as a message begins."""
        value = self.values.get(key)
        came = "no" if value is None else f"{show(value)} for"
        return f'{self.caller}: {self.file} has {came} "{key}"{f" in {self.inside}" if self.inside else ""}'

    def wrong(self, key: str, takes: str) -> CheckpointError:
        """The error for a field, to be raised by the caller."""
        return CheckpointError(f"{self.said(key)}; takes {takes}. Fetch the file again.")

    def count(self, key: str, default: int | None = None, low: int = 1, high: int = INT32_MAX) -> int:
        """A whole number from low to high."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """A finite number above 0, or with `zero` 0 as well."""
        value = self.get(key, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and (value > 0 or (zero and value == 0)):
            with suppress(OverflowError):
                if math.isfinite(value):
                    return float(value)
        raise self.wrong(key, f"a finite number {'of 0 or more' if zero else 'above 0'}")

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty where there is none."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise self.wrong(key, "a list of strings")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings, or one string for a list of one; empty where there is none."""
        value = self.get(key, ())
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
            raise self.wrong(key, "a string or a list of strings")
        return tuple(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; empty where there is none."""
        value = self.get(key, [])
        value = value if isinstance(value, list) else [value]
        if any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in value):
            raise self.wrong(key, "a token id or a list of them, 0 or more")
        return tuple(value)

    def object(self, key: str) -> "Fields":
        """A JSON object; empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Fields(value, self.file, f"{self.inside}.{key}" if self.inside else key, self.caller)
