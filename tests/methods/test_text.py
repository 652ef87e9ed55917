"""Ids to text with tokenizers that write a space as part of a word and drop the one before the first word (Llama 2, Mistral)."""

import itertools

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

from ramify.decode.text import HALF, TextStream
from ramify.model.tokenizer import Tokenizer

WORDS = ["<unk>", "<s>", "</s>", "▁", "▁▁", "▁the", "▁cat", "a", "b", "<0xE2>", "<0x82>", "<0xAC>"]
SPACE, TWO, THE, CAT, A, FIRST, SECOND, THIRD = 3, 4, 5, 6, 7, 9, 10, 11


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:3]])
    return Tokenizer(fast)


def streamed(tokenizer, ids, start, sizes):
    seen = ids[:start]
    stream = TextStream(tokenizer, seen, start)
    for size in sizes:
        seen += ids[len(seen) : len(seen) + size]
        stream.read()
    stream.finish()
    return stream.text


@pytest.mark.parametrize("ids", list(itertools.product([1, SPACE, TWO, THE, A], repeat=3)), ids=str)
def test_every_short_text(tokenizer, ids):
    """However the ids come, the text is that of all of them, and what stands before it is not in it."""
    for start in range(3):
        before = tokenizer.decode(ids[:start])
        for sizes in ([1, 1, 1], [2, 1], [3]):
            assert before + streamed(tokenizer, list(ids), start, sizes) == tokenizer.decode(ids) or not before


def test_a_continuation_keeps_its_space(tokenizer):
    assert streamed(tokenizer, [THE, CAT, A], 1, [1, 1]) == " cata"
    assert streamed(tokenizer, [THE, 2, 1, CAT], 1, [1, 1, 1]) == " cat"  # behind ids that show nothing
    assert streamed(tokenizer, [CAT, THE], 0, [1, 1]) == "cat the"  # the first word of all


def test_a_character_that_the_prompt_began(tokenizer):
    assert streamed(tokenizer, [THE, FIRST, SECOND, THIRD, A], 3, [1, 1]) == "€a"
    assert HALF in streamed(tokenizer, [THE, FIRST, SECOND], 1, [1, 1])


@pytest.mark.parametrize("seed", range(10))
def test_random_text(tokenizer, seed):
    rng = np.random.default_rng(seed)
    ids = [CAT, *rng.choice([1, SPACE, TWO, THE, CAT, A, 8], 40).tolist()]
    for start in (1, 7, 30):
        want = tokenizer.decode(ids)[len(tokenizer.decode(ids[:start])) :]
        assert streamed(tokenizer, ids, start, rng.integers(1, 4, 40).tolist()) == want
