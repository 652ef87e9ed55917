"""A simulated machine for size policies: the clock is a formula, the drafter a rule, so every second is accounted for."""

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from ramify.size._cost import BUCKETS, CostTable
from ramify.tree import TokenTree
from ramify.verify import Verdict

STEP = 4e-4


def cpu_like(rows: int) -> float:
    """A step that grows slowly with its rows, as one bound by reading weights does."""
    return STEP * (1 + 0.02 * rows)


class Machine:
    """Runs a policy against a drafter that offers `offers(n)` rows of n and of which `accepts(rows)` leading rows are taken.

    chance: of the n rows of a sequence, as TokenTree.chance; None says nothing of it.
    """

    def __init__(self, policy, accepts, offers=lambda n: n, draft=lambda n: 0.0, step=cpu_like, batch=1, chance=None):
        self.policy, self.accepts, self.offers, self.draft, self.step, self.batch = policy, accepts, offers, draft, step, batch
        self.chance = chance
        self.seconds = self.tokens = 0.0
        self.widths: list[int] = []  # asked for, by step
        self.verified: list[int] = []  # rows, of all sequences
        policy.costs = CostTable([step(rows) for rows in BUCKETS])
        policy.bind(None, [])

    def run(self, steps: int) -> "Machine":
        """So many steps."""
        for _ in range(steps):
            [width] = set(self.policy.rows(list(range(self.batch)), [0] * self.batch))
            rows = [max(1, min(width, self.offers(width))) for _ in range(self.batch)]
            taken = [self.accepts(n) for n in rows]
            tree = TokenTree.chains([0] * self.batch, [[0] * (n - 1) for n in rows])
            if self.chance:
                tree.chance = np.concatenate([self.chance(n) for n in rows])
            tree = self.policy.trim(tree)
            paths = [np.arange(1 + min(most, n - 1), dtype=np.int32) for most, n in zip(taken, tree.rows.tolist(), strict=True)]
            forward, draft = self.step(tree.M), self.draft(width)
            stopwatch = {"draft": draft, "forward": forward, "verify": 1e-5, "commit": 1e-5}
            clock = SimpleNamespace(**{phase: SimpleNamespace(last=s) for phase, s in stopwatch.items()})
            self.policy.observe(tree, Verdict(paths, [[0] * len(p) for p in paths]), clock)
            self.seconds += sum(stopwatch.values())
            self.tokens += sum(map(len, paths)) / self.batch
            self.widths.append(width)
            self.verified.append(tree.M)
        return self

    @property
    def speedup(self) -> float:
        """Over plain decoding on this machine."""
        return self.tokens / self.seconds * (self.step(self.batch) + 2e-5)


def geometric(alpha: float, seed: int = 0) -> Callable[[int], int]:
    """Every guess is right with probability alpha, on its own."""
    rng = random.Random(seed)

    def accepts(n):
        taken = 0
        while taken < n - 1 and rng.random() < alpha:
            taken += 1
        return taken

    return accepts
