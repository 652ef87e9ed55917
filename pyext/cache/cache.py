"""Cache: the sequences of one generation, each a list of pages and a length. Commit is the only place where it grows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ramify.cache.arena import PAGE, Arena
from ramify.checks import show


class Draft(NamedTuple):
    """Rows of a forward that nobody has committed yet: of each of its sequences the first page in the draft region, and how many."""

    page: np.ndarray
    rows: np.ndarray


class Cache:
    """Slots 0 .. B-1, one per sequence, over the pages of an arena. It serves the model whose `new_cache` made it, and no other.

    lengths int32 [B]: committed tokens of each slot, both what attention walks and what RoPE counts (nothing is evicted yet).
    A slot's last, partly filled page is its open window; full pages are sealed and never written again, but for a crop.
    page_table int32 [B, P]: page of every 64 slots of a sequence. capacities int64 [B]: tokens that each may hold, -1 once it was freed.
    draft: what the last forward left in the draft region, until it is committed.
    """

    def __init__(self, arena: Arena, capacities: Sequence[int], model: Any):
        self.arena, self.model = arena, model
        self.capacities = np.array(capacities, np.int64)
        self.lengths = np.zeros(len(capacities), np.int32)
        widest = max(1, -(-int(self.capacities.max()) // PAGE))
        width = 1 << (widest - 1).bit_length()  # few widths, so that an arena's captured steps serve many caches
        self.page_table = np.zeros((len(capacities), width), np.int32)
        self._pages: list[list[int]] = [[] for _ in capacities]
        self.live = len(capacities)
        self.draft: Draft | None = None

    def of(self, slots: Sequence[int]) -> "CacheView":
        """The named slots, in this order, as one step sees them. Raises ValueError for slots that are not there, freed, or named twice."""
        slots = list(slots)
        if len(set(slots)) < len(slots) or not all(0 <= slot < len(self.capacities) and self.capacities[slot] > 0 for slot in slots):
            there = np.flatnonzero(self.capacities > 0).tolist()
            raise ValueError(f"Cache.of: slots is {show(slots)}; takes different ones of {show(there)}.")
        return CacheView(self, slots)

    def reserve(self, slot: int, length: int) -> None:
        """Give a slot the pages of `length` tokens. Raises ValueError beyond its capacity."""
        if length > self.capacities[slot]:
            raise ValueError(
                f"Cache: {length} tokens in slot {slot}; takes at most {self.capacities[slot]}. Ask new_cache for a larger capacity."
            )
        pages, need = self._pages[slot], -(-length // PAGE)
        while len(pages) < need:
            page = self.arena.free_pages.pop()
            self.page_table[slot, len(pages)] = page
            pages.append(page)

    def free(self, slots: Sequence[int]) -> None:
        """Give the slots' pages back. Freeing a slot twice is fine; the last one gives the arena back to its model. Turns of a device over
        one of them end. Raises ValueError for a slot that never was.
        """
        if not all(0 <= slot < len(self.capacities) for slot in slots):
            raise ValueError(f"Cache.free: slots is {show(slots)}; takes some of 0 to {len(self.capacities) - 1}.")
        held = [slot for slot in dict.fromkeys(slots) if self.capacities[slot] > 0]
        if not held:  # the arena may be another cache's by now
            return
        self.arena.leave(held)
        for slot in held:
            self.arena.flush()
            self.arena.free_pages += self._pages[slot]
            self._pages[slot], self.lengths[slot], self.capacities[slot] = [], 0, -1
            self.live -= 1
            if self.live == 0:
                self.model.release(self.arena)


class CacheView:
    """Some slots of a cache in the order of a step's sequences. draft: of the last forward of this view."""

    __slots__ = ("cache", "draft", "slots")

    def __init__(self, cache: Cache, slots: Sequence[int]):
        self.cache, self.slots = cache, list(slots)
        self.draft: Draft | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Committed tokens of each sequence, int32 [B] (a copy)."""
        return self.cache.lengths[self.slots]

    @property
    def freed(self) -> bool:
        """Whether a slot of it was freed, so that what it names may be another's."""
        cache = self.cache
        return cache.live < len(cache.capacities) and bool((cache.capacities[self.slots] < 0).any())

    def commit(self, paths: Sequence[np.ndarray]) -> None:
        """Append draft rows paths[b] (ascending rows of the last forward's tree) to each sequence; the other rows are forgotten.

        Raises ValueError unless the last forward of the cache was this view's, for a row that it did not run, or beyond a slot's capacity;
        TypeError for rows that are no whole numbers. Nothing is appended then.
        """
        cache, draft = self.cache, self.draft
        if draft is None or draft is not cache.draft:
            raise ValueError("CacheView.commit: no forward has filled the draft region of this view; run model.forward(tree, view) first.")
        paths = [_rows(slot, path, rows) for slot, path, rows in zip(self.slots, paths, draft.rows.tolist(), strict=True)]
        for slot, path in zip(self.slots, paths, strict=True):
            cache.reserve(slot, int(cache.lengths[slot]) + len(path))
        cache.draft = None
        for b, (slot, path) in enumerate(zip(self.slots, paths, strict=True)):
            count = len(path)
            if count == 0:
                continue
            begin = int(cache.lengths[slot])
            if count == 1:
                target = cache.page_table[slot, begin // PAGE] * PAGE + begin % PAGE
            else:
                at = np.arange(begin, begin + count)
                target = cache.page_table[slot, at // PAGE] * PAGE + at % PAGE
            cache.arena.note(path + draft.page[b] * PAGE, target)
            cache.lengths[slot] = begin + count

    def moved(self, counts: np.ndarray) -> None:
        """Count what a device has committed by itself, counts int32 [B], into pages that it was given before."""
        self.cache.lengths[self.slots] += counts

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget committed tokens at the end: sequence b keeps its first lengths[b]. Raises ValueError for more than it has, and while
        turns of a device are open.
        """
        self.cache.arena.idle("CacheView.crop")
        for slot, length in zip(self.slots, lengths, strict=True):
            have = int(self.cache.lengths[slot])
            if not 0 <= length <= have:
                raise ValueError(f"CacheView.crop: length is {length} for slot {slot}; takes 0 to {have}. Commit to make it longer.")
            self.cache.lengths[slot] = length


def _rows(slot: int, path: Sequence[int], rows: int) -> np.ndarray:
    """A path as int32 [A]: ascending rows below `rows`."""
    given = np.asarray(path)
    if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
        raise TypeError(f"CacheView.commit: path of slot {slot} is {show(path)}; takes rows as whole numbers.")
    ascending = given[:-1] < given[1:]
    if len(given) and not (given[0] >= 0 and given[-1] < rows and ascending.all()):
        takes = f"rows 0 to {rows - 1} of the last forward's tree, ascending"
        raise ValueError(f"CacheView.commit: path of slot {slot} is {show(given.tolist())}; takes {takes}.")
    return given.astype(np.int32, copy=False)
