"""Speculative sampling: accept a drawn guess with probability min(1, p/q), else draw from what q left over.

Source: Leviathan et al. 2023; Chen et al. 2023. Exact when q is what the guess was really drawn from. Chains only: one guess a row.
Accepts sum_x min(p(x), q(x)) of the guesses, and no coupling of one guess accepts more.
"""

from ramify.registry import verifier
from ramify.sampling.pipeline import inverse_cdf
from ramify.sampling.rng import ACCEPT, RESIDUAL
from ramify.verify.base import Verifier, Walk, residual


@verifier("speculative", lossless=True, modes=("iid", "wor"), source="Leviathan et al. 2023")
class Speculative(Verifier):
    """Accept with min(1, p/q); on rejection one draw from norm([p - q]_+) ends the step."""

    def decide(self, walk: Walk) -> tuple[int, int]:
        """Return the guess and its row, or a token of the residual and -1."""
        children = walk.children()
        if walk.greedy or not children:
            token = walk.choose()
            return token, walk.match(token)
        if len(children) > 1:
            where = f"row {walk.rows[-1]} of sequence {walk.b} has {len(children)} children"
            raise ValueError(f"speculative: {where}; takes chains. Take recursive_rejection for trees.")
        token = walk.tokens[children[0]]
        p, q = walk.p(), walk.q()
        if walk.uniform(ACCEPT) * q[token] < p[token]:
            return token, children[0]
        return inverse_cdf(residual(p, q), walk.uniform(RESIDUAL)), -1
