"""Measured: as many rows as pay, by what a step costs on this machine and by what was accepted lately.

Rows are in order of priority, so one verified tree tells what every smaller tree would have brought: the accepted rows that lie in its
prefix. Tokens per second of each width follow from that, the table of step costs, and the seconds that drafting took. One row, plain
decoding, is always among the choices. A drafter that was given up is asked again at growing intervals, and all such trials together
may cost `share` of the time; so a hopeless drafter costs a few percent at most.

The choice stands for a few steps and is then made anew: deciding takes as long as a tenth of a small model's step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ramify.checks import between, whole
from ramify.size._cost import cost_table
from ramify.size._experience import WIDTHS, Experience
from ramify.size.base import SizePolicy, size_policy
from ramify.tree import MAX_ROWS, TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

_SILENT, _CLOSE = 1.5, 0.03  # a drafter that offers so few rows goes on being asked while that is this close to plain
_FIRST, _LAST = 8, 256  # steps between trials: at first, and after many that failed
_STAND = 8  # steps that a choice stands, once the first few steps were seen

_met: WeakKeyDictionary[Any, dict[str, Experience]] = WeakKeyDictionary()  # target -> what was learned about its drafters


@size_policy("measured")
@dataclass
class Measured(SizePolicy):
    """The width of most tokens per second.

    most: rows per sequence, at most. share: of the time, for trials of a drafter that was given up and of wider trees. about: a name under
    which what was learned with this target is kept for later calls in this process; "" begins anew. costs: a CostTable; None measures.
    """

    most: int = MAX_ROWS
    share: float = 0.02
    about: str = ""
    costs: Any = None
    experience: Experience = field(default_factory=Experience, init=False, repr=False)

    def __post_init__(self) -> None:
        if whole("most", self.most, 1, "measured") > MAX_ROWS:
            raise ValueError(f"measured: most is {self.most}; takes 1 to {MAX_ROWS}.")
        between("share", self.share, 0, 1, "measured")
        self._widths = [n for n in WIDTHS if n <= self.most]
        self._chosen, self._best, self._wider = 1, 0, 0  # rows of this step; index of the best width; index of the best wider one
        self._stands = 0  # steps for which the choice still stands
        self._batch = 0
        self._loss = 0.0  # what a trial of the wider one is expected to cost
        self._rate = 0.0  # tokens per second and sequence of the best width
        self._trial, self._wait, self._since = False, _FIRST, 0
        self._spent = self._lost = self._rest = 0.0  # seconds: all, of trials, of verify and commit in a step
        self._rows: list[np.ndarray] = []
        self._paths: list[np.ndarray] = []

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
        self.decide(batch)
        self._since += 1
        if self._since > self._wait and self._wider > self._best and self._lost + self._loss <= self.share * self._spent:
            self._take(self._wider)
            self._trial, self._since = True, 0
        return self._chosen

    def visit(self, batch: int) -> int:
        """Rows of a step that is there to learn about the drafter, whatever it is expected to bring: the best width above one."""
        self.decide(batch)
        self._take(max(self._best, self._wider))
        return self._chosen

    def decide(self, batch: int) -> float:
        """Choose the best width, if the last choice does not stand any more; returns its tokens per second and sequence."""
        if self._stands > 0 and batch == self._batch:
            self._stands -= 1
            return self._rate
        self._learn()
        rates, tokens, rows = self._rates(batch)
        best = 1 + int(rates[1:].argmax()) if len(rates) > 1 else 0
        if best and rates[best] <= (1 - _CLOSE if rows[best] < _SILENT else 1) * rates[0]:
            best = 0
        settled = best == self._best and self.experience.steps[0] > _STAND
        self._best = self._wider = best
        if best < len(rates) - 1:
            self._wider = wider = best + 1 + int(rates[best + 1 :].argmax())
            self._loss = max(0.0, float(tokens[wider] / rates[wider] - tokens[wider] / rates[best]))
        self._batch, self._trial, self._rate, self._chosen = batch, False, float(rates[best]), self._widths[best]
        self._stands = _STAND if settled else 0
        return self._rate

    def observe(self, tree: TokenTree, verdict: "Verdict", clock: "Clock") -> None:
        """Learn from a step that was drafted with the width last chosen."""
        draft, forward = clock.draft.last, clock.forward.last
        self._rest += 0.1 * (clock.verify.last + clock.commit.last - self._rest)
        seconds = draft + forward + self._rest
        self._spent += seconds
        self.costs.observe(tree.M, forward)
        self.experience.drafted(self._chosen, draft)
        self._rows.append(tree.row_start)
        self._paths += verdict.path
        if self._trial:
            tokens, best = sum(map(len, verdict.path)) / tree.B, self._best
            self._lost += max(0.0, seconds - tokens / self._rate)
            self.decide(tree.B)
            self._wait = _FIRST if self._best > best else min(2 * self._wait, _LAST)

    def _take(self, width: int) -> None:
        """Leave the choice for one step."""
        self._learn()
        self._chosen, self._stands = self._widths[width], 0

    def _learn(self) -> None:
        """Take in the steps since the last choice, all of one width."""
        if self._paths:
            rows = np.concatenate([start[1:] - start[:-1] for start in self._rows])
            self.experience.add(self._chosen, rows, self._paths, len(self._rows))
            self._rows, self._paths = [], []

    def _rates(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens per second, tokens and rows per step, of each width."""
        count = len(self._widths)
        tokens, rows = np.maximum.accumulate(self.experience.tokens), self.experience.rows
        forward = np.array([self.costs.at(batch * n) for n in rows[:count].tolist()])
        return tokens[:count] / (forward + self.experience.drafting()[:count] + self._rest), tokens[:count], rows[:count]
