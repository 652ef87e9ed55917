"""Size policies against a simulated machine (ramify.testing.machine), and what they keep on disk."""

import itertools
import json
import random
from collections import deque

import numpy as np
import pytest

from ramify.registry import size_policy
from ramify.size import _cost, _experience, _store
from ramify.size._cost import BUCKETS, CostTable, cost_table
from ramify.size._experience import WIDTHS
from ramify.size.measured import Measured
from ramify.testing import FakeModel
from ramify.testing.machine import STEP, Machine, cpu_like, geometric


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
    assert len(at) < 60 and gaps.max() >= 60


def test_oracle_goes_wide():
    machine = Machine(Measured(), accepts=lambda n: n - 1).run(300)
    best = max(WIDTHS, key=lambda n: n / (cpu_like(n) + 2e-5))
    assert machine.widths[-1] >= best / 2
    assert machine.speedup > 0.8 * best / (cpu_like(best) + 2e-5) * (cpu_like(1) + 2e-5)


def test_never_wider_than_most():
    assert max(Machine(Measured(most=12), accepts=lambda n: n - 1).run(200).widths) == 12
    assert set(Machine(Measured(most=1), accepts=lambda n: n - 1).run(50).widths) == {1}


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
    assert np.median(machine.widths[-100:]) >= 8


def test_wide_batches_get_narrow_trees():
    """A compute-bound batch: the step grows with every row, so guesses that one sequence can afford are too dear for eight."""

    def step(rows):
        return STEP * max(1.0, rows / 8)

    one = Machine(Measured(), accepts=geometric(0.5), step=step).run(600)
    many = Machine(Measured(), accepts=geometric(0.5), step=step, batch=8).run(600)
    assert np.median(one.widths[300:]) >= 3
    assert np.median(many.widths[300:]) == 1 and many.speedup > 0.95


def test_a_rest_ends_with_a_sequence():
    """While plain decoding rests nobody is asked; a batch that shrinks asks anew, and both kinds of step are told apart in the table."""

    def step(rows):
        return STEP * (1 + 0.5 * rows)

    machine = Machine(Measured(), accepts=lambda n: 0, step=step, batch=4).run(400)
    policy, told = machine.policy, []
    assert policy._rest.left > 2
    policy.costs.observe = lambda *seen: told.append(seen)
    machine.run(2)
    assert told == []
    machine.batch = 1
    machine.run(200)
    assert machine.widths[-200:].count(1) > 190
    first = told[0]
    assert first[0] == 4 and first[3] and first[1] == pytest.approx(first[4] * step(4))  # rows, seconds in all, plain, steps
    assert all(
        rows == 1 and seconds == pytest.approx(count * step(1)) for rows, seconds, _, plain, count in (t for t in told[1:] if len(t) > 4)
    )
    assert policy.experience.spent == pytest.approx(machine.seconds, rel=0.01)


def test_a_rest_is_not_longer_than_the_text():
    policy = Measured()
    machine = Machine(policy, accepts=lambda n: 0).run(300)
    policy._rest.left, policy._left = 0, 5.0
    steps = policy.experience.steps.copy()
    machine.run(1)
    assert policy._rest.left <= 4 and policy.experience.steps[0] - steps[0] <= 5


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


def test_what_nobody_has_tried_lately_follows_the_pace_of_plain_steps():
    table = CostTable([float(rows) for rows in BUCKETS])
    for _ in range(100):
        table.observe(16, 160.0)
    table.observe(1, 900 * 2.0, 0.0, True, 900)
    assert table.at(1) == pytest.approx(1.3) and table.at(16) == pytest.approx(1.3 * 16) and table.at(64) == pytest.approx(1.3 * 64)
    table.observe(16, 160.0)
    assert table.at(16) > 25  # one step says much where nothing is known


def test_a_table_from_a_busy_moment_is_measured_anew(tmp_path, monkeypatch):
    """Steps take a fortieth of what the table says: the next call measures, and where none follows the file goes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    truth = [40e-3]
    monkeypatch.setattr(_cost, "measure", lambda model: [truth[0]] * len(BUCKETS))
    model = FakeModel(16)
    model.fingerprint = "abc"
    table = cost_table(model)
    [path] = (tmp_path / "ramify").iterdir()
    for _ in range(30):
        table.observe(8, 38e-3)  # a little below is the machine's own business
    assert not table.stale
    for _ in range(30):
        table.observe(8, 1e-3)
    assert table.stale
    _cost._leave(table, path)
    assert not path.exists()
    truth[0] = 1e-3
    fresh = cost_table(model)
    assert fresh is not table and fresh.at(1) == 1e-3 and json.loads(path.read_text())["seconds"][0] == 1e-3
    for _ in range(60):
        fresh.observe(8, 9e-3)  # busy now: the table stays
    assert not fresh.stale and cost_table(model) is fresh
    _cost._leave(table, path)
    assert path.exists()  # it is not the stale one's any more


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


def test_a_step_costs_at_most_two_of_half_its_rows(tmp_path, monkeypatch):
    """What other programs added while wide steps were measured keeps nobody from trying them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ticks = itertools.count()
    monkeypatch.setattr(_cost, "perf_counter", lambda: next(ticks) ** 3 * 1e-9)  # ever busier
    model = FakeModel(16)
    seconds = _cost.measure(model)
    assert all(0 < b <= 2 * a for a, b in itertools.pairwise(seconds))
    model.fingerprint = "abc"
    _store.write(_store.path_of("step-cost", model, _store.built()), {"rows": list(BUCKETS), "seconds": [1e-3, *[40e-3] * 8]})
    table = cost_table(model)
    assert [table.at(n) for n in (1, 2, 8, 64, 256)] == [1e-3, 2e-3, 8e-3, 40e-3, 40e-3]


def test_a_folder_that_refuses_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = FakeModel(16)
    model.fingerprint = "abc"
    assert cost_table(model).at(1) > 0


def test_a_user_without_a_home_is_no_error(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    model = FakeModel(16)
    model.fingerprint = "abc"
    assert cost_table(model).at(1) > 0 and _experience.remembered(model, "x").wait > 0


@pytest.mark.parametrize(
    "damage",
    [
        {"wait": float("inf")},
        {"wait": 1e30},
        {"since": -1},
        {"opening": float("nan")},
        {"draft": {"2": -5.0, "4": -5.0}},
        {"draft": {"2": float("nan")}},
        {"draft": {"5": 1.0}},
        {"tokens": [0.0] * len(WIDTHS)},
        {"tokens": [1e300] * len(WIDTHS)},
        {"rows": [float("nan")] * len(WIDTHS)},
    ],
)
def test_damaged_experience_is_forgotten(damage):
    kept = _experience.Experience.of({**_experience.Experience().state(), "wait": 64})
    assert kept.wait == 64
    assert _experience.Experience.of({**kept.state(), **damage}).state() == _experience.Experience().state()


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
