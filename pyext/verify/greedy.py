"""Greedy: emit the arg-max of every row as long as a guess holds it. Temperature 0 only.

Exact for any tree: siblings are distinct, so the walk is unique and ends where plain greedy decoding leaves the tree. Never touches
logits unless a repetition penalty is on.
"""

from ramify.registry import verifier
from ramify.tree import MODES
from ramify.verify.base import Verifier, Walk


@verifier("greedy", lossless=True, modes=MODES)
class Greedy(Verifier):
    """The longest path whose tokens are the target's arg-max, then one arg-max more."""

    def decide(self, walk: Walk) -> tuple[int, int]:
        """Return the arg-max (after the repetition penalty along the path) and the child that holds it."""
        if not walk.greedy:
            t = walk.sampling.params[walk.b].temperature
            raise ValueError(f"greedy: temperature is {t} in sequence {walk.b}; takes 0. Take sample_match to sample.")
        token = walk.choose()
        return token, walk.match(token)
