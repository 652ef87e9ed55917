"""Size policies against a simulated machine: the clock is a formula, the drafter a rule, so every second is accounted for."""

import json
import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from ramify.draft.auto import Arm, Auto
from ramify.draft.base import Drafter, Wants
from ramify.registry import size_policy
from ramify.size import _cost, _experience
from ramify.size._cost import BUCKETS, CostTable, cost_table
from ramify.size._experience import WIDTHS
from ramify.size.measured import Measured
from ramify.testing import FakeModel
from ramify.tree import TokenTree
from ramify.verify import Verdict

STEP = 4e-4


def cpu_like(rows):
    """A step that grows slowly with its rows, as one bound by reading weights does."""
    return STEP * (1 + 0.02 * rows)


class Machine:
    """Runs a policy against a drafter that offers `offers(n)` rows of n and of which `accepts(rows)` leading rows are taken."""

    def __init__(self, policy, accepts, offers=lambda n: n, draft=lambda n: 0.0, step=cpu_like, batch=1):
        self.policy, self.accepts, self.offers, self.draft, self.step, self.batch = policy, accepts, offers, draft, step, batch
        self.seconds = self.tokens = 0.0
        self.widths = []
        policy.costs = CostTable([step(rows) for rows in BUCKETS])
        policy.bind(None, [])

    def run(self, steps):
        for _ in range(steps):
            [width] = set(self.policy.rows(list(range(self.batch)), [0] * self.batch))
            rows = [max(1, min(width, self.offers(width))) for _ in range(self.batch)]
            paths = [np.arange(1 + min(self.accepts(n), n - 1), dtype=np.int32) for n in rows]
            tree = TokenTree.chains([0] * self.batch, [[0] * (n - 1) for n in rows])
            forward, draft = self.step(sum(rows)), self.draft(width)
            stopwatch = {"draft": draft, "forward": forward, "verify": 1e-5, "commit": 1e-5}
            clock = SimpleNamespace(**{phase: SimpleNamespace(last=s) for phase, s in stopwatch.items()})
            self.policy.observe(tree, Verdict(paths, [[0] * len(p) for p in paths]), clock)
            self.seconds += sum(stopwatch.values())
            self.tokens += sum(map(len, paths)) / self.batch
            self.widths.append(width)
        return self

    @property
    def speedup(self):
        return self.tokens / self.seconds * (self.step(self.batch) + 2e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("per_guess", [0.0, 0.15 * STEP])
def test_hopeless_drafter_costs_a_few_percent(batch, per_guess):
    machine = Machine(Measured(), accepts=lambda n: 0, draft=lambda n: (n - 1) * per_guess, batch=batch).run(1000)
    assert machine.speedup > 0.95
    assert machine.widths.count(1) > 900


def test_hopeless_drafter_on_a_short_text():
    machine = Machine(Measured(), accepts=lambda n: 0, draft=lambda n: (n - 1) * 0.1 * STEP).run(128)
    assert machine.speedup > 0.93


def test_dear_trials_keep_to_their_share():
    machine = Machine(Measured(), accepts=lambda n: 0, draft=lambda n: (n - 1) * 3 * STEP).run(300)
    assert machine.policy.experience.lost < 1.2 * 0.02 * machine.seconds


def test_trials_grow_apart():
    machine = Machine(Measured(), accepts=lambda n: 0).run(2000)
    at = [i for i, width in enumerate(machine.widths) if width > 1][4:]
    gaps = np.diff(at)
    assert len(at) < 40 and gaps.max() >= 200


def test_oracle_goes_wide():
    machine = Machine(Measured(), accepts=lambda n: n - 1).run(300)
    best = max(WIDTHS, key=lambda n: n / (cpu_like(n) + 2e-5))
    assert machine.widths[-1] >= best / 2
    assert machine.speedup > 0.8 * best / (cpu_like(best) + 2e-5) * (cpu_like(1) + 2e-5)


def test_never_wider_than_most():
    assert max(Machine(Measured(most=12), accepts=lambda n: n - 1).run(200).widths) == 12
    assert set(Machine(Measured(most=1), accepts=lambda n: n - 1).run(50).widths) == {1}


def geometric(alpha, seed=0):
    rng = random.Random(seed)

    def accepts(n):
        taken = 0
        while taken < n - 1 and rng.random() < alpha:
            taken += 1
        return taken

    return accepts


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("cost", [0.0, 0.1])
def test_near_the_best_fixed_width(alpha, cost):
    """Against every fixed width in hindsight, for a chain of iid acceptance: formula (1 - alpha^n) / (1 - alpha) tokens a step."""

    def rate(n):
        return (1 - alpha**n) / (1 - alpha) / (cpu_like(n) + (n - 1) * cost * STEP + 2e-5)

    machine = Machine(Measured(), accepts=geometric(alpha), draft=lambda n: (n - 1) * cost * STEP).run(1500)
    best = max(rate(n) for n in WIDTHS)
    assert machine.tokens / machine.seconds > 0.9 * best


def test_a_drafter_that_recovers_is_noticed():
    good = False
    machine = Machine(Measured(), accepts=lambda n: n - 1 if good else 0).run(500)
    assert machine.widths[-1] == 1
    good = True
    machine.run(600)
    assert machine.widths[-1] >= 8


def test_wide_batches_get_narrow_trees():
    """A compute-bound batch: the step grows with every row, so guesses that one sequence can afford are too dear for eight."""

    def step(rows):
        return STEP * max(1.0, rows / 8)

    one = Machine(Measured(), accepts=geometric(0.5), step=step).run(600)
    many = Machine(Measured(), accepts=geometric(0.5), step=step, batch=8).run(600)
    assert np.median(one.widths[300:]) >= 3
    assert np.median(many.widths[300:]) == 1 and many.speedup > 0.95


def test_rare_matches_stay_open():
    """Prompt lookup: mostly nothing to offer, and then a long copy. Offering nothing is free, so the policy keeps asking."""
    rng = random.Random(0)
    machine = Machine(Measured(), accepts=lambda n: n - 1, offers=lambda n: n if rng.random() < 0.05 else 1, draft=lambda n: 5e-6).run(1500)
    assert np.mean(np.array(machine.widths[200:]) > 1) > 0.9


def test_a_dear_opening_is_weighed_against_what_is_left():
    """A draft model must read the prompt before its first guess: worth it for a long text, not for a short one."""

    def speedup(tokens, opening):
        policy, first = Measured(), []

        def draft(n):
            first.append(n)
            return 2e-5 + (opening if len(first) == 1 else 0.0) if n > 1 else 0.0

        machine = Machine(policy, accepts=lambda n: min(2, n - 1), draft=draft)
        policy.experience.opening, policy.experience.draft = opening, {4: deque([2e-5])}
        policy._left = tokens
        steps = 0
        while machine.tokens < tokens and steps < 5000:
            machine.run(1)
            steps += 1
        return machine.speedup, max(machine.widths)

    assert speedup(40, 60 * STEP)[1] == 1
    long, width = speedup(1000, 60 * STEP)
    assert width > 1 and long > 1.5


def test_what_was_learned_outlives_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = FakeModel(16), FakeModel(16)
    first.fingerprint = second.fingerprint = "abc"
    known = _experience.remembered(first, "x")
    known.add(8, np.array([8]), [np.arange(5)], 30)
    known.drafted(8, 1e-3)
    _experience._leave()
    found = _experience.remembered(second, "x")
    assert found is not known and found.tokens.tolist() == known.tokens.tolist()
    assert found.steps.max() < known.steps.max() and found.drafting()[5] == pytest.approx(1e-3)
    path = next(tmp_path.rglob("drafters-*.json"))
    for damaged in ("", "[]", '{"x": 3}', '{"x": {"tokens": [1]}}', path.read_text().replace("[", "[null,", 1)):
        path.write_text(damaged)
        third = FakeModel(16)
        third.fingerprint = "abc"
        assert _experience.remembered(third, "x").steps.max() == 0


def test_what_was_learned_is_kept_by_name():
    target = FakeModel(16)
    costs = CostTable([cpu_like(rows) for rows in BUCKETS])
    first = Measured(about="x", costs=costs)
    first.bind(target, [])
    second = Measured(about="x", costs=costs)
    second.bind(target, [])
    other = Measured(about="y", costs=costs)
    other.bind(target, [])
    assert first.experience is second.experience and first.experience is not other.experience


def test_cost_table():
    table = CostTable([float(rows) for rows in BUCKETS])
    assert table.at(3) == 3 and table.at(256) == 256 and table.at(512) == 512 and table.at(1) == 1
    for _ in range(200):
        table.observe(16, 100.0)
    assert table.at(16) == pytest.approx(100, rel=0.01) and table.at(1) == 1 and table.at(64) == 64
    table.observe(24, 1e9)
    assert table.at(32) < 64


def test_measured_once_and_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(_cost, "measure", lambda model: calls.append(model) or [1e-3] * len(BUCKETS))
    for _ in range(2):
        model = FakeModel(16)
        model.fingerprint = "abc"
        table = cost_table(model)
        assert cost_table(model) is table and table.at(7) == 1e-3
    assert len(calls) == 1
    [path] = (tmp_path / "ramify").iterdir()
    for damaged in ("", "{", "[]", json.dumps({"rows": list(BUCKETS), "seconds": [1]}), json.dumps({"rows": [1], "seconds": [1]})):
        path.write_text(damaged)
        model = FakeModel(16)
        model.fingerprint = "abc"
        assert cost_table(model).at(1) == 1e-3
    assert len(calls) == 6 and json.loads(path.read_text())["rows"] == list(BUCKETS)
    nameless = FakeModel(16)
    cost_table(nameless)
    assert len(calls) == 7 and len(list((tmp_path / "ramify").iterdir())) == 1


def test_a_folder_that_refuses_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = FakeModel(16)
    model.fingerprint = "abc"
    assert cost_table(model).at(1) > 0


def test_measuring_a_small_model():
    seconds = _cost.measure(FakeModel(16, max_positions=40))
    assert len(seconds) == len(BUCKETS) and all(s > 0 for s in seconds)


def test_registry_and_bad_arguments():
    assert {"fixed", "measured"} <= set(size_policy.names())
    for spec, told in {
        "fixed:rows_each=0": "rows_each is 0; takes 1 or more",
        "fixed:rows_each=300": "takes 1 to 256",
        "measured:share=2": "share is 2; takes 0 to 1",
        "measured:most=0": "most is 0",
        "fixed:row_each=2": 'nearest is "rows_each"',
        "fixd": 'nearest is "fixed"',
    }.items():
        with pytest.raises(ValueError, match=told):
            size_policy.build(spec)
    with pytest.raises(TypeError, match="takes a whole number"):
        size_policy.build("fixed:rows_each=a")


def test_widths_grow_by_doubling():
    """A step far wider than any that was seen costs as much as dozens of plain ones, whatever the extrapolation promises."""
    widths = Machine(Measured(), accepts=lambda n: n - 1).run(300).widths
    widest = np.maximum.accumulate(widths)
    assert widest[-1] >= 64 and (widest[1:] <= np.maximum(2 * widest[:-1], 12) * 1.4).all()


class Warmth:
    """A machine on which plain steps are twice as dear for a dozen steps after a wide one, as on a model in the last-level cache."""

    def __init__(self, plain=1.0):
        self.plain, self.cold = plain, 0

    def __call__(self, rows):
        if rows > 1:
            self.cold = 12
            return (1.55 + 0.02 * rows) * STEP
        self.cold = max(0, self.cold - 1)
        return (self.plain if not self.cold else 2.0) * STEP


def test_plain_steps_among_wide_ones_say_nothing():
    """1.4 tokens a step for 1.6 times the seconds: a loss against plain decoding, a gain against the plain steps between wide ones."""
    turn = random.Random(3)
    machine = Machine(Measured(), accepts=lambda n: min(n - 1, turn.random() < 0.4), step=Warmth()).run(1500)
    assert np.mean(np.array(machine.widths[300:]) == 1) > 0.9 and machine.speedup > 0.9


def test_plain_decoding_that_became_cheaper_is_noticed():
    """While a drafter drafts nobody decodes plainly; a spell of it now and then shows what it costs by now."""
    warmth = Warmth(plain=2.0)
    machine = Machine(Measured(), accepts=lambda n: min(n - 1, 1), step=warmth).run(300)
    assert np.mean(np.array(machine.widths[100:]) > 1) > 0.75
    warmth.plain = 0.5
    machine.run(3000)
    assert np.mean(np.array(machine.widths[-500:]) == 1) > 0.9


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
        auto.observe([0], tree, SimpleNamespace(topk_ids=ids[: tree.M], topk_values=None), verdict)
        shown.append(([0], tree.tokens.tolist(), ids[: tree.M].tolist(), [[step]]))
    auto.end([0])
    assert all(arm.drafter.seen == shown for arm in arms)
