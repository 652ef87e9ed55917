"""I3 for whole methods: drafters that draw their guesses leave the target's law as it is, and the test would notice if they did not."""

import numpy as np
import pytest

from ramify.decode.loop import decode
from ramify.decode.output import Request
from ramify.draft import draft_chain, draft_tree
from ramify.registry import drafter
from ramify.sampling.pipeline import SamplingParams
from ramify.size.fixed import Fixed
from ramify.testing import FakeModel

VOCAB, DRAWS, PROMPT = 6, 2000, [1, 2, 3]


def chi_square(method, temperature=0.9, top_k=5):
    """Statistic of the first two emitted tokens against the target's own law, and the degrees of freedom."""
    target = FakeModel(VOCAB, sharpness=1.2)
    draft = target.student(0.6)
    law = np.zeros((VOCAB, VOCAB))

    def p(text):
        logits = target.law(text).astype(np.float64) / temperature
        keep = logits >= np.sort(logits)[-top_k]
        weights = np.where(keep, np.exp(logits - logits.max()), 0)
        return weights / weights.sum()

    for first, share in enumerate(p(PROMPT)):
        law[first] = share * p([*PROMPT, first])
    seen = np.zeros_like(law)
    for at in range(0, DRAWS, 500):
        params = [SamplingParams(temperature, top_k=top_k, seed=seed) for seed in range(at, at + 500)]
        requests = [Request(PROMPT, 3, one) for one in params]  # a third token, so that both come from a tree
        for out in decode(target, requests, drafter.build(method, model=draft), Fixed(8)):
            seen[tuple(out.token_ids[:2])] += 1
    possible = law > 0
    assert not seen[~possible].any()
    expected = law[possible] * DRAWS
    return float(((seen[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


def is_lawful(statistic, freedom):
    """Within five standard deviations of what chance gives."""
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


METHODS = ["draft_chain:stochastic=True,confidence=0.3", "draft_tree:stochastic=True"]


@pytest.mark.parametrize("method", METHODS)
def test_drawn_guesses_keep_the_law(method):
    assert is_lawful(*chi_square(method))


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_q_is_noticed(method, monkeypatch):
    """Guesses taken as the likeliest, judged as if they had been drawn."""

    def likeliest(q, count, mode, seed, index, row=0):
        return np.argsort(-q)[: min(count, int((q > 0).sum()))].tolist()

    for module in (draft_chain, draft_tree):
        monkeypatch.setattr(module, "draw_children", likeliest)
    assert not is_lawful(*chi_square(method))
