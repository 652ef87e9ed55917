"""What a step costs on this machine: seconds of a target step by rows, measured once, kept on disk, corrected while decoding."""

import atexit
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ramify.size import _store
from ramify.tree import MAX_ROWS, TokenTree

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows at which steps are measured: those for which the model layer is captured."""

_CONTEXT = 256  # committed tokens while measuring; how cost grows with context is left to the corrections
_REPEAT = 7
_STIRRED = 1 << 21  # bytes: more than a core's own caches, little against those that cores share
_PATIENCE = 0.5  # seconds; wider steps than the first that takes longer are extrapolated
_RATE, _RARE = 0.1, 0.25  # how far one step moves the table; a settled plain one, of which there are few while a drafter drafts
_DRIFT, _BUSY = 0.1, 0.5  # a table whose steps take less than half of what it says, over a dozen or so, was measured on a busy machine
_DOUBT, _SURE = 64, 2048  # plain steps after which other widths are taken to cost what was measured: at first, and after vain doubts
_AGAIN = 0.5  # weight then of the first step of any of them; below `_RIGHT` times the price the doubt was right
_RIGHT = 1.25
_MOST = 0.3  # weight of one observation, however many steps it is of
SETTLED = 12
"""Plain steps, after wider ones, until they cost what plain decoding costs."""

_tables: WeakKeyDictionary[Any, "CostTable"] = WeakKeyDictionary()


class CostTable:
    """Seconds of a step by its rows: linear between the buckets, and beyond the last two as between them.

    rest, tree_rest: seconds of verify and commit, of plain steps and of others, whatever their rows. A plain step that follows wider
    ones says nothing of plain decoding: it takes up to twice as long until a dozen of them have brought caches and clocks back (seen on
    a model that lies in the last-level cache), so plain steps are taken in only where they follow each other. thaw: seconds that this
    dozen takes longer, in all.
    A policy that finds other widths dear does not look again. So after a long run of plain steps they are taken to cost what was
    measured, at the pace of plain steps now; if that proves wrong, the next such run has to be twice as long.
    stale: whether steps have come to take far less than the table said, as they do when other programs ran while it was measured.
    """

    def __init__(self, seconds: Sequence[float], rows: Sequence[int] = BUCKETS) -> None:
        self.rows = list(rows)
        self.seconds = [max(float(s), 1e-9) for s in seconds]
        self.rest = self.tree_rest = self.thaw = self._excess = 0.0
        self.stale, self._drift = False, 1.0  # mean of what steps took over what the table as it was measured says
        self._measured, self._doubted = list(self.seconds), [0.0] * len(self.seconds)
        self._alone, self._wait = 0, _DOUBT  # plain steps since the last other one or doubt, and until the next doubt
        self._plain = 0  # plain steps in a row

    def at(self, rows: float) -> float:
        """Seconds of a step of so many rows (of all sequences together)."""
        return _between(self.seconds, *self._place(rows))

    def over(self, rows: np.ndarray) -> np.ndarray:
        """`at` of many row counts."""
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.rows[-1] - self.rows[-2])
        return np.interp(rows, self.rows, self.seconds) + np.maximum(rows - self.rows[-1], 0) * slope

    def whole(self, rows: np.ndarray, batch: int) -> np.ndarray:
        """Seconds of steps of so many rows of `batch` sequences together, with all but drafting."""
        return self.over(rows) + self.rest + max(0.0, self.tree_rest - self.rest) * np.minimum(rows / batch - 1, 1)

    def observe(self, rows: int, seconds: float, rest: float = 0.0, plain: bool = False, steps: int = 1) -> None:
        """Move the two nearest buckets a little towards what a step really took. One step counts at most for a factor of two.

        plain: whether it was a step without guesses, one row a sequence. steps: so many of them in a row, `seconds` and `rest` in all;
        at most `unsettled` where that is not 0.
        """
        weight = 1 - (1 - _RATE) ** steps
        if plain:
            self.rest += weight * (rest / steps - self.rest)
        else:
            self.tree_rest += weight * (rest / steps - self.tree_rest)
        self._plain = self._plain + steps if plain else 0
        usual = steps * self.at(rows)
        excess = min(seconds, 2 * usual) - usual
        if 0 < self._plain <= SETTLED:
            self._excess = excess + (self._excess if self._plain > steps else 0.0)
            if self._plain == SETTLED:
                self.thaw += _RARE * (max(0.0, self._excess) - self.thaw)
            return
        k, share = self._place(rows)
        share = min(share, 1.0)
        said = _between(self._measured, k, share)
        self._drift += (1 - (1 - _DRIFT) ** steps) * (min(seconds / steps / said, 2.0) - self._drift)
        self.stale |= self._drift < _BUSY
        rate = min(1 - (1 - (_RARE if self._plain else _RATE)) ** steps, _MOST)  # a burst of other work passes
        for i, doubt in enumerate(self._doubted):
            moved = max(doubt, rate * (1 - share if i == k else share if i == k + 1 else 0.0))
            self.seconds[i] *= 1 + moved * max(excess / usual, -0.5)
            self._doubted[i] *= 1 - moved
        self._alone = self._alone + steps if plain else 0
        if self._alone >= self._wait:
            self._doubt(self.at(rows) / said, (k, k + 1) if share else (k,))
        elif not plain and seconds < _RIGHT * usual:
            self._wait = _DOUBT

    def _doubt(self, pace: float, seen: Sequence[int]) -> None:
        for k in set(range(len(self.rows))).difference(seen):
            self.seconds[k], self._doubted[k] = pace * self._measured[k], _AGAIN
        self.tree_rest = min(self.tree_rest, self.rest)
        self._alone, self._wait = 0, min(2 * self._wait, _SURE)

    @property
    def unsettled(self) -> int:
        """Plain steps that are still to come until they cost what plain decoding costs."""
        return max(0, SETTLED - self._plain)

    def _place(self, rows: float) -> tuple[int, float]:
        k = 0
        while k < len(self.rows) - 2 and rows > self.rows[k + 1]:
            k += 1
        return k, (rows - self.rows[k]) / (self.rows[k + 1] - self.rows[k])


def _between(seconds: Sequence[float], k: int, share: float) -> float:
    return seconds[k] + share * (seconds[k + 1] - seconds[k])


def cost_table(model: Any) -> CostTable:
    """The table of this model on this machine: from this process, from disk, or measured now (about a second) and written to disk.

    A stale one is measured anew. A model that has neither a fingerprint nor a config and dtype is measured in every process.
    """
    table = _tables.get(model)
    if table is None or table.stale:
        path = _store.path_of("step-cost", model, _store.built())
        seconds = _seconds(_store.read(path)) if path and table is None else None
        if seconds is None:
            seconds = measure(model)
            if path:
                _store.write(path, {"rows": list(BUCKETS), "seconds": seconds})
        table = _tables[model] = CostTable(seconds)
        if path:
            atexit.register(_leave, table, path)
    return table


def _leave(table: CostTable, path: Path) -> None:
    """No later process shall believe a table that this one found stale."""
    if table.stale and _seconds(_store.read(path)) == table._measured:
        path.unlink(missing_ok=True)


def measure(model: Any) -> list[float]:
    """Seconds of a step of each bucket: the second fastest of a few chains after a context of some hundred tokens.

    Between two steps memory is written to, as decoding does: a step that finds everything where it left it is up to a quarter faster.
    """
    config = model.config
    context = max(1, min(_CONTEXT, config.max_positions - MAX_ROWS - 1))
    tokens = [(i * 7919) % config.vocab_size for i in range(MAX_ROWS + context)]
    cache = model.new_cache([context])
    model.prefill([tokens[:context]], cache, slots=[0])
    view = cache.of([0])
    seconds: list[float] = []
    stirred = np.zeros(_STIRRED, np.uint8)
    for rows in BUCKETS:
        if context + rows > config.max_positions or (seconds and seconds[-1] > _PATIENCE):
            seconds.append(2 * seconds[-1] if seconds else 1.0)
            continue
        tree = TokenTree.chains([tokens[context]], [tokens[context + 1 : context + rows]])
        if getattr(model, "device", "cpu") != "cpu":
            model.forward(tree, view)  # records the step and compiles its kernels
        taken: list[float] = []
        while len(taken) < _REPEAT and sum(taken) <= _PATIENCE:
            stirred += 1
            begun = perf_counter()
            model.forward(tree, view)
            taken.append(perf_counter() - begun)
        seconds.append(sorted(taken)[min(1, len(taken) - 1)])  # the middle ones are other programs', where some are at work
    cache.free([0])
    return _bounded(seconds)


def _bounded(seconds: list[float]) -> list[float]:
    """No step costs more than two of half its rows: what was measured above that was another program's."""
    for k in range(1, len(seconds)):
        seconds[k] = min(seconds[k], 2 * seconds[k - 1])
    return seconds


def _seconds(kept: Any) -> list[float] | None:
    try:
        seconds = [float(s) for s in kept["seconds"]]
    except (ValueError, TypeError, KeyError):
        return None
    good = kept.get("rows") == list(BUCKETS) and len(seconds) == len(BUCKETS) and all(0 < s < 1e6 for s in seconds)
    return _bounded(seconds) if good else None
