"""Plain decoding: the tree is the root, the step is one token, and every other method is measured against it."""

from collections.abc import Sequence

from ramify.draft.base import Drafter, drafter
from ramify.size.base import SizePolicy
from ramify.size.fixed import Fixed
from ramify.tree import StaticTree, TokenTree


@drafter("plain", lossless=True, trained=False)
class Plain(Drafter):
    """One token a step: guesses nothing."""

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """The roots alone."""
        return TokenTree.roots(roots)

    def static(self) -> StaticTree | None:
        """Roots alone."""
        return StaticTree(lambda rows: ((-1,), (0,))) if type(self) is Plain else None  # another class may guess

    def size_policy(self) -> SizePolicy:
        """One row: there is nothing to choose."""
        return Fixed(1)
