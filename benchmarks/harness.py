"""The stopwatch of every benchmark: peers take turns in short bursts, and a burst that was disturbed does not count.

A number from one peer alone says little on a shared machine: clock speed, memory bandwidth and neighbours drift by tens of
percent within minutes. So every peer of a cell runs in every round (A B C, A B C, ...), and what is reported is a median over
bursts and a ratio inside the cell. A burst is dropped when the kernel says that this process's threads stood ready without
a core for more than 3% of it. Between peers there is a pause, so that the spinning workers of one runtime do not sit on the next
one's core.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLD_BYTES = 128 << 20
"""A cold call finds nothing in cache: copies of its arguments rotate through at least this much, or 4 last-level caches."""


class Machine:
    """Clock, pause and scheduler figures of this process, as Linux reports them. Tests put a made-up one in its place."""

    def now(self) -> float:
        """Seconds on a clock that never steps."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Leave the core."""
        time.sleep(seconds)

    def kept_off(self) -> float | None:
        """Seconds that threads of this process were ready to run and had no core, all threads together; None where unknown."""
        total, known = 0, False
        for thread in Path("/proc/self/task").glob("*/schedstat"):
            try:
                total += int(thread.read_text().split()[1])
                known = True
            except (OSError, IndexError, ValueError):
                continue  # the thread ended, or this kernel keeps no such figures
        return total / 1e9 if known else None

    def others(self) -> int:
        """How many threads of other processes want a core now."""
        try:
            wanting = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        except (OSError, IndexError, ValueError):
            return 0
        ours = 0
        for thread in Path("/proc/self/task").glob("*/stat"):
            try:
                ours += thread.read_text().rpartition(")")[2].split()[0] == "R"
            except (OSError, IndexError):
                continue
        return max(0, wanting - max(1, ours))


@dataclass(frozen=True)
class Plan:
    """How long to measure, and what counts as undisturbed."""

    rounds: int = 5
    burst: float = 0.05  # seconds of calls in a burst
    calls: tuple[int, int] = (3, 1000)  # least and most calls in a burst
    pause: float = 0.006  # between peers
    dirty: float = 0.03  # a burst whose threads were kept off a core for more than this share is dropped
    enough: int = 3  # clean bursts that a peer needs; rounds are added, up to twice as many, until it has them
    quiet: float = 0.25  # wait so long at most, before a burst, for other processes to finish
    warm: bool = True  # a call of each peer before the first burst; False where the caller has made one
    patience: float = 20.0  # seconds of such waiting in one `measure`; on a busy machine more would change nothing

    @classmethod
    def quick(cls) -> "Plan":
        """A look, not a measurement."""
        return cls(rounds=2, burst=0.01, calls=(1, 100), enough=1, quiet=0.02, patience=0.2)


@dataclass
class Entry:
    """One peer of a cell: `call(*copies[i])`, with i going round. parts: equal calls of the op inside one, such as nodes of a graph."""

    name: str
    call: Callable[..., Any]
    copies: Sequence[tuple]
    parts: int = 1
    next: int = 0

    def once(self) -> Any:
        """One call, on the next copy of the arguments."""
        args = self.copies[self.next % len(self.copies)]
        self.next += 1
        return self.call(*args)


@dataclass
class Timing:
    """What one peer's bursts said. Seconds of one call."""

    clean: list[list[float]] = field(default_factory=list)
    disturbed: list[list[float]] = field(default_factory=list)

    @property
    def bursts(self) -> list[list[float]]:
        """The clean bursts; all of them when none was clean."""
        return self.clean or self.disturbed

    @property
    def dirty(self) -> bool:
        """True when no burst was clean, so that the figures hold other people's work as well."""
        return not self.clean

    @property
    def median(self) -> float:
        """Median over bursts of each burst's median call."""
        return quantile([quantile(burst, 0.5) for burst in self.bursts], 0.5)

    def quantile(self, share: float) -> float:
        """Quantile over the calls of all bursts that count."""
        return quantile([seconds for burst in self.bursts for seconds in burst], share)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, between neighbours by interpolation. ValueError when there are none."""
    if not values:
        raise ValueError("quantile: values is empty; takes at least one value")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def copies_needed(size: int, cold: bool = True, cache: int | None = None) -> int:
    """How many copies of `size` bytes make every call a cold one; 1 for a hot benchmark."""
    if not cold:
        return 1
    whole = max(COLD_BYTES, 4 * (last_level_cache() if cache is None else cache))
    return max(1, -(-whole // max(1, size)))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core, 0 where the system does not say."""
    units, largest = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}, 0
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        largest = max(largest, int(text.rstrip("KMG")) * units.get(text[-1:], 1))
    return largest


def measure(entries: Sequence[Entry], plan: Plan, machine: Machine | None = None) -> list[Timing]:
    """Time all entries in turns; one Timing each, in the same order. An exception of an entry is the caller's to prevent."""
    machine = machine or Machine()
    counts = [_calls(entry, plan, machine) for entry in entries]
    timings = [Timing() for _ in entries]
    waited = 0.0
    for turn in range(2 * plan.rounds):
        if turn >= plan.rounds and all(len(t.clean) >= plan.enough for t in timings):
            break
        for entry, count, timing in zip(entries, counts, timings):
            if turn >= plan.rounds and len(timing.clean) >= plan.enough:
                continue
            machine.sleep(plan.pause)
            if waited < plan.patience:
                waited += _wait_for_quiet(machine, plan.quiet)
            _burst(entry, count, plan, machine, timing)
    return timings


def _calls(entry: Entry, plan: Plan, machine: Machine) -> int:
    if plan.warm:
        entry.once()  # first touch: pages, pools, lazy set-up
    least, most = plan.calls
    least = -(-least // entry.parts)
    if least == most:
        return least
    start = machine.now()
    entry.once()
    seconds = max(1e-9, machine.now() - start)
    return int(min(max(plan.burst / seconds, least), most))


def _burst(entry: Entry, count: int, plan: Plan, machine: Machine, timing: Timing) -> None:
    off, calls = machine.kept_off(), []
    begun = machine.now()
    for _ in range(count):
        start = machine.now()
        entry.once()
        calls.append((machine.now() - start) / entry.parts)
    whole, after = machine.now() - begun, machine.kept_off()
    disturbed = off is not None and after is not None and after - off > plan.dirty * whole
    (timing.disturbed if disturbed else timing.clean).append(calls)


def _wait_for_quiet(machine: Machine, longest: float) -> float:
    """Until no other process wants a core, `longest` seconds at most. Returns the seconds waited."""
    start = machine.now()
    while (waited := machine.now() - start) < longest:
        if machine.others() == 0:
            break
        machine.sleep(0.002)
    return waited
