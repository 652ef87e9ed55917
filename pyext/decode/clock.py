"""Seconds of each phase of a step. Two reads of the performance counter a phase; nothing is allocated."""

from time import perf_counter
from types import TracebackType


class Stopwatch:
    """Seconds of one phase: those of the last run in `last`, of all runs in `total`. Use it as a context manager."""

    __slots__ = ("last", "total", "_begun")

    def __init__(self) -> None:
        self.last = self.total = self._begun = 0.0

    def __enter__(self) -> "Stopwatch":
        self._begun = perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.last = perf_counter() - self._begun
        self.total += self.last


class Clock:
    """The four phases of a step, and the prefill before the first."""

    __slots__ = ("prefill", "draft", "forward", "verify", "commit")

    def __init__(self) -> None:
        self.prefill, self.draft, self.forward, self.verify, self.commit = (Stopwatch() for _ in self.__slots__)

    def totals(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        return {phase: getattr(self, phase).total for phase in self.__slots__}
