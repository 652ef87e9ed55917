"""A draft model and its cache, kept in step with the target's text.

The newest token of a slot's text is the next root; what stands before it and is not in the cache yet is pending. A step feeds pending
tokens as a chain above the root, so catching up costs no forward of its own. Rows that were run and then accepted are committed;
accepted rows that were never run (the last guess of a chain) are pending then, and so is everything that others drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ramify.checks import loaded_model
from ramify.draft.base import Drafter
from ramify.sampling.pipeline import Sampling
from ramify.tree import MAX_ROWS, TokenTree

if TYPE_CHECKING:
    from ramify.decode.output import Request
    from ramify.verify import Verdict

_NOTHING = np.zeros(0, np.int32)
_FEW = 24
"""So many pending tokens ride along with the root; more are fed by a prefill of their own."""


class Guessing:
    """One slot's tree while it grows, in rows of the draft model: pending tokens, root, then guesses that were run."""

    __slots__ = ("chain", "fed", "head", "parents", "row_of", "slot", "tokens")

    def __init__(self, slot: int, pending: Sequence[int], root: int) -> None:
        self.slot = slot
        self.tokens = [*pending, root]
        self.parents = list(range(-1, len(pending)))
        self.head = len(pending)  # the root's row here
        self.row_of: dict[int, int] = {}  # node of the proposal -> row here, for nodes that were run
        self.fed = 0  # rows that the model has run
        self.chain = True  # each row is the child of the one before

    def add(self, node: int, token: int, parent: int) -> None:
        """Run `node` of the proposal in the next forward; parent: a row here."""
        self.row_of[node] = len(self.tokens)
        self.chain &= parent == len(self.tokens) - 1
        self.tokens.append(token)
        self.parents.append(parent)


class SecondModel:
    """The draft model of one call to generate; slots are those of the call."""

    def __init__(self, model: Any, requests: Sequence[Request], method: str) -> None:
        """method: the name that its errors begin with."""
        self.model, self.method = model, method
        self.limit = model.config.max_positions
        self.capacities = [min(r.capacity, self.limit) for r in requests]
        self.cache: Any = None  # made by the first begin: a drafter that only watches needs none
        self.text: dict[int, list[int]] = {}
        self._length: dict[int, int] = {}  # committed tokens
        self._run: dict[int, Guessing] = {}
        self._view: Any = None  # of the slots in _run

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Take the prompts down. They are fed when a guess is first wanted: a drafter that only watches costs no forward."""
        if self.cache is None:
            self.cache = self.model.new_cache(self.capacities)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.text[slot], self._length[slot] = list(prompt), 0

    def end(self, slots: Sequence[int]) -> None:
        """Free these slots; those that never began or have ended are left alone. A slot may begin again."""
        ended = [slot for slot in slots if self.text.pop(slot, None) is not None]
        if ended and self.text:
            self.cache.free(ended)
        elif ended:
            self.cache.free(range(len(self.capacities)))
            self.cache = None

    def pending(self, slot: int) -> list[int]:
        """What stands before the next root and not in the cache."""
        return self.text[slot][self._length[slot] : -1]

    def start(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> list[Guessing]:
        """Open a tree for every slot that may guess: more than one row allowed, and positions left in the draft model."""
        self._run.clear()
        able = [i for i, slot in enumerate(slots) if rows[i] > 1 and self._room(slot, rows[i])]
        self._prefill([slots[i] for i in able], few=_FEW)
        for i in able:
            self._run[slots[i]] = Guessing(slots[i], self.pending(slots[i]), roots[i])
        self._view = self.cache.of(list(self._run)) if able else None
        return list(self._run.values())

    def forward(self, grown: Sequence[Guessing], topk: int = 0, logits: bool = False) -> tuple[Any, list[int]]:
        """Run the rows that were added to these trees (pending tokens and root, the first time).

        Returns the StepOut, and for each tree where in it the root or the first added row lies; its others follow. Raises ValueError for
        logits that are not finite, and says whose they are.
        The draft region belongs to one set of sequences per step, so a tree that has stopped growing runs its last row again.
        """
        trees = list(self._run.values())
        if all(t.chain for t in trees):
            tree = TokenTree.chains([t.tokens[0] for t in trees], [t.tokens[1:] for t in trees])
        else:
            tree = TokenTree.from_parents([t.tokens for t in trees], [t.parents for t in trees])
        first = np.array([min(t.fed, len(t.tokens) - 1) for t in trees], np.int32)
        whole = trees[0].fed == 0
        try:
            out = self.model.forward(tree, self._view, first=None if whole else first, topk=topk, logits=logits)
        except ValueError as problem:
            raise ValueError(f"{self.method}: the drafter's {str(problem).removeprefix('forward: ')}") from problem
        if not math.isfinite(out.lse.sum()):  # a model that does not look itself
            row = int(np.flatnonzero(~np.isfinite(out.lse))[0])
            raise ValueError(
                f"{self.method}: the drafter's logits of row {row} hold NaN or infinity; takes finite ones. Check its weights."
            )
        at, row = {}, 0
        for t, old in zip(trees, first.tolist(), strict=True):
            at[t.slot] = row + (t.head if whole else 0)
            row += len(t.tokens) - (0 if whole else old)
            t.fed = len(t.tokens)
        return out, [at[t.slot] for t in grown]

    def follow(self, slots: Sequence[int], emitted: Sequence[list[int]]) -> None:
        """Take down what was emitted after a tree that was another drafter's, or none: all of it is pending."""
        for slot, tokens in zip(slots, emitted, strict=True):
            self.text[slot] += tokens

    def settle(self, slots: Sequence[int], emitted: Sequence[list[int]], paths: Sequence[Any]) -> None:
        """Take down what was emitted after the tree that was run; its accepted rows (paths: nodes of the proposal) are committed."""
        keep = {slot: _NOTHING for slot in self._run}
        for slot, path in zip(slots, paths, strict=True):
            guessing = self._run.get(slot)
            if guessing is None or not len(path):
                continue
            rows = list(range(guessing.head + 1))
            for node in path[1:]:
                row = guessing.row_of.get(int(node))
                if row is None:
                    break
                rows.append(row)
            keep[slot] = np.array(rows, np.int32)
            self._length[slot] += len(rows)
        self.follow(slots, emitted)
        if self._view is not None:
            self._view.commit(list(keep.values()))
        self._run.clear()
        self._view = None

    def _room(self, slot: int, rows: int) -> bool:
        return len(self.text[slot]) - 1 + rows < self.limit

    def _prefill(self, slots: Sequence[int], few: int) -> None:
        behind = {slot: tokens for slot in slots if few < len(tokens := self.pending(slot)) < self.limit}
        if behind:
            self.model.prefill(list(behind.values()), self.cache, slots=list(behind))
            for slot, tokens in behind.items():
                self._length[slot] += len(tokens)


class ModelDrafter(Drafter):
    """A drafter that guesses with a second model of the same vocabulary. A subclass has the field `model` and supplies `propose`.

    `last`, the tree that it proposed last, tells its own verdicts from those on another drafter's tree.
    """

    model: Any
    second: SecondModel
    last: TokenTree | None = None

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Make the draft model's cache, with a slot per request. Raises ValueError for a model of another vocabulary."""
        if self.model is None:
            raise ValueError(f"{self.name}: model is None; takes the loaded draft model. generate(drafter=...) sets it.")
        check_vocabulary(model, loaded_model("model", self.model, self.name))
        self.second = SecondModel(self.model, requests, self.name)
        self.params = [r.params for r in requests]
        self.last = None

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Take the prompts down for the draft model."""
        self.second.begin(slots, prompts)

    def observe(self, slots: Sequence[int], tree: TokenTree, out: Any, verdict: Verdict) -> None:
        """Commit the rows of the draft model that were accepted; what it has not run waits for the next step."""
        if tree is self.last:
            self.second.settle(slots, verdict.emitted, verdict.path)
        else:
            self.second.follow(slots, verdict.emitted)
        self.last = None

    def end(self, slots: Sequence[int]) -> None:
        """Free the slots."""
        self.second.end(slots)

    def sampling(self, slots: Sequence[int]) -> Sampling:
        """The parameters and texts of these slots, to process the draft model's logits like the target's."""
        return Sampling([self.params[slot] for slot in slots], [self.second.text[slot] for slot in slots])


ROOM = MAX_ROWS - _FEW - 1
"""Most guesses that the draft model may run in one step, pending tokens and root aside."""


_PROBE = "def f(x):\n    return {'naïve': x ** 2, \"€\": [0.5, 128]}  # The quick brown fox\n"


def check_vocabulary(target: Any, draft: Any) -> None:
    """Raises ValueError unless both models give the same ids the same tokens."""
    if target.config.vocab_size != draft.config.vocab_size:
        ours, theirs = target.config.vocab_size, draft.config.vocab_size
        raise ValueError(
            f"generate: drafter has {theirs} tokens in its vocabulary; takes {ours}, as the target has. Take a model of one family."
        )
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is None or theirs is None or ours is theirs:
        return
    same = getattr(ours, "fingerprint", None) == getattr(theirs, "fingerprint", None)
    if same and getattr(ours, "fingerprint", None) is None:
        same = ours.encode(_PROBE) == theirs.encode(_PROBE)
    if not same:
        raise ValueError(
            "generate: drafter has another tokenizer than the target; takes one with the same ids. Take a model of one family."
        )
