"""Model: token trees in, logits out, over captured steps."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ramify.backends import MAX_TOPK
from ramify.cache.arena import PAGE, PREFILL_ROWS
from ramify.cache.cache import Cache, CacheView, Draft
from ramify.checks import INT32_MAX, show, whole
from ramify.model.config import ModelConfig
from ramify.model.device_steps import DeviceSteps
from ramify.model.device_turns import DeviceTurns
from ramify.model.shape import DRAFT_PAGES, Shape
from ramify.model.step_out import StepOut, check_finite
from ramify.model.tokenizer import Tokenizer
from ramify.model.weights import Weights
from ramify.registry import page_format
from ramify.sampling.pipeline import Draws
from ramify.tree import MAX_ROWS, StaticTree, TokenTree

FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Model:
    """A decoder of the Llama, Mistral, Qwen2 or Qwen3 family. Made by `ramify.load`.

    config: shapes. tokenizer: or None. weights: as the kernels of its device take them. device: "cpu", "cuda:0", ... eager: run kernel by
    kernel instead of replaying captured steps (same bits).
    """

    def __init__(self, config: ModelConfig, weights: Weights, tokenizer: Tokenizer | None = None):
        self.config, self.weights, self.tokenizer = config, weights, tokenizer
        self.eager = False
        device = weights.settings.device
        self.device = "cpu" if device is None else str(device)
        self._steps: Any = _captured(config, weights) if device is None else DeviceSteps(config, weights, device)
        self._arenas: list[Any] = []
        depth = np.arange(PREFILL_ROWS, dtype=np.int32)
        bits = np.tril(np.ones((PREFILL_ROWS, PREFILL_ROWS), np.uint8))
        self._chain = (depth, np.packbits(bits, axis=1, bitorder="little").view(np.int64))

    def __repr__(self) -> str:
        c, on = self.config, "" if self.device == "cpu" else f" on {self.device}"
        return f"Model({c.name}: {c.architecture}, {c.num_layers} layers, hidden {c.hidden_size}, {self.dtype}{on})"

    @property
    def fingerprint(self) -> str:
        """Tells models of other shapes, kernels or devices apart; what is measured about one holds for every model that has the same."""
        where = "" if self.weights.settings.device is None else f" {self._steps.device_name}"
        return f"{self.config!r} {self.weights.settings!r}{where}"

    @property
    def dtype(self) -> str:
        """Precision of the weights and the cache: "fp32" or "bf16"."""
        return "bf16" if self.weights.dtype == torch.bfloat16 else "fp32"

    @property
    def draws(self) -> bool:
        """Whether `forward` draws tokens when it is asked to: on a GPU, from where logits would be long on their way."""
        return bool(self._steps.draws)

    @property
    def takes_turns(self) -> bool:
        """Whether `turns` can be had: on a GPU, which should not wait for its host between two steps."""
        return bool(self._steps.takes_turns)

    @property
    def backend(self) -> str:
        """What a step is made of: the ISA level of the CPU kernels, or the backend that runs attention on a GPU."""
        return self._steps.backend()

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
        need = sum(-(-int(c) // PAGE) for c in capacities)
        drafts = max(self._steps.prefill_rows // PAGE, DRAFT_PAGES * len(capacities))
        for i, arena in enumerate(self._arenas):  # an idle arena keeps its captured steps
            if arena.page_format.name == stored.name and arena.pages >= need and arena.draft_pages >= drafts:
                return Cache(self._arenas.pop(i), capacities, self)
        return Cache(self._steps.arena(stored, need, drafts), capacities, self)

    def release(self, arena: Any) -> None:
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
        """Feed and commit all given tokens, chunk by chunk, after what the slots hold. On the CPU the chunk size changes no bit.

        rows_out(slot, tokens, out) sees each chunk's rows; without it logits are not computed at all.
        Raises ValueError for an empty prompt, a token outside the vocabulary, or more tokens than the slot or the model takes; TypeError
        for tokens that are no whole numbers. No prompt is fed where one of them is refused for its tokens.
        """
        if not 1 <= chunk <= PREFILL_ROWS:
            raise ValueError(f"prefill: chunk is {chunk}; takes 1 to {PREFILL_ROWS} rows.")
        depth, bits = self._chain
        chunk = min(chunk, self._steps.prefill_rows)
        layers = self.config.num_layers
        taps = self._check_request((0, layers), taps, topk, None, "prefill") if taps or topk else ()
        slots = list(range(len(prompts)) if slots is None else slots)
        if len(slots) != len(prompts):
            raise ValueError(f"prefill: prompts has {len(prompts)} texts; takes {len(slots)}, one for each of slots.")
        texts = [self._prompt(slot, prompt) for slot, prompt in zip(slots, prompts, strict=True)]
        for slot, ids in zip(slots, texts, strict=True):
            view = cache.of([slot])
            cache.reserve(slot, int(cache.lengths[slot]) + len(ids))
            for at in range(0, len(ids), chunk):
                part = ids[at : at + chunk]
                n = len(part)
                rows = np.array([0, n], np.int32)
                tree = TokenTree(part, depth[:n] - 1, depth[:n], rows, bits[:n, : -(-n // 64)], np.zeros(n, np.uint8))
                out = self._forward(tree, view, None, (0, layers), rows_out is not None, topk, taps, None, self._steps.prefill_rows)
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
        draws: Draws | None = None,
    ) -> StepOut:
        """Run the rows of a tree after the committed tokens of `view`; commits nothing.

        first int32 [B]: rows of each sequence below it were run by an earlier forward of the same uncommitted tree; only the others are
        computed and returned. taps: hidden states to return, 0 to num_layers (-1 is the last). topk: 0 to 32. layers [start, end): a part
        of the model; start > 0 takes `hidden` f32 [M, hidden], end < num_layers returns the hidden state as its tap. draws: of a
        model whose property of that name is True: the token after every row, drawn where its logits are.
        Raises ValueError for a tree that does not fit the view, the vocabulary or the positions, and when a row's logits are not finite.
        """
        span = (0, self.config.num_layers) if layers is None else (int(layers[0]), int(layers[1]))
        if layers is not None or taps or topk:
            taps = self._check_request(span, taps, topk, hidden)
        head = span[1] == self.config.num_layers
        out = self._forward(tree, view, first, span, head, topk, tuple(taps), hidden, MAX_ROWS, draws if head and self.draws else None)
        if not logits:
            out.logits = None
        return out

    def turns(
        self, view: CacheView, tree: StaticTree, roots: Sequence[int], left: Sequence[int], draws: Draws | None = None
    ) -> DeviceTurns:
        """Steps that draft from tree.table, decide and commit where the model is, `left` tokens of each sequence of `view` in all.

        roots: the last token of each text, as in a tree. draws: temperatures and seeds as in `forward`, positions are those of the text;
        None takes the likeliest tokens. Of a model whose `takes_turns` is True. Raises ValueError for another, for a root outside the
        vocabulary, for more tokens than a slot holds and while other turns of the cache are open; TypeError for what is no such argument.
        """
        if not self.takes_turns:
            raise ValueError(f"turns: model is on {self.device}; takes one on a GPU, which drafts by itself. Use forward.")
        for name, given in (("roots", roots), ("left", left)):
            if isinstance(given, str) or not hasattr(given, "__len__"):
                raise TypeError(f"turns: {name} is {show(given)}; takes a whole number for each sequence, in a list.")
        self._check_view(view, len(roots), "turns")
        self._check_tokens(np.array([whole("root", root, 0, "turns", INT32_MAX) for root in roots], np.int32), "turns")
        if len(left) != len(roots):
            raise ValueError(f"turns: left has {len(left)} numbers; takes {len(roots)}, one for each root.")
        for count in left:
            whole("left", count, 1, "turns", INT32_MAX)
        if not isinstance(tree, StaticTree):
            raise TypeError(f"turns: tree is {show(tree)}; takes a StaticTree, as a drafter's static() returns.")
        tree.check(self.config.vocab_size)
        if tree.width > MAX_TOPK:
            raise ValueError(f"turns: table is {tree.width} ids wide; takes at most {MAX_TOPK}.")
        if draws is not None:
            if not isinstance(draws, Draws):
                raise TypeError(f"turns: draws is {show(draws)}; takes Draws or None, for the likeliest tokens.")
            draws.check(len(roots), "turns")
        return DeviceTurns(self._steps, view, tree, roots, left, draws)

    def _prompt(self, slot: int, prompt: Sequence[int]) -> np.ndarray:
        given = np.asarray(prompt)
        if given.shape == (0,):
            raise ValueError(f"prefill: prompt of slot {slot} is empty; takes one token or more.")
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise TypeError(f"prefill: prompt of slot {slot} is {show(prompt)}; takes token ids, which are whole numbers.")
        ids = np.clip(given.astype(np.int64), -1, INT32_MAX).astype(np.int32)
        self._check_tokens(ids, "prefill")
        return ids

    def _check_request(self, span, taps, topk, hidden, caller: str = "forward") -> tuple[int, ...]:
        L = self.config.num_layers
        if not 0 <= span[0] < span[1] <= L:
            raise ValueError(f"{caller}: layers is {list(span)}; takes 0 <= start < end <= {L}.")
        if (span[0] > 0) != (hidden is not None):
            came = "missing" if hidden is None else "given"
            raise ValueError(f"{caller}: hidden is {came} for layers {list(span)}; takes it exactly when the range starts above 0.")
        if not 0 <= topk <= MAX_TOPK:
            raise ValueError(f"{caller}: topk is {topk}; takes 0 to {MAX_TOPK}.")
        taps = tuple(sorted({span[1] if tap == -1 else tap for tap in taps} | ({span[1]} if span[1] < L else set())))
        if taps and not (span[0] <= taps[0] and taps[-1] <= span[1]):
            raise ValueError(f"{caller}: taps is {list(taps)}; takes layers {span[0]} to {span[1]}.")
        return taps

    def _forward(self, tree, view, first, span, head, topk, taps, hidden, limit, draws=None) -> StepOut:
        self._check_view(view, len(tree.row_start) - 1)
        arena = view.cache.arena
        shape = Shape.of(tree, limit) if first is None else Shape.grown(tree, first, limit)
        step = self._steps.step(view, shape, tree, span, head, topk, taps, draws is not None)
        self._fill(step, shape, tree, view)
        if hidden is not None:
            if hidden.shape != (shape.M, self.config.hidden_size):
                takes = f"[{shape.M}, {self.config.hidden_size}], a state per row"
                raise ValueError(f"forward: hidden is {list(hidden.shape)}; takes {takes}.")
            step.start_from(hidden)
        if draws is not None:
            step.draw(draws, shape)
        step.run(self.eager)
        arena.flushed()
        view.draft = view.cache.draft = Draft(step.draft_page, shape.rows)
        out: StepOut = step.out(shape)
        if out.lse is not None:
            check_finite(out.lse)
        return out

    def _check_view(self, view: CacheView, B: int, caller: str = "forward") -> None:
        if not isinstance(view, CacheView):
            raise TypeError(f"{caller}: view is {show(view)}; takes slots of a cache: cache.of([0]).")
        cache = view.cache
        if cache.model is not self:
            raise ValueError(f"{caller}: cache is another model's; takes one that this model's new_cache made.")
        if not cache.live:  # its memory may be another cache's by now
            raise ValueError(f"{caller}: cache was freed; takes one that was not. Make another with new_cache.")
        if view.freed:
            raise ValueError(
                f"{caller}: a slot of {show(view.slots)} was freed; takes slots that were not. Ask the cache for another view."
            )
        if len(view.slots) != B:
            came = f"tree has {B} sequences" if caller == "forward" else f"roots has {B} tokens"
            raise ValueError(f"{caller}: {came}; takes {len(view.slots)}, as the view has.")

    def _check_tokens(self, tokens: np.ndarray, caller: str = "forward") -> None:
        if int(tokens.view(np.uint32).max()) >= self.config.vocab_size:  # a negative id is a large unsigned one
            bad = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0]
            raise ValueError(f"{caller}: token {bad}; takes 0 to {self.config.vocab_size - 1}. Is it another model's vocabulary?")

    def _fill(self, step: Any, shape: Shape, tree: TokenTree, view: CacheView) -> None:
        """Write a step's inputs; checks what a wrong address could come from."""
        cache, B = view.cache, len(view.slots)
        lengths = cache.lengths[view.slots]
        tokens = tree.tokens if shape.keep is None else tree.tokens[shape.keep]
        self._check_tokens(tokens)
        last = int(lengths[0]) + shape.deepest if B == 1 else int((lengths + shape.depths).max())
        if last >= self.config.max_positions:
            raise ValueError(f"forward: position {last}; takes 0 to {self.config.max_positions - 1}. Shorten the text or the tree.")
        self._steps.reach(last)
        step.fill(shape, tree, tokens, lengths, cache.page_table[view.slots])


def _captured(config: ModelConfig, weights: Weights) -> Any:
    """The steps of the CPU. A build without its kernels has none, and still runs models on a GPU."""
    from ramify.model.step import Steps

    return Steps(config, weights)
