"""The stopwatch of a GPU: events around calls that find the cache cold, peers in turns; and its stand-in on a CPU.

A call is enqueued while the device still clears its cache, so what is measured is the device's time as long as the host needs less than
that for a call. The host's own time is kept beside it: a loop of such calls without a CUDA graph runs no faster.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import quantile

FLUSH = 512 << 20
"""Bytes that are written to clear a cache: 0.1 ms of an H200, longer than the host needs to enqueue a call."""

WARM, ROUNDS, CALLS = 3, 4, 5
"""Calls before the first timed one; rounds in which every peer has its turn, forth and back; timed calls of a turn."""


class Events:
    """CUDA events on the current stream."""

    def __init__(self, device: str = "cuda", flush: int = FLUSH) -> None:
        self._spare = torch.empty(flush, dtype=torch.uint8, device=device)

    def burst(self, call: Callable[[], Any], count: int, cold: bool = True) -> list[tuple[float, float]]:
        """Seconds on the device and on the host of each of `count` calls."""
        pairs, host = [], []
        for _ in range(count):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if cold:
                self._spare.zero_()
            begin.record()
            start = time.perf_counter()
            call()
            host.append(time.perf_counter() - start)
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [(begin.elapsed_time(end) / 1e3, seconds) for (begin, end), seconds in zip(pairs, host)]


class Wall:
    """The host's clock, for a rehearsal."""

    def burst(self, call: Callable[[], Any], count: int, cold: bool = True) -> list[tuple[float, float]]:
        """Seconds of each of `count` calls, twice."""
        found = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            found.append((seconds, seconds))
        return found


def clock(device: str) -> Events | Wall:
    """The clock of a device."""
    return Events(device) if torch.device(device).type == "cuda" else Wall()


def lost() -> str:
    """Why the device answers no more; empty while it does, or was never asked."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@dataclass
class Runner:
    """One peer of a cell. inside: what its calls run in, entered outside the clock."""

    name: str
    call: Callable[[], Any]
    inside: Callable[[], AbstractContextManager] = nullcontext
    samples: list[tuple[float, float]] = field(default_factory=list)

    @property
    def us(self) -> dict[str, float]:
        """Microseconds of a call on the device: median, p10, p90."""
        seconds = [each for each, _ in self.samples]
        return {name: round(1e6 * quantile(seconds, share), 3) for name, share in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))}

    @property
    def host_us(self) -> float:
        """Microseconds until the host has enqueued a call."""
        return round(1e6 * quantile([host for _, host in self.samples], 0.5), 3)


def race(runners: Sequence[Runner], with_clock: Events | Wall, rounds: int = ROUNDS, calls: int = CALLS, warm: int = WARM) -> None:
    """Time all runners in turns (A B C, C B A, ...), so that a drift of the chip's clock meets all of them."""
    for runner in runners:
        with runner.inside():
            with_clock.burst(runner.call, warm)
    for turn in range(rounds):
        for runner in runners if turn % 2 == 0 else reversed(runners):
            with runner.inside():
                runner.samples += with_clock.burst(runner.call, calls)
