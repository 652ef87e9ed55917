"""What a cache and prefill refuse: rows of somebody else's forward, tokens that are none, and requests no kernel has room for."""

import numpy as np
import pytest

import ramify
from ramify import backends
from ramify.testing.tiny_models import VOCABULARY
from ramify.tree import TokenTree


@pytest.fixture(params=["cpu", "device"])
def model(request, engine, folders):
    if (engine.name, engine.dtype) != ("table", "fp32"):
        pytest.skip("nothing of it is the kernels'")
    if request.param == "device":
        return engine.load(folders["llama"])
    if backends.missing("cpu"):
        pytest.skip(backends.missing("cpu"))
    return ramify.load(folders["llama"], dtype="fp32")


def lse(model, view):
    return model.forward(TokenTree.roots([7]), view).lse.tolist()


def test_a_view_commits_rows_of_its_own_forward_once(model):
    """The draft region is the last forward's: whoever else committed from it would append another text's keys."""
    cache = model.new_cache([20, 20, 20])
    model.prefill([[1, 2, 3, 4]] * 2 + [[1, 2, 3, 4, 5]], cache)
    first, other, whole = (cache.of([slot]) for slot in range(3))
    model.forward(TokenTree.chains([5], [[6, 7]]), first)
    model.forward(TokenTree.roots([77]), other)
    with pytest.raises(ValueError, match="no forward has filled the draft region"):
        first.commit([[0]])
    model.forward(TokenTree.chains([5], [[6, 7]]), first)
    for path, error in (
        ([0, 0], ValueError),
        ([1, 0], ValueError),
        ([0, 3], ValueError),
        ([-1], ValueError),
        ([[0]], TypeError),
        ([0.7], TypeError),
    ):
        with pytest.raises(error, match="CacheView.commit: path of slot 0"):
            first.commit([path])
    first.commit([np.array([0], np.int64)])
    with pytest.raises(ValueError, match="no forward has filled the draft region"):
        first.commit([[0]])
    assert first.lengths.tolist() == [5] and lse(model, first) == lse(model, whole)
    for slots in ([-1], [3]):
        with pytest.raises(ValueError, match="Cache.free: slots is"):
            cache.free(slots)
    cache.free([0, 1, 2])


def test_prefill_refuses_before_anything_is_fed(model):
    cache, kept = model.new_cache([900, 20]), []
    seen = {"rows_out": lambda slot, tokens, out: kept.append(slot)}
    for prompts, given, error, says in (
        ([[1, 2]], {"slots": [0], "topk": 33, **seen}, ValueError, "prefill: topk is 33; takes 0 to 32"),
        ([[1, 2]], {"slots": [0], "topk": -1, **seen}, ValueError, "prefill: topk is -1"),
        ([[1, 2]], {"slots": [0], "taps": (99,), **seen}, ValueError, "prefill: taps is"),
        ([[1], [2]], {"slots": [0]}, ValueError, "prefill: prompts has 2 texts; takes 1"),
        ([[1, 2], []], {}, ValueError, "prefill: prompt of slot 1 is empty"),
        ([[1, 2], [1.7]], {}, TypeError, "prefill: prompt of slot 1 is .*; takes token ids"),
        ([[1, 2], ["a"]], {}, TypeError, "takes token ids"),
        ([[1] * 600 + [2**40], [3]], {}, ValueError, f"prefill: token .*; takes 0 to {VOCABULARY - 1}"),
        ([[1, 2], [-1]], {}, ValueError, "prefill: token -1"),
    ):
        with pytest.raises(error, match=says):
            model.prefill(prompts, cache, **given)
        assert cache.lengths.tolist() == [0, 0] and not kept
    for dtype in (np.uint8, np.int16, np.uint64):
        model.prefill([np.array([3, 4], dtype)], cache, [1])
    model.prefill([[1, 2]], cache, [0], topk=32, taps=(-1,), **seen)
    assert kept == [0]
    cache.free([0, 1])
