"""Random guesses in random trees: wrong nearly always, legal always. For tests of everything that must not depend on the drafter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ramify.checks import whole
from ramify.draft.base import Drafter, drafter
from ramify.tree import TokenTree

if TYPE_CHECKING:
    from ramify.decode.output import Request


@drafter("random_draft", lossless=True, trained=False, testing=True)
@dataclass
class RandomDraft(Drafter):
    """Trees of random shape and random tokens. seed: of shapes and tokens, which also depend on the order of the calls."""

    seed: int = 0
    _random: random.Random = field(init=False, repr=False)
    _vocab: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, "random_draft")
        self._random = random.Random(self.seed)

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Learn the size of the vocabulary."""
        self._vocab = model.config.vocab_size

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """Up to rows[i] rows; every row hangs under any earlier one."""
        tokens, parents = [], []
        for root, n in zip(roots, rows, strict=True):
            used: set[tuple[int, int]] = set()
            tokens.append([root])
            parents.append([-1])
            for _ in range(n - 1):
                parent, token = self._random.randrange(len(tokens[-1])), self._random.randrange(self._vocab)
                if (parent, token) not in used:
                    used.add((parent, token))
                    tokens[-1].append(token)
                    parents[-1].append(parent)
        return TokenTree.from_parents(tokens, parents)
