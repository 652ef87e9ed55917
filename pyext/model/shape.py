"""What a step needs of a tree besides its tokens."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ramify.cache.arena import PAGE
from ramify.tree import MAX_ROWS, TokenTree

DRAFT_PAGES = MAX_ROWS // PAGE  # of each sequence: room for the largest tree, so a growing tree never moves its neighbours
WORDS = 8  # ancestor words of a row in the step's own buffers: a prefill chunk of 512 rows is the widest tree


class Shape:
    """Rows of a tree as a step takes them. Trees of one shape share their arrays, so a shape is worked out once.

    rows int32 [B]: of each tree. M: rows to compute; of them: keep int [M], their places among the packed rows of the tree, or None for
    all; depth, sequence, draft_slot int [M]; ancestors [M, W]; row_start int32 [B + 1]. depths [B]: the deepest row of each tree.
    """

    _recent: OrderedDict[tuple[int, int, int, int], "Shape"] = OrderedDict()

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
        inside = [np.arange(n, r) + b * DRAFT_PAGES * PAGE for b, (n, r) in enumerate(zip(begin, self.rows))]
        self.draft_slot = np.concatenate(inside).astype(np.int32)

    @classmethod
    def of(cls, tree: TokenTree, limit: int) -> "Shape":
        """The shape of a whole tree, from the recent ones if its arrays were there."""
        key = (id(tree.depth), id(tree.row_start), id(tree.ancestors), limit)
        shape = cls._recent.get(key)
        if shape is None:
            shape = cls._recent[key] = cls(tree, None, limit)
            if len(cls._recent) > 256:
                cls._recent.popitem(last=False)
        return shape

    @classmethod
    def grown(cls, tree: TokenTree, first: Sequence[int], limit: int) -> "Shape":
        """The rows of a tree from `first` on."""
        return cls(tree, np.asarray(first, np.int32), limit)
