"""The oracle: guesses the true continuation with an accuracy that you dial. Shows what a drafter of that accuracy would be worth.

It decodes every request plainly first, which costs as much as it saves: a tool for tests and measurements.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ramify.checks import between, sequence, show, whole
from ramify.draft.base import Drafter, drafter
from ramify.tree import TokenTree

if TYPE_CHECKING:
    from ramify.decode.output import Request
    from ramify.verify import Verdict


@drafter("oracle", lossless=True, trained=False, testing=True)
@dataclass
class Oracle(Drafter):
    """A chain of true tokens, each replaced by a wrong one with probability 1 - accuracy; every true row may get wrong siblings.

    accuracy: 0 to 1. branches: wrong siblings of each guess, placed before it, so that the tree's path is not its first rows. seed: of the
    mistakes. continuations: the true texts by slot; None decodes them.
    """

    accuracy: float = 1.0
    branches: int = 0
    seed: int = 0
    continuations: Sequence[Sequence[int]] | None = None
    _truth: list[list[int]] = field(default_factory=list, init=False, repr=False)
    _at: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _vocab: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        between("accuracy", self.accuracy, 0, 1, "oracle")
        whole("branches", self.branches, 0, "oracle")
        if self.continuations is not None and sequence(self.continuations) is None:
            raise TypeError(f"oracle: continuations is {show(self.continuations)}; takes a list of ids for each slot, or None.")
        self._random = random.Random(whole("seed", self.seed, caller="oracle"))

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Find out the continuations, by plain decoding with the requests' own parameters and seeds."""
        self._vocab = model.config.vocab_size
        if self.continuations is not None:
            self._truth = [list(tokens) for tokens in self.continuations]
            return
        from ramify.decode.loop import decode
        from ramify.draft.plain import Plain
        from ramify.size.fixed import Fixed

        self._truth = [out.token_ids for out in decode(model, requests, Plain(), Fixed(1))]

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Start at the beginning of each continuation."""
        self._at.update(dict.fromkeys(slots, 0))

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """The next true tokens, with mistakes, as far as the rows reach."""
        tokens, parents = [], []
        for slot, root, n in zip(slots, roots, rows, strict=True):
            t, p, above = [root], [-1], 0
            for truth in self._truth[slot][self._at[slot] :]:
                if len(t) == n:
                    break
                guess = truth if self._random.random() < self.accuracy else self._wrong(truth)
                wrong = {self._wrong(truth) for _ in range(self.branches)} - {guess}
                for token in [*sorted(wrong)[: n - 1 - len(t)], guess]:
                    t.append(token)
                    p.append(above)
                above = len(t) - 1
            tokens.append(t)
            parents.append(p)
        return TokenTree.from_parents(tokens, parents)

    def observe(self, slots: Sequence[int], tree: TokenTree, out: Any, verdict: Verdict) -> None:
        """Go on by as much as was emitted."""
        for slot, tokens in zip(slots, verdict.emitted, strict=True):
            self._at[slot] += len(tokens)

    def end(self, slots: Sequence[int]) -> None:
        """Nothing is kept of a slot that ended."""
        for slot in slots:
            self._at.pop(slot, None)

    def _wrong(self, truth: int) -> int:
        return (truth + 1 + self._random.randrange(self._vocab - 1)) % self._vocab if self._vocab > 1 else truth
