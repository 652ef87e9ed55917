"""What a prompt's step computes: no more than its cache needs."""

import numpy as np
import pytest

import ramify
from ramify import backends
from ramify.tree import TokenTree

pytestmark = pytest.mark.skipif(bool(backends.missing("cpu")), reason=backends.missing("cpu"))


def test_a_prompt_ends_with_its_last_keys_and_values(folders):
    """Where nobody reads logits or the last state, four calls of the last layer are left out, and what is kept is the same."""
    model = ramify.load(folders["llama"], dtype="bf16")
    last = model.config.num_layers
    text, logits, calls = [7, 3, 9] * 30, [], []
    ways = [{}, {"rows_out": lambda *_: None}, {"taps": (last,)}]
    for way in ways:
        cache = model.new_cache([100])
        model.prefill([text], cache, **way)
        calls.append(len(list(cache.arena.programs.values())[-1].calls))
        logits.append(model.forward(TokenTree.chains([3], [[1, 2]]), cache.of([0]), logits=True).logits.copy())
        cache.free([0])
    assert all(np.array_equal(one, logits[0]) for one in logits)
    assert calls == [calls[0], calls[0] + 5, calls[0] + 5]  # the logits, or the copy of the state
