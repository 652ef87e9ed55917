"""A model without arithmetic: the whole interface of a Model, in microseconds, for tests of drafters, verifiers and loops.

Its logits are a fixed pseudo-random function of the last few tokens that a row sees. It finds them through the ancestor bits, as
attention would, and its cache keeps token lists, so a wrong mask, a wrong commit or a kept view changes the text or raises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from ramify.tree import MAX_ROWS, TokenTree


@dataclass
class FakeOut:
    """StepOut of the fake: the same fields, made unusable by the model's next forward."""

    argmax: np.ndarray
    top: np.ndarray
    lse: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_values: np.ndarray | None = None
    logits: np.ndarray | None = None
    taps: dict[int, np.ndarray] = field(default_factory=dict)

    def poison(self) -> None:
        """Overwrite everything, as the static buffers of a real model would be."""
        for array in (self.argmax, self.topk_ids):
            if array is not None:
                array.fill(-7)
        for array in (self.top, self.lse, self.topk_values, self.logits):
            if array is not None:
                array.fill(np.nan)


class FakeModel:
    """Same calls as a Model. The law of the next token depends on the last `order` tokens, hashed into `contexts` rows of a table.

    sharpness: standard deviation of the logits; the larger, the likelier the likeliest token. `student` makes a model that mostly agrees.
    """

    def __init__(
        self,
        vocab: int = 64,
        *,
        seed: int = 0,
        sharpness: float = 3.0,
        order: int = 3,
        contexts: int = 509,
        eos: Sequence[int] = (),
        max_positions: int = 4096,
        tokenizer: Any = None,
        name: str = "fake",
    ) -> None:
        self.config = SimpleNamespace(
            vocab_size=vocab, max_positions=max_positions, eos_token_ids=tuple(eos), name=name, hidden_size=4, num_layers=1
        )
        self.tokenizer = tokenizer
        self.order = order
        self.table = (np.random.default_rng(seed).standard_normal((contexts, vocab)) * sharpness).astype(np.float32)
        self.forwards: list[int] = []
        """Rows of every forward so far, prefill excluded."""
        self._last: FakeOut | None = None

    def student(self, agreement: float = 0.8, seed: int = 1) -> "FakeModel":
        """A model over the same contexts whose logits are this one's, mixed with noise; agreement 1 is the same law."""
        other = FakeModel(self.config.vocab_size, max_positions=self.config.max_positions, eos=self.config.eos_token_ids, order=self.order)
        noise = np.random.default_rng(seed).standard_normal(self.table.shape) * self.table.std()
        other.table = (agreement * self.table + (1 - agreement) * noise).astype(np.float32)
        other.tokenizer = self.tokenizer
        return other

    def law(self, text: Sequence[int]) -> np.ndarray:
        """Logits of the token after `text`, float32 [V]."""
        return self.table[self._context(text)]

    def continuation(self, prompt: Sequence[int], count: int) -> list[int]:
        """The plain greedy continuation, without any cache or loop; stops after an eos id."""
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.law(text).argmax()))
            if text[-1] in self.config.eos_token_ids:
                break
        return text[len(prompt) :]

    def new_cache(self, capacities: Sequence[int]) -> "FakeCache":
        """One slot per capacity."""
        return FakeCache(capacities, self)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: "FakeCache",
        slots: Sequence[int] | None = None,
        topk: int = 0,
        taps: Sequence[int] = (),
        rows_out: Callable[[int, Sequence[int], FakeOut], None] | None = None,
        chunk: int = 16,
    ) -> None:
        """Feed and commit all given tokens, chunk by chunk."""
        for slot, prompt in zip(range(len(prompts)) if slots is None else slots, prompts, strict=True):
            if not len(prompt):
                raise ValueError(f"prefill: prompt of slot {slot} is empty; takes one token or more.")
            self._check_ids(prompt, slot)
            cache.region = None
            for at in range(0, len(prompt), chunk):
                part = list(prompt[at : at + chunk])
                text = cache.tokens[slot]
                cache.append(slot, part)
                if rows_out is not None:
                    done = len(text) - len(part)
                    rows_out(slot, part, self._rows([text[: done + i + 1] for i in range(len(part))], topk, False, taps))

    def forward(
        self,
        tree: TokenTree,
        view: "FakeView",
        first: Sequence[int] | None = None,
        taps: Sequence[int] = (),
        topk: int = 0,
        logits: bool = False,
    ) -> FakeOut:
        """The rows of a tree, those below `first` left out; they must stand in the draft region from an earlier forward."""
        tree.check()
        if tree.B != len(view.slots):
            raise ValueError(f"forward: tree has {tree.B} sequences; takes {len(view.slots)}, as the view has.")
        texts = []
        view.cache.take_region(view, first is not None)
        for b, slot in enumerate(view.slots):
            span = tree.span(b)
            skip = 0 if first is None else int(first[b])
            tokens, seen = tree.tokens[span].tolist(), _seen(tree.ancestors[span])
            rows = view.cache.draft(slot, tokens, seen, skip)
            self._check_ids(tokens, slot)
            committed = view.cache.tokens[slot]
            deepest = len(committed) + int(tree.depth[span].max())
            if deepest >= self.config.max_positions:
                raise ValueError(f"forward: position {deepest} in sequence {b}; takes 0 to {self.config.max_positions - 1}.")
            texts += [committed[-self.order :] + [tokens[j] for j in seen[row]] for row in rows]
        self.forwards.append(len(texts))
        return self._rows(texts, topk, logits, taps)

    def _context(self, text: Sequence[int]) -> int:
        key = 0
        for token in text[-self.order :]:
            key = (key * 1000003 + int(token) + 1) & 0xFFFFFFFF
        return (key ^ key >> 15) % len(self.table)

    def _check_ids(self, tokens: Sequence[int], slot: int) -> None:
        if not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            raise ValueError(f"forward: ids {min(tokens)} to {max(tokens)} in slot {slot}; takes 0 to {self.config.vocab_size - 1}.")

    def _rows(self, texts: list[list[int]], topk: int, logits: bool, taps: Sequence[int]) -> FakeOut:
        if self._last is not None:
            self._last.poison()
        rows = self.table[[self._context(text) for text in texts]]
        top = rows.max(axis=1)
        out = FakeOut(rows.argmax(axis=1).astype(np.int32), top, top + np.log(np.exp(rows - top[:, None]).sum(axis=1)))
        if topk:
            ids = np.argsort(-rows, axis=1, kind="stable")[:, :topk]
            out.topk_ids = ids.astype(np.int32)
            out.topk_values = np.take_along_axis(rows, ids, axis=1)
        if logits:
            out.logits = rows
        out.taps = {layer: np.zeros((len(texts), 4), np.float32) for layer in taps}
        self._last = out
        return out


def _seen(ancestors: np.ndarray) -> list[list[int]]:
    """Rows that each row sees, ascending, from its bits."""
    bits = np.unpackbits(ancestors.astype("<i8").view(np.uint8).reshape(len(ancestors), -1), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits]


class FakeCache:
    """Committed tokens of every slot, and a draft region of rows that were run and not committed."""

    def __init__(self, capacities: Sequence[int], model: FakeModel) -> None:
        self.capacities, self.model = list(capacities), model
        self.tokens: list[list[int]] = [[] for _ in capacities]
        self.freed: list[list[int]] = [[] for _ in capacities]
        """Committed tokens of a slot at the time it was freed."""
        self.drafts: list[list[tuple[int, list[int]]]] = [[] for _ in capacities]
        self.live = [True] * len(self.capacities)
        self.region: FakeView | None = None
        """The view whose rows the draft region holds: one region serves one set of sequences at a time."""

    def of(self, slots: Sequence[int]) -> "FakeView":
        """A view of some slots, one per sequence of a tree."""
        if not all(self.live[slot] for slot in slots):
            raise ValueError(f"cache: slots {list(slots)} came; some of them were freed.")
        return FakeView(self, list(slots))

    def free(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            if self.live[slot]:
                self.freed[slot], self.tokens[slot], self.drafts[slot], self.live[slot] = self.tokens[slot], [], [], False
                self.capacities[slot] = -1

    def append(self, slot: int, tokens: Sequence[int]) -> None:
        """Commit tokens at the end; ValueError beyond the slot's capacity."""
        if len(self.tokens[slot]) + len(tokens) > self.capacities[slot]:
            came, room = len(self.tokens[slot]) + len(tokens), self.capacities[slot]
            raise ValueError(f"cache: {came} tokens in slot {slot}; takes {room}, its capacity.")
        self.tokens[slot] += tokens
        self.drafts[slot] = []

    def take_region(self, view: "FakeView", again: bool) -> None:
        """Give the draft region to a view; `again`: it must have it already."""
        if again and self.region is not view:
            raise ValueError("forward: first came with another view than that of the forward before; takes the same view for one tree.")
        self.region = view
        if not again:
            self.drafts = [[] for _ in self.drafts]

    def draft(self, slot: int, tokens: list[int], seen: list[list[int]], skip: int) -> range:
        """Put rows into the draft region after the `skip` that are there; returns which rows are new."""
        if not 0 <= skip < len(tokens) <= MAX_ROWS:
            raise ValueError(f"forward: first is {skip} for {len(tokens)} rows in slot {slot}; takes 0 to {len(tokens) - 1}.")
        old = self.drafts[slot]
        if skip > len(old) or old[:skip] != list(zip(tokens, seen, strict=True))[:skip]:
            raise ValueError(f"forward: first is {skip} in slot {slot}; those rows were not run, or differ from the rows that were.")
        self.drafts[slot] = old[:skip] + list(zip(tokens, seen, strict=True))[skip:]
        return range(skip, len(tokens))


class FakeView:
    """Some slots of a FakeCache, one per sequence."""

    def __init__(self, cache: FakeCache, slots: list[int]) -> None:
        self.cache, self.slots = cache, slots

    @property
    def lengths(self) -> np.ndarray:
        """Committed tokens, int32 [B]."""
        return np.array([len(self.cache.tokens[slot]) for slot in self.slots], np.int32)

    def commit(self, paths: Sequence[np.ndarray]) -> None:
        """Keep these draft rows, each a path from row 0; forget the others."""
        if self.cache.region is not self:
            raise ValueError("commit: no forward of this view has filled the draft region.")
        self.cache.region = None
        for slot, path in zip(self.slots, paths, strict=True):
            rows = [int(row) for row in path]
            draft = self.cache.drafts[slot]
            if rows and (rows[-1] >= len(draft) or draft[rows[-1]][1] != rows):
                raise ValueError(f"commit: path {rows} in slot {slot} is no path from row 0 of the {len(draft)} rows that were run.")
            self.cache.append(slot, [draft[row][0] for row in rows])

    def crop(self, lengths: Sequence[int]) -> None:
        """Drop committed tokens at the end."""
        for slot, length in zip(self.slots, lengths, strict=True):
            if not 0 <= length <= len(self.cache.tokens[slot]):
                raise ValueError(f"crop: length {length} in slot {slot}; takes 0 to {len(self.cache.tokens[slot])}.")
            self.cache.tokens[slot] = self.cache.tokens[slot][:length]
            self.cache.drafts[slot] = []
