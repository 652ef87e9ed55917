"""Token Recycling: what the target thought likely after a token, even in a rejected row, is next time's guess after that token.

Source: Luo et al. 2024 (Turning Trash into Treasure). Exact with any exact verifier. No weights: a table of 8 ids per vocabulary entry.
Wins on every kind of text once the table is warm; cost: 81 rows if the size policy allows them, and a top-8 of every row.
Rows of one step that hold the same token: the last one in row order wins, on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ramify.checks import flag, one_of, show
from ramify.draft.base import Drafter, Wants, drafter
from ramify.tree import StaticTree, TokenTree
from ramify.tree.static_tree import Links

if TYPE_CHECKING:
    from ramify.decode.output import Request
    from ramify.verify import Verdict

WIDTH = 8
"""Successors that the table keeps of each token."""

_CHILDREN: dict[tuple[int, ...], int] = {
    (): 8,
    **{(i,): n for i, n in enumerate((8, 4, 3, 2, 1, 1, 1, 1))},
    **{(0, j): n for j, n in enumerate((8, 3, 2, 1, 1, 1, 1, 1))},
    **{(1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1},
    **{(0, 0, j): n for j, n in enumerate((5, 2, 1, 1, 1))},
    **{(0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1},
    **{(0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1},
    **{(0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1},
}
"""The static tree (template 2.2.2) by ranks: how many children the node with these ranks has. 80 nodes below the root."""

_RANK_ODDS = (0.4, 0.13, 0.07, 0.05, 0.035, 0.03, 0.025, 0.02)
"""How often the successor of each rank comes next, roughly: orders the rows, so that a smaller tree keeps the likelier ones."""

_tables: WeakKeyDictionary[Any, np.ndarray] = WeakKeyDictionary()  # target -> its table, warm for as long as the target lives


@drafter("token_recycling", lossless=True, trained=False, portfolio=True, source="Luo et al. 2024")
@dataclass
class TokenRecycling(Drafter):
    """A static tree filled from a table of likely successors, which every verified row updates.

    keep: share one table between all calls with the same target ("hot start"); else begin empty. prompt: what a prompt teaches, which in
    the original is nothing ("none"): "pairs" takes what followed each token in the prompt itself, where the table is empty; "rows" takes
    the target's own likely ids, which costs the logits of every prompt row. table: int32 [V, 8], likeliest first, -1 where nothing was
    seen; a saved one may be given.
    """

    keep: bool = True
    prompt: str = "pairs"
    table: Any = field(default=None, repr=False)
    wants: Wants = field(default=Wants(), init=False, repr=False)

    def __post_init__(self) -> None:
        flag("keep", self.keep, "token_recycling")
        if self.table is not None and not isinstance(self.table, np.ndarray):
            raise TypeError(f"token_recycling: table is {show(self.table)}; takes an int32 array [V, {WIDTH}] or None.")
        self.prompt = "none" if self.prompt is None else self.prompt  # as a command line reads it
        one_of("prompt", self.prompt, ("none", "pairs", "rows"), "token_recycling")
        self.wants = Wants(topk=WIDTH, prompt=self.prompt == "rows")

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Take the table of this target. Raises ValueError when the given one is of another vocabulary."""
        vocab = model.config.vocab_size
        if self.table is None:
            self.table = _tables.get(model) if self.keep else None
        if self.table is None:
            self.table = np.full((vocab, WIDTH), -1, np.int32)
        if self.table.shape != (vocab, WIDTH) or self.table.dtype != np.int32:
            came = f"{self.table.dtype} {list(self.table.shape)}"
            raise ValueError(f"token_recycling: table is {came}; takes int32 [{vocab}, {WIDTH}]. It belongs to another vocabulary.")
        if not (self.table.flags.c_contiguous and self.table.flags.writeable):
            raise ValueError(
                "token_recycling: table is read-only or strided; takes a dense one that may be written to, such as table.copy()."
            )
        if not -1 <= self.table.min() <= self.table.max() < vocab:
            came = f"{self.table.min()} to {self.table.max()}"
            raise ValueError(f"token_recycling: table holds {came}; takes ids of 0 to {vocab - 1}, and -1 where nothing was seen.")
        if self.keep:
            _tables[model] = self.table

    def reset(self) -> None:
        """Forget what was learned."""
        if self.table is not None:
            self.table.fill(-1)

    def save(self, path: str | Path) -> None:
        """Write the table as .npy."""
        np.save(path, self.table)

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Learn what followed what in the prompts, the latest first."""
        if self.prompt != "pairs":
            return
        after: dict[int, dict[int, None]] = {}
        for prompt in prompts:
            for token, follower in zip(prompt[-2::-1], prompt[:0:-1], strict=True):
                after.setdefault(token, {})[follower] = None
        for token, followers in after.items():
            if self.table[token, 0] < 0:
                known = list(followers)[:WIDTH]
                self.table[token, : len(known)] = known

    def read(self, slot: int, tokens: Sequence[int], out: Any) -> None:
        """Learn from the rows of a prompt."""
        self._learn(list(tokens), out.topk_ids)

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """The first rows of the template, without the places whose token is not known."""
        levels, parents = template(max(rows))
        tokens = np.empty((len(roots), len(parents)), np.int32)
        tokens[:, 0] = roots
        for row, parent, rank in levels:
            tokens[:, row] = self.table[tokens[:, parent], rank]  # an unknown parent (-1) reads the last entry; it is pruned below
        if tokens.min() >= 0 and min(rows) >= len(parents):
            return TokenTree.from_parents(tokens.tolist(), [parents] * len(roots))
        pruned = [_prune(t, parents, n) for t, n in zip(tokens.tolist(), rows, strict=True)]
        return TokenTree.from_parents([t for t, _ in pruned], [p for _, p in pruned])

    def observe(self, slots: Sequence[int], tree: TokenTree, out: Any, verdict: Verdict) -> None:
        """Every row, accepted or not, says what is likely after its token."""
        self._learn(tree.tokens.tolist(), out.topk_ids)

    def static(self) -> StaticTree | None:
        """The template over the table. Rows whose token is not known stay in it, and nobody accepts them."""
        return StaticTree(links, self.table) if type(self) is TokenRecycling else None  # another class may guess otherwise

    def _learn(self, tokens: list[int], likely: np.ndarray) -> None:
        if len(tokens) == 1:
            self.table[tokens[0]] = likely[0, :WIDTH]
            return
        last = dict(zip(tokens, range(len(tokens)), strict=True))  # numpy does not define which of two writes stays
        self.table[list(last)] = likely[list(last.values()), :WIDTH]


@lru_cache(maxsize=256)
def template(rows: int) -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], list[int]]:
    """The first `rows` rows of the static tree: (row, parent row, rank) of each level below the root, and all parents."""
    paths = sorted(_paths(), key=lambda path: (-_odds(path), len(path), path))[:rows]
    place = {path: row for row, path in enumerate(paths)}
    parents = [-1] + [place[path[:-1]] for path in paths[1:]]
    levels = []
    for depth in range(1, max(map(len, paths)) + 1):
        at = [row for row, path in enumerate(paths) if len(path) == depth]
        levels.append((np.array(at), np.array([parents[row] for row in at]), np.array([paths[row][-1] for row in at])))
    return levels, parents


@lru_cache(maxsize=256)
def links(rows: int) -> Links:
    """Parents and ranks of the first `rows` rows of the static tree."""
    levels, parents = template(rows)
    ranks = [0] * len(parents)
    for at, _, rank in levels:
        for row, r in zip(at.tolist(), rank.tolist(), strict=True):
            ranks[row] = r
    return tuple(parents), tuple(ranks)


def _paths() -> list[tuple[int, ...]]:
    return [()] + [(*path, rank) for path, count in _CHILDREN.items() for rank in range(count)]


def _odds(path: tuple[int, ...]) -> float:
    odds = 1.0
    for rank in path:
        odds *= _RANK_ODDS[rank]
    return odds


def _prune(tokens: list[int], parents: list[int], rows: int) -> tuple[list[int], list[int]]:
    """The first `rows` rows whose token and whose ancestors' tokens are known."""
    place, kept_tokens, kept_parents = [0], [tokens[0]], [-1]
    for token, parent in zip(tokens[1:rows], parents[1:rows], strict=True):
        above = place[parent]
        if token < 0 or above < 0:
            place.append(-1)
            continue
        place.append(len(kept_tokens))
        kept_tokens.append(token)
        kept_parents.append(above)
    return kept_tokens, kept_parents
