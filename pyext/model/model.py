"""Model: token trees in, logits out, over captured steps."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ramify.backends import MAX_TOPK, check_model_backend
from ramify.cache.arena import PREFILL_ROWS, Arena
from ramify.cache.cache import Cache, CacheView
from ramify.checks import show, whole
from ramify.model.config import ModelConfig
from ramify.model.rope import RopeTable
from ramify.model.step import WORDS, Plan, Step
from ramify.model.tokenizer import Tokenizer
from ramify.model.weights import Weights
from ramify.native import TILE, threads
from ramify.registry import page_format
from ramify.tree import MAX_ROWS, TokenTree

DRAFT_PAGES = MAX_ROWS // TILE  # of each sequence: room for the largest tree, so a growing tree never moves its neighbours
FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass
class StepOut:
    """What a forward returns, one row per packed row of the tree. Views of the step's buffers: the next forward overwrites them.

    argmax int32 [M]; top, lse f32 [M]: largest logit and log-sum-exp; topk_ids int32 and topk_values f32 [M, k], descending; logits
    f32 [M, V] when asked for; taps {i: f32 [M, hidden]}: the hidden state after i layers, before the norm that follows.
    Without the last layer everything but taps is None.
    """

    argmax: np.ndarray | None = None
    top: np.ndarray | None = None
    lse: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    topk_values: np.ndarray | None = None
    logits: np.ndarray | None = None
    taps: dict[int, np.ndarray] = field(default_factory=dict)


class Model:
    """A decoder of the Llama, Mistral, Qwen2 or Qwen3 family. Made by `ramify.load`.

    config: shapes. tokenizer: or None. weights: packed. eager: run kernel by kernel instead of replaying captured steps (same bits).
    """

    def __init__(self, config: ModelConfig, weights: Weights, tokenizer: Tokenizer | None = None):
        self.config, self.weights, self.tokenizer = config, weights, tokenizer
        self.eager = False
        self._rope = RopeTable(config.rope, config.head_dim, config.max_positions)
        self._arenas: list[Arena] = []
        depth = np.arange(PREFILL_ROWS, dtype=np.int32)
        bits = np.tril(np.ones((PREFILL_ROWS, PREFILL_ROWS), np.uint8))
        self._chain = (depth, np.packbits(bits, axis=1, bitorder="little").view(np.int64))

    def __repr__(self) -> str:
        c = self.config
        return f"Model({c.name}: {c.architecture}, {c.num_layers} layers, hidden {c.hidden_size}, {self.dtype})"

    @property
    def fingerprint(self) -> str:
        """Tells models of other shapes or other kernels apart; what is measured about one holds for every model that has the same."""
        return f"{self.config!r} {self.weights.settings!r}"

    @property
    def dtype(self) -> str:
        """Precision of the weights and the cache: "fp32" or "bf16"."""
        return "bf16" if self.weights.dtype == torch.bfloat16 else "fp32"

    def new_cache(self, capacities: Sequence[int], pages: str | None = None) -> Cache:
        """A cache with one slot per capacity (tokens). pages: a page format by name; the default stores what the model computes in.

        Raises ValueError for no capacity, one below 1 or beyond the model's positions; TypeError for what is no whole number.
        """
        limit = self.config.max_positions
        for capacity in capacities:
            if not 1 <= whole("capacity", capacity, caller="new_cache") <= limit:
                raise ValueError(f"new_cache: capacity is {show(capacity)}; takes 1 to {limit}, the positions of {self.config.name}.")
        if len(capacities) == 0:
            raise ValueError("new_cache: capacities is empty; takes one or more, a slot each.")
        stored = page_format.get(pages or FORMATS[self.weights.dtype], "new_cache", "pages")()
        need = sum(-(-int(c) // TILE) for c in capacities)
        drafts = max(PREFILL_ROWS // TILE, DRAFT_PAGES * len(capacities))
        for i, arena in enumerate(self._arenas):  # an idle arena keeps its captured steps
            if arena.page_format.name == stored.name and arena.pages >= need and arena.draft_pages >= drafts:
                return Cache(self._arenas.pop(i), capacities, self)
        return Cache(Arena(self.config, stored, need, drafts), capacities, self)

    def release(self, arena: Arena) -> None:
        """Take the arena of a cache whose last slot was freed, for caches to come."""
        self._arenas = [*self._arenas[-1:], arena]  # two idle arenas at most

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: Cache,
        slots: Sequence[int] | None = None,
        topk: int = 0,
        taps: Sequence[int] = (),
        rows_out: Callable[[int, Sequence[int], StepOut], None] | None = None,
        chunk: int = PREFILL_ROWS,
    ) -> None:
        """Feed and commit all given tokens, chunk by chunk, after what the slots hold. The chunk size changes no bit.

        rows_out(slot, tokens, out) sees each chunk's rows; without it logits are not computed at all.
        Raises ValueError for an empty prompt, a token outside the vocabulary, or more tokens than the slot or the model takes.
        """
        if not 1 <= chunk <= PREFILL_ROWS:
            raise ValueError(f"prefill: chunk is {chunk}; takes 1 to {PREFILL_ROWS} rows.")
        depth, bits = self._chain
        for slot, prompt in zip(range(len(prompts)) if slots is None else slots, prompts, strict=True):
            ids = np.asarray(prompt, np.int32)
            if len(ids) == 0:
                raise ValueError(f"prefill: prompt of slot {slot} is empty; takes one token or more.")
            view = cache.of([slot])
            cache.reserve(slot, int(cache.lengths[slot]) + len(ids))
            for at in range(0, len(ids), chunk):
                part = ids[at : at + chunk]
                n = len(part)
                rows = np.array([0, n], np.int32)
                tree = TokenTree(part, depth[:n] - 1, depth[:n], rows, bits[:n, : -(-n // 64)], np.zeros(n, np.uint8))
                layers = self.config.num_layers
                out = self._forward(tree, view, None, (0, layers), rows_out is not None, topk, tuple(taps), None, PREFILL_ROWS)
                if rows_out is not None:
                    rows_out(slot, part.tolist(), out)
                view.commit([depth[:n]])

    def forward(
        self,
        tree: TokenTree,
        view: CacheView,
        first: Sequence[int] | None = None,
        taps: Sequence[int] = (),
        topk: int = 0,
        logits: bool = False,
        layers: tuple[int, int] | None = None,
        hidden: np.ndarray | None = None,
    ) -> StepOut:
        """Run the rows of a tree after the committed tokens of `view`; commits nothing.

        first int32 [B]: rows of each sequence below it were run by an earlier forward of the same uncommitted tree; only the others are
        computed and returned. taps: hidden states to return, 0 to num_layers (-1 is the last). topk: 0 to 32. layers [start, end): a part
        of the model; start > 0 takes `hidden` f32 [M, hidden], end < num_layers returns the hidden state as its tap.
        Raises ValueError for a tree that does not fit the view, the vocabulary or the positions, and when a row's logits are not finite.
        """
        span = (0, self.config.num_layers) if layers is None else (int(layers[0]), int(layers[1]))
        if layers is not None or taps or topk:
            taps = self._check_request(span, taps, topk, hidden)
        head = span[1] == self.config.num_layers
        out = self._forward(tree, view, first, span, head, topk, tuple(taps), hidden, MAX_ROWS)
        if not logits:
            out.logits = None
        return out

    def _check_request(self, span, taps, topk, hidden) -> tuple[int, ...]:
        L = self.config.num_layers
        if not 0 <= span[0] < span[1] <= L:
            raise ValueError(f"forward: layers is {list(span)}; takes 0 <= start < end <= {L}.")
        if (span[0] > 0) != (hidden is not None):
            came = "missing" if hidden is None else "given"
            raise ValueError(f"forward: hidden is {came} for layers {list(span)}; takes it exactly when the range starts above 0.")
        if not 0 <= topk <= MAX_TOPK:
            raise ValueError(f"forward: topk is {topk}; takes 0 to {MAX_TOPK}.")
        taps = tuple(sorted({span[1] if tap == -1 else tap for tap in taps} | ({span[1]} if span[1] < L else set())))
        if taps and not (span[0] <= taps[0] and taps[-1] <= span[1]):
            raise ValueError(f"forward: taps is {list(taps)}; takes layers {span[0]} to {span[1]}.")
        return taps

    def _forward(self, tree, view, first, span, head, topk, taps, hidden, limit) -> StepOut:
        check_model_backend()
        B, arena = len(tree.row_start) - 1, view.cache.arena
        if view.cache.model is not self:
            raise ValueError("forward: cache is another model's; takes one that this model's new_cache made.")
        if not view.cache.live:  # its memory may be another cache's by now
            raise ValueError("forward: cache was freed; takes one that was not. Make another with new_cache.")
        if len(view.slots) != B:
            raise ValueError(f"forward: tree has {B} sequences; takes {len(view.slots)}, as the view has.")
        shape = _Shape.of(tree, limit) if first is None else _Shape.grown(tree, first, limit)
        M = shape.M
        step = self._step(arena, view.cache, max(M, len(tree.tokens)), B, span, head, topk, taps)
        self._fill(step, shape, tree, view)
        if hidden is not None:
            if hidden.shape != (M, self.config.hidden_size):
                raise ValueError(f"forward: hidden is {list(hidden.shape)}; takes [{M}, {self.config.hidden_size}], a state per row.")
            step.x[:M] = hidden
        step.run(self.eager)
        arena.flushed()
        view.draft_page, view.draft_rows = step.inputs.draft_page, shape.rows
        out = StepOut(taps={i: rows[:M] for i, rows in step.taps.items()})
        if head:
            named = step.outputs
            out.argmax, out.top, out.lse, out.logits = named["argmax"][:M], named["top"][:M], named["lse"][:M], named["logits"][:M]
            if topk:
                out.topk_ids, out.topk_values = named["topk_ids"][:M], named["topk_values"][:M]
            if not math.isfinite(out.lse.sum()):
                row = int(np.flatnonzero(~np.isfinite(out.lse))[0])
                raise ValueError(f"forward: logits of row {row} are not finite; takes weights without NaN. Check the checkpoint.")
        return out

    def _step(self, arena: Arena, cache: Cache, rows: int, B: int, span, head, topk, taps) -> Step:
        bucket, pages = 1 << (rows - 1).bit_length(), cache.page_table.shape[1]
        key = (bucket, B, span, head, topk, taps, pages)
        step = arena.programs.get(key)
        if step is None or step.threads != threads():
            plan = Plan(bucket, B, span, head, topk, taps)
            step = arena.programs[key] = Step(self.config, self.weights, self._rope, arena, plan, pages)
            step.inputs.draft_page[:] = np.arange(B) * DRAFT_PAGES
        return step

    def _fill(self, step: Step, shape: "_Shape", tree: TokenTree, view: CacheView) -> None:
        """Write a step's inputs; checks what a wrong address could come from. A shape that the step has seen last is not written again."""
        i, M, cache, B = step.inputs, shape.M, view.cache, len(view.slots)
        lengths = cache.lengths[view.slots]
        tokens = tree.tokens if shape.keep is None else tree.tokens[shape.keep]
        if int(tokens.view(np.uint32).max()) >= self.config.vocab_size:  # a negative id is a large unsigned one
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0]
            raise ValueError(f"forward: token {bad}; takes 0 to {self.config.vocab_size - 1}. Is it another model's vocabulary?")
        last = int(lengths[0]) + shape.deepest if B == 1 else int((lengths + shape.depths).max())
        if last >= self.config.max_positions:
            raise ValueError(f"forward: position {last}; takes 0 to {self.config.max_positions - 1}. Shorten the text or the tree.")
        if last >= self._rope.ready:
            self._rope.reach(last + 1)
        i.tokens[:M] = tokens
        i.prefix[:] = lengths
        i.page_table[:] = cache.page_table[view.slots]
        np.add(shape.depth, lengths[0] if B == 1 else lengths[shape.sequence], out=i.position[:M])
        if step.shape is not shape:
            i.count[0] = M
            i.depth[:M], i.draft_slot[:M], i.row_start[:] = shape.depth, shape.draft_slot, shape.row_start
            i.ancestors[:M, : shape.ancestors.shape[1]] = shape.ancestors
            i.tail_depth[: len(tree.depth)], i.tail_offset[:], i.tail[:] = tree.depth, tree.row_start, shape.rows
            step.shape = shape


class _Shape:
    """What a step needs of a tree besides its tokens. Trees of one shape share their arrays, so a shape is worked out once."""

    _recent: OrderedDict[tuple[int, int, int, int], "_Shape"] = OrderedDict()

    def __init__(self, tree: TokenTree, old: np.ndarray | None, limit: int):
        self.arrays = (tree.depth, tree.row_start, tree.ancestors)  # held, so that their identities stay theirs
        self.rows, B = tree.rows, tree.B
        new = self.rows if old is None else self.rows - old
        if old is not None and (int(new.min()) < 1 or int(old.min()) < 0):
            raise ValueError(f"forward: first is {old.tolist()}; takes 0 to one less than the rows, {self.rows.tolist()}.")
        if int(self.rows.max()) > limit:
            raise ValueError(f"forward: {int(self.rows.max())} rows in a sequence; takes 1 to {limit}. Lower rows= of the size policy.")
        if tree.ancestors.shape[1] > WORDS:
            raise ValueError(f"forward: ancestors has {tree.ancestors.shape[1]} words a row; takes at most {WORDS}.")
        total = int(self.rows.sum())
        if not len(tree.tokens) == len(tree.depth) == len(tree.ancestors) == total or int(self.rows.min()) < 1:
            raise ValueError(
                f"forward: tokens, depth and ancestors have other lengths than the {total} rows of row_start. Try TokenTree.check()."
            )
        if int(tree.depth.min()) < 0 or (tree.depth >= np.repeat(self.rows, self.rows)).any():
            raise ValueError("forward: depth has a row outside 0 to rows - 1; takes one more than its parent's. Try TokenTree.check().")
        begin = np.zeros(B, np.int32) if old is None else old
        self.keep = (
            None if old is None else np.concatenate([np.arange(s + n, e) for s, n, e in zip(tree.row_start, old, tree.row_start[1:])])
        )
        self.M = int(new.sum())
        self.depth = tree.depth if self.keep is None else tree.depth[self.keep]
        self.ancestors = tree.ancestors if self.keep is None else tree.ancestors[self.keep]
        self.depths = np.maximum.reduceat(tree.depth, tree.row_start[:-1])
        self.deepest = int(self.depths.max())
        self.sequence = np.repeat(np.arange(B), new)
        self.row_start = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        inside = [np.arange(n, r) + b * DRAFT_PAGES * TILE for b, (n, r) in enumerate(zip(begin, self.rows))]
        self.draft_slot = np.concatenate(inside).astype(np.int32)

    @classmethod
    def of(cls, tree: TokenTree, limit: int) -> "_Shape":
        """The shape of a whole tree, from the recent ones if its arrays were there."""
        key = (id(tree.depth), id(tree.row_start), id(tree.ancestors), limit)
        shape = cls._recent.get(key)
        if shape is None:
            shape = cls._recent[key] = cls(tree, None, limit)
            if len(cls._recent) > 256:
                cls._recent.popitem(last=False)
        return shape

    @classmethod
    def grown(cls, tree: TokenTree, first: Sequence[int], limit: int) -> "_Shape":
        """The rows of a tree from `first` on."""
        return cls(tree, np.asarray(first, np.int32), limit)
