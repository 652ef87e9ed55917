"""TokenTree: what one step asks the model about, one packed row per token.

A chain is a tree, plain decoding is a tree of roots alone. Shapes repeat from step to step while tokens change, so everything that
follows from the parents alone (depths, ancestor bits) is built once per shape and shared, read-only, by all trees of that shape.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

MAX_ROWS = 256
"""Most rows of one sequence in one step; kernels size their buffers by it."""

CANDIDATE, PROBE, PAD = 0, 1, 2
"""Kinds of row: may be accepted; read by its drafter but never accepted; computed and ignored."""

MODES = ("det", "iid", "wor", "greedy_plus_one")
"""How the children of a row were chosen: without randomness, drawn from q with replacement, drawn from q without replacement, or
the most likely ones of q and then one drawn from the rest."""


class Shape(NamedTuple):
    """What follows from the parents of a whole step; read-only arrays."""

    parent: np.ndarray
    depth: np.ndarray
    row_start: np.ndarray
    ancestors: np.ndarray
    kind: np.ndarray


@dataclass(slots=True)
class TokenTree:
    """The rows of one step, packed: those of sequence 0 first, then of sequence 1, and so on; M rows, B sequences.

    Row 0 of a sequence is its root: the last emitted token, not yet in the cache. A parent stands before its child.

    tokens: int32 [M].
    parent: int32 [M], a row of the own sequence; -1 for the root.
    depth: int32 [M], steps from the root; a row's position is the committed length plus its depth.
    row_start: int32 [B + 1], where each sequence begins.
    ancestors: int64 [M, W]; bit j & 63 of word j >> 6 is set when the row sees row j of its sequence. The self bit is set.
    kind: uint8 [M], CANDIDATE, PROBE or PAD.
    mode: how children were chosen, one of MODES, for the whole tree. Children stand in the order in which they were drawn.
    q: None or float32 [M, V]: what the children of each row were drawn from. Ignored for "det".
    chance: None or float64 [M]: how likely each row is to be accepted in its drafter's eyes, 1 for roots and never above the parent's;
    only for "det", where leaving out the unlikely ones changes no law.

    Arrays may be shared with other trees: replace them, never write into them.
    """

    tokens: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    row_start: np.ndarray
    ancestors: np.ndarray
    kind: np.ndarray
    mode: str = "det"
    q: np.ndarray | None = None
    chance: np.ndarray | None = None

    @classmethod
    def roots(cls, tokens: Sequence[int]) -> "TokenTree":
        """One row per sequence: plain decoding."""
        return cls(np.array(tokens, np.int32), *_chain_shape((1,) * len(tokens)))

    @classmethod
    def chains(cls, roots: Sequence[int], guesses: Sequence[Sequence[int]], mode: str = "det", q: np.ndarray | None = None) -> "TokenTree":
        """One chain per sequence: its root, then its guesses (none is fine), each the child of the one before.

        q: float32 [M, V] in the packed row order, for modes other than "det". Raises ValueError when a sequence passes MAX_ROWS rows.
        """
        if len(roots) != len(guesses):
            raise ValueError(f"TokenTree.chains: guesses has {len(guesses)} sequences; takes {len(roots)}, one per root. Give [] for none.")
        packed: list[int] = []
        for root, guess in zip(roots, guesses, strict=True):
            packed.append(root)
            packed.extend(guess)
        tree = cls(np.array(packed, np.int32), *_chain_shape(tuple([1 + len(guess) for guess in guesses])), mode, q)
        if mode != "det":
            tree._check_q("TokenTree.chains")
        return tree

    @classmethod
    def from_parents(
        cls,
        tokens: Sequence[Iterable[int]],
        parents: Sequence[Iterable[int]],
        mode: str = "det",
        q: np.ndarray | None = None,
        kinds: Sequence[Iterable[int]] | None = None,
    ) -> "TokenTree":
        """One tree per sequence from lists of tokens and of parents (-1 for row 0, a smaller row for all others).

        Equal siblings of a "det" tree are merged: the later one's children move to the first, so a sequence may come out with fewer
        rows than it was given; without repeated siblings rows keep their numbers. "wor" and "greedy_plus_one" refuse them, and so
        does a tree with kinds, whose rows must stay where its drafter put them.
        Raises ValueError for lists of unequal length, a parent that does not stand before its child, a missing q, too many rows.
        """
        rows = [_as_list(t) for t in tokens]
        links = [tuple(_as_list(p)) for p in parents]
        marks = None if kinds is None else [_as_list(k) for k in kinds]
        _check_lengths(rows, links, marks)
        if mode != "iid":
            for b, (t, p) in enumerate(zip(rows, links, strict=True)):
                twice = _repeated_sibling(t, p, None if marks is None else marks[b])
                if twice < 0:
                    continue
                if mode != "det" or marks is not None:
                    what = f"token {t[twice]} stands twice under row {p[twice]} of sequence {b} (again at row {twice})"
                    raise ValueError(f"TokenTree: {what}; takes distinct siblings here. Draw without replacement, or merge them.")
                if p[0] == -1 and all(parent < row for row, parent in enumerate(p)):
                    rows[b], links[b] = _merge_siblings(t, p)
        shape = _tree_shape(tuple(links))
        packed = rows[0] if len(rows) == 1 else [token for t in rows for token in t]
        tree = cls(np.array(packed, np.int32), *shape, mode, q)
        if marks is not None:
            tree.kind = np.array([mark for m in marks for mark in m], np.uint8)
        if mode != "det":
            tree._check_q("TokenTree.from_parents")
        return tree

    @classmethod
    def filled(cls, tokens: np.ndarray, parents: tuple[int, ...]) -> "TokenTree":
        """One shape for all sequences, tokens int32 [B, T] as they are: a row without a token (-1) is a PAD, and nothing is merged."""
        shape, packed = _tree_shape((parents,) * len(tokens)), tokens.ravel()
        if packed.min() >= 0:
            return cls(packed, *shape)
        return cls(packed.clip(0), *shape[:-1], np.where(packed < 0, PAD, CANDIDATE).astype(np.uint8))

    @property
    def B(self) -> int:
        """Number of sequences."""
        return len(self.row_start) - 1

    @property
    def M(self) -> int:
        """Number of rows of all sequences."""
        return len(self.tokens)

    @property
    def rows(self) -> np.ndarray:
        """Rows of each sequence, int32 [B]."""
        return np.diff(self.row_start)

    def span(self, b: int) -> slice:
        """Where the rows of sequence b lie in the packed arrays."""
        return slice(int(self.row_start[b]), int(self.row_start[b + 1]))

    def children(self, b: int) -> list[list[int]]:
        """For each row of sequence b the rows of its candidate children, in the order in which they were drawn."""
        span = self.span(b)
        parents, kinds = self.parent[span].tolist(), self.kind[span].tolist()
        kids: list[list[int]] = [[] for _ in parents]
        for row, parent in enumerate(parents):
            if parent >= 0 and kinds[row] == CANDIDATE:
                kids[parent].append(row)
        return kids

    def path(self, b: int, row: int) -> np.ndarray:
        """The rows of sequence b from the root to `row`, ascending, int32."""
        parents = self.parent[self.span(b)]
        steps = []
        while row >= 0:
            steps.append(row)
            row = int(parents[row])
        return np.array(steps[::-1], np.int32)

    def prefix(self, rows: Sequence[int]) -> "TokenTree":
        """The tree of the first rows[b] rows of each sequence (at least its root, at most all of them)."""
        chance = self.chance
        if self.B == 1 and self.ancestors.shape[1] == 1:  # most steps are, and views will do
            n = min(max(int(rows[0]), 1), self.M)
            q, start = (None if self.q is None else self.q[:n]), np.array([0, n], np.int32)
            arrays = self.tokens[:n], self.parent[:n], self.depth[:n], start, self.ancestors[:n], self.kind[:n]
            return TokenTree(*arrays, self.mode, q, None if chance is None else chance[:n])
        spans = [self.span(b) for b in range(self.B)]
        counts = [min(max(int(n), 1), s.stop - s.start) for n, s in zip(rows, spans, strict=True)]
        if counts == [s.stop - s.start for s in spans]:
            return self
        keep = np.concatenate([np.arange(s.start, s.start + n) for s, n in zip(spans, counts, strict=True)])
        start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=start[1:])
        words = _words(max(counts))
        q = None if self.q is None else self.q[keep]
        arrays = (self.tokens[keep], self.parent[keep], self.depth[keep], start, self.ancestors[keep, :words].copy(), self.kind[keep])
        return TokenTree(*arrays, self.mode, q, None if chance is None else chance[keep])

    def check(self, max_rows: int = MAX_ROWS) -> "TokenTree":
        """Checks every statement of the class docstring and returns self. For trees whose arrays were made by hand, and for tests.

        Raises TypeError for a dtype, ValueError for a shape or a value.
        """
        for name, dtype, size in (
            ("tokens", np.int32, self.M),
            ("parent", np.int32, self.M),
            ("depth", np.int32, self.M),
            ("row_start", np.int32, None),
            ("kind", np.uint8, self.M),
        ):
            array = getattr(self, name)
            if array.dtype != dtype:
                raise TypeError(f"TokenTree: {name} is {array.dtype}; takes {np.dtype(dtype)}. Use {name}.astype.")
            if array.ndim != 1 or (size is not None and len(array) != size):
                raise ValueError(f"TokenTree: {name} is {list(array.shape)}; takes [{size}], one value per row. Give one per token.")
        start = self.row_start
        if self.B < 1 or start[0] != 0 or start[-1] != self.M or (np.diff(start) < 1).any():
            raise ValueError(f"TokenTree: row_start is {start.tolist()}; takes 0 up to {self.M}, a row or more each. Keep every root.")
        if self.mode not in MODES:
            raise ValueError(f"TokenTree: mode is {self.mode!r}; takes one of {', '.join(MODES)}. Say how children were chosen.")
        if self.M and int(self.tokens.min()) < 0:
            row = int(self.tokens.argmin())
            raise ValueError(f"TokenTree: tokens[{row}] is {int(self.tokens[row])}; takes ids from 0 up. Leave the row out.")
        links = tuple(tuple(self.parent[self.span(b)].tolist()) for b in range(self.B))
        for b, link in enumerate(links):
            _check_parents(b, link, max_rows)
        if not np.array_equal(self.depth, _tree_shape(links).depth):
            raise ValueError("TokenTree: depth is not one more than the parent's; takes 0 for roots. Build it with from_parents.")
        self._check_bits(links)
        if self.mode != "det":
            self._check_q("TokenTree")
        return self

    def _check_bits(self, links: tuple[tuple[int, ...], ...]) -> None:
        words = _words(max(map(len, links)))
        if self.ancestors.dtype != np.int64:
            raise TypeError(f"TokenTree: ancestors is {self.ancestors.dtype}; takes int64. Use ancestors.view(np.int64).")
        if self.ancestors.shape != (self.M, words):
            raise ValueError(f"TokenTree: ancestors is {list(self.ancestors.shape)}; takes [{self.M}, {words}], a bit per row. Pad it.")
        candidate = self.kind == CANDIDATE
        if not np.array_equal(self.ancestors[candidate], _tree_shape(links).ancestors[candidate]):
            raise ValueError("TokenTree: ancestors of a candidate row are not its path; takes path bits and the self bit. Follow parent.")

    def _check_q(self, who: str) -> None:
        if self.mode not in MODES:
            raise ValueError(f"{who}: mode is {self.mode!r}; takes one of {', '.join(MODES)}. Say how children were chosen.")
        if self.q is None:
            if self.M > self.B:
                raise ValueError(f'{who}: q is None and mode is "{self.mode}"; takes float32 [{self.M}, V]. Give q, or mode "det".')
            return
        if self.q.dtype != np.float32:
            raise TypeError(f"{who}: q is {self.q.dtype}; takes float32 [{self.M}, V]. Use q.astype(np.float32).")
        if self.q.ndim != 2 or len(self.q) != self.M:
            raise ValueError(f"{who}: q is {list(self.q.shape)}; takes [{self.M}, V], one row per tree row. Leave unused rows zero.")


def _as_list(values: Iterable[int]) -> list[int]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _check_whole(who: str, name: str, lists: Sequence[Sequence[Any]], least: int, most: int) -> None:
    for b, values in enumerate(lists):
        if set(map(type, values)) <= {int} and (not values or (min(values) >= least and max(values) <= most)):
            continue
        for row, value in enumerate(values):
            if not (isinstance(value, (int, np.integer)) and least <= value <= most):
                raise ValueError(f"{who}: {name}[{b}][{row}] is {value!r}; takes whole numbers from {least} to {most}.")


def _words(rows: int) -> int:
    return (rows + 63) >> 6


@lru_cache(maxsize=4096)
def _chain_shape(lengths: tuple[int, ...]) -> Shape:
    return _tree_shape(tuple(tuple(range(-1, n - 1)) for n in lengths))


@lru_cache(maxsize=1024)
def _tree_shape(links: tuple[tuple[int, ...], ...]) -> Shape:
    """The shape of a step from the parents of each of its sequences."""
    if not links:
        raise ValueError("TokenTree: 0 sequences came; takes one or more. Call it for live sequences only.")
    words = _words(max(map(len, links)))
    depth: list[int] = []
    bits: list[bytes] = []
    start = [0]
    for b, parents in enumerate(links):
        _check_parents(b, parents, MAX_ROWS)
        first = len(depth)
        seen: list[int] = []
        for row, parent in enumerate(parents):
            above = seen[parent] if parent >= 0 else 0
            seen.append(above | 1 << row)
            depth.append(depth[first + parent] + 1 if parent >= 0 else 0)
        bits += [mask.to_bytes(8 * words, "little") for mask in seen]
        start.append(len(depth))
    shape = Shape(
        np.array([parent for parents in links for parent in parents], np.int32),
        np.array(depth, np.int32),
        np.array(start, np.int32),
        np.frombuffer(b"".join(bits), "<i8").astype(np.int64).reshape(-1, words),
        np.zeros(len(depth), np.uint8),
    )
    for array in shape:
        array.flags.writeable = False
    return shape


def _check_parents(b: int, parents: tuple[int, ...], max_rows: int) -> None:
    """Raises ValueError unless the parents of sequence b are a tree in topological order of at most max_rows rows."""
    if not 1 <= len(parents) <= max_rows:
        raise ValueError(f"TokenTree: {len(parents)} rows in sequence {b}; takes 1 to {max_rows}. Lower rows= of the size policy.")
    if parents[0] != -1:
        raise ValueError(f"TokenTree: parent[0] is {parents[0]} in sequence {b}; takes -1. Row 0 is the root.")
    for row, parent in enumerate(parents):
        if 0 <= parent < row or row == 0:
            continue
        if parent == -1:
            raise ValueError(f"TokenTree: parent[{row}] is -1 in sequence {b}; only row 0 is a root. Hang the row under another.")
        if not 0 <= parent < len(parents):
            raise ValueError(f"TokenTree: parent[{row}] is {parent} in sequence {b}; takes 0 to {row - 1}. Leave the row out.")
        seen = {row}
        while parent not in seen and 0 <= parent < len(parents):
            seen.add(parent)
            parent = parents[parent]
        if parent in seen:
            raise ValueError(f"TokenTree: parent[{row}] is {parents[row]} in sequence {b}: a cycle; every path leads to row 0. Cut it.")
        raise ValueError(f"TokenTree: parent[{row}] is {parents[row]} in sequence {b}; a parent stands before its child. Reorder the rows.")


def _check_lengths(rows: list[list[int]], links: list[tuple[int, ...]], marks: list[list[int]] | None) -> None:
    who = "TokenTree.from_parents"
    _check_whole(who, "tokens", rows, 0, 2**31 - 1)
    _check_whole(who, "parents", links, -(2**31), 2**31 - 1)
    if len(rows) != len(links) or (marks is not None and len(marks) != len(rows)):
        raise ValueError(f"{who}: parents has {len(links)} sequences; takes {len(rows)}, as tokens has. Give one list per sequence.")
    for b, (t, p) in enumerate(zip(rows, links, strict=True)):
        if len(t) != len(p):
            raise ValueError(f"{who}: parents[{b}] has {len(p)} rows; takes {len(t)}, as tokens[{b}] has. Give one parent per token.")
        if marks is not None and len(marks[b]) != len(t):
            raise ValueError(f"{who}: kinds[{b}] has {len(marks[b])} rows; takes {len(t)}, as tokens[{b}] has. Give one kind per token.")


def _repeated_sibling(tokens: list[int], parents: tuple[int, ...], marks: list[int] | None) -> int:
    """The first candidate row whose token an earlier sibling has already, or -1."""
    if len(set(zip(parents, tokens, strict=True))) == len(tokens):
        return -1
    seen: set[tuple[int, int]] = set()
    for row, key in enumerate(zip(parents, tokens, strict=True)):
        if marks is not None and marks[row] != CANDIDATE:
            continue
        if key in seen:
            return row
        seen.add(key)
    return -1


def _merge_siblings(tokens: list[int], parents: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
    """Equal siblings become one row, which inherits the children of all; order is kept."""
    first: dict[tuple[int, int], int] = {}
    place: list[int] = []
    kept_tokens: list[int] = []
    kept_parents: list[int] = []
    for token, parent in zip(tokens, parents, strict=True):
        above = place[parent] if parent >= 0 else -1
        row = first.setdefault((above, token), len(kept_tokens))
        if row == len(kept_tokens):
            kept_tokens.append(token)
            kept_parents.append(above)
        place.append(row)
    return kept_tokens, tuple(kept_parents)
