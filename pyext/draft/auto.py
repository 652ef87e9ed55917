"""Auto: every drafter at hand, and each step the one that has paid best; plain decoding where none pays.

The choice is a bandit's with known costs: each drafter has its own measured size policy, which says how many tokens per second its best
width brings; the best one drafts, the others watch. A drafter nobody has met is expected to be decent and so is tried at once; one that
fell behind is tried again at growing intervals, within a share of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ramify.checks import between
from ramify.draft.base import Drafter, Wants, drafter
from ramify.registry import drafter as drafters
from ramify.size._experience import Experience, remembered
from ramify.size.base import SizePolicy
from ramify.size.measured import Measured
from ramify.tree import TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

_FIRST, _LAST = 24, 512  # steps between two visits to drafters that are behind
_VISIT = 3  # steps of a visit
_STAND = 8  # steps that the choice of a drafter stands


class Arm:
    """A drafter and its size policy."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.size = drafter, Measured(about=f"auto {drafter.name}")


@drafter("auto", lossless=True, trained=False, takes_model="maybe")
@dataclass
class Auto(Drafter):
    """Picks among the drafters that need no training (and the draft model's, when there is one) by measured cost and acceptance.

    model: a draft model, or None. share: of the time, for visits to drafters that are behind.
    """

    model: Any = None
    share: float = 0.02
    arms: list[Arm] = field(default_factory=list, init=False, repr=False)
    wants: Wants = field(default=Wants(), init=False, repr=False)
    chosen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        between("share", self.share, 0, 1, "auto")
        for cls in drafters.all():
            needs = getattr(cls, "takes_model", "no") == "yes"
            if getattr(cls, "portfolio", False) and not (needs and self.model is None):
                self.arms.append(Arm(cls(model=self.model) if needs else cls()))
        wants = [arm.drafter.wants for arm in self.arms]
        self.wants = Wants(
            topk=max(w.topk for w in wants),
            taps=tuple(sorted({layer for w in wants for layer in w.taps})),
            logits=any(w.logits for w in wants),
            prompt=any(w.prompt for w in wants),
        )

    def size_policy(self) -> SizePolicy:
        """The policy that chooses drafter and width together."""
        return _AutoSize(self)

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Bind every drafter."""
        for arm in self.arms:
            arm.drafter.bind(model, requests)

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Begin everywhere: all watch from the start."""
        for arm in self.arms:
            arm.drafter.begin(slots, prompts)

    def read(self, slot: int, tokens: Sequence[int], out: Any) -> None:
        """Show the prompt to those that want it."""
        for arm in self.arms:
            if arm.drafter.wants.prompt:
                arm.drafter.read(slot, tokens, out)

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """The chosen drafter's tree."""
        return self.arms[self.chosen].drafter.propose(slots, roots, rows)

    def observe(self, slots: Sequence[int], tree: TokenTree, out: Any, verdict: Verdict) -> None:
        """All see every step."""
        for arm in self.arms:
            arm.drafter.observe(slots, tree, out, verdict)

    def end(self, slots: Sequence[int]) -> None:
        """End the slots everywhere."""
        for arm in self.arms:
            arm.drafter.end(slots)


class _AutoSize(SizePolicy):
    """Chooses the drafter, then lets that drafter's own policy choose the width. What it knows of visits is kept like an experience."""

    def __init__(self, auto: Auto) -> None:
        self.auto, self.log = auto, Experience()
        self.visit = self.stands = 0  # steps left of a visit; steps for which the choice of a drafter stands
        self.home = self.next = 0

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Bind every drafter's policy."""
        for arm in self.auto.arms:
            arm.size.bind(model, requests)
        if model is not None:
            self.log = remembered(model, "auto")
        self.log.wait = max(self.log.wait, _FIRST)

    def rows(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Choose the drafter of most tokens per second, or a visit to another; then its width."""
        arms, batch = self.auto.arms, len(live)
        self.log.since += 1
        if not self.visit:
            if self.stands:
                self.stands -= 1
            else:
                rates = [arm.size.decide(batch) for arm in arms]
                self.stands = _STAND if self.home == rates.index(max(rates)) else 0
                self.home = self.auto.chosen = rates.index(max(rates))
            self.auto.chosen = self.home
            if len(arms) > 1 and self.log.since > self.log.wait:
                self._leave_home(batch)
        size = arms[self.auto.chosen].size
        if self.visit:
            return [size.visit(batch)] * batch
        return size.rows(live, lengths)

    def observe(self, tree: TokenTree, verdict: Verdict, clock: Clock) -> None:
        """The chosen drafter's policy learns; a visit's loss is written down."""
        arms, batch, log = self.auto.arms, tree.B, self.log
        size = arms[self.auto.chosen].size
        seconds = clock.draft.last + clock.forward.last + clock.verify.last + clock.commit.last
        log.spent += seconds
        size.observe(tree, verdict, clock)
        if not self.visit:
            return
        tokens = sum(map(len, verdict.path)) / batch
        home = arms[self.home].size.decide(batch)
        log.lost += max(0.0, seconds - tokens / home)
        self.visit -= 1
        if not self.visit:
            self.stands = 0
            log.wait = _FIRST if size.decide(batch) > home else min(2 * log.wait, _LAST)

    def _leave_home(self, batch: int) -> None:
        """Begin a visit to the next drafter, if the share of the time that visits may cost allows it."""
        arms, log = self.auto.arms, self.log
        other = (self.next + 1) % len(arms)
        other = (other + 1) % len(arms) if other == self.home else other
        price = arms[other].size.price(batch, arms[self.home].size.decide(batch))
        log.since = max(0, log.wait - _STAND)  # refused or not, not asked again at once
        if log.lost + price <= self.auto.share * log.spent:
            self.next = self.auto.chosen = other
            self.visit, log.since = _VISIT, 0
