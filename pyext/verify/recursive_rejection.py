"""Recursive rejection: test the drawn children one after the other, each against what the rejected ones left of the target.

Source: SpecInfer (Miao et al. 2023) for draws with replacement; EAGLE (Li et al. 2024) and Sequoia (Chen et al. 2024) for draws
without. Exact when children stand in the order in which they were drawn from q; sorting them by score afterwards is not exact.
"""

from ramify.registry import verifier
from ramify.sampling.pipeline import inverse_cdf
from ramify.sampling.rng import ACCEPT, RESIDUAL
from ramify.verify.base import Verifier, Walk, residual


@verifier("recursive_rejection", lossless=True, modes=("iid", "wor"), source="Miao et al. 2023; Chen et al. 2024")
class RecursiveRejection(Verifier):
    """Child i passes with min(1, p_i/q_i); on rejection p_i+1 = norm([p_i - q_i]_+), and q_i+1 = q_i without the child if mode is "wor"."""

    def decide(self, walk: Walk) -> tuple[int, int]:
        """Return the first child that passes, or a token of the last residual and -1."""
        children = walk.children()
        if walk.greedy or not children:
            token = walk.choose()
            return token, walk.match(token)
        p, q = walk.p(), walk.q()
        for lane, child in enumerate(children):
            token = walk.tokens[child]
            if walk.uniform(ACCEPT, lane) * q[token] < p[token]:
                return token, child
            p = residual(p, q)
            if walk.tree.mode == "wor":
                q[token] = 0
                mass = q.sum()
                if mass <= 0:  # q has no support left: no further child can have been drawn from it
                    break
                q /= mass
        return inverse_cdf(p, walk.uniform(RESIDUAL)), -1
