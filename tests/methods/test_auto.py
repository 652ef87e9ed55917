"""`auto` against a simulated machine (ramify.testing.machine), and what its drafters are shown."""

from types import SimpleNamespace

import numpy as np
import pytest

import ramify
from ramify.draft.auto import Arm, Auto
from ramify.draft.base import Drafter, Wants
from ramify.size._cost import BUCKETS, CostTable
from ramify.size._experience import WIDTHS
from ramify.size.base import SizePolicy
from ramify.size.measured import Measured
from ramify.size.weighed import Weighed
from ramify.testing import FakeModel
from ramify.testing.machine import STEP, Machine, cpu_like, geometric
from ramify.tree import TokenTree
from ramify.verify import Verdict


class Watching(Drafter):
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


def test_a_drafter_that_weighs_its_guesses_is_one_arm_among_others():
    """It brings its own policy; beside a hopeless drafter `auto` is nearly as fast as that policy alone."""
    table = [cpu_like(rows) for rows in BUCKETS]
    alone = Machine(Weighed(), accepts=geometric(0.8), chance=lambda n: 0.8 ** np.arange(n)).run(600)
    auto = Auto()
    auto.arms = [Arm(Watching("weighs")), Arm(Watching("hopeless"))]
    auto.arms[0].size, auto.arms[1].size = Weighed(costs=CostTable(table)), Measured(costs=CostTable(table))
    right = geometric(0.8)
    machine = Machine(auto.size_policy(), accepts=lambda n: right(n) if auto.chosen == 0 else 0, chance=lambda n: 0.8 ** np.arange(n))
    machine.run(600)
    assert machine.speedup > 0.9 * alone.speedup > 2


def auto_beside_dear_ones(**dear):
    """`auto` over one that weighs its guesses, and drafters that are wrong and whose drafts take so many steps."""
    auto, right = Auto(), geometric(0.8)
    auto.arms = [Arm(Watching(name)) for name in ("weighs", *dear)]
    for arm, kind in zip(auto.arms, (Weighed, *(Measured for _ in dear)), strict=True):
        arm.size = kind(costs=CostTable([cpu_like(rows) for rows in BUCKETS]))
    takes, chosen = [0.0, *dear.values()], []

    def draft(n):
        chosen.append(auto.chosen)
        return STEP * takes[auto.chosen] if n > 1 else 0.0

    accepts = lambda n: right(n) if auto.chosen == 0 else 0  # noqa: E731
    return Machine(auto.size_policy(), accepts=accepts, draft=draft, chance=lambda n: 0.8 ** np.arange(n)), chosen


def test_a_fresh_auto_begins_with_what_costs_nothing():
    """One visit to a drafter nobody has met, and the next when that one's loss is a small share of the time: not all at the start."""
    alone = Machine(Weighed(), accepts=geometric(0.8), chance=lambda n: 0.8 ** np.arange(n)).run(150)
    machine, chosen = auto_beside_dear_ones(one=8.0, two=8.0, three=8.0)
    assert machine.run(150).speedup > 0.75 * alone.speedup > 2
    assert chosen[:4] == [0] * 4 and chosen.count(0) == 147 and chosen.count(1) == 3
    machine.run(6000)
    assert {1, 2, 3} <= set(chosen) and sum(c > 0 for c in chosen) * 9 * STEP < 0.03 * machine.seconds


def test_one_drafter_too_dear_keeps_no_other_waiting():
    machine, chosen = auto_beside_dear_ones(cheap=0.1, dear=100.0)
    machine.run(800)
    assert chosen.count(2) == 3 and chosen.count(1) >= 9


class Seeing(Drafter):
    """Notes what it is shown, and proposes only when it knows the text and has seen every step since it began."""

    name, wants = "seeing", Wants(topk=2)

    def __init__(self):
        self.seen, self.text, self.began = [], None, 0

    def begin(self, slots, prompts):
        assert self.text is None
        self.text, self.seen = list(prompts[0]), []
        self.began += 1

    def propose(self, slots, roots, rows):
        self.check()
        return TokenTree.chains(roots, [[1] * (n - 1) for n in rows])

    def observe(self, slots, tree, out, verdict):
        assert out.argmax.tolist() == [row[0] for row in out.topk_ids.tolist()]
        self.seen.append((list(slots), tree.tokens.tolist(), out.topk_ids.tolist(), verdict.emitted))
        self.text += verdict.emitted[0]

    def end(self, slots):
        self.check()
        self.text = None

    def check(self):
        shown = self.steps()
        assert self.seen == shown[len(shown) - len(self.seen) :]
        assert self.text == [-1, *(step[3][0][0] for step in shown)]


def shown_steps(auto, count, choose, alone):
    """`auto` through so many steps of a text, in each of which choose(step) drafts; returns what was to be seen.

    alone: places in every 50 steps where the chosen one is not asked, as where a single token is left.
    """
    shown, ids = [], np.zeros((3, 2), np.int32)
    for arm in auto.arms:
        arm.drafter.steps = lambda: shown
    auto.begin([0], [[-1]])
    for step in range(count):
        auto.chosen = choose(step)
        tree = auto.propose([0], [step], [3]) if auto.chosen >= 0 and step % 50 not in alone else TokenTree.roots([step])
        ids[:] = step  # the view that the next step overwrites
        verdict = Verdict([np.array([0], np.int32)], [[step]])
        out = SimpleNamespace(topk_ids=ids[: tree.M], topk_values=None, argmax=ids[: tree.M, 0], logits=ids)
        auto.observe([0], tree, out, verdict)
        shown.append(([0], tree.tokens.tolist(), ids[: tree.M].tolist(), [[step]]))
    return shown


@pytest.mark.parametrize("chosen", [-1, 0, 1])
def test_all_drafters_of_auto_see_every_step_once(chosen):
    """At once or later: before it drafts, and before a text ends, each that is awake has seen all steps in order, with their values."""
    auto = Auto()
    auto.arms = [Arm(Seeing()), Arm(Seeing())]
    for arm in auto.arms:
        arm.awake = True
    auto._count()
    assert auto.wants == Wants(topk=2)
    shown = shown_steps(auto, 150, lambda step: chosen if step % 50 else 1 - max(chosen, 0), alone=(0, 9, 10, 33))
    seen = [arm.drafter.seen for arm in auto.arms]
    auto.end([0])
    assert all(each == shown for each in seen)


def test_drafters_of_auto_sleep_until_they_are_asked():
    """One that has not begun is shown nothing and wants nothing; it begins with the text so far, as often as it falls asleep."""
    auto = Auto()
    auto.arms = [Arm(Seeing()), Arm(Seeing())]
    auto._count()
    wanted = []

    def choose(step):
        if step % 50 == 0:
            for arm in auto.arms:
                auto.sleep(arm)
            wanted.append(auto.wants)
        return {7: 0, 9: 1, 20: 1, 21: 1, 33: 0, 45: 1}.get(step % 50, -1)  # in step 9 one that sleeps is chosen and not asked

    shown_steps(auto, 170, choose, alone=(9,))
    assert [arm.drafter.began for arm in auto.arms] == [4, 3]
    auto.end([0])
    assert [len(arm.drafter.seen) for arm in auto.arms] == [170 - 157, 150 - 120]
    assert wanted == [Wants()] * 4 and auto.wants == Wants(topk=2)


class Restless(SizePolicy):
    """Asks one drafter of `auto` or none, in turn by chance, and sends them to sleep by chance."""

    def __init__(self, auto):
        self.auto, self.random, self.slept = auto, np.random.default_rng(0), 0

    def rows(self, live, lengths):
        if self.random.random() < 0.2:
            arm = self.auto.arms[self.random.integers(len(self.auto.arms))]
            self.slept += arm.awake
            self.auto.sleep(arm)
        self.auto.chosen = int(self.random.integers(-1, len(self.auto.arms)))
        return [int(self.random.integers(1, 9)) if self.auto.chosen >= 0 else 1 for _ in live]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_text_under_drafters_that_sleep(batch, temperature):
    """Whoever sleeps, wakes and drafts, the text is plain decoding's; texts that end while a drafter sleeps leave nothing behind."""
    model = FakeModel(48, sharpness=2.0)
    prompts = [[(11 * i + b) % 48 for i in range(2 + 3 * b)] for b in range(batch)]
    params = {"max_new_tokens": 150, "temperature": temperature, "seed": 3}
    plain = ramify.generate(model, prompts, method="plain", **params)
    auto = Auto(model=model.student(0.6))
    size = Restless(auto)
    outs = ramify.generate(model, prompts, method=auto, size=size, **params)
    assert [out.token_ids for out in outs] == [out.token_ids for out in plain]
    assert size.slept > 3 and len(auto.arms) == 4
    assert not auto._text and not any(arm.drafter.second.text for arm in auto.arms if arm.drafter.name.startswith("draft_"))


def test_hopeless_drafters_fall_asleep():
    machine, chosen = auto_machine(one=(lambda n: 0, lambda n: 0.0), two=(lambda n: 0, lambda n: 0.0))
    slept = []
    auto = machine.policy.auto
    auto.sleep = lambda arm: slept.append((len(chosen), arm.drafter.name))
    machine.run(2500)
    assert {name for _, name in slept} == {"one", "two"} and slept[0][0] > 48


def test_a_drafter_that_pays_stays_awake():
    machine, _ = auto_machine(good=(geometric(0.9), lambda n: 0.0), other=(lambda n: 0, lambda n: 0.0))
    slept = []
    machine.policy.auto.sleep = lambda arm: slept.append(arm.drafter.name)
    machine.run(2500)
    assert set(slept) == {"other"}
