"""Weighed: of each tree the rows that bring most tokens per second, by their chance in the drafter's eyes.

For drafters whose guesses cost next to nothing and that say in `TokenTree.chance` how likely each of them is. They are asked in every
step, and what a step costs here decides how much of the tree is verified, down to the root alone. So a text that never repeats costs
the asking, and that a small share of the time once guesses have brought nothing for some steps; one that does is copied as fast as
the machine allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ramify.checks import between, show, whole
from ramify.sampling.pipeline import sampled
from ramify.size._cost import SETTLED, CostTable, cost_table
from ramify.size.base import SizePolicy, size_policy
from ramify.tree import MAX_ROWS, TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

_STANDS = 16  # steps until prices are taken from the cost table anew
_OFF = 1.5  # a step that takes so many times its price has prices taken anew at once
_GAIN = 1.2  # what a tree must promise over a plain step: among plain ones it finds neither its code nor its weights at hand
_MEMORY = 0.05  # weight of the newest step
_PATIENCE = 16.0  # times that a drafter whose guesses bring nothing is asked before it is asked within its share of the time
_FRESH = 4.0  # of these, for a text of a kind that has brought nothing before


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


@dataclass(slots=True)
class _Asks:
    """left: times that the drafter may be asked before it has to be right again; seconds: what asking takes."""

    left: float = _PATIENCE
    seconds: float = 0.0

    def asked(self, seconds: float) -> None:
        self.left -= 1
        self.seconds += _MEMORY * (seconds - self.seconds) if self.seconds else seconds

    def earn(self, seconds: float, right: bool) -> None:
        """The full count after a guess that was right, else what `seconds` of time for asking allow."""
        if right:
            self.left = _PATIENCE
        elif self.seconds:
            self.left = min(_PATIENCE, self.left + seconds / self.seconds)


_kept: WeakKeyDictionary[Any, dict[tuple[str, bool], _Asks]] = WeakKeyDictionary()  # target -> by `about` and whether text is sampled


@size_policy("weighed")
@dataclass
class Weighed(SizePolicy):
    """The cut of most tokens per second. A tree without `chance` is verified whole.

    most: rows asked for, per sequence. share: of the time, for asking while guesses bring nothing. about: a name under which later calls
    with this target find how asking went; "" begins anew. costs: a CostTable; None measures.
    """

    most: int = 32
    share: float = 0.02
    about: str = ""
    costs: Any = None

    def __post_init__(self) -> None:
        if whole("most", self.most, 1, "weighed") > MAX_ROWS:
            raise ValueError(f"weighed: most is {self.most}; takes 1 to {MAX_ROWS}.")
        between("share", self.share, 0, 1, "weighed")
        if not isinstance(self.about, str):
            raise TypeError(f"weighed: about is {show(self.about)}; takes a string.")
        if not (self.costs is None or isinstance(self.costs, CostTable)):
            raise TypeError(f"weighed: costs is {show(self.costs)}; takes a CostTable or None.")
        self._speed: list[float] = []  # steps per second by rows beyond the roots
        self._batch = self._stands = 0
        self._asks, self._asked = _Asks(), False
        self._seen, self._tokens, self._seconds = 0, 1.0, 0.0  # steps, and what one of them brings and takes of late
        self.rate = 0.0
        self._run = _Run(0)

    def bind(self, model: Any, requests: Sequence["Request"]) -> None:
        """Find or measure the cost table, and how asking went before."""
        if self.costs is None:
            self.costs = cost_table(model)
        if self.about:
            kind = self.about, sampled(r.params for r in requests)
            self._asks = _kept.setdefault(model, {}).setdefault(kind, self._asks)
            self._asks.left = max(self._asks.left, _FRESH)

    def rows(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """As many as could pay, or none."""
        return [self.choose(len(live))] * len(live)

    def trim(self, tree: TokenTree) -> TokenTree:
        """Keep the likeliest rows of all sequences, as many as bring most tokens per second."""
        if tree.chance is None or tree.M == tree.B:
            return tree
        if tree.B != self._batch or not self._stands:
            self._price(tree.B)
        self._stands -= 1
        B, M, speed, chance = tree.B, tree.M, self._speed, tree.chance.tolist()
        if B > 1:
            chance.sort(reverse=True)
        tokens, best, kept = float(B), _GAIN * B * speed[0], B
        for row in range(B, M):
            tokens += chance[row]
            if tokens * speed[row + 1 - B] > best:
                best, kept = tokens * speed[row + 1 - B], row + 1
        if kept == B:
            return TokenTree.roots(tree.tokens[tree.row_start[:-1]].tolist())
        if kept == M:
            return tree
        return tree.prefix([kept] if B == 1 else np.add.reduceat(tree.chance >= chance[kept - 1], tree.row_start[:-1]))

    def observe(self, tree: TokenTree, verdict: "Verdict", clock: "Clock") -> None:
        """Correct the cost table, and count what the steps bring."""
        tokens = sum(map(len, verdict.path))
        forward, rest, plain = clock.forward.last, clock.verify.last + clock.commit.last, tree.M == tree.B
        if not plain or self._run.batch != tree.B or self._run.steps == SETTLED:
            self._run.tell(self.costs)
            self._run = _Run(tree.B)
        if plain:
            self._run.steps += 1
            self._run.forward += forward
            self._run.rest += rest
        else:
            self.costs.observe(tree.M, forward, rest)
            if tree.B == self._batch and (forward + rest) * self._speed[tree.M - tree.B] > _OFF:
                self._stands = 0
        seconds = clock.draft.last + forward + rest
        if self._asked:
            self._asks.asked(clock.draft.last)
        self._asks.earn(self.share * seconds, tokens > tree.B)
        self._seen += 1
        weight = max(_MEMORY, 1 / self._seen)
        self._tokens += weight * (tokens / tree.B - self._tokens)
        self._seconds += weight * (seconds - self._seconds)

    def _price(self, batch: int) -> None:
        seconds = self.costs.whole(np.arange(batch, batch * self.most + 1), batch)
        self._speed, self._batch, self._stands = (1 / seconds).tolist(), batch, _STANDS

    # ---- what `auto` asks of the policies of its drafters, as of Measured

    drafts = met = True
    """Whether the best choice is to draft at all, and the drafter known: each tree decides for itself, and says its chances."""

    def choose(self, batch: int) -> int:
        """Rows per sequence of the next step."""
        self.decide(batch)
        self._asked = self._asks.left >= 1
        return self.most if self._asked else 1

    def visit(self, batch: int) -> int:
        """Rows per sequence of a step that is there to learn about the drafter."""
        self._asked = True
        return self.most

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
