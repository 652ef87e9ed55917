"""Threads of a step by what other processes leave: on a made-up clock."""

import random

from ramify.model.pace import LAST, WINDOW, Pace


class Machine:
    """A step costs 1 on two threads and 1.8 on one, each times what it is slower, and stalls for 20 with a probability of its own."""

    def __init__(self):
        self.now, self.counts = 0.0, []
        self.stalls, self.slower = {1: 0.0, 2: 0.0}, {1: 1.0, 2: 1.0}
        self.pace, self.random = Pace(2, lambda: self.now), random.Random(0)

    def replay(self, threads):
        self.counts.append(threads)
        self.now += (1.8 if threads == 1 else 1.0) * self.slower[threads] + 20 * (self.random.random() < self.stalls[threads])

    def steps(self, n):
        before, self.counts = self.now, []
        for _ in range(n):
            self.pace.run(self.replay)
        return self.now - before


def test_without_stalls_every_step_takes_all_threads():
    machine = Machine()
    assert machine.steps(1000) == 1000 and set(machine.counts) == {2}


def test_one_thread_while_there_are_stalls_and_all_of_them_afterwards():
    machine = Machine()
    machine.stalls = {1: 0.02, 2: 0.25}  # 2.2 against 6 seconds a step
    assert machine.steps(4000) < 2.5 * 4000
    assert machine.counts.count(2) < 400
    machine.stalls = {1: 0.0, 2: 0.0}
    machine.steps(LAST + WINDOW)
    assert machine.steps(500) == 500 and set(machine.counts) == {2}


def test_one_thread_that_does_not_help_is_not_asked_for_again_soon():
    machine = Machine()
    machine.stalls = {1: 0.3, 2: 0.12}
    machine.steps(1200)
    assert machine.counts.count(1) <= 3 * WINDOW


def test_steps_that_are_all_slow_are_held_against_those_before():
    machine = Machine()
    machine.steps(2 * WINDOW)
    machine.slower[2] = 5.0  # another process has one of the cores for itself
    assert machine.steps(4000) < 2.5 * 4000
    machine.slower[2] = 1.0
    machine.steps(LAST + WINDOW)
    assert machine.steps(500) == 500


def test_steps_that_grow_with_the_text_are_not_taken_for_stalls():
    machine = Machine()
    machine.steps(2 * WINDOW)
    machine.slower = {1: 2.5, 2: 2.5}
    machine.steps(4000)
    assert machine.counts.count(1) <= WINDOW


def test_one_long_step_in_a_window_changes_nothing():
    machine = Machine()
    for _ in range(5):
        machine.steps(WINDOW - 1)
        machine.stalls[2] = 1.0
        machine.steps(1)
        machine.stalls[2] = 0.0
        assert set(machine.counts) == {2}
    machine.steps(WINDOW)
    assert set(machine.counts) == {2}


def test_one_thread_stays_one():
    pace, counts = Pace(1), []
    pace.run(counts.append)
    assert counts == [1]
