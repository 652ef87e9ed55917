"""`auto` against a simulated machine (ramify.testing.machine), and what its drafters are shown."""

from types import SimpleNamespace

import numpy as np
import pytest

from ramify.draft.auto import Arm, Auto
from ramify.draft.base import Drafter, Wants
from ramify.size._cost import BUCKETS, CostTable
from ramify.size._experience import WIDTHS
from ramify.size.measured import Measured
from ramify.testing.machine import STEP, Machine, cpu_like, geometric
from ramify.tree import TokenTree
from ramify.verify import Verdict


class Watching:
    """A drafter of `auto` that never drafts here: the machine plays its part."""

    def __init__(self, name):
        self.name = name


def auto_machine(**drafters):
    """`auto` over drafters that are rules: each (accepts, seconds of drafting by width)."""
    auto = Auto()
    auto.arms = [Arm(Watching(name)) for name in drafters]
    for arm in auto.arms:
        arm.size = Measured(costs=CostTable([cpu_like(rows) for rows in BUCKETS]))
    chosen = []

    def rule(k):
        def of(n):
            return list(drafters.values())[auto.chosen][k](n)

        return of

    class Noting(type(auto.size_policy())):
        def rows(self, live, lengths):
            rows = super().rows(live, lengths)
            chosen.append([*drafters, "plain"][auto.chosen])
            return rows

    return Machine(Noting(auto), accepts=rule(0), draft=rule(1)), chosen


def test_auto_settles_on_the_best():
    machine, chosen = auto_machine(
        hopeless=(lambda n: 0, lambda n: 0.0),
        fair=(geometric(0.5), lambda n: 1e-5),
        good=(geometric(0.85), lambda n: 3e-5),
        dear=(geometric(0.9), lambda n: (n - 1) * 0.5 * STEP),
    )
    machine.run(1500)
    assert chosen[500:].count("good") > 900

    def rate(n):
        return (1 - 0.85**n) / 0.15 / (cpu_like(n) + 5e-5)

    assert machine.tokens / machine.seconds > 0.88 * max(map(rate, WIDTHS))


def test_auto_with_hopeless_drafters_only():
    machine, _ = auto_machine(one=(lambda n: 0, lambda n: 0.0), two=(lambda n: 0, lambda n: (n - 1) * 0.1 * STEP))
    assert machine.run(1500).speedup > 0.94


def test_auto_notices_a_change():
    turn = [0.1, 0.9]
    machine, chosen = auto_machine(
        a=(lambda n: geometric(turn[0], len(chosen))(n), lambda n: 0.0), b=(lambda n: geometric(turn[1], len(chosen))(n), lambda n: 0.0)
    )
    machine.run(300)
    assert chosen[-100:].count("b") > 80
    turn.reverse()
    machine.run(1000)
    assert chosen[-200:].count("a") > 160


class Seeing(Drafter):
    """Notes what it is shown, and proposes only when it has seen everything before."""

    name, wants = "seeing", Wants(topk=2)

    def __init__(self):
        self.seen = []

    def propose(self, slots, roots, rows):
        assert len(self.seen) == self.steps()
        return TokenTree.chains(roots, [[1] * (n - 1) for n in rows])

    def observe(self, slots, tree, out, verdict):
        assert out.argmax.tolist() == [row[0] for row in out.topk_ids.tolist()]
        self.seen.append((list(slots), tree.tokens.tolist(), out.topk_ids.tolist(), verdict.emitted))

    def end(self, slots):
        assert len(self.seen) == self.steps()


@pytest.mark.parametrize("chosen", [-1, 0, 1])
def test_all_drafters_of_auto_see_every_step_once(chosen):
    """At once or later: before it drafts, and before a text ends, each has seen all steps in order, with the values of their time."""
    auto, shown = Auto(), []
    arms = [Arm(Seeing()), Arm(Seeing())]
    for arm in arms:
        arm.drafter.steps = lambda: len(shown)
    auto.arms, auto.wants = arms, Wants(topk=2)
    ids = np.zeros((3, 2), np.int32)
    for step in range(150):
        auto.chosen = chosen if step % 50 else 1 - max(chosen, 0)
        tree = auto.propose([0], [step], [3]) if auto.chosen >= 0 else TokenTree.roots([step])
        ids[:] = step  # the view that the next step overwrites
        verdict = Verdict([np.array([0], np.int32)], [[step]])
        out = SimpleNamespace(topk_ids=ids[: tree.M], topk_values=None, argmax=ids[: tree.M, 0], logits=ids)
        auto.observe([0], tree, out, verdict)
        shown.append(([0], tree.tokens.tolist(), ids[: tree.M].tolist(), [[step]]))
    auto.end([0])
    assert all(arm.drafter.seen == shown for arm in arms)
