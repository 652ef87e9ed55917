"""Memory of a cache on a device: pages, a draft region, and the moves that a commit has asked for.

It serves a Cache as an Arena does. Keys and values lie slot by slot, [slot, head, feature], as the ops take them. One slot more than
anybody owns stands at the end of the pages and of the draft region: rows that fill up a step are written there, and nobody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ramify.cache.arena import PAGE
from ramify.cache.base import PageFormat
from ramify.cache.mirror import Mirror, wait
from ramify.ops import _bound as bound
from ramify.tree import MAX_ROWS

if TYPE_CHECKING:
    from ramify.model.config import ModelConfig

I32 = torch.int32
MOST_MOVES = 1 << 15
"""Moves of one launch: a block each along an axis of a CUDA grid, which has 65535."""


class DeviceArena:
    """k, v [L, pages + 1, 64, Hkv, D] and draft_k, draft_v [L, 64 draft_pages + 1, Hkv, D] on `device`.

    programs: the steps recorded over it; states: what its turns hand on; turns: those that are open, or were. cos, sin f32
    [positions, D / 2]: rotary tables as long as any position that fits.
    """

    def __init__(
        self, config: ModelConfig, page_format: PageFormat, pages: int, draft_pages: int, device: torch.device, rope: tuple[Tensor, Tensor]
    ):
        self.page_format, self.pages, self.draft_pages, self.device = page_format, pages, draft_pages, device
        self.cos, self.sin = rope
        L, head = config.num_layers, (config.num_kv_heads, config.head_dim)
        like = {"dtype": page_format.dtype, "device": device}
        self.k, self.v = (torch.zeros(L, pages + 1, PAGE, *head, **like) for _ in range(2))
        self.draft_k, self.draft_v = (torch.zeros(L, draft_pages * PAGE + 1, *head, **like) for _ in range(2))
        self.spare_draft, self.spare_slot = draft_pages * PAGE, pages * PAGE
        self.free_pages = list(range(pages - 1, -1, -1))
        self.programs: dict = {}
        self.states: dict = {}
        self.turns: Any = None  # a weak reference: turns that everybody has forgotten are over
        self.pending = 0
        self._source, self._target = (np.zeros(min(draft_pages * PAGE, MOST_MOVES), np.int32) for _ in range(2))
        self._flush: tuple[Mirror, bound.Bound] | None = None
        self._workspace: dict[tuple[str, torch.dtype], Tensor] = {}

    def idle(self, caller: str) -> None:
        """Raises ValueError while turns are open: they own the state that is here, and what they committed is not yet known."""
        turns = self.turns and self.turns()
        if turns is not None and turns.open:
            raise ValueError(f"{caller}: turns of this cache are open; takes one at rest. Close them first.")

    def leave(self, slots: Sequence[int]) -> None:
        """End turns over any of these slots: their pages are about to be another's."""
        turns = self.turns and self.turns()
        if turns is not None and not turns.slots.isdisjoint(slots):
            turns.close()

    @property
    def nbytes(self) -> int:
        """Bytes of pages and draft region."""
        return 2 * (self.k.nbytes + self.draft_k.nbytes)

    def tail(self, i: int, sequences: int, rows: int) -> tuple[Tensor, Tensor]:
        """Draft keys and values of layer i as [sequences, rows, Hkv, D], MAX_ROWS slots a sequence."""
        each = MAX_ROWS
        k, v = (x[i, : sequences * each].view(sequences, each, *x.shape[2:])[:, :rows] for x in (self.draft_k, self.draft_v))
        return k, v

    def workspace(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that steps share, since they run one after another; what a step leaves there holds until the next one."""
        size = int(np.prod(shape))
        held = self._workspace.get((name, dtype))
        if held is None or held.numel() < size:  # the steps over a smaller one keep it
            held = self._workspace[name, dtype] = torch.zeros(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)

    def note(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy draft slots to page slots before the next step reads any page."""
        if self.pending + len(source) > len(self._source):
            self.flush()
        span = slice(self.pending, self.pending + len(source))
        self._source[span], self._target[span] = source, target
        self.pending = span.stop

    def hand(self, moves: dict[str, np.ndarray]) -> None:
        """Write the noted moves where a step reads them, and unused entries as moves of nothing. Too many for it are made at once."""
        if self.pending > len(moves["source"]):
            self.flush()
        n = self.pending
        moves["source"][:n], moves["target"][:n], moves["moved"][:n] = self._source[:n], self._target[:n], 1
        moves["source"][n:], moves["target"][n:], moves["moved"][n:] = self.spare_draft, self.spare_slot, 0

    def moves(self, inputs: Mirror) -> bound.Bound:
        """The launch that carries out the moves in source, target and moved of `inputs`."""
        pages = (x.flatten(1, 2) for x in (self.k, self.v))
        return bound.kv_moves(self.draft_k, self.draft_v, *pages, *(inputs.device[name] for name in ("source", "target", "moved")))

    def flush(self) -> None:
        """Carry out the noted moves now."""
        if not self.pending:
            return
        if self._flush is None:
            inputs = Mirror(self.device, {name: ((len(self._source),), I32) for name in ("source", "target", "moved")})
            self._flush = inputs, self.moves(inputs)
        inputs, launch = self._flush
        self.hand(inputs.host)
        inputs.upload()
        launch.run()
        wait(self.device)
        self.pending = 0

    def flushed(self) -> None:
        """A step has carried the moves out."""
        self.pending = 0
