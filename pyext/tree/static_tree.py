"""StaticTree: a tree of one shape whose guesses are looked up, so that a device can draft it without its host."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Links = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StaticTree:
    """Row t of every sequence is the successor of rank ranks[t] of its parent's token.

    links: rows asked for -> (parents, ranks) of at most so many; -1 and 0 for the root. table: int32 [V, W], the likeliest successors of
    each token, likeliest first, -1 where nothing is known; None for roots alone. Whoever runs the trees writes there what the rows have
    taught: the W likeliest ids after each row's token, of rows with the same token those of the last.
    """

    links: Callable[[int], Links]
    table: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Successors that the table keeps of each token."""
        return 0 if self.table is None else self.table.shape[1]
