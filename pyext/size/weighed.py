"""Weighed: of each tree the rows that bring most tokens per second, by their chance in the drafter's eyes.

For drafters whose guesses cost next to nothing and that say in `TokenTree.chance` how likely each of them is. They are asked in every
step, and what a step costs here decides how much of the tree is verified, down to the root alone. So a text that never repeats costs
the asking, and one that does is copied as fast as the machine allows, from the first step on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ramify.checks import show, whole
from ramify.size._cost import CostTable, cost_table
from ramify.size.base import SizePolicy, size_policy
from ramify.tree import MAX_ROWS, TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

_STANDS = 16  # steps until prices are taken from the cost table anew
_MEMORY = 0.05  # weight of the newest step


@size_policy("weighed")
@dataclass
class Weighed(SizePolicy):
    """The cut of most tokens per second. A tree without `chance` is verified whole.

    most: rows asked for, per sequence. costs: a CostTable; None measures.
    """

    most: int = 32
    costs: Any = None

    def __post_init__(self) -> None:
        if whole("most", self.most, 1, "weighed") > MAX_ROWS:
            raise ValueError(f"weighed: most is {self.most}; takes 1 to {MAX_ROWS}.")
        if not (self.costs is None or isinstance(self.costs, CostTable)):
            raise TypeError(f"weighed: costs is {show(self.costs)}; takes a CostTable or None.")
        self._speed: list[float] = []  # steps per second by rows beyond the roots
        self._batch = self._stands = 0
        self._seen, self._tokens, self._seconds = 0, 1.0, 0.0  # steps, and what one of them brings and takes of late
        self.rate = 0.0

    def bind(self, model: Any, requests: Sequence["Request"]) -> None:
        """Find or measure the cost table."""
        if self.costs is None:
            self.costs = cost_table(model)

    def rows(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """As many as could pay."""
        return [self.most] * len(live)

    def trim(self, tree: TokenTree) -> TokenTree:
        """Keep the likeliest rows of all sequences, as many as bring most tokens per second."""
        if tree.chance is None or tree.M == tree.B:
            return tree
        if tree.B != self._batch or not self._stands:
            self._price(tree.B)
        self._stands -= 1
        chance = sorted(tree.chance.tolist(), reverse=True)
        tokens, best, kept = float(tree.B), tree.B * self._speed[0], 0
        for more, odds in enumerate(chance[tree.B :], 1):
            tokens += odds
            if tokens * self._speed[more] > best:
                best, kept = tokens * self._speed[more], more
        if kept == tree.M - tree.B:
            return tree
        if tree.B == 1:
            return tree.prefix([1 + kept])
        least = chance[tree.B + kept - 1]
        return tree.prefix(np.add.reduceat(tree.chance >= least, tree.row_start[:-1]))

    def observe(self, tree: TokenTree, verdict: "Verdict", clock: "Clock") -> None:
        """Correct the cost table, and count what the steps bring."""
        rest = clock.verify.last + clock.commit.last
        self.costs.observe(tree.M, clock.forward.last, rest, tree.M == tree.B)
        self._seen += 1
        weight = max(_MEMORY, 1 / self._seen)
        self._tokens += weight * (sum(map(len, verdict.path)) / tree.B - self._tokens)
        self._seconds += weight * (clock.draft.last + clock.forward.last + rest - self._seconds)

    def _price(self, batch: int) -> None:
        seconds = self.costs.whole(np.arange(batch, batch * self.most + 1), batch)
        self._speed, self._batch, self._stands = (1 / seconds).tolist(), batch, _STANDS

    # ---- what `auto` asks of the policies of its drafters, as of Measured

    drafts = True
    """Whether the best choice is to draft at all: each tree decides that for itself."""

    def choose(self, batch: int) -> int:
        """Rows per sequence of the next step."""
        self.decide(batch)
        return self.most

    visit = choose

    def decide(self, batch: int) -> float:
        """Tokens per second and sequence of late; before any step, of plain decoding."""
        self.rate = self._tokens / self._seconds if self._seen else 1 / (self.costs.at(batch) + self.costs.rest)
        return self.rate

    def price(self, batch: int, rate: float) -> float:
        """Seconds that a visit is expected to lose: trees are only verified where that pays."""
        return 0.0

    def forget(self) -> None:
        """Let the next step say more than all before it."""
        self._seen = 0

    def reopen(self) -> None:
        """Its drafter begins anew, which takes no time."""
