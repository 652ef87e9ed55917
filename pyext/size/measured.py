"""Measured: as many rows as pay, by what a step costs on this machine and by what was accepted lately.

Rows are in order of priority, so one verified tree tells what every smaller tree would have brought: the accepted rows that lie in its
prefix. Tokens per second of each width follow from that, the table of step costs, and the seconds that drafting took. One row, plain
decoding, is always among the choices. A drafter that was given up is asked again at growing intervals, and all such trials together
may cost `share` of the time; so a hopeless drafter costs a few percent at most.

The choice stands for a few steps and is then made anew: deciding takes as long as a tenth of a small model's step. Where plain decoding
is the choice, the policy rests (_rest.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ramify.checks import between, show, whole
from ramify.sampling.pipeline import sampled
from ramify.size._cost import SETTLED, CostTable, cost_table
from ramify.size._experience import FIRST_WAIT, WIDTHS, Experience, remembered
from ramify.size._rest import MOST, Rest
from ramify.size.base import SizePolicy, size_policy
from ramify.tree import MAX_ROWS, TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

_SILENT, _CLOSE = 1.5, 0.03  # a drafter that offers so few rows goes on being asked while that is this close to plain
_LAST_WAIT = 64  # steps between trials, after many that failed
_STAND = 8  # steps that a choice stands, once the first few steps were seen
_SPELL = SETTLED + 8  # plain steps of a spell, the last of which count
_NEAR = 0.05  # share of its time that a spell is taken to lose, at least
_REFUSED = 32  # steps before a trial that was too dear is thought of again


@size_policy("measured")
@dataclass
class Measured(SizePolicy):
    """The width of most tokens per second.

    most: rows per sequence, at most. share: of the time, for trials of a drafter that was given up and of wider trees, and as much again
    for plain steps where a drafter drafts. about: a name under which what was learned with this target is kept for later calls, in this
    process and (in the cache folder) in later ones; "" begins anew. costs: a CostTable; None measures.
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
        if not isinstance(self.about, str):
            raise TypeError(f"measured: about is {show(self.about)}; takes a string.")
        if not (self.costs is None or isinstance(self.costs, CostTable)):
            raise TypeError(f"measured: costs is {show(self.costs)}; takes a CostTable or None.")
        self._widths = [n for n in WIDTHS if n <= self.most]
        self._chosen, self._best, self._wider = 1, 0, 0  # rows of this step; index of the best width; index of the best wider one
        self._stands = 0  # steps for which the choice still stands
        self._rest = Rest()
        self._spell = 0  # steps left of a spell of plain ones
        self._spells = 0.0  # seconds that the next spell is expected to lose
        self._batch = 0
        self._loss = 0.0  # what a trial of the wider one is expected to cost
        self._rate = 0.0  # tokens per second and sequence of the best width
        self._trial = False
        self._left = np.inf  # tokens that the longest request may still bring
        self._first: float | None = None  # seconds of this call's first draft, while it waits for a second to compare with
        self._opened = False
        self._rows: list[np.ndarray] = []
        self._paths: list[np.ndarray] = []

    def bind(self, model: Any, requests: Sequence["Request"]) -> None:
        """Find or measure the cost table, and what was learned about this drafter before."""
        self.reopen()
        if self.costs is None:
            self.costs = cost_table(model)
        if self.about:
            drawn = sampled(r.params for r in requests)
            self.experience = remembered(model, f"{self.about}, sampled" if drawn else self.about)
        self._left = max((r.max_new_tokens for r in requests), default=np.inf)

    def rows(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """The best width for every sequence, or a trial's."""
        batch = len(live)
        if self._rest.covers(batch, self.costs):
            return [1] * batch
        width = self.choose(batch)
        if not (self._best or self._trial) and self._stands:
            self._begin_rest(batch)
        return [width] * batch

    def choose(self, batch: int) -> int:
        """Rows per sequence of the next step for a batch of this many."""
        if self._spell:
            self._spell, self._chosen = self._spell - 1, 1
            return 1
        self.decide(batch)
        e = self.experience
        if self._best and self.share * (e.spent - e.checked) > self._spells:
            self._take(0)
            self._spell, e.checked = _SPELL - 1, e.spent
        elif e.since >= e.wait and self._wider > self._best and e.lost + self._loss <= self.share * e.spent:
            self._take(self._wider)
            self._trial, e.since = True, 0
            if not self._best:
                self.forget()
        return self._chosen

    def _begin_rest(self, batch: int) -> None:
        """Decode plainly, unasked, until the next trial is due."""
        e = self.experience
        self._learn()
        steps = max(e.wait - e.since, _REFUSED) if self._wider else MOST
        self._rest.begin(int(max(1, min(steps, self._left))), batch, self.costs)
        e.rested(self._rest.left)
        self._left -= self._rest.left
        self._stands = 0

    def forget(self) -> None:
        """Let the next step say more than all before it: texts change, and a drafter that was given up may be right by now."""
        self._learn()
        self.experience.steps[1:] = 0.0

    def visit(self, batch: int) -> int:
        """Rows of a step that is there to learn about the drafter, whatever it is expected to bring: the best width above one."""
        self.decide(batch)
        self._take(max(self._best, self._wider))
        return self._chosen

    def price(self, batch: int, rate: float) -> float:
        """Seconds that a visit is expected to lose against decoding at `rate` tokens per second."""
        self.decide(batch)
        rates, tokens, _ = self._rates(batch)
        k = max(self._best, self._wider)
        return max(0.0, float(tokens[k] / rates[k] - tokens[k] / rate)) + self._opening() + self.costs.thaw

    def decide(self, batch: int) -> float:
        """Choose the best width, if the last choice does not stand any more; returns its tokens per second and sequence."""
        if self._stands > 0 and batch == self._batch:
            self._stands -= 1
            return self._rate
        self._learn()
        rates, tokens, rows = self._rates(batch)
        known = min(self.experience.known or len(rates), len(rates))  # beyond them only trials go, but for a drafter nobody has met
        best = 1 + int(rates[1:known].argmax()) if known > 1 else 0
        if best and rates[best] <= (1 - _CLOSE if rows[best] < _SILENT else 1) * rates[0]:
            best = 0
        settled = best == self._best and self.experience.steps[0] >= _STAND
        self._best = self._wider = best
        self._spells = _SPELL * max(_NEAR, 1 - float(rates[0] / rates[best])) / float(rates[0])
        if best < len(rates) - 1:
            self._wider = wider = best + 1 + int(rates[best + 1 :].argmax())
            self._loss = max(0.0, float(tokens[wider] / rates[wider] - tokens[wider] / rates[best])) + self._opening() + self._thaw()
        self._batch, self._trial, self._rate, self._chosen = batch, False, float(rates[best]), self._widths[best]
        self._stands = _STAND if settled else 0
        return self._rate

    @property
    def rate(self) -> float:
        """Tokens per second and sequence that the last choice is expected to bring."""
        return self._rate

    @property
    def drafts(self) -> bool:
        """Whether the best choice is to draft at all."""
        return self._best > 0

    @property
    def met(self) -> bool:
        """Whether this drafter has ever drafted for this target: what is known of others is a guess."""
        return max(self.experience.draft, default=1) > 1

    def observe(self, tree: TokenTree, verdict: "Verdict", clock: "Clock") -> None:
        """Learn from a step that was drafted with the width last chosen."""
        if self._rest.left:
            self._rest.observe(clock, self.experience, self.costs)
            return
        e, draft, forward = self.experience, clock.draft.last, clock.forward.last
        rest = clock.verify.last + clock.commit.last
        self.costs.observe(tree.M, forward, rest, tree.M == tree.B)
        seconds = draft + forward + rest
        tokens = sum(map(len, verdict.path)) / tree.B
        e.spent += seconds
        e.since += 1
        self._left -= tokens
        self._drafted(draft)
        self._rows.append(tree.row_start)
        self._paths += verdict.path
        if self._trial:
            best = self._best
            e.lost += max(0.0, seconds - tokens / self._rate) + self._thaw()
            self.decide(tree.B)
            e.wait = 0 if self._best > best else min(max(2 * e.wait, FIRST_WAIT), _LAST_WAIT)

    def _drafted(self, seconds: float) -> None:
        """Note the seconds of a draft; what the first one of a call takes longer than the second is its opening."""
        e, width = self.experience, self._chosen
        if width == 1 or self._opened:
            e.drafted(width, seconds)
        elif self._first is None and max(e.draft, default=1) == 1:
            self._first = seconds  # nothing to compare with yet
        else:
            usual = seconds if self._first is not None else float(e.drafting()[WIDTHS.index(width)])
            e.opening, self._opened = max(0.0, (seconds if self._first is None else self._first) - usual), True
            if self._first is not None:
                e.drafted(width, seconds)

    def reopen(self) -> None:
        """The drafter begins, or will begin anew: its next draft is a first one."""
        self._first, self._opened = None, False

    def _opening(self) -> float:
        """Seconds that the next draft takes beyond the usual."""
        return self.experience.opening if self._first is None and not self._opened else 0.0

    def _thaw(self) -> float:
        """Seconds that plain steps after a trial will take longer, where the trial interrupts plain decoding."""
        return 0.0 if self._best else self.costs.thaw

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
        e = self.experience
        count = min(len(self._widths), e.frontier)
        tokens, rows = (each[:count] for each in e.expected())
        seconds = self.costs.whole(batch * rows, batch) + e.drafting()[:count]
        if opening := self._opening():  # shared among the tokens that are still to come
            seconds[1:] += opening * tokens[1:] / max(1.0, self._left)
        return tokens / seconds, tokens, rows
