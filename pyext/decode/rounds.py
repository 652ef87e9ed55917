"""Rounds: the steps of the live requests between two retirements, in the four phases that the loop times.

Here a step is drafted, run, decided and committed one phase after the other. device_rounds.py has the other kind, for a device that does
all of it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ramify.checks import show
from ramify.decode.output import Output
from ramify.draft.base import Drafter
from ramify.registry import verifier as verifiers
from ramify.sampling.pipeline import Sampling
from ramify.size.base import SizePolicy
from ramify.tree import MAX_ROWS, TokenTree
from ramify.verify import choose_verifier
from ramify.verify.base import Verdict

Judge = Callable[[TokenTree, Any, Sampling], Verdict]


@dataclass(frozen=True)
class Parts:
    """What a call decodes with. verifier: None takes the exact one that accepts most for each tree."""

    model: Any
    drafter: Drafter
    size: SizePolicy
    verifier: Judge | None


class Rounds:
    """Steps of `live` requests, each seen whole before the next begins.

    tree: of the last round. told: whether the size policy asked for its rows. ahead: rounds that are under way behind it.
    """

    told, ahead = True, 0

    def __init__(self, parts: Parts, cache: Any, outs: Sequence[Output], live: Sequence[int]) -> None:
        self.parts, self.live, self.outs = parts, list(live), list(outs)
        self.view: Any = cache.of(live)
        self.sampling = Sampling([o.request.params for o in self.outs], [o.ids for o in self.outs])
        self.tree: TokenTree
        self.out: Any = None
        self._model_draws = self.sampling.needs_logits and getattr(parts.model, "draws", False)
        self._positions = parts.model.config.max_positions
        self._longest = max(o.request.capacity for o in self.outs)
        self._verifiers: dict[tuple[str, bool], Judge] = {}

    def draft(self) -> None:
        """Ask the drafter, for as many rows as the size policy wants."""
        size = self.parts.size
        rows = self._fit(size.rows(self.live, self.view.lengths))
        roots = [out.ids[-1] for out in self.outs]
        self.tree = size.trim(self._proposed(roots, rows)) if max(rows) > 1 else TokenTree.roots(roots)

    def run(self) -> None:
        """Have the model look at the tree."""
        wants = self.parts.drafter.wants
        wanted: dict[str, Any] = {"taps": wants.taps, "topk": wants.topk, "logits": wants.logits or self.sampling.needs_logits}
        if self._model_draws:
            wanted["draws"] = self.sampling.draws()
        self.out = self.parts.model.forward(self.tree, self.view, **wanted)

    def decide(self) -> Verdict:
        """Which rows are accepted, and what comes after them."""
        return (self.parts.verifier or self._verifier(self.tree))(self.tree, self.out, self.sampling)

    def commit(self, verdict: Verdict) -> None:
        """Append what was accepted, and show it to the drafter."""
        self.view.commit(verdict.path)
        self.parts.drafter.observe(self.live, self.tree, self.out, verdict)

    def close(self) -> None:
        """Leave nothing under way."""

    def _proposed(self, roots: list[int], rows: list[int]) -> TokenTree:
        """The drafter's tree: whatever it guesses, a tree over other roots would decode another text."""
        drafter = self.parts.drafter
        tree = drafter.propose(self.live, roots, rows)
        name = getattr(drafter, "name", type(drafter).__name__)
        if not isinstance(tree, TokenTree):
            raise TypeError(f"{name}: propose returned {show(tree)}; takes a TokenTree, such as TokenTree.chains(roots, guesses).")
        if tree.tokens[tree.row_start[:-1]].tolist() != roots:
            came = tree.tokens[tree.row_start[:-1]].tolist()
            raise ValueError(f"{name}: propose returned a tree over the roots {came}; takes {roots}, the last tokens emitted.")
        if tree.M > sum(rows):
            raise ValueError(f"{name}: propose returned {tree.rows.tolist()} rows; takes at most {rows}, as it was asked for.")
        return tree

    def _fit(self, rows: Sequence[int]) -> list[int]:
        """Rows that can be of use: one where a single token is left, none beyond the last position that the model has."""
        fitted = [1 if o.left == 1 else min(n, MAX_ROWS) for o, n in zip(self.outs, rows, strict=True)]
        if self._longest + max(fitted) > self._positions:
            fitted = [max(1, min(n, self._positions - len(o.ids) + 1)) for o, n in zip(self.outs, fitted, strict=True)]
        return fitted

    def _verifier(self, tree: TokenTree) -> Judge:
        """The verifier for this tree: decided by how its children were chosen, the temperatures, and whether it branches."""
        chain = tree.mode != "det" and bool((tree.depth[1:] > tree.depth[:-1]).sum() == tree.M - tree.B)
        key = tree.mode, chain
        if key not in self._verifiers:
            self._verifiers[key] = verifiers.get(choose_verifier(tree.mode, self.sampling.params, chain))()
        return self._verifiers[key]
