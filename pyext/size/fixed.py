"""A fixed number of rows, whatever the device, the batch and the acceptance: for tests, and to compare drafters at equal rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from ramify.checks import whole
from ramify.size.base import SizePolicy, size_policy
from ramify.tree import MAX_ROWS


@size_policy("fixed")
@dataclass
class Fixed(SizePolicy):
    """The same number of rows for every sequence and step. rows_each: 1 to 256."""

    rows_each: int = 16

    def __post_init__(self) -> None:
        if whole("rows_each", self.rows_each, 1, "fixed") > MAX_ROWS:
            raise ValueError(f"fixed: rows_each is {self.rows_each}; takes 1 to {MAX_ROWS}. A sequence has no more rows in a step.")

    def rows(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """The constant, once per sequence."""
        return [self.rows_each] * len(live)
