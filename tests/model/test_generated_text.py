"""Law 2 and law 8 on generated text: every lossless method writes plain decoding's text, bit for bit, with the embedded model.

No tolerance anywhere, in no precision: equal ids, equal finish reasons, equal caches. Rows per step are forced wide (`fixed`), so that
most rows are rejected and every step commits out of a tree.
"""

import numpy as np
import pytest
import torch

import ramify
from ramify import native
from ramify.zoo import corpus

METHODS = [row["name"] for row in ramify.methods() if row["lossless"] and row["name"] != "plain"]
LEVELS = [level for level, runs in native.levels().items() if runs]


@pytest.fixture(scope="module", params=["bf16", "fp32", "int4-g64", "int8"])
def zoo(request):
    if request.param in ("bf16", "fp32"):
        return ramify.load("zoo", dtype=request.param)
    return ramify.load("zoo", weights=request.param)


@pytest.fixture(scope="module")
def drafter(zoo):
    return ramify.load("zoo-drafter", dtype=zoo.dtype)


@pytest.fixture(scope="module")
def prompts(zoo):
    texts = corpus.held_out_texts()
    return [zoo.tokenizer.encode(texts[name][skip:])[:n] for name, skip, n in (("textwrap", 0, 100), ("heapq", 500, 1), ("csv", 40, 300))]


def write(model, prompts, method, n, **options):
    outs = ramify.generate(model, prompts, method=method, max_new_tokens=n, **options)
    return [(out.token_ids, out.finish_reason) for out in outs]


@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_is_plain_text(zoo, drafter, prompts, method):
    """I1 in the model's own precision, 500 tokens, one sequence, narrow and wide trees."""
    want = write(zoo, prompts[:1], "plain", 500)
    for size in ("fixed:rows_each=9", "fixed:rows_each=81"):
        assert write(zoo, prompts[:1], method, 500, size=size) == want


@pytest.fixture(scope="module")
def alone(zoo, prompts):
    """What plain decoding makes of each prompt by itself."""
    return [write(zoo, [p], "plain", 60)[0] for p in prompts]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_is_no_excuse(zoo, prompts, alone, method, batch):
    """I2: in bf16 and low bits too, where other implementations may part at a near tie, every text is that of its prompt alone.

    Prompts of 1 to 300 tokens side by side.
    """
    order = {1: (2,), 2: (0, 2), 5: (1, 0, 2, 1, 0)}[batch]
    assert write(zoo, [prompts[i] for i in order], method, 60, size="fixed:rows_each=17") == [alone[i] for i in order]


@pytest.mark.parametrize("method", METHODS)
def test_sampled_text_is_plain_text(zoo, prompts, method):
    """Same seed, same text: guesses that are not drawn leave the target's own draws untouched."""
    dice = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    for seed in (0, 1):
        want = write(zoo, prompts[:2], "plain", 80, seed=seed, **dice)
        assert write(zoo, prompts[:2], method, 80, seed=seed, size="fixed:rows_each=17", **dice) == want
    assert want != write(zoo, prompts[:2], "plain", 80, seed=7, **dice)


@pytest.mark.parametrize("level", LEVELS)
def test_every_isa_level_and_thread_count(zoo, prompts, level):
    before, threads = native.isa(), torch.get_num_threads()
    native.set_isa(level)
    try:
        want = write(zoo, prompts[:1], "plain", 60)
        torch.set_num_threads(1)
        assert write(zoo, prompts[:1], "token_recycling", 60, size="fixed:rows_each=40") == want
    finally:
        torch.set_num_threads(threads)
        native.set_isa(before)


def test_a_flipped_bit_is_noticed(zoo, prompts, monkeypatch):
    """The tests above can fail: a commit that takes the wrong draft rows changes the text."""
    from ramify.cache.cache import CacheView

    want = write(zoo, prompts[:1], "plain", 120)
    honest = CacheView.commit
    monkeypatch.setattr(CacheView, "commit", lambda self, paths: honest(self, [np.arange(len(p), dtype=np.int32) for p in paths]))
    assert write(zoo, prompts[:1], "token_recycling", 120, size="fixed:rows_each=40") != want
