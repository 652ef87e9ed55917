"""Draft tree: a small model grows the likeliest tree level by level, the target checks all of it in one step.

Source: the growth is that of EAGLE-2 (Li et al. 2024) with exact selection; the static trees of drawn guesses are Sequoia's (Chen et al.
2024). Exact. Needs a second model. Wins over the chain where the small model's second and third guesses are often right and the target's
step costs little more for more rows; one forward of the small model per level.

A node's odds are the draft model's probability of the whole path. Of all nodes within `depth`, `width` and `frontier`, the rows are those
of the highest odds, highest first: a child never has better odds than its parent, so every prefix of the rows is a tree, the best of its
size. Guesses are deterministic (above temperature 0 the token that the request's own dice choose in the draft model stands first among
its siblings), so no q is kept and the text is that of plain decoding. With `stochastic` children are draws without replacement in a
tree whose shape was fixed before the draws, for recursive rejection: exact in law, not equal in text.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ramify.checks import between, flag, whole
from ramify.draft._second_model import ROOM, Guessing, ModelDrafter
from ramify.draft.base import drafter
from ramify.sampling.pipeline import Sampling, draw_children, sampled
from ramify.size.base import SizePolicy
from ramify.size.fixed import Fixed
from ramify.tree import TokenTree

DRAW_ODDS = (0.65, 0.15, 0.07, 0.04, 0.03, 0.02, 0.01, 0.01)
"""How often the n-th draw without replacement is the one accepted, roughly: shapes the static trees of `stochastic`."""


@drafter("draft_tree", lossless=True, trained=True, portfolio=True, takes_model="yes", source="Li et al. 2024; Chen et al. 2024")
@dataclass
class DraftTree(ModelDrafter):
    """The most likely tree in the eyes of a second model.

    model: the loaded draft model. depth: levels, each a forward of it. width: children of a node. frontier: nodes of a level that it runs.
    min_odds: paths less likely than this are no rows. stochastic: draw guesses from the processed q; texts are then reproducible with a
    fixed size policy only.
    """

    model: Any = None
    depth: int = 7
    width: int = 6
    frontier: int = 12
    min_odds: float = 0.02
    stochastic: bool = False

    def __post_init__(self) -> None:
        for field in ("depth", "width", "frontier"):
            whole(field, getattr(self, field), 1, "draft_tree")
        between("min_odds", self.min_odds, 0, 1, "draft_tree")
        flag("stochastic", self.stochastic, "draft_tree")
        if (self.depth - 1) * self.frontier > ROOM:
            raise ValueError(f"draft_tree: depth is {self.depth} and frontier {self.frontier}; takes (depth - 1) * frontier up to {ROOM}.")

    def size_policy(self) -> SizePolicy | None:
        """Rows must not depend on the clock where the text depends on the rows."""
        return Fixed(16) if self.stochastic else None

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """Grow all sequences' trees together, one level per forward of the draft model."""
        drawing = self.stochastic and sampled(self.params[slot] for slot in slots)
        dice = any(self.params[slot].needs_logits for slot in slots)
        run = self.second.start(slots, roots, rows)
        sampling = self.sampling([t.slot for t in run])
        most = dict(zip(slots, rows, strict=True))
        kind: type[_Drawn] | type[_Likely] = _Drawn if drawing else _Likely
        growing = {t.slot: kind(self, t, sampling, b, most[t.slot]) for b, t in enumerate(run)}
        for level in range(1, self.depth + 1):
            if not run:
                break
            out, at = self.second.forward(run, topk=0 if drawing else min(self.width, self.model.config.vocab_size), logits=dice)
            for t, row in zip(run, at, strict=True):
                growing[t.slot].grow(out, row, last=level == self.depth)
            run = [t for t in run if t.fed < len(t.tokens)]
        grown = [
            growing[slot].finish(root) if slot in growing else Rows([root], [-1], [None]) for slot, root in zip(slots, roots, strict=True)
        ]
        q = _stack([law for rows in grown for law in rows.laws], self.model.config.vocab_size) if drawing else None
        self.last = TokenTree.from_parents([r.tokens for r in grown], [r.parents for r in grown], "wor" if drawing else "det", q)
        return self.last


class Rows(NamedTuple):
    """One sequence's rows: tokens, parents, and for drawn children the law that they were drawn from."""

    tokens: list[int]
    parents: list[int]
    laws: Sequence[np.ndarray | None]


def _stack(laws: list[np.ndarray | None], vocab: int) -> np.ndarray:
    """q float32 [M, V]; rows without children have none."""
    q = np.zeros((len(laws), vocab), np.float32)
    for row, law in enumerate(laws):
        if law is not None:
            q[row] = law
    return q


class _Likely:
    """One sequence's candidates, best first by path odds."""

    def __init__(self, settings: DraftTree, run: Guessing, sampling: Sampling, b: int, rows: int) -> None:
        self.settings, self.run, self.sampling, self.b, self.rows = settings, run, sampling, b, rows
        self.dice = sampling.params[b].needs_logits
        heat = sampling.params[b].temperature
        self.temperature = min(max(heat, 1e-30), 1e30) if heat else 1.0  # what float32 can divide by
        self.nodes: list[tuple[float, int, int, int]] = []  # all: (-odds, its place here, token, parent's place); they sort best first
        self.best: list[tuple[float, int, int, int]] = []  # those that are rows unless better ones come
        self.fresh = [-1]  # places of the nodes that the coming forward runs, in its row order; -1 is the root

    def grow(self, out: Any, at: int, last: bool) -> None:
        """Take in the children of the nodes that were run (rows of `out` from `at` on), choose what to run next."""
        nodes, first, least = self.nodes, len(self.nodes), self.settings.min_odds
        for node, children in zip(self.fresh, self._children(out, at), strict=True):
            above = nodes[node][0] if node >= 0 else -1.0
            for token, odds in children:
                if odds * -above < least and (node >= 0 or len(nodes) > first):  # the root keeps its best child, however unlikely
                    break
                nodes.append((above * odds, len(nodes), token, node))
        self.best = sorted(self.best + nodes[first:])[: self.rows - 1]
        self.fresh = []
        if not last:
            chosen = [node for node in self.best if node[1] >= first][: self.settings.frontier]
            self.fresh = sorted(place for _, place, _, _ in chosen)
        for place in self.fresh:
            _, _, token, parent = nodes[place]
            self.run.add(place, token, self.run.row_of[parent] if parent >= 0 else self.run.head)

    def finish(self, root: int) -> Rows:
        """The best candidates, in the order of their odds; `run` then speaks of these rows."""
        row_of = {place: row for row, (_, place, _, _) in enumerate(self.best, 1)}
        self.run.row_of = {row_of[place]: row for place, row in self.run.row_of.items() if place in row_of}
        row_of[-1] = 0
        tokens = [root, *(token for _, _, token, _ in self.best)]
        parents = [-1, *(row_of[parent] for _, _, _, parent in self.best)]
        return Rows(tokens, parents, [None] * len(tokens))

    def _children(self, out: Any, at: int) -> Iterable[Iterable[tuple[int, float]]]:
        """For each node that was run its likeliest children and their odds, likeliest first."""
        span = slice(at, at + len(self.fresh))
        ids, values = out.topk_ids[span].tolist(), out.topk_values[span]
        if not self.dice:
            return map(zip, ids, np.exp(values - out.lse[span, None]).tolist())
        w = np.exp((values - values[:, :1]) / self.temperature)
        odds = (w / w.sum(axis=1, keepdims=True)).tolist()
        return [self._with_dice(out, at + i, node, ids[i], odds[i]) for i, node in enumerate(self.fresh)]

    def _with_dice(self, out: Any, row: int, node: int, ids: list[int], odds: list[float]) -> list[tuple[int, float]]:
        """Put the token that the request's dice choose here among the likely ones.

        The dice fall alike in both models where their laws are alike, so that token is likelier than its own probability.
        """
        drawn = self.sampling.choose(self.b, out, row, self._path(node))
        likely = dict(zip(ids, odds, strict=True))
        sure = likely.pop(drawn, odds[-1]) ** 0.5
        scale = (1 - sure) / (sum(likely.values()) or 1.0)
        children = [(drawn, sure), *((token, share * scale) for token, share in likely.items())]
        return sorted(children, key=lambda child: -child[1])[: self.settings.width]

    def _path(self, node: int) -> list[int]:
        path = []
        while node >= 0:
            _, _, token, node = self.nodes[node]
            path.append(token)
        return path[::-1]


class _Drawn:
    """One sequence's static tree, filled with draws without replacement."""

    def __init__(self, settings: DraftTree, run: Guessing, sampling: Sampling, b: int, rows: int) -> None:
        self.run, self.sampling, self.b = run, sampling, b
        self.parents = static_tree(rows, settings.depth, settings.width)
        self.kids: list[list[int]] = [[] for _ in self.parents]
        for row, parent in enumerate(self.parents[1:], 1):
            self.kids[parent].append(row)
        self.token: dict[int, int] = {}
        self.law: dict[int, np.ndarray] = {}
        self.fresh = [0]

    def grow(self, out: Any, at: int, last: bool) -> None:
        """Draw the children of the rows that were run; those that have children of their own run next."""
        drawn: list[int] = []
        params, text = self.sampling.params[self.b], self.sampling.text[self.b]
        for i, row in enumerate(self.fresh):
            path = self._path(row)
            law = self.sampling.probabilities(self.b, out.logits[at + i], path)
            self.law[row] = law
            tokens = draw_children(law, len(self.kids[row]), "wor", params.seed, len(text) + len(path), row)
            for kid, token in zip(self.kids[row], tokens, strict=False):  # fewer tokens when the support of q ran out
                self.token[kid] = token
                drawn.append(kid)
        self.fresh = [] if last else [row for row in sorted(drawn) if self.kids[row]]
        for row in self.fresh:
            parent = self.parents[row]
            self.run.add(row, self.token[row], self.run.row_of[parent] if parent else self.run.head)

    def finish(self, root: int) -> Rows:
        """The rows that were filled, in the order of the static tree."""
        rows = [0, *sorted(self.token)]
        place = {row: i for i, row in enumerate(rows)}
        self.run.row_of = {place[row]: at for row, at in self.run.row_of.items()}
        tokens = [root, *(self.token[row] for row in rows[1:])]
        parents = [-1, *(place[self.parents[row]] for row in rows[1:])]
        return Rows(tokens, parents, [self.law.get(row) for row in rows])

    def _path(self, row: int) -> list[int]:
        path = []
        while row > 0:
            path.append(self.token[row])
            row = self.parents[row]
        return path[::-1]


@lru_cache(maxsize=512)
def static_tree(rows: int, depth: int, width: int, odds: tuple[float, ...] = DRAW_ODDS) -> list[int]:
    """Parents of the tree of `rows` rows that has most expected accepted tokens when the n-th child is the right one with odds[n].

    Best first: the row of highest path odds is added next, so smaller trees are prefixes of larger ones. Fewer rows if depth ends it.
    """
    parents = [-1]
    heap = [(-odds[0], 0, 0, 1)]  # (-odds of the path, parent row, rank, depth)
    while heap and len(parents) < rows:
        minus, parent, rank, level = heapq.heappop(heap)
        row = len(parents)
        parents.append(parent)
        if rank + 1 < min(width, len(odds)):
            heapq.heappush(heap, (minus / odds[rank] * odds[rank + 1], parent, rank + 1, level))
        if level < depth:
            heapq.heappush(heap, (minus * odds[0], row, 0, level + 1))
    return parents
