"""The loop with every method of the registry: the same text as plain decoding, for any batch, budget, temperature and end.

I1, I7, I8 and I9 of the decoding invariants (test_invariants.py says what each is). A new drafter is covered the moment its file is there.
"""

import numpy as np
import pytest

import ramify
from ramify.decode.loop import decode
from ramify.decode.output import Request
from ramify.decode.text import TextStream
from ramify.draft.base import ChainDrafter
from ramify.draft.plain import Plain
from ramify.registry import drafter
from ramify.sampling.pipeline import SamplingParams
from ramify.size.base import SizePolicy
from ramify.size.fixed import Fixed
from ramify.testing import FakeModel, FakeTokenizer
from ramify.tree import TokenTree

METHODS = [*drafter.names(), "oracle:accuracy=0.7,branches=2", "random_draft:seed=3"]
METHODS += ["prompt_lookup:anchor=unique", "prompt_lookup:copy_on=False"]
PROMPTS = [[5, 6, 7, 5, 6], [9], [3, 4] * 20, [11, 12, 13], list(range(2, 31))]
SIZES = [1, 6, 32]


class Ragged(SizePolicy):
    """Another number of rows for every sequence and step."""

    def __init__(self, most=40, seed=0):
        self.random, self.most = np.random.default_rng(seed), most

    def rows(self, live, lengths):
        return self.random.integers(1, self.most, len(live)).tolist()


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def target(**settings):
    return FakeModel(**{"vocab": 31, "sharpness": 2.0, "order": 2, "contexts": 127, **settings})


def run(model, prompts, method, size, count, draft=None, **settings):
    return ramify.generate(model, prompts, method=method, drafter=draft or model.student(0.7), size=size, max_new_tokens=count, **settings)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_greedy_identity(method, batch):
    """I1: the ids of plain greedy decoding. I7: never more target steps than ids."""
    model = target()
    truth = [model.continuation(prompt, 200) for prompt in PROMPTS[:batch]]
    for size in (Fixed(12), Ragged()):
        outs = run(model, PROMPTS[:batch], method, size, 200)
        assert [out.token_ids for out in outs] == truth
        assert all(out.stats.steps <= len(out.token_ids) == out.stats.tokens for out in outs)
        assert all(out.finish_reason == "length" and sum(out.stats.accepted) == out.stats.steps for out in outs)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_sampled_text_is_plain_text(method, rows):
    """Guesses are deterministic, so one seed is one text: for any method, any number of rows, any batch."""
    model = target(sharpness=1.0)
    settings = {"temperature": 0.8, "top_k": 12, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 7}
    truth = [run(model, [prompt], "plain", None, 40, **settings)[0].token_ids for prompt in PROMPTS]
    for some in (slice(0, 1), slice(1, 3), slice(0, 5)):
        outs = run(model, PROMPTS[some], method, Fixed(rows), 40, **settings)
        assert [out.token_ids for out in outs] == truth[some]


@pytest.mark.parametrize("method", METHODS)
def test_repetition_penalty_at_temperature_zero(method):
    model = target()
    truth = [out.token_ids for out in run(model, PROMPTS, "plain", None, 60, repetition_penalty=1.5)]
    assert truth != [out.token_ids for out in run(model, PROMPTS, "plain", None, 60)]
    assert [out.token_ids for out in run(model, PROMPTS, method, Ragged(), 60, repetition_penalty=1.5)] == truth


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_warm_and_cold(method, batch):
    """I8: what a drafter and a size policy have learned changes speed, never text."""
    model, prompts = target(), PROMPTS[:batch]
    draft = model.student(0.7)
    for settings in ({}, {"temperature": 0.9, "seed": 5}):
        cold = [out.token_ids for out in run(model, prompts, method, None, 60, draft, **settings)]
        run(model, [[7, 8, 9], [1, 2]], method, None, 60, draft, temperature=1.0)
        assert [out.token_ids for out in run(model, prompts, method, None, 60, draft, **settings)] == cold
        assert cold == [out.token_ids for out in run(model, prompts, "plain", None, 60, **settings)]


@pytest.mark.parametrize("method", ["draft_chain:stochastic=True", "draft_tree:stochastic=True"])
def test_drawn_guesses_are_reproducible_at_a_fixed_width(method):
    model = target(sharpness=1.0)
    alone = [run(model, [prompt], method, None, 50, temperature=0.9, seed=3)[0].token_ids for prompt in PROMPTS]
    together = run(model, PROMPTS, method, None, 50, temperature=0.9, seed=3)
    assert [out.token_ids for out in together] == alone
    assert max(out.stats.tokens_per_step for out in together) > 1.2
    greedy = run(model, PROMPTS, method, None, 50)
    assert [out.token_ids for out in greedy] == [model.continuation(prompt, 50) for prompt in PROMPTS]


class Watched(FakeModel):
    """Keeps the caches it makes, so that what was committed can be looked at after the call."""

    def new_cache(self, capacities):
        self.cache = super().new_cache(capacities)
        return self.cache


def ended(method, prompts=PROMPTS, count=60, make=None, **settings):
    """Outputs of a method and of plain decoding, with the tokens that each had committed in the end."""
    model = Watched(**{"vocab": 31, "sharpness": 1.5, "order": 2, "contexts": 127, **(make or {})})
    found = []
    for name in (method, "plain"):
        outs = run(model, prompts, name, Ragged(20), count, **settings)
        assert model.cache.tokens == [[] for _ in prompts], "a slot was left behind"
        found.append(([(o.token_ids, o.text, o.finish_reason) for o in outs], model.cache.freed))
    return found


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_ends_as_plain_decoding_does(method, temperature, batch):
    """I9: end-of-text ids, stop ids, stop strings and lengths inside an accepted path; text, ids, reason and cache."""
    prompts = PROMPTS[:batch]
    eos = {"eos": (4, 17)}
    tokenizer = {"tokenizer": FakeTokenizer(size=31)}
    reasons = set()
    for settings in (
        {"make": eos},
        {"make": tokenizer, "stop": ["a"]},
        {"make": tokenizer, "stop": ["xy", "bc", "€", "\n\n"]},
        {"make": tokenizer | eos, "stop": ["e", 21, [5, 6]]},
        {"stop": [[8], [9, 10], [3, 3]]},
        {"count": 1},
        {"count": 7},
    ):
        mine, plain = ended(method, prompts, temperature=temperature, **settings)
        assert mine == plain
        reasons |= {reason for _, _, reason in plain[0]}
        for (ids, _, _), prompt, kept in zip(plain[0], prompts, plain[1], strict=True):
            assert kept == (prompt + ids)[:-1]
    assert reasons == {"eos", "stop", "length"} or batch < 5


def test_text_ends_before_the_stop_string_and_ids_after_it():
    pieces = [b"a", b"b", b"c", b"ab"]
    tokenizer = FakeTokenizer(pieces)
    model = FakeModel(4, tokenizer=tokenizer)
    script = {(0,): 1, (1,): 2, (2,): 3, (3,): 0}  # a b c ab a b c ab ...
    model.law = None
    model.table = np.zeros((4, 4), np.float32)
    model.order, model._context = 1, lambda text: text[-1]
    for (last,), following in script.items():
        model.table[last, following] = 9.0
    for method in ("plain", "oracle", "prompt_lookup"):
        [out] = ramify.generate(model, [[0]], method=method, size=Fixed(8), max_new_tokens=20, stop=["cab"])
        assert (out.text, out.token_ids, out.finish_reason) == ("b", [1, 2, 3], "stop")
        [out] = ramify.generate(model, [[0]], method=method, size=Fixed(8), max_new_tokens=20, stop="bc")
        assert (out.text, out.token_ids, out.finish_reason) == ("", [1, 2], "stop")
        [out] = ramify.generate(model, [[0]], method=method, size=Fixed(8), max_new_tokens=20, stop=[[3, 0]])
        assert (out.text, out.token_ids, out.finish_reason) == ("bcaba", [1, 2, 3, 0], "stop")
        [out] = ramify.generate(model, "a", method=method, size=Fixed(8), max_new_tokens=2)
        assert (out.text, out.token_ids, out.finish_reason) == ("bc", [1, 2], "length")


@pytest.mark.parametrize("method", ["plain", "oracle:accuracy=0.8", "token_recycling", "draft_tree"])
def test_stream_joins_to_the_text(method):
    model = target(tokenizer=FakeTokenizer(size=31), eos=(0,), sharpness=1.0)
    for stop in ((), ["ab", "€x", "zz"]):
        ids, texts, halves = [[] for _ in PROMPTS], [""] * len(PROMPTS), 0

        def stream(index, new, piece, ids=ids, texts=texts):
            assert new
            ids[index] += new
            texts[index] += piece

        outs = run(model, PROMPTS, method, Ragged(), 60, temperature=1.0, stop=stop, stream=stream, seed=5)
        assert ids == [out.token_ids for out in outs]
        assert texts == [out.text for out in outs]
        for out in outs:
            prompt, kept = PROMPTS[out.index], out.token_ids[: -1 if out.finish_reason == "eos" else None]
            before = model.tokenizer.decode(prompt).rstrip("\ufffd")  # a character that the prompt begins belongs to the text
            whole = model.tokenizer.decode([*prompt, *kept])[len(before) :]
            assert out.text == whole if out.finish_reason != "stop" else whole.startswith(out.text)
            halves += "\ufffd" in out.text
        assert halves or stop, "the test should meet characters cut in two"


@pytest.mark.parametrize("seed", range(20))
def test_text_stream(seed):
    """Characters whose bytes come in several ids, in any grouping of the ids; stop strings wherever they begin and end."""
    rng = np.random.default_rng(seed)
    tokenizer = FakeTokenizer()
    ids = rng.choice([2, 3, 5, 6, 7, 8, 9, 10], 40, p=[0.05, 0.05, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1]).tolist()
    ids[10:10] = [8, 7, 5, 6, 7]
    whole = tokenizer.decode(ids)
    for stops in ((), ("a€€",), ("b",)):
        seen: list[int] = []
        stream = TextStream(tokenizer, seen, 0, stops)
        pieces = []
        while len(seen) < len(ids) and not stream.stopped:
            seen += ids[len(seen) : len(seen) + int(rng.integers(1, 4))]
            stream.read()
            pieces.append(stream.take())
            assert whole.startswith("".join(pieces))
        stream.finish()
        pieces.append(stream.take(last=True))
        found = [whole.find(stop) for stop in stops if stop in whole]
        assert "".join(pieces) == stream.text == (whole[: min(found)] if found else whole)


def test_interrupt_leaves_nothing_behind():
    model = Watched(31)
    ended = []

    class Recorder(ChainDrafter):
        def guess(self, text, count):
            if len(text) > 20:
                raise KeyboardInterrupt
            return text[-count:]

        def end(self, slots):
            ended.append(list(slots))
            super().end(slots)

    with pytest.raises(KeyboardInterrupt):
        decode(model, [Request([1, 2], 100), Request([3], 100)], Recorder(), Fixed(4))
    assert ended == [[0, 1]] and model.cache.live == [False, False]


def test_a_drafter_of_three_lines():
    class Echo(ChainDrafter):
        def guess(self, text, count):
            return text[-count:]

    model = target()
    [out] = ramify.generate(model, [PROMPTS[0]], method=Echo(), max_new_tokens=50)
    assert out.token_ids == model.continuation(PROMPTS[0], 50)


def test_last_positions_of_the_model():
    """prompt + max_new_tokens may fill the model's positions; guesses never pass them."""
    model = target(max_positions=64)
    small = model.student(0.9)
    small.config.max_positions = 40
    for method in METHODS:
        for draft in (model.student(0.9), small):
            outs = run(model, [[5, 6, 7, 8], [9] * 30], method, Fixed(200), 34, draft)
            assert [out.token_ids for out in outs] == [model.continuation(prompt, 34) for prompt in ([5, 6, 7, 8], [9] * 30)]


def test_auto_finds_the_good_drafter():
    model = target(sharpness=3.0)
    outs = run(model, PROMPTS[:2], "auto", None, 300, model)
    assert [out.token_ids for out in outs] == [model.continuation(prompt, 300) for prompt in PROMPTS[:2]]


def test_requests_with_parameters_of_their_own():
    model = target(sharpness=1.0)
    asked = [SamplingParams(), SamplingParams(1.0, seed=1), SamplingParams(0.7, top_k=5, seed=2)]
    requests = [Request(prompt, 20 + i, params) for i, (prompt, params) in enumerate(zip(PROMPTS, asked, strict=False))]
    alone = [decode(model, [request], Plain(), Fixed(1))[0].token_ids for request in requests]
    for name in ("prompt_lookup", "token_recycling", "random_draft"):
        outs = decode(model, requests, drafter.build(name), Ragged())
        assert [out.token_ids for out in outs] == alone and list(map(len, alone)) == [20, 21, 22]


def test_counts_and_seconds():
    model = target()
    [out] = run(model, [PROMPTS[0]], "oracle", Fixed(5), 21)
    assert out.stats.accepted == [1, 0, 0, 0, 4] and out.stats.steps == 5 and out.stats.tokens_per_step == pytest.approx(4.2)
    assert set(out.stats.seconds) == {"prefill", "draft", "forward", "verify", "commit"}
    assert out.stats.tokens_per_second > 0
    assert ramify.generate(model, []) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": [""]}, "prompt 0 is empty"),
        ({"prompts": [[1], [31]]}, "prompt 1 holds id 31; takes 0 to 30"),
        ({"prompts": [[1] * 90], "max_new_tokens": 20}, "prompt 0 has 90 tokens and max_new_tokens is 20; takes 100 together"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; takes 1 or more"),
        ({"method": "prompt_lokup"}, 'method "prompt_lokup" is not known; nearest is "prompt_lookup"'),
        ({"method": "qqqqqqq"}, "known: auto, "),
        ({"method": "prompt_lookup:longst=3"}, 'no option "longst"; nearest is "longest"'),
        ({"method": "prompt_lookup:longest"}, "takes key=value"),
        ({"method": "prompt_lookup:longest=0"}, "longest is 0; takes 1 or more"),
        ({"method": "plain:x=1"}, 'has no option "x"'),
        ({"method": "draft_chain", "drafter": None}, "drafter is None; takes a path, a model"),
        ({"drafter": FakeModel(32), "method": "draft_tree"}, "drafter has 32 tokens in its vocabulary; takes 31"),
        ({"temperature": -1}, "temperature is -1"),
        ({"stop": [""]}, 'stop has ""'),
        ({"stop": [[]]}, r"stop has \[\]"),
        ({"stop": ["x"]}, "the model has no tokenizer"),
        ({"prompts": ["text"]}, "has no tokenizer"),
        ({"size": "fixt"}, 'size "fixt" is not known; nearest is "fixed"'),
    ],
)
def test_bad_values(arguments, told):
    with pytest.raises(ValueError, match=told) as raised:
        ramify.generate(target(max_positions=100), **{"prompts": [[1, 2]], "max_new_tokens": 8, **arguments})
    assert "\n" not in str(raised.value)


class Proposing(Plain):
    """Proposes what it is told, and can do no more."""

    def __init__(self, made):
        self.made = made

    def propose(self, slots, roots, rows):
        return self.made(roots, rows)

    def end(self, slots):
        raise KeyError("end")


@pytest.mark.parametrize(
    ("made", "error", "told"),
    [
        (lambda roots, rows: None, TypeError, "plain: propose returned None; takes a TokenTree"),
        (
            lambda roots, rows: TokenTree.roots([r + 1 for r in roots]),
            ValueError,
            r"over the roots \[3\]; takes \[2\], the last tokens emitted",
        ),
        (lambda roots, rows: TokenTree.chains(roots, [[1] * 9]), ValueError, r"returned \[10\] rows; takes at most \[4\]"),
        (lambda roots, rows: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_a_drafter_that_fails_leaves_no_slot(made, error, told):
    """The first error is the one that is raised, even where the drafter cannot clean up either."""
    model = target()
    cache = model.new_cache([40])
    with pytest.raises(error, match=told):
        ramify.generate(model, [[1, 2]], method=Proposing(made), size=Fixed(4), max_new_tokens=8, cache=cache)
    assert not any(cache.live)


@pytest.mark.parametrize("arguments", [{"prompts": [3]}, {"prompts": [[1.5]]}, {"method": 3}, {"max_new_tokens": 2.5}, {"stop": [1.5]}])
def test_bad_kinds(arguments):
    with pytest.raises(TypeError):
        ramify.generate(target(), **{"prompts": [[1, 2]], "max_new_tokens": 8, **arguments})


def test_another_tokenizer_is_refused():
    model = target(tokenizer=FakeTokenizer(size=31))
    draft = target(tokenizer=FakeTokenizer([b"x", *FakeTokenizer(size=31).pieces[1:]]))
    model.tokenizer.fingerprint, draft.tokenizer.fingerprint = "a", "b"
    with pytest.raises(ValueError, match="another tokenizer"):
        ramify.generate(model, [[1]], method="draft_chain", drafter=draft)
