"""Model: token trees in, logits out, over captured steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ramify.cache.arena import PREFILL_ROWS, Arena
from ramify.cache.cache import Cache, CacheView
from ramify.model.config import ModelConfig
from ramify.model.rope import rope_tables
from ramify.model.step import WORDS, Plan, Step
from ramify.model.tokenizer import Tokenizer
from ramify.model.weights import Weights
from ramify.native import MAX_TOPK, TILE, threads
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
        self._rope = rope_tables(config.rope, config.head_dim, config.max_positions)
        self._arenas: list[Arena] = []
        depth = np.arange(PREFILL_ROWS, dtype=np.int32)
        bits = np.tril(np.ones((PREFILL_ROWS, PREFILL_ROWS), np.uint8))
        self._chain = (depth, np.packbits(bits, axis=1, bitorder="little").view(np.int64))

    def __repr__(self) -> str:
        c = self.config
        return f"Model({c.name}: {c.architecture}, {c.num_layers} layers, hidden {c.hidden_size}, {self.dtype})"

    @property
    def dtype(self) -> str:
        """Precision of the weights and the cache: "fp32" or "bf16"."""
        return "bf16" if self.weights.dtype == torch.bfloat16 else "fp32"

    def new_cache(self, capacities: Sequence[int], pages: str | None = None) -> Cache:
        """A cache with one slot per capacity (tokens). pages: a page format by name; the default stores what the model computes in.

        Raises ValueError for a capacity below 1 or beyond the model's positions.
        """
        limit = self.config.max_positions
        for capacity in capacities:
            if not 1 <= capacity <= limit:
                raise ValueError(f"new_cache: capacity is {capacity}; takes 1 to {limit}, the positions of {self.config.name}.")
        stored = page_format.get(pages or FORMATS[self.weights.dtype], "new_cache", "pages")()
        need = sum(-(-int(c) // TILE) for c in capacities)
        drafts = max(PREFILL_ROWS // TILE, DRAFT_PAGES * len(capacities))
        for i, arena in enumerate(self._arenas):  # an idle arena keeps its captured steps
            if arena.page_format.name == stored.name and arena.pages >= need and arena.draft_pages >= drafts:
                return Cache(self._arenas.pop(i), capacities, self._arenas.append)
        return Cache(Arena(self.config, stored, need, drafts), capacities, self._release)

    def _release(self, arena: Arena) -> None:
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
        B, arena = tree.B, view.cache.arena
        if len(view.slots) != B:
            raise ValueError(f"forward: tree has {B} sequences; takes {len(view.slots)}, as the view has.")
        old = np.zeros(B, np.int32) if first is None else np.asarray(first, np.int32)
        new = tree.rows - old
        M = int(new.sum())
        if int(new.min()) < 1 or int(old.min()) < 0:
            raise ValueError(f"forward: first is {old.tolist()}; takes 0 to one less than the rows, {tree.rows.tolist()}.")
        if int(tree.rows.max()) > limit:
            raise ValueError(f"forward: {int(tree.rows.max())} rows in a sequence; takes 1 to {limit}. Lower rows= of the size policy.")
        step = self._step(arena, view.cache, M, tree.M, B, span, head, topk, taps)
        self._fill(step, tree, view, old, new, M, first is None)
        if hidden is not None:
            if hidden.shape != (M, self.config.hidden_size):
                raise ValueError(f"forward: hidden is {list(hidden.shape)}; takes [{M}, {self.config.hidden_size}], a state per row.")
            step.x[:M] = hidden
        step.run(self.eager)
        arena.flushed()
        view.draft_page = step.inputs.draft_page
        out = StepOut(taps={i: rows[:M] for i, rows in step.taps.items()})
        if head:
            named = step.outputs
            out.argmax, out.top, out.lse, out.logits = named["argmax"][:M], named["top"][:M], named["lse"][:M], named["logits"][:M]
            if topk:
                out.topk_ids, out.topk_values = named["topk_ids"][:M], named["topk_values"][:M]
            if not np.isfinite(out.lse).all():
                row = int(np.flatnonzero(~np.isfinite(out.lse))[0])
                raise ValueError(f"forward: logits of row {row} are not finite; takes weights without NaN. Check the checkpoint.")
        return out

    def _step(self, arena: Arena, cache: Cache, M: int, tail: int, B: int, span, head, topk, taps) -> Step:
        rows = 1 << (max(M, tail) - 1).bit_length()
        plan = Plan(rows, B, span, head, topk, taps)
        pages = cache.page_table.shape[1]
        step = arena.programs.get((plan, pages))
        if step is None or step.threads != threads():
            step = Step(self.config, self.weights, self._rope, arena, plan, pages)
            step.inputs.draft_page[:] = np.arange(B) * DRAFT_PAGES
            arena.programs[plan, pages] = step
        return step

    def _fill(self, step: Step, tree: TokenTree, view: CacheView, old: np.ndarray, new: np.ndarray, M: int, whole: bool) -> None:
        """Write a step's inputs; checks what a wrong address could come from."""
        i, B, cache = step.inputs, tree.B, view.cache
        lengths = cache.lengths[view.slots]
        tokens, depth, ancestors, words = tree.tokens, tree.depth, tree.ancestors, tree.ancestors.shape[1]
        if not whole:
            keep = np.concatenate([np.arange(tree.row_start[b] + old[b], tree.row_start[b + 1]) for b in range(B)])
            tokens, depth, ancestors = tokens[keep], depth[keep], ancestors[keep]
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.config.vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0]
            raise ValueError(f"forward: token {bad}; takes 0 to {self.config.vocab_size - 1}. Is it another model's vocabulary?")
        if words > WORDS:
            raise ValueError(f"forward: ancestors has {words} words a row; takes at most {WORDS}.")
        i.count[0] = M
        i.tokens[:M], i.depth[:M] = tokens, depth
        i.ancestors[:M, :words] = ancestors
        i.tail_depth[: tree.M], i.tail_offset[: B + 1] = tree.depth, tree.row_start
        i.prefix[:B], i.tail[:B] = lengths, tree.rows
        i.page_table[:B] = cache.page_table[view.slots]
        if B == 1:
            i.row_start[1] = M
            np.add(depth, lengths[0], out=i.position[:M])
            i.draft_slot[:M] = np.arange(old[0], old[0] + M)
        else:
            np.cumsum(new, out=i.row_start[1 : B + 1])
            np.add(depth, np.repeat(lengths, new), out=i.position[:M])
            for b in range(B):
                i.draft_slot[i.row_start[b] : i.row_start[b + 1]] = np.arange(old[b], tree.rows[b]) + b * DRAFT_PAGES * TILE
        last = int(i.position[:M].max())
        if last >= self.config.max_positions:
            raise ValueError(f"forward: position {last}; takes 0 to {self.config.max_positions - 1}. Shorten the text or the tree.")
