"""Measured: as many rows as pay, by what a step costs on this machine and by what was accepted lately.

Rows are in order of priority, so one verified tree tells what every smaller tree would have brought: the accepted rows that lie in its
prefix. Tokens per second of each width follow from that, the table of step costs, and the seconds that drafting took. One row, plain
decoding, is always among the choices. A drafter that was given up is asked again at growing intervals, and all such trials together
may cost `share` of the time; so a hopeless drafter costs a few percent at most.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ramify.checks import between, whole
from ramify.size._cost import CostTable, cost_table
from ramify.size.base import SizePolicy, size_policy
from ramify.tree import MAX_ROWS, TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 81, 128, 192, 256)
"""Rows per sequence that are considered. 81 is the whole tree of Token Recycling."""

_N = np.array(WIDTHS)
_PRIOR = 1 + 1.2 * (1 - _N**-0.7)
"""Tokens per step that are expected of a drafter nobody has met: enough to try it, little enough to drop it after a few steps."""

_MEMORY = 0.05  # weight of the newest step
_CLOSE = 0.02  # drafting goes on while it is this close to plain: what it would find next may be better than what it found
_FIRST, _LAST = 8, 256  # steps between trials: at first, and after many that failed


class Experience:
    """What a drafter has brought so far, by width: tokens and rows per sequence and step, and seconds of drafting."""

    def __init__(self) -> None:
        self.tokens = _PRIOR.copy()
        self.rows = _N.astype(np.float64)
        self.steps = np.zeros(len(_N))
        self.draft: dict[int, deque[float]] = {}

    def add(self, budget: int, tree_rows: Sequence[int], paths: Sequence[np.ndarray], seconds: float) -> None:
        """One step: trees of `tree_rows` rows were verified where `budget` were allowed, and `paths` accepted."""
        count = len(paths)
        tokens, rows, known = np.zeros(len(_N)), np.zeros(len(_N)), budget
        for n, path in zip(tree_rows, paths, strict=True):
            tokens += path.searchsorted(_N)
            rows += np.minimum(n, _N)
        if max(tree_rows) < budget:  # the drafter had no more to say, so a larger budget would have been the same
            known = MAX_ROWS
        k = int(_N.searchsorted(known, side="right"))
        weight = np.maximum(_MEMORY, 1 / (self.steps[:k] + 2))
        self.tokens[:k] += weight * (tokens[:k] / count - self.tokens[:k])
        self.rows[:k] += weight * (rows[:k] / count - self.rows[:k])
        self.steps[:k] += 1
        self.draft.setdefault(budget, deque(maxlen=5)).append(seconds)

    def expected(self) -> np.ndarray:
        """Tokens per step of each width; widths not tried yet go on from the widest tried one as the prior does."""
        tried = int(np.count_nonzero(self.steps))
        tokens = np.maximum.accumulate(self.tokens)
        if 1 < tried < len(_N):
            steepness = (tokens[tried - 1] - tokens[tried - 2]) / (_PRIOR[tried - 1] - _PRIOR[tried - 2])
            tokens[tried:] = tokens[tried - 1] + steepness * (_PRIOR[tried:] - _PRIOR[tried - 1])
        return tokens

    def drafting(self) -> np.ndarray:
        """Seconds of drafting of each width: the median of the last few, and between linear and constant for widths not tried."""
        if not self.draft:
            return np.zeros(len(_N))
        known = sorted((n, sorted(seen)[(len(seen) - 1) // 2]) for n, seen in self.draft.items())
        widths, seconds = [float(n) for n, _ in known], [s for _, s in known]
        if widths[0] > 1:
            widths, seconds = [1.0, *widths], [0.0, *seconds]
        guess = np.interp(_N, widths, seconds)
        return np.where(_N > widths[-1], seconds[-1] * np.sqrt(_N / widths[-1]), guess)


_met: WeakKeyDictionary[Any, dict[str, Experience]] = WeakKeyDictionary()


@size_policy("measured")
@dataclass
class Measured(SizePolicy):
    """The width of most tokens per second.

    most: rows per sequence, at most. share: of the time, for trials of a drafter that was given up and of wider trees. about: a name under
    which what was learned with this target is kept for later calls in this process; "" begins anew. costs: seconds by rows; None measures.
    """

    most: int = MAX_ROWS
    share: float = 0.02
    about: str = ""
    costs: CostTable | None = None
    experience: Experience = field(default_factory=Experience, init=False, repr=False)
    _width: int = field(default=0, init=False, repr=False)  # index into WIDTHS
    _trial: bool = field(default=False, init=False, repr=False)
    _wait: int = field(default=_FIRST, init=False, repr=False)
    _since: int = field(default=0, init=False, repr=False)
    _spent: float = field(default=0.0, init=False, repr=False)
    _lost: float = field(default=0.0, init=False, repr=False)
    _rest: float = field(default=0.0, init=False, repr=False)  # seconds of verify and commit

    def __post_init__(self) -> None:
        if whole("most", self.most, 1, "measured") > MAX_ROWS:
            raise ValueError(f"measured: most is {self.most}; takes 1 to {MAX_ROWS}.")
        between("share", self.share, 0, 1, "measured")

    def bind(self, model: Any, requests: Sequence["Request"]) -> None:
        """Find or measure the cost table, and what was learned about this drafter before."""
        if self.costs is None:
            self.costs = cost_table(model)
        if self.about:
            self.experience = _met.setdefault(model, {}).setdefault(self.about, self.experience)

    def rows(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """The best width for every sequence, or a trial's."""
        return [self.choose(len(live))] * len(live)

    def choose(self, batch: int) -> int:
        """Rows per sequence of the next step for a batch of this many."""
        rates = self._rates(batch)
        self._width = best = self._best(rates)
        self._trial = False
        self._since += 1
        if self._since > self._wait and best < len(rates) - 1:
            wider = best + 1 + int(rates[best + 1 :].argmax())
            loss = self._loss(rates, wider, best)
            if self._lost + loss <= self.share * self._spent:
                self._width, self._trial, self._since = wider, True, 0
        return WIDTHS[self._width]

    def revisit(self, batch: int) -> int:
        """Rows of a step that is there to learn about the drafter: the best width above one."""
        rates = self._rates(batch)
        self._width, self._trial = (1 + int(rates[1:].argmax()) if len(rates) > 1 else 0), False
        return WIDTHS[self._width]

    def rate(self, batch: int) -> float:
        """Tokens per second and sequence that are expected of the best width."""
        rates = self._rates(batch)
        return float(rates[self._best(rates)])

    def observe(self, tree: TokenTree, verdict: "Verdict", clock: "Clock") -> None:
        """Learn from a step that was drafted with the width last chosen."""
        width, draft, forward = WIDTHS[self._width], clock.draft.last, clock.forward.last
        self._rest += 0.1 * (clock.verify.last + clock.commit.last - self._rest)
        seconds = draft + forward + self._rest
        self._spent += seconds
        self.costs.observe(tree.M, forward)
        if not self._trial:
            self._add(width, tree, verdict, draft)
            return
        batch = tree.B
        before = self._rates(batch)
        plain = self._best(before)
        tokens = sum(map(len, verdict.path)) / batch
        self._lost += max(0.0, seconds - tokens / float(before[plain]))
        self._add(width, tree, verdict, draft)
        won = self._best(self._rates(batch)) > plain
        self._wait = _FIRST if won else min(2 * self._wait, _LAST)

    def _add(self, width: int, tree: TokenTree, verdict: "Verdict", draft: float) -> None:
        self.experience.add(width, tree.rows.tolist(), verdict.path, draft)

    def _rates(self, batch: int) -> np.ndarray:
        learned = self.experience
        upto = max(1, int(_N.searchsorted(self.most, side="right")))
        at, rest = self.costs.at, self._rest
        cost = np.array([at(batch * rows) + rest for rows in learned.rows[:upto].tolist()])
        return learned.expected()[:upto] / (cost + learned.drafting()[:upto])

    def _best(self, rates: np.ndarray) -> int:
        if len(rates) == 1:
            return 0
        best = 1 + int(rates[1:].argmax())
        return best if rates[best] > (1 - _CLOSE) * rates[0] else 0

    def _loss(self, rates: np.ndarray, wider: int, best: int) -> float:
        """Seconds that a trial is expected to cost more than the same tokens would."""
        tokens = float(self.experience.expected()[wider])
        return max(0.0, tokens / float(rates[wider]) - tokens / float(rates[best]))
