"""What perplexity is measured on: the zoo's held-out modules in whichever model's tokens, less of them for larger models, or a text."""

import pytest

from ramify.convert import evaluate
from ramify.convert.conversion import silent
from ramify.model.checkpoint import Checkpoint
from ramify.model.load import folder_of, load
from ramify.model.perplexity import perplexity
from ramify.model.tokenizer import Tokenizer
from ramify.zoo import corpus

TEXT = "def add(a, b):\n    return a + b\n\n\n" * 40


@pytest.fixture(scope="module")
def drafter():
    return Checkpoint(folder_of("zoo-drafter")), Tokenizer.from_folder(folder_of("zoo-drafter"))


def test_is_what_perplexity_says(drafter):
    """Of a long text and a short one, windows and all."""
    checkpoint, tokenizer = drafter
    judge = evaluate.judged(TEXT, checkpoint, tokenizer)
    seen = []
    found = judge.measure(checkpoint, None, lambda items, stage: seen.append((stage, len(items))) or items, "perplexity before")
    wanted = perplexity(load("zoo-drafter", dtype="fp32"), TEXT, window=min(1024, checkpoint.config.max_positions - 1))
    assert found.tokens == wanted.tokens and found.nats_per_token == pytest.approx(wanted.nats_per_token, rel=1e-12)
    assert found.bits_per_byte == pytest.approx(wanted.bits_per_byte, rel=1e-12) and judge.name == f"a text of {len(TEXT):,} characters"
    assert seen == [("perplexity before", len(judge.windows))]


@pytest.mark.parametrize(("weights", "count"), [(10**6, 16), (5 * 10**8, 6), (10**9, 3), (8 * 10**9, 1), (10**12, 1)])
def test_a_larger_model_reads_less(drafter, monkeypatch, weights, count):
    checkpoint, tokenizer = drafter
    monkeypatch.setattr(corpus, "held_out_texts", lambda: {str(i): TEXT for i in range(16)})
    monkeypatch.setattr(evaluate, "_too_large", lambda checkpoint: "")
    monkeypatch.setattr(type(checkpoint), "names", ("embed",))
    monkeypatch.setattr(checkpoint, "shape", lambda name: (weights,))
    judge = evaluate.judged(None, checkpoint, tokenizer)
    each = len(evaluate.judged(TEXT, checkpoint, tokenizer).windows)
    assert len(judge.windows) == count * each and judge.size == count * len(TEXT)
    assert judge.name == ("the zoo's held-out modules" if count == 16 else f"{count} of the zoo's 16 held-out modules")


def test_what_does_not_fit_is_not_measured_unasked(drafter, monkeypatch):
    """But it is where a text is given."""
    checkpoint, tokenizer = drafter
    monkeypatch.setattr(evaluate.Path, "read_text", lambda path: "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")
    assert evaluate.judged(None, checkpoint, tokenizer) == "the model takes 0.0 GB of memory as float32, and 0.0 GB are free"
    assert evaluate.judged(TEXT, checkpoint, tokenizer).measure(checkpoint, None, silent, "").tokens > 100
    monkeypatch.setattr(evaluate.Path, "read_text", lambda path: "nothing of the kind")
    assert isinstance(evaluate.judged(None, checkpoint, tokenizer), evaluate.Judged)


def test_without_text(drafter, monkeypatch):
    checkpoint, tokenizer = drafter
    assert evaluate.judged(False, checkpoint, tokenizer) == "it was not asked for"
    assert evaluate.judged(None, checkpoint, None) == "the model has no tokenizer.json"
    monkeypatch.setattr(corpus, "held_out_texts", dict)
    assert evaluate.judged(None, checkpoint, tokenizer) == "this Python has no sources of the standard library"
    with pytest.raises(ValueError, match="no tokenizer.json; takes one"):
        evaluate.judged(TEXT, checkpoint, None)
    with pytest.raises(TypeError, match="evaluate is 3; takes a text"):
        evaluate.judged(3, checkpoint, tokenizer)
