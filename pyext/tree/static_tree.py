"""StaticTree: a tree of one shape whose guesses are looked up, so that a device can draft it without its host."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ramify.checks import show
from ramify.tree.token_tree import MAX_ROWS, TokenTree

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

    def fitted(self, rows: int, depth: int) -> Links:
        """The tree of at most `rows` rows, none deeper than `depth`: whole, or of 2^n or 3 2^n rows, so that few shapes are in use."""
        shape = self._of(rows)
        if len(shape[0]) == len(self._of(MAX_ROWS)[0]) and deepest(shape[0]) <= depth:
            return shape
        for n in range(len(shape[0]), 0, -1):
            if n & (n - 1) == 0 or (n % 3 == 0 and (n // 3) & (n // 3 - 1) == 0):
                shape = self._of(n)
                if deepest(shape[0]) <= depth:
                    return shape
        raise ValueError(f"StaticTree: rows is {rows} and depth {depth}; takes 1 and 0 or more, for the roots.")

    def check(self, vocab: int) -> None:
        """Raises TypeError or ValueError for a table that is none of this vocabulary, and for ranks that it has not."""
        table = self.table
        if table is not None and not (isinstance(table, np.ndarray) and table.dtype == np.int32 and table.flags.writeable):
            came = f"{getattr(table, 'dtype', type(table).__name__)}"
            raise TypeError(f"StaticTree: table is {came}; takes an int32 array that may be written to, or None.")
        if table is not None and (table.ndim != 2 or len(table) != vocab or not table.flags.c_contiguous):
            raise ValueError(f"StaticTree: table is {list(table.shape)}; takes [{vocab}, W], dense, a row for each token.")
        self._of(MAX_ROWS)

    def _of(self, rows: int) -> Links:
        shape = self.links(rows)
        if not (isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(each, tuple) for each in shape)):
            raise TypeError(f"StaticTree: links({rows}) returned {show(shape)}; takes a tuple of parents and one of ranks.")
        parents, ranks = shape
        if not 1 <= len(parents) <= rows or len(ranks) != len(parents):
            came = f"{len(parents)} parents and {len(ranks)} ranks"
            raise ValueError(f"StaticTree: links({rows}) returned {came}; takes as many of both, 1 to {rows}.")
        if len(parents) > 1 and not 0 <= min(ranks) <= max(ranks) < self.width:
            raise ValueError(f"StaticTree: ranks reach {max(ranks)}; takes 0 to {self.width - 1}, as the table is wide.")
        return shape

    @property
    def width(self) -> int:
        """Successors that the table keeps of each token."""
        return 0 if self.table is None else self.table.shape[1]


@lru_cache(maxsize=1024)
def deepest(parents: tuple[int, ...]) -> int:
    """Steps from the root to the row that is furthest from it."""
    return int(TokenTree.filled(np.zeros((1, len(parents)), np.int32), parents).depth.max())
