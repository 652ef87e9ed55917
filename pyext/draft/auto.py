"""Auto: every drafter at hand, and each step the one that has paid best; plain decoding where none pays.

The choice is a bandit's with known costs: each drafter has its own measured size policy, which says how many tokens per second its best
width brings; the best one drafts, the others watch. Those nobody has met are visited first, the cheap before the dear; one that fell
behind is visited again at growing intervals; all visits stay within a share of the time, and one too dear keeps nobody else waiting.
A small model's step is over sooner than four drafters have watched it. So a drafter sleeps (has not begun, wants nothing) until it is
first asked to draft, and again when visits have failed for long; those awake watch later: steps are kept and shown many at a time, or
when a drafter's turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ramify.checks import between
from ramify.draft.base import Drafter, Wants, drafter
from ramify.model.step_out import StepOut
from ramify.registry import drafter as drafters
from ramify.sampling.pipeline import sampled
from ramify.size._cost import CostTable
from ramify.size._experience import Experience, remembered
from ramify.size._rest import Rest
from ramify.size.base import SizePolicy
from ramify.size.measured import Measured
from ramify.tree import TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

_FIRST, _LAST = 24, 1024  # steps between two visits to drafters that are behind
_NEW = 4  # the same where there is one that nobody has met
_VISIT = 3  # steps of a visit
_REFUSED = 32  # steps before a visit that was too dear is thought of again: its price takes a third of a small model's step
_KEPT = 64  # steps that wait to be watched, at most
_SLEEPY = 4 * _FIRST  # steps between visits from which on a drafter that has failed one sleeps until the next
PLAIN = -1  # where no drafter pays


class Arm:
    """A drafter and its size policy. awake: whether it has begun. seen: how many of the steps that are kept it has watched."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.size = drafter, drafter.size_policy() or Measured(about=f"auto {drafter.name}")
        self.awake, self.seen = False, 0

    def watch(self, steps: Sequence[tuple]) -> None:
        """Watch the steps that it has not seen."""
        for step in steps[self.seen :]:
            self.drafter.observe(*step)
        self.seen = len(steps)


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
    chosen: int = field(default=PLAIN, init=False)
    _awake: list[Arm] = field(default_factory=list, init=False, repr=False)
    _steps: list[tuple] = field(default_factory=list, init=False, repr=False)  # what they have still to watch
    _text: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        between("share", self.share, 0, 1, "auto")
        for cls in sorted(drafters.all(), key=_needs_model):  # those without a second model first: to meet them costs little
            if getattr(cls, "portfolio", False) and not (_needs_model(cls) and self.model is None):
                self.arms.append(Arm(_made(cls, **({"model": self.model} if _needs_model(cls) else {}))))
        self._count()

    def size_policy(self) -> SizePolicy:
        """The policy that chooses drafter and width together."""
        return _AutoSize(self)

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Bind every drafter."""
        for arm in self.arms:
            arm.drafter.bind(model, requests)

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Begin with those that are awake and those that want to read the prompt; the others sleep until they are asked to draft."""
        for slot, prompt in zip(slots, prompts, strict=True):
            self._text[slot] = list(prompt)
        for arm in self.arms:
            if arm.awake or arm.drafter.wants.prompt:
                self._wake(arm, slots)

    def read(self, slot: int, tokens: Sequence[int], out: Any) -> None:
        """Show the prompt to those that want it."""
        for arm in self._awake:
            if arm.drafter.wants.prompt:
                arm.drafter.read(slot, tokens, out)

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """The chosen drafter's tree; the first one's where another size policy than ours asks."""
        arm = self.arms[max(self.chosen, 0)]
        if arm.awake:
            arm.watch(self._steps)
        else:
            self._wake(arm, list(self._text))
        return arm.drafter.propose(slots, roots, rows)

    def observe(self, slots: Sequence[int], tree: TokenTree, out: Any, verdict: Verdict) -> None:
        """The one that drafts sees the step now, others that are awake see it later."""
        for slot, tokens in zip(slots, verdict.emitted, strict=True):
            self._text[slot] += tokens
        if not self._awake:
            return
        views = self.wants.taps or self.wants.logits  # that cannot be kept
        now = [arm for arm in self._awake if views or (self.chosen >= 0 and arm is self.arms[self.chosen])]
        for arm in now:
            arm.watch(self._steps)
            arm.drafter.observe(slots, tree, out, verdict)
            arm.seen += 1
        if len(now) == len(self._awake):
            self._steps.append(())
        else:
            self._steps.append((list(slots), tree, _kept(out), verdict))
        if len(self._steps) >= _KEPT:
            self._catch_up()

    def end(self, slots: Sequence[int]) -> None:
        """End the slots everywhere."""
        self._catch_up()
        for arm in self._awake:
            arm.drafter.end(slots)
        for slot in slots:
            self._text.pop(slot, None)

    def sleep(self, arm: Arm) -> None:
        """Let a drafter forget the texts and want nothing, until it is asked to draft again."""
        if arm.awake and not arm.drafter.wants.prompt:  # who wants to read prompts cannot begin later
            arm.watch(self._steps)
            arm.drafter.end(list(self._text))
            arm.size.reopen()
            arm.awake = False
            self._count()

    def _wake(self, arm: Arm, slots: Sequence[int]) -> None:
        """Begin with the texts of these slots as they stand."""
        arm.drafter.begin(slots, [self._text[slot] for slot in slots])
        arm.awake, arm.seen = True, len(self._steps)
        self._count()

    def _count(self) -> None:
        """Who is awake, and what they want."""
        self._awake = [arm for arm in self.arms if arm.awake]
        wants = [arm.drafter.wants for arm in self._awake]
        self.wants = Wants(
            topk=max((w.topk for w in wants), default=0),
            taps=tuple(sorted({layer for w in wants for layer in w.taps})),
            logits=any(w.logits for w in wants),
            prompt=any(arm.drafter.wants.prompt for arm in self.arms),
        )

    def _catch_up(self) -> None:
        for arm in self._awake:
            arm.watch(self._steps)
            arm.seen = 0
        self._steps.clear()


def _needs_model(cls: Any) -> bool:
    return getattr(cls, "takes_model", "no") == "yes"


def _made(cls: Any, **options: Any) -> Drafter:
    try:
        return cls(**options)
    except TypeError as problem:
        raise ValueError(
            f'auto: drafter "{cls.name}" cannot be made without options ({problem}); takes defaults. Register it without portfolio.'
        ) from problem


def _kept(out: Any) -> StepOut:
    """What a step says of its rows, but for their logits: `out` holds views that the next step overwrites."""
    rows = {name: value.copy() for name in _ROWS if (value := getattr(out, name, None)) is not None}
    return StepOut(**rows)


_ROWS = ("argmax", "top", "lse", "topk_ids", "topk_values", "drawn")


class _AutoSize(SizePolicy):
    """Chooses the drafter, then lets that drafter's own policy choose the width. What it knows of visits is kept like an experience."""

    def __init__(self, auto: Auto) -> None:
        self.auto, self.log = auto, Experience()
        self._rest = Rest()
        self.visit = 0  # steps left of a visit
        self.home, self.next = PLAIN, -1
        self._first = False  # whether it is the first to that drafter
        self._wait, self._refused = _NEW, 0  # steps from visit to visit, and until a visit is thought of again
        self._batch = 0  # for which the drafters were compared last; 0 asks for it anew
        self._rate = self._second = 0.0  # tokens per second of the home, and of the best drafter but for it

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Bind every drafter's policy."""
        for arm in self.auto.arms:
            arm.size.bind(model, requests)
        if model is not None:
            self.log = remembered(model, "auto, sampled" if sampled(r.params for r in requests) else "auto")
        self.log.wait = max(self.log.wait, _FIRST)

    def rows(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Choose the drafter of most tokens per second, or a visit to another; then its width."""
        batch, log = len(live), self.log
        if self._rest.covers(batch, self._costs):
            return [1] * batch
        if not self.visit:
            if batch != self._batch:
                self._compare(batch)
            if self._refused:
                self._refused -= 1
            elif log.since >= self._wait:
                self._leave_home(batch)
        if self.visit:
            return [self.auto.arms[self.auto.chosen].size.visit(batch)] * batch
        if self.home == PLAIN:
            self._rest.begin(max(1, self._wait - log.since, self._refused), batch, self._costs)
            self._refused = 0
            return [1] * batch
        size = self.auto.arms[self.home].size
        width, self._rate = size.choose(batch), size.rate
        if self._rate < self._second or not size.drafts:
            self._batch = 0
        return [width] * batch

    def trim(self, tree: TokenTree) -> TokenTree:
        """As the policy of the one that drafted does."""
        return self.auto.arms[self.auto.chosen].size.trim(tree)

    def observe(self, tree: TokenTree, verdict: Verdict, clock: Clock) -> None:
        """The chosen drafter's policy learns; a visit's loss is written down."""
        log = self.log
        if self._rest.left:
            self._rest.observe(clock, log, self._costs)
            return
        batch, seconds = tree.B, clock.draft.last + clock.forward.last + clock.verify.last + clock.commit.last
        log.spent += seconds
        log.since += 1
        arm = self.auto.arms[self.auto.chosen]
        size = arm.size
        size.observe(tree, verdict, clock)
        if not self.visit:
            return
        self._lose(arm, max(0.0, seconds - sum(map(len, verdict.path)) / batch / self._rate))
        self.visit -= 1
        if not self.visit:
            paid = size.decide(batch) > self._rate and size.drafts
            log.wait = _FIRST if paid else log.wait if self._first else min(2 * log.wait, _LAST)
            self._lose(arm, size.costs.thaw if self.home == PLAIN else 0.0)
            self._batch, self.auto.chosen = 0, self.home
            if not paid and log.wait >= _SLEEPY:
                self.auto.sleep(arm)

    def _lose(self, arm: Arm, seconds: float) -> None:
        name = arm.drafter.name
        self.log.lost_to[name] = self.log.lost_to.get(name, 0.0) + seconds

    @property
    def _costs(self) -> CostTable:
        return self.auto.arms[0].size.costs

    def _compare(self, batch: int) -> None:
        """Find the home: of the drafters whose own policy would draft the one of most tokens per second, or plain decoding.

        A policy goes on with a drafter that mostly stays silent and costs next to nothing, so the home may be a little behind plain.
        """
        sizes = [arm.size for arm in self.auto.arms]
        rates = [size.decide(batch) for size in sizes]
        drafting = sorted(((rate, -i) for i, rate in enumerate(rates) if sizes[i].met and sizes[i].drafts), reverse=True)
        self._rate, self.home = (drafting[0][0], -drafting[0][1]) if drafting else (1 / (self._costs.at(batch) + self._costs.rest), PLAIN)
        self.auto.chosen = self.home
        self._batch, self._second = batch, drafting[1][0] if len(drafting) > 1 else 0.0
        self._wait = self.log.wait if all(size.met for size in sizes) else _NEW

    def _leave_home(self, batch: int) -> None:
        """Begin a visit to the next drafter that is within its part of the time for visits; who is new waits until all losses are."""
        arms = self.auto.arms
        log, allowed, lost_to_all = self.log, self.auto.share * self.log.spent, sum(self.log.lost_to.values())
        for other in sorted(range(len(arms)), key=lambda i: (arms[i].size.met, (i - self.next - 1) % len(arms))):
            arm = arms[other]
            price = arm.size.price(batch, self._rate)
            lost = len(arms) * (log.lost_to.get(arm.drafter.name, 0.0) + price) if arm.size.met else lost_to_all + price
            if other != self.home and lost <= allowed:
                self.next = self.auto.chosen = other
                self.visit, log.since, self._first = _VISIT, 0, not arm.size.met
                arm.size.forget()
                return
        self._refused = _REFUSED
