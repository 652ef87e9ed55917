"""What a drafter has brought at each width. A whole tree tells of all smaller ones: the accepted rows in a prefix are theirs."""

import atexit
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ramify.size import _store
from ramify.tree import MAX_ROWS

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 81, 128, 192, 256)
"""Rows per sequence that are considered. 81 is the whole tree of Token Recycling."""

_N = np.array(WIDTHS)
_PRIOR = 1 + 1.2 * (1 - _N**-0.7)
"""Tokens per step that are expected of a drafter nobody has met: enough to try it, little enough to drop it after a few steps."""

_MEMORY = 0.05  # weight of the newest step
_STALE = 0.3  # steps, after forgetting, below which a width counts as not tried
_OPEN = 5  # widths, up to 6 rows, that are taken for known at first
_TRUST = 8.0  # steps that what an earlier process learned counts as, at most: the next text may be another kind
FIRST_WAIT = 8
_SANE = ((0.1, 2 * MAX_ROWS), (0.1, 2 * MAX_ROWS), (0.0, 1e12))
"""Least and most that tokens, rows and steps may be in what an earlier process left."""


class Experience:
    """Tokens and rows per sequence and step, and seconds of drafting, by width; and how trials of this drafter stand.

    Widths up to the widest tree of the last few dozen steps are known; wider ones hold what was seen last, or the prior. opening: seconds
    that the first draft of a text takes beyond the others, such as a draft model's reading of the prompt. spent, lost: seconds of all
    steps and of trials (lost_to: of each, where drafters are several); checked: `spent` when plain decoding was last looked at;
    wait, since: steps between two trials, and since the last.
    """

    def __init__(self) -> None:
        self.tokens = _PRIOR.copy()
        self.rows = _N.astype(np.float64)
        self.steps = np.zeros(len(_N))
        self.opening = self.spent = self.lost = self.checked = 0.0
        self.lost_to: dict[str, float] = {}
        self.wait, self.since = FIRST_WAIT, 0
        self.draft: dict[int, deque[float]] = {}
        self._guess: np.ndarray | None = None

    def add(self, width: int, rows: np.ndarray, paths: Sequence[np.ndarray], steps: int = 1) -> None:
        """Learn from `steps` steps of this width: the rows of each tree that was verified, and the rows accepted of it."""
        k = WIDTHS.index(width) + 1
        n = _N[:k]
        tokens = sum(path.searchsorted(n) for path in paths) / len(paths)
        used = np.minimum(rows[:, None], n).mean(axis=0)
        weight = np.maximum(1 - (1 - _MEMORY) ** steps, steps / (self.steps[:k] + steps + 1))
        if self.known:
            weight[self.steps[:k] <= _STALE] = 1.0  # what was seen long ago, or never, says less than one trial
        self.tokens[:k] += weight * (tokens - self.tokens[:k])
        self.rows[:k] += weight * (used - self.rows[:k])
        self.steps[:k] += steps
        self.steps[k:] *= (1 - _MEMORY) ** steps

    def rested(self, steps: int) -> None:
        """So many plain steps: they bring a token each, and what wider ones brought grows old."""
        self.steps[0] += steps
        self.steps[1:] *= (1 - _MEMORY) ** steps

    @property
    def known(self) -> int:
        """How many of WIDTHS the last few dozen steps tell of."""
        return int(np.count_nonzero(self.steps > _STALE))

    @property
    def frontier(self) -> int:
        """How many of WIDTHS to consider: up to twice the widest known. What lies beyond is a guess, and a step of it is dear."""
        return int(np.searchsorted(_N, 2 * WIDTHS[max(self.known, _OPEN) - 1])) + 1

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and rows per step of each width. Those not known go on from the widest known: tokens as the prior does, rows straight."""
        known, tokens, rows = self.known, self.tokens.copy(), self.rows.copy()
        if 1 < known < len(_N):
            last, before = known - 1, known - 2
            steepness = max(0.0, tokens[last] - tokens[before]) / (_PRIOR[last] - _PRIOR[before])
            slope = (rows[last] - rows[before]) / (_N[last] - _N[before])
            tokens[known:] = tokens[last] + steepness * (_PRIOR[known:] - _PRIOR[last])
            rows[known:] = rows[last] + slope * (_N[known:] - _N[last])
        return np.maximum.accumulate(tokens), rows

    def drafted(self, width: int, seconds: float) -> None:
        """Drafting a step of this width took so long."""
        seen = self.draft.get(width)
        if seen is None:
            seen = self.draft[width] = deque(maxlen=5)
        seen.append(seconds)
        self._guess = None

    def drafting(self) -> np.ndarray:
        """Seconds of drafting of each width: the median of the last few, and between constant and linear for widths not tried."""
        if self._guess is None:
            self._guess = np.zeros(len(_N))
            if self.draft:
                known = sorted((n, sorted(seen)[(len(seen) - 1) // 2]) for n, seen in self.draft.items())
                widths, seconds = [float(n) for n, _ in known], [s for _, s in known]
                if widths[0] > 1:
                    widths, seconds = [1.0, *widths], [0.0, *seconds]
                guess = np.interp(_N, widths, seconds)
                self._guess = np.where(_N > widths[-1], seconds[-1] * np.sqrt(_N / widths[-1]), guess)
        return self._guess

    def state(self) -> dict[str, Any]:
        """What a later process wants to know, as JSON takes it."""
        draft = {str(n): sorted(seen)[(len(seen) - 1) // 2] for n, seen in self.draft.items()}
        numbers = {name: getattr(self, name) for name in ("opening", "wait", "since")}
        return {"tokens": self.tokens.tolist(), "rows": self.rows.tolist(), "steps": self.steps.tolist(), "draft": draft, **numbers}

    @classmethod
    def of(cls, state: Any) -> "Experience":
        """The experience of an earlier process; a new one when the state is damaged."""
        e = cls()
        try:
            arrays = [np.array(state[name], np.float64) for name in ("tokens", "rows", "steps")]
            draft = {int(n): float(s) for n, s in state["draft"].items()}
            opening, wait, since = float(state["opening"]), int(state["wait"]), int(state["since"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return e
        if any(a.shape != _N.shape or not ((a >= least) & (a <= most)).all() for a, (least, most) in zip(arrays, _SANE, strict=True)):
            return e
        seconds = [*draft.values(), opening]
        if not (set(draft) <= set(WIDTHS) and all(0 <= s < 1e6 for s in seconds) and 0 <= wait < 1e6 and 0 <= since < 1e9):
            return e
        e.tokens, e.rows, e.steps = arrays
        np.minimum(e.steps, _TRUST, out=e.steps)
        e.draft, e.opening, e.wait, e.since = {n: deque([s], maxlen=5) for n, s in draft.items()}, opening, wait, since
        return e


_met: WeakKeyDictionary[Any, dict[str, Experience]] = WeakKeyDictionary()  # target -> what was learned about its drafters
_files: dict[Path, dict[str, Experience]] = {}  # what this process will leave on disk when it ends


def remembered(model: Any, about: str) -> Experience:
    """What is known about a drafter with this target, from this process or an earlier one on this machine."""
    met = _met.get(model)
    if met is None:
        path = _store.path_of("drafters", model)
        kept = _store.read(path) if path else None
        met = _met[model] = {name: Experience.of(state) for name, state in kept.items()} if isinstance(kept, dict) else {}
        if path:
            if not _files:
                atexit.register(_leave)
            _files[path] = met
    return met.setdefault(about, Experience())


def _leave() -> None:
    for path, met in _files.items():
        _store.write(path, {name: e.state() for name, e in met.items()})
