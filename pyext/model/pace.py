"""How many threads a captured step takes while other processes want the cores as well.

The threads of a step meet after every kernel, dozens of times. Where another process takes a core away, the others wait for whole time
slices of the scheduler, and steps on two threads may come to ten times the seconds of steps on one. What a step computes does not depend
on its threads (law 8), so their number may change from step to step: while steps stall, one thread is tried, and kept if it is faster.
"""

import math
import time
from collections.abc import Callable

WINDOW, PROBE = 32, 16  # steps that are judged together; steps on all threads that end a spell on one
STALLED = 2.0  # a window's mean, without its worst step, over the fastest step; beyond it, threads wait for each other
FIRST, LAST = 32, 512  # steps of a spell on one thread, at first and after many


class Pace:
    """Runs one captured step again and again on `threads` threads, or on one while that is faster."""

    def __init__(self, threads: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.threads, self._clock = threads, clock
        self._times: list[float] = []  # of the steps that will be judged together
        self._alone = False
        self._fastest = math.inf  # step on all threads, of this window and those before it
        self._all = 0.0  # mean seconds on all threads that a first spell on one has to beat; 0 behind it
        self._budget = 0.0  # seconds that a probe may still take; 0 without a probe
        self._spell, self._patience = FIRST, 0  # steps of the next spell; windows before another is thought of

    def run(self, replay: Callable[[int], None]) -> None:
        """One step: `replay(threads)`."""
        if self.threads == 1:
            return replay(1)
        begun = self._clock()
        replay(1 if self._alone else self.threads)
        self._times.append(self._clock() - begun)
        if self._alone:
            if len(self._times) >= self._spell:
                self._end_spell()
        elif self._budget > 0:
            self._probe()
        elif len(self._times) >= WINDOW:
            self._judge()
        return None

    def _judge(self) -> None:
        """Go on alone if the threads wait for each other most of the time."""
        mean = (sum(self._times) - max(self._times)) / (len(self._times) - 1)
        self._patience -= 1
        self._fastest = min(self._fastest, *self._times)
        if mean > STALLED * self._fastest and self._patience <= 0:
            self._alone, self._all, self._spell = True, mean, FIRST
        self._times = []

    def _end_spell(self) -> None:
        """Back to all threads: to stay, if one was slower; else for as long as some steps on one would take."""
        mean, self._times, self._alone = sum(self._times) / len(self._times), [], False
        if self._all and mean >= self._all:
            self._patience = LAST // WINDOW
            self._fastest = math.inf  # the text has grown: steps are slower now and stall no more than before
        else:
            self._budget = PROBE * mean
        self._all = 0.0

    def _probe(self) -> None:
        """All threads stay if they do PROBE steps within the budget."""
        self._budget -= self._times[-1]
        if self._budget <= 0:
            self._alone, self._spell = True, min(2 * self._spell, LAST)
        elif len(self._times) < PROBE:
            return
        self._times, self._budget = [], 0.0
