"""Draft chain: a small model of the same vocabulary runs ahead, the target checks the whole run in one step.

Source: Leviathan et al. 2023; Chen et al. 2023; the confidence stop is that of transformers' assisted decoding (Mamou et al. 2024).
Exact. Needs a second model. Wins where that is much cheaper than the target and mostly agrees; costs one forward of it per guess.

At temperature 0 a guess is the small model's arg-max. Above it, a guess is what the small model would emit with the request's own seed:
both models then throw the same dice, so guesses are deterministic, need no q, and the text is bit for bit that of plain decoding.
With `stochastic` guesses are independent draws from q, for speculative sampling: exact in law, not equal in text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ramify.checks import between, flag, whole
from ramify.draft._second_model import ROOM, ModelDrafter
from ramify.draft.base import drafter
from ramify.sampling.pipeline import Sampling, draw_children, sampled
from ramify.size.base import SizePolicy
from ramify.size.fixed import Fixed
from ramify.tree import TokenTree


@drafter("draft_chain", lossless=True, trained=True, portfolio=True, takes_model="yes", source="Leviathan et al. 2023; Chen et al. 2023")
@dataclass
class DraftChain(ModelDrafter):
    """One chain per sequence from a second model, as long as it is sure of itself.

    model: the loaded draft model. most: guesses per step. confidence: a guess less likely than this in the draft model's eyes is the last
    of its chain. stochastic: draw guesses from the processed q; texts are then reproducible with a fixed size policy only.
    """

    model: Any = None
    most: int = 16
    confidence: float = 0.4
    stochastic: bool = False

    def __post_init__(self) -> None:
        if whole("most", self.most, 1, "draft_chain") > ROOM:
            raise ValueError(f"draft_chain: most is {self.most}; takes 1 to {ROOM}.")
        between("confidence", self.confidence, 0, 1, "draft_chain")
        flag("stochastic", self.stochastic, "draft_chain")

    def size_policy(self) -> SizePolicy | None:
        """Rows must not depend on the clock where the text depends on the rows."""
        return Fixed(8) if self.stochastic else None

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """Run the draft model token by token; a sequence leaves the batch when it is unsure or has its rows."""
        drawing = self.stochastic and sampled(self.params[slot] for slot in slots)
        logits = any(self.params[slot].needs_logits for slot in slots)
        active = self.second.start(slots, roots, rows)
        sampling = self.sampling([t.slot for t in active])
        chains: dict[int, list[int]] = {t.slot: [] for t in active}
        laws: dict[int, list[np.ndarray]] = {t.slot: [] for t in active}
        most = {slot: min(n - 1, self.most) for slot, n in zip(slots, rows, strict=True)}
        place = {t.slot: b for b, t in enumerate(active)}
        while active:
            out, at = self.second.forward(active, logits=logits)
            sure = np.exp(out.top[at] - out.lse[at]).tolist()
            going = []
            for t, row, odds in zip(active, at, sure, strict=True):
                chain, b = chains[t.slot], place[t.slot]
                if drawing:
                    law = sampling.probabilities(b, out.logits[row], chain)
                    laws[t.slot].append(law)
                    token = self._draw(sampling, b, law, len(chain))
                else:
                    token = sampling.choose(b, out, row, chain)
                chain.append(token)
                if odds >= self.confidence and len(chain) < most[t.slot]:
                    t.add(len(chain), token, len(t.tokens) - 1)
                    going.append(t)
            active = going
        guesses = [chains.get(slot, []) for slot in slots]
        q = _stack([laws.get(slot, []) for slot in slots], self.model.config.vocab_size) if drawing else None
        self.last = TokenTree.chains(roots, guesses, "wor" if drawing else "det", q)
        return self.last

    def _draw(self, sampling: Sampling, b: int, law: np.ndarray, depth: int) -> int:
        return draw_children(law, 1, "wor", sampling.params[b].seed, len(sampling.text[b]) + depth, depth)[0]


def _stack(laws: list[list[np.ndarray]], vocab: int) -> np.ndarray:
    """q float32 [M, V] of chains: each row's law of its child, the last row's zero."""
    end = np.zeros(vocab)
    return np.stack([law for chain in laws for law in [*chain, end]]).astype(np.float32)
