"""Weights on huge pages: what every step reads from end to end should not cost a page table entry every 4 KiB.

A step reads each weight once, so no entry of the TLB serves twice, and in a virtual machine a lookup walks two tables. On pages of 2 MiB
there is one lookup where there were 512, and the prefetchers of the chip do not stop. Where the system has no huge pages, or none left, the
same bytes lie on small ones.
"""

import mmap
from contextlib import suppress
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

PAGE = 2 << 20
"""Bytes of a huge page."""

REGION = 32 << 20
"""Bytes asked for at once: layers smaller than a page share it. What nobody has touched takes no memory."""

LINE = 64
"""Tensors begin on cache lines."""


class _Region:
    """Memory handed out from front to back. It goes back to the system once no tensor of it is left and another one is being filled."""

    def __init__(self, size: int):
        # Shared memory, Python's default, has huge pages only where an administrator allowed them, and a forked child writes into it.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._memory = mmap.mmap(-1, size + PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
        self._next = -address % PAGE
        self._end = self._next + size

    def take(self, like: Tensor) -> Tensor | None:
        """Memory of `like`'s shape and dtype, a storage of its own; None where less is left."""
        begin, end = self._next, self._next + like.nbytes
        if end > self._end:
            return None
        self._next = -(-end // LINE) * LINE
        return torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=begin).view(like.shape)


def system() -> str:
    """Whether the system gives huge pages to who asks, in a line."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "weights on small pages: no transparent huge pages here"
    taken = setting.partition("[")[2].partition("]")[0]
    return f"weights on {'small' if taken == 'never' else 'huge'} pages: transparent_hugepage is {taken or setting.strip()}"


_lock = Lock()
_region: _Region | None = None


def on_huge_pages(x: Tensor) -> Tensor:
    """A contiguous copy of x, a tensor on the CPU, where a kernel reads it fastest; x itself if it is empty."""
    global _region
    if not x.nbytes:
        return x
    with _lock:
        copy = None if _region is None else _region.take(x)
        if copy is None:
            made = _Region(max(REGION, -(-x.nbytes // PAGE) * PAGE))
            copy = made.take(x)
            if x.nbytes < REGION:  # else it is full, and held it would outlive its tensor
                _region = made
    assert copy is not None
    return copy.copy_(x)
