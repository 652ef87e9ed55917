"""What a verifier returns, and the walk that all verifiers share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ramify.sampling.pipeline import Sampling, logits_of
from ramify.tree import CANDIDATE, MODES, TokenTree


@dataclass(slots=True)
class Verdict:
    """What one step decided.

    path: for each sequence the accepted rows, int32, ascending, row 0 (the root) first: the rows whose keys and values to commit.
    emitted: for each sequence the tokens after the root: those of path[1:], then the one decided at the last accepted row.

    len(path[b]) == len(emitted[b]): the root was emitted by the step before and enters the cache in this one.
    """

    path: list[np.ndarray]
    emitted: list[list[int]]

    def cut(self, counts: Sequence[int]) -> "Verdict":
        """The verdict that keeps the first counts[b] emitted tokens of each sequence, as a stop rule asks for."""
        if all(n >= len(tokens) for n, tokens in zip(counts, self.emitted, strict=True)):
            return self
        path = [rows[:n] for rows, n in zip(self.path, counts, strict=True)]
        return Verdict(path, [tokens[:n] for tokens, n in zip(self.emitted, counts, strict=True)])

    @property
    def bonus(self) -> list[int]:
        """The last emitted token of each sequence (the next root), or -1 where nothing was emitted."""
        return [tokens[-1] if tokens else -1 for tokens in self.emitted]


class Walk:
    """Where a verifier stands: one sequence of one step, the rows accepted so far, and the tokens after the root on that path."""

    __slots__ = ("tree", "out", "sampling", "b", "first", "tokens", "parents", "rows", "path")

    def __init__(self, tree: TokenTree, out: Any, sampling: Sampling, b: int) -> None:
        span = tree.span(b)
        self.tree, self.out, self.sampling, self.b = tree, out, sampling, b
        self.first = span.start
        self.tokens: list[int] = tree.tokens[span].tolist()
        self.parents: list[int] = tree.parent[span].tolist()
        self.rows = [0]
        self.path: list[int] = []

    @property
    def row(self) -> int:
        """The packed row at which the walk stands."""
        return self.first + self.rows[-1]

    @property
    def greedy(self) -> bool:
        """Whether this sequence takes the most likely token instead of a sample."""
        return self.sampling.params[self.b].temperature == 0

    def match(self, token: int) -> int:
        """Return the candidate child that holds `token`, or -1."""
        here = child = self.rows[-1]
        tokens, parents = self.tokens, self.parents
        try:
            while True:
                child = tokens.index(token, child + 1)
                if parents[child] == here and self.tree.kind[self.first + child] == CANDIDATE:
                    return child
        except ValueError:  # the token stands in no later row
            return -1

    def children(self) -> list[int]:
        """Return the candidate children of the current row, in the order in which they were drawn."""
        here = child = self.rows[-1]
        found = []
        try:
            while True:
                child = self.parents.index(here, child + 1)
                if self.tree.kind[self.first + child] == CANDIDATE:
                    found.append(child)
        except ValueError:  # no further child
            return found

    def choose(self) -> int:
        """Return the token that plain decoding with the same seed would emit here."""
        return self.sampling.choose(self.b, self.out, self.row, self.path)

    def p(self) -> np.ndarray:
        """Return the target's processed distribution here, float64 [V]."""
        return self.sampling.probabilities(self.b, logits_of(self.out, self.row), self.path)

    def q(self) -> np.ndarray:
        """Return what the children of this row were drawn from, float64 [V], summing to 1 (a copy)."""
        if self.tree.q is None:
            raise ValueError(f"verify: tree.q is None and row {self.row} has children; takes float32 [M, V]. Give what drew them.")
        q = self.tree.q[self.row].astype(np.float64)
        total = q.sum()
        if not 0 < total < np.inf or q.min() < 0:
            raise ValueError(f"verify: q of row {self.row} sums to {total}; takes probabilities. Say what its children were drawn from.")
        q /= total
        return q

    def uniform(self, purpose: int, lane: int = 0) -> float:
        """Return the random number for this position, purpose and lane."""
        return self.sampling.uniform(self.b, len(self.path), purpose, lane)


class Verifier:
    """Walks each sequence from its root and decides a token at every row it reaches. A subclass supplies `decide`.

    modes: the trees it takes, by how their children were chosen. Exactness asks three things of `decide`: the token must follow the
    target's distribution at this row given the path; random numbers come from `walk.uniform` (positions have fresh ones); nothing but
    the current row, its children and their q may be looked at.
    """

    modes: tuple[str, ...] = MODES

    def __call__(self, tree: TokenTree, out: Any, sampling: Sampling) -> Verdict:
        """Return what to commit and to emit. out: a StepOut whose rows are those of the tree.

        Raises ValueError for a tree of another mode, for logits that were not asked for, and for NaN.
        """
        if tree.mode not in self.modes:
            raise ValueError(f'{type(self).__name__}: tree.mode is "{tree.mode}"; takes {", ".join(self.modes)}. Take another verifier.')
        who, live = type(self).__name__, len(sampling.params)
        if live != tree.B:
            raise ValueError(f"{who}: tree has {tree.B} sequences; takes {live}, as sampling has. Give both the live ones.")
        verdict = Verdict([], [])
        for b in range(tree.B):
            walk = Walk(tree, out, sampling, b)
            child = 0
            while child >= 0:
                token, child = self.decide(walk)
                walk.path.append(token)
                if child >= 0:
                    walk.rows.append(child)
            verdict.path.append(np.array(walk.rows, np.int32))
            verdict.emitted.append(walk.path)
        return verdict

    def decide(self, walk: Walk) -> tuple[int, int]:
        """Return the token to emit after the current row, and the child that holds it, or -1 to stop."""
        raise NotImplementedError


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return norm([p - q]_+), float64 [V]; p itself when the two are equal up to rounding and nothing is left."""
    rest = p - q
    np.maximum(rest, 0, out=rest)
    total = rest.sum()
    if total <= 0:
        return p
    rest /= total
    return rest
