"""The stopwatch on a made-up clock: turns, medians, disturbed bursts, waiting, rotation."""

import random
import statistics

import numpy as np
import pytest

from benchmarks.harness import COLD_BYTES, Entry, Machine, Plan, Timing, copies_needed, last_level_cache, measure, quantile


class Clock(Machine):
    """Time passes in sleeps and in `work`. `steal(seconds)` is time that somebody else takes from the work done until it is reset."""

    def __init__(self, busy: int = 0) -> None:
        self.time = self.off = self.slept = 0.0
        self.busy, self.stolen, self.log = busy, 0.0, []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.slept += seconds

    def kept_off(self) -> float:
        return self.off

    def others(self) -> int:
        return self.busy

    def work(self, name: str, seconds: float) -> None:
        self.log.append(name)
        self.time += seconds + self.stolen
        self.off += self.stolen


PLAN = Plan(rounds=3, burst=1.0, calls=(2, 2), pause=0.5, quiet=0.0)


def test_peers_take_turns():
    clock = Clock()
    entries = [Entry(name, clock.work, [(name, 1.0)]) for name in "abc"]
    measure(entries, PLAN, clock)
    assert "".join(clock.log) == "abc" + 3 * "aabbcc"  # one call each to warm up, then bursts of two in turns
    assert clock.slept == pytest.approx(9 * 0.5)


def test_calls_fill_a_burst_within_bounds():
    for seconds, calls in ((0.001, 20), (0.1, 10), (5.0, 3)):
        clock = Clock()
        plan = Plan(rounds=1, burst=1.0, calls=(3, 20), enough=1, quiet=0)
        [timing] = measure([Entry("a", clock.work, [("a", seconds)])], plan, clock)
        assert len(timing.clean[0]) == calls
        assert timing.median == pytest.approx(seconds)


def test_median_of_medians_ignores_one_slow_burst():
    timing = Timing(clean=[[1.0, 2.0, 30.0], [2.0, 3.0, 4.0], [50.0, 60.0, 70.0]])
    assert timing.median == 3.0
    assert timing.quantile(0) == 1.0 and timing.quantile(1) == 70.0
    assert timing.quantile(0.2) <= timing.median <= timing.quantile(0.8)


def test_quantile_is_numpys():
    rng = random.Random(1)
    for size in (1, 2, 5, 40):
        values = [rng.random() for _ in range(size)]
        for share in (0.0, 0.2, 0.5, 0.8, 1.0):
            assert quantile(values, share) == pytest.approx(np.quantile(values, share))
        assert quantile(values, 0.5) == pytest.approx(statistics.median(values))
    with pytest.raises(ValueError, match="empty"):
        quantile([], 0.5)


def test_a_disturbed_burst_does_not_count():
    clock, calls = Clock(), []

    def call():
        calls.append(0)
        clock.stolen = 10.0 if 4 <= len(calls) <= 5 else 0.0  # the second burst: call 1 warms up
        clock.work("a", 1.0)

    [timing] = measure([Entry("a", call, [()])], PLAN, clock)
    assert len(timing.disturbed) == 1 and len(timing.clean) == 3  # a round was added in its place
    assert timing.median == 1.0 and not timing.dirty


def test_three_percent_is_the_limit():
    for share, disturbed in ((0.02, False), (0.05, True)):
        clock = Clock()
        clock.stolen = share / (1 - share)
        [timing] = measure([Entry("a", clock.work, [("a", 1.0)])], PLAN, clock)
        assert timing.dirty is disturbed


def test_when_everything_was_disturbed_it_says_so_and_stops():
    clock = Clock()
    clock.stolen = 1.0
    [timing] = measure([Entry("a", clock.work, [("a", 1.0)])], PLAN, clock)
    assert timing.dirty and len(timing.disturbed) == 2 * PLAN.rounds
    assert timing.median == 2.0


def test_only_those_who_need_more_get_added_rounds():
    clock = Clock()

    def noisy():
        clock.stolen = 1.0
        clock.work("n", 1.0)
        clock.stolen = 0.0

    quiet, bad = measure([Entry("q", clock.work, [("q", 1.0)]), Entry("n", noisy, [()])], PLAN, clock)
    assert len(quiet.clean) == 3 and len(bad.disturbed) == 6


def test_waiting_for_quiet_is_bounded_in_each_burst_and_in_all():
    clock = Clock(busy=2)
    plan = Plan(rounds=4, burst=0.1, calls=(1, 1), pause=0.0, enough=4, quiet=1.0, patience=2.5)
    measure([Entry("a", clock.work, [("a", 0.1)])], plan, clock)
    assert 3.0 <= clock.slept < 3.1  # three waits of one second: the third passes the patience, the fourth is not made
    idle = Clock(busy=0)
    measure([Entry("a", idle.work, [("a", 0.1)])], plan, idle)
    assert idle.slept == 0


def test_unknown_delays_drop_nothing():
    clock = Clock()
    clock.kept_off = lambda: None
    [timing] = measure([Entry("a", clock.work, [("a", 1.0)])], PLAN, clock)
    assert len(timing.clean) == 3


def test_copies_go_round():
    seen, clock = [], Clock()
    entry = Entry("a", lambda i: (seen.append(i), clock.work("a", 1.0)), [(0,), (1,), (2,)])
    measure([entry], PLAN, clock)
    assert seen == [i % 3 for i in range(7)]


def test_copies_needed():
    assert copies_needed(1 << 20, cache=0) == COLD_BYTES >> 20
    assert copies_needed(1 << 20, cache=64 << 20) == 256
    assert copies_needed(COLD_BYTES * 10, cache=0) == 1
    assert copies_needed(1, cold=False) == 1
    assert copies_needed(0) >= 1


def test_this_machine_answers():
    machine = Machine()
    before = machine.kept_off()
    assert before is None or before >= 0
    assert machine.others() >= 0 and last_level_cache() >= 0
    assert machine.now() <= machine.now()
