"""Sample and match: draw once from the target at every visited row, then look whether a guess holds the draw.

Source: the deterministic-draft case of speculative sampling (Leviathan et al. 2023, section 2; used by prompt lookup and Token Recycling).
Exact for every tree whose guesses do not look at this draw, whatever the mode, because the draw alone decides: a path emits bit for bit
what plain decoding with the same seed emits. q is never read. Accepts the mass that the target gives to the children, which for a
"det" tree no verifier can beat; for drawn children the rejection verifiers accept more.
"""

from ramify.registry import verifier
from ramify.tree import MODES
from ramify.verify.base import Verifier, Walk


@verifier("sample_match", lossless=True, modes=MODES, source="Leviathan et al. 2023")
class SampleMatch(Verifier):
    """One draw from the target per visited row; go on while a child holds it."""

    def decide(self, walk: Walk) -> tuple[int, int]:
        """Return the draw (the arg-max at temperature 0) and the child that holds it."""
        token = walk.choose()
        return token, walk.match(token)
