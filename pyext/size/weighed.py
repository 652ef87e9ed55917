"""Weighed: of each tree the rows that bring most tokens per second, by their chance in the drafter's eyes.

For drafters whose guesses cost next to nothing and that say in `TokenTree.chance` how likely each of them is. They are asked in every
step, and what a step costs here decides how much of the tree is verified, down to the root alone. So a text that never repeats costs
the asking, and one that does is copied as fast as the machine allows, from the first step on. A tree among plain steps is also charged
for what the plain steps after it will take longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ramify.checks import show, whole
from ramify.size._cost import SETTLED, CostTable, cost_table
from ramify.size.base import SizePolicy, size_policy
from ramify.tree import MAX_ROWS, TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

_STANDS = 16  # steps until prices are taken from the cost table anew
_MEMORY = 0.05  # weight of the newest step


@dataclass(slots=True)
class _Run:
    """Plain steps in a row that the cost table has not heard of; to tell it of each would take a hundredth of a small model's step."""

    batch: int
    steps: int = 0
    forward: float = 0.0
    rest: float = 0.0

    def tell(self, costs: CostTable) -> None:
        if self.steps:
            costs.observe(self.batch, self.forward, self.rest, True, self.steps)


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
        self._speed: list[list[float]] = []  # steps per second by rows beyond the roots: after a tree, and after a plain step
        self._after_plain = True
        self._batch = self._stands = 0
        self._seen, self._tokens, self._seconds = 0, 1.0, 0.0  # steps, and what one of them brings and takes of late
        self.rate = 0.0
        self._run = _Run(0)

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
        B, M, speed, chance = tree.B, tree.M, self._speed[self._after_plain], tree.chance.tolist()
        if B > 1:
            chance.sort(reverse=True)
        tokens, best, kept = float(B), B * speed[0], B
        for row in range(B, M):
            tokens += chance[row]
            if tokens * speed[row + 1 - B] > best:
                best, kept = tokens * speed[row + 1 - B], row + 1
        if kept == M:
            return tree
        if kept == B:
            return TokenTree.roots(tree.tokens[tree.row_start[:-1]].tolist())
        return tree.prefix([kept] if B == 1 else np.add.reduceat(tree.chance >= chance[kept - 1], tree.row_start[:-1]))

    def observe(self, tree: TokenTree, verdict: "Verdict", clock: "Clock") -> None:
        """Correct the cost table, and count what the steps bring."""
        forward, rest, plain = clock.forward.last, clock.verify.last + clock.commit.last, tree.M == tree.B
        self._after_plain = plain
        if not plain or self._run.batch != tree.B or self._run.steps == SETTLED:
            self._run.tell(self.costs)
            self._run = _Run(tree.B)
        if plain:
            self._run.steps += 1
            self._run.forward += forward
            self._run.rest += rest
        else:
            self.costs.observe(tree.M, forward, rest)
        self._seen += 1
        weight = max(_MEMORY, 1 / self._seen)
        self._tokens += weight * (sum(map(len, verdict.path)) / tree.B - self._tokens)
        self._seconds += weight * (clock.draft.last + forward + rest - self._seconds)

    def _price(self, batch: int) -> None:
        seconds = self.costs.whole(np.arange(batch, batch * self.most + 1), batch)
        thaw = np.where(np.arange(len(seconds)) > 0, self.costs.thaw, 0.0)
        self._speed, self._batch, self._stands = [(1 / seconds).tolist(), (1 / (seconds + thaw)).tolist()], batch, _STANDS

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
