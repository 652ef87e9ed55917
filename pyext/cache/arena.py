"""Memory of a cache: a pool of pages, a draft region of the same layout, and the moves that a commit has asked for.

A commit does not copy at once. It notes (draft slot, page slot) pairs, and the next step's first kernel carries them out inside
the step's own parallel region; whoever reads pages without running a step calls `flush` first. Rejected rows are never noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ramify.backends import native
from ramify.cache.base import PageFormat

if TYPE_CHECKING:
    from ramify.model.config import ModelConfig

PAGE = 64
"""Slots of a page: TILE of the kernels."""

PREFILL_ROWS = 512
"""Prompt tokens fed in one forward, and the least number of rows that a draft region holds."""


class Arena:
    """Pages and draft region for one model: k, v [L, pages, Hkv, 64 D] and draft_k, draft_v [L, draft pages, Hkv, 64 D]."""

    def __init__(self, config: ModelConfig, page_format: PageFormat, pages: int, draft_pages: int):
        self.page_format, self.pages, self.draft_pages = page_format, pages, draft_pages
        L, Hkv, D, dtype = config.num_layers, config.num_kv_heads, config.head_dim, page_format.dtype
        self.page_elements = Hkv * PAGE * D
        # zeros, not empty: a value that nobody wrote is multiplied by an exact 0 and must not be NaN
        self.k, self.v = (torch.zeros(L, pages, self.page_elements, dtype=dtype, device="cpu") for _ in range(2))
        self.draft_k, self.draft_v = (torch.zeros(L, draft_pages, self.page_elements, dtype=dtype, device="cpu") for _ in range(2))
        self.free_pages = list(range(pages - 1, -1, -1))
        self.source = torch.zeros(draft_pages * PAGE, dtype=torch.int32, device="cpu")
        self.target = torch.zeros_like(self.source)
        self.pending = torch.zeros(1, dtype=torch.int32, device="cpu")
        self._source, self._target, self._pending = self.source.numpy(), self.target.numpy(), self.pending.numpy()
        self.programs: dict = {}
        kernels = native()
        self.commit_args = kernels.CommitArgs(
            count=self.pending.data_ptr(),
            source=self.source.data_ptr(),
            target=self.target.data_ptr(),
            L=L,
            Hkv=Hkv,
            D=D,
            kv_dtype=kernels.DTYPES[dtype],
            k=self.k.data_ptr(),
            v=self.v.data_ptr(),
            layer_stride=pages * self.page_elements,
            page_stride=self.page_elements,
            draft_k=self.draft_k.data_ptr(),
            draft_v=self.draft_v.data_ptr(),
            draft_layer_stride=draft_pages * self.page_elements,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of pages and draft region."""
        return 2 * (self.k.nbytes + self.draft_k.nbytes)

    def note(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy draft slots to page slots before the next step reads any page."""
        begin = int(self._pending[0])
        end = begin + len(source)
        if end > len(self._source):
            self.flush()
            begin, end = 0, len(source)
        self._source[begin:end], self._target[begin:end] = source, target
        self._pending[0] = end

    def idle(self, caller: str) -> None:
        """Nothing goes on over it by itself."""

    def leave(self, slots: Sequence[int]) -> None:
        """Nothing goes on over the slots by itself."""

    def flush(self) -> None:
        """Carry out the noted moves now."""
        if self._pending[0]:
            native().run(self.commit_args)
            self._pending[0] = 0

    def flushed(self) -> None:
        """A step has carried the moves out."""
        self._pending[0] = 0
