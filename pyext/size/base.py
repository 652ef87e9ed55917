"""What a size policy is: how many rows each sequence may verify in the next step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ramify.registry import size_policy
from ramify.tree import TokenTree

if TYPE_CHECKING:
    from ramify.decode.clock import Clock
    from ramify.decode.output import Request
    from ramify.verify import Verdict

__all__ = ["SizePolicy", "size_policy"]


class SizePolicy:
    """Chooses the rows of a step before it is drafted, and learns from what came of it. 1 row is plain decoding."""

    def bind(self, model: Any, requests: Sequence["Request"]) -> None:
        """Meet the target and the requests. Called once, before everything else."""

    def rows(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Return the most rows of each live sequence, 1 to MAX_ROWS. lengths: its committed tokens."""
        raise NotImplementedError

    def trim(self, tree: TokenTree) -> TokenTree:
        """Leave out drafted rows that are not worth verifying; of each sequence the first rows stay, its root among them. Not asked where
        a device drafts by itself: its trees have a shape before they have tokens.
        """
        return tree

    def observe(self, tree: TokenTree, verdict: "Verdict", clock: "Clock") -> None:
        """See the tree that was verified, what was accepted, and in `clock.<phase>.last` the seconds of this step's phases."""
