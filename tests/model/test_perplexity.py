"""perplexity: against cross-entropy of the reference model, its windows, and what it refuses."""

import math

import pytest
import torch

import ramify
from ramify.model.checkpoint import Checkpoint
from ramify.model.load import folder_of
from ramify.model.perplexity import perplexity
from ramify.reference.model import forward

TEXTS = ["import os\n\n\ndef main(argv):\n    return os.path.join(*argv)\n", "class A:\n    x = 1\n" * 40]


@pytest.fixture(scope="module")
def model():
    return ramify.load("zoo-drafter", dtype="fp32")


def plain(ids, window):
    """(sum of losses, tokens) by torch's cross-entropy over the reference model's logits."""
    checkpoint = Checkpoint(folder_of("zoo-drafter"))
    weights, nats, tokens = dict(checkpoint.tensors()), 0.0, 0
    for first in range(0, len(ids) - 1, window):
        part = torch.tensor(ids[first : first + window + 1])
        logits = forward(weights, checkpoint.config, part[:-1]).logits.double()
        nats += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
        tokens += len(part) - 1
    return nats, tokens


@pytest.mark.parametrize("window", [1, 7, 300, 1024])
def test_against_cross_entropy(model, window):
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    parts = [plain(each[:60] if window == 1 else each, window) for each in ids]
    nats, tokens = (sum(each) for each in zip(*parts))
    found = perplexity(model, [each[:60] if window == 1 else each for each in ids], window)
    assert found.tokens == tokens and found.bits_per_byte is None
    assert found.nats_per_token == pytest.approx(nats / tokens, abs=2e-5)  # float32 logits of two orders of summation
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_texts_and_ids(model):
    of_texts, of_ids = perplexity(model, TEXTS), perplexity(model, [model.tokenizer.encode(text) for text in TEXTS])
    assert of_texts.nats_per_token == of_ids.nats_per_token
    size = sum(len(text.encode()) for text in TEXTS)
    assert of_texts.bits_per_byte == pytest.approx(of_texts.nats_per_token * of_texts.tokens / math.log(2) / size)
    assert perplexity(model, TEXTS[0]) == perplexity(model, [TEXTS[0]])
    ids = model.tokenizer.encode(TEXTS[0])
    assert perplexity(model, ids) == perplexity(model, [ids]) == perplexity(model, [ids, [5], []])


def test_a_long_window_is_fed_in_chunks(model):
    ids = model.tokenizer.encode(TEXTS[1] * 10)[:1200]
    nats, tokens = plain(ids, 2000)
    assert perplexity(model, ids, 2000).nats_per_token == pytest.approx(nats / tokens, abs=2e-5)


@pytest.mark.parametrize("texts", ["", [], [[]], [[3]], ["", ""]])
def test_nothing_to_predict(model, texts):
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(model, texts)


def test_refuses(model):
    for window in (0, 2048):
        with pytest.raises(ValueError, match=f"window is {window}; takes"):
            perplexity(model, TEXTS, window)
    with pytest.raises(ValueError, match="token 99999; takes 0 to 4095"):
        perplexity(model, [1, 99999, 2])
    assert model.new_cache([2048]) is not None  # the cache of a failed call went back
    silent = ramify.load("zoo-drafter", dtype="fp32")
    silent.tokenizer = None
    with pytest.raises(ValueError, match=r"no tokenizer\.json; takes lists of token ids"):
        perplexity(silent, TEXTS)
