"""What a drafter has brought at each width. A whole tree tells of all smaller ones: the accepted rows in a prefix are theirs."""

from collections import deque
from collections.abc import Sequence

import numpy as np

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 81, 128, 192, 256)
"""Rows per sequence that are considered. 81 is the whole tree of Token Recycling."""

_N = np.array(WIDTHS)
_PRIOR = 1 + 1.2 * (1 - _N**-0.7)
"""Tokens per step that are expected of a drafter nobody has met: enough to try it, little enough to drop it after a few steps."""

_MEMORY = 0.05  # weight of the newest step
_STALE = 0.3  # steps, after forgetting, below which a width counts as not tried


class Experience:
    """Tokens and rows per sequence and step, and seconds of drafting, by width.

    Widths up to the widest tree of the last few dozen steps are known; wider ones hold what the known ones promise.
    """

    def __init__(self) -> None:
        self.tokens = _PRIOR.copy()
        self.rows = _N.astype(np.float64)
        self.steps = np.zeros(len(_N))
        self.draft: dict[int, deque[float]] = {}

    def add(self, width: int, rows: np.ndarray, paths: Sequence[np.ndarray], steps: int = 1) -> None:
        """Learn from `steps` steps of this width: the rows of each tree that was verified, and the rows accepted of it."""
        k = WIDTHS.index(width) + 1
        n = _N[:k]
        tokens = np.array([path.searchsorted(n) for path in paths]).mean(axis=0)
        used = np.minimum(rows[:, None], n).mean(axis=0)
        weight = np.maximum(1 - (1 - _MEMORY) ** steps, steps / (self.steps[:k] + steps + 1))
        self.tokens[:k] += weight * (tokens - self.tokens[:k])
        self.rows[:k] += weight * (used - self.rows[:k])
        self.steps[:k] += steps
        self.steps[k:] *= (1 - _MEMORY) ** steps
        self._extrapolate()

    def drafted(self, width: int, seconds: float) -> None:
        """Drafting a step of this width took so long."""
        seen = self.draft.get(width)
        if seen is None:
            seen = self.draft[width] = deque(maxlen=5)
        seen.append(seconds)

    def _extrapolate(self) -> None:
        """Widths not known go on from the widest known one: tokens as the prior does, rows straight."""
        known = int(np.count_nonzero(self.steps > _STALE))
        if 1 < known < len(_N):
            last, before = known - 1, known - 2
            steepness = max(0.0, self.tokens[last] - self.tokens[before]) / (_PRIOR[last] - _PRIOR[before])
            slope = (self.rows[last] - self.rows[before]) / (_N[last] - _N[before])
            self.tokens[known:] = self.tokens[last] + steepness * (_PRIOR[known:] - _PRIOR[last])
            self.rows[known:] = self.rows[last] + slope * (_N[known:] - _N[last])

    def drafting(self) -> np.ndarray:
        """Seconds of drafting of each width: the median of the last few, and between constant and linear for widths not tried."""
        if not self.draft:
            return np.zeros(len(_N))
        known = sorted((n, sorted(seen)[(len(seen) - 1) // 2]) for n, seen in self.draft.items())
        widths, seconds = [float(n) for n, _ in known], [s for _, s in known]
        if widths[0] > 1:
            widths, seconds = [1.0, *widths], [0.0, *seconds]
        guess = np.interp(_N, widths, seconds)
        return np.where(_N > widths[-1], seconds[-1] * np.sqrt(_N / widths[-1]), guess)
