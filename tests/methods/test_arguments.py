"""Arguments that generate cannot take: one line that names the argument, what came and what is taken; model and drafter as they were.

Each case runs on a model made of nothing and on a real one, and the same prompt has the same text after it.
"""

from collections import UserDict

import numpy as np
import pytest
import torch

import ramify
from ramify.decode.loop import decode
from ramify.decode.output import Request
from ramify.draft.draft_chain import DraftChain
from ramify.draft.plain import Plain
from ramify.size.fixed import Fixed
from ramify.size.measured import Measured
from ramify.testing import FakeModel, FakeTokenizer

HERE = "generate: "
PROMPT = [5, 6, 7, 5, 6]


@pytest.fixture(scope="module", params=["fake", "zoo-drafter"])
def model(request):
    if request.param == "fake":
        return FakeModel(31, sharpness=2.0, order=2, tokenizer=FakeTokenizer(size=31))
    return ramify.load(request.param)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def still_writes(model):
    """The model writes the same text before and after the test."""

    def text():
        [out] = ramify.generate(model, [PROMPT], method="draft_tree", drafter=model, max_new_tokens=12)
        return out.token_ids, out.text

    before = text()
    yield
    assert text() == before


def refused(error, told, model, **arguments):
    """generate raises this error, one line long, that says this."""
    arguments = {"prompts": [PROMPT], "method": "plain", "max_new_tokens": 8, **arguments}
    prompts = arguments.pop("prompts")
    with pytest.raises((ValueError, TypeError)) as raised:
        ramify.generate(model, prompts, **arguments)
    said = str(raised.value)
    assert told in said and "\n" not in said and said.isprintable()
    assert type(raised.value) is error


MODELS = ["zoo", None, 5, torch.nn.Linear(2, 2), FakeModel]


@pytest.mark.parametrize("wrong", MODELS, ids=str)
def test_a_model_that_is_none(wrong):
    for prompts in ([PROMPT], []):
        refused(TypeError, HERE + "model is ", wrong, prompts=prompts)
    refused(TypeError, 'takes a loaded model. Use ramify.load("zoo").', "zoo")


PROMPTS = [
    (None, TypeError, "prompts is None; takes strings or lists of token ids."),
    (5, TypeError, "prompts is 5; takes"),
    (b"abc", TypeError, "prompts is b'abc'; takes"),
    ({"a": 1}, TypeError, "prompts is {'a': 1}; takes"),
    (UserDict(input_ids=[[1, 2]]), TypeError, "prompts is {'input_ids': [[1, 2]]}; takes"),
    ({"ab", "b"}, TypeError, "prompts is {"),
    (torch.tensor(3), TypeError, "prompts is tensor(3); takes"),
    (torch.tensor([3, 4]), TypeError, "prompt 0 is 3; takes a string or a list of token ids."),
    ([3, 4], TypeError, "prompt 0 is 3; takes a string or a list of token ids. prompts is a list of them."),
    ([PROMPT, None], TypeError, "prompt 1 is None; takes"),
    ([b"abc"], TypeError, "prompt 0 is b'abc'; takes a string or a list of token ids. Use .decode()."),
    ([bytearray(b"abc")], TypeError, "prompt 0 is bytearray(b'abc'); takes"),
    ([{1, 2}], TypeError, "prompt 0 is {1, 2}; takes"),
    ([{"a": 1}], TypeError, "prompt 0 is {'a': 1}; takes"),
    ([torch.tensor(3)], TypeError, "prompt 0 is tensor(3); takes"),
    ([torch.tensor([[1, 2]])], TypeError, "prompt 0 holds [1, 2]; takes token ids"),
    ([torch.tensor([1, 2], device="meta")], TypeError, "prompt 0 is tensor(..., device='meta'"),
    ([torch.tensor([1.0, 2.0])], TypeError, "prompt 0 holds 1.0; takes token ids"),
    ([np.array([True])], TypeError, "prompt 0 holds True; takes token ids"),
    ([[1.5]], TypeError, "prompt 0 holds 1.5; takes token ids"),
    ([[True]], TypeError, "prompt 0 holds True; takes token ids"),
    ([["a", "b"]], TypeError, 'prompt 0 holds "a"; takes token ids'),
    ([[[1, 2]]], TypeError, "prompt 0 holds [1, 2]; takes token ids"),
    ([[-1]], ValueError, "prompt 0 holds id -1; takes 0 to "),
    ([[1], [1 << 70]], ValueError, "prompt 1 holds id 1180591620717411303424; takes 0 to "),
    ([np.zeros(0, np.int64)], ValueError, "prompt 0 is empty"),
    ([""], ValueError, "prompt 0 is empty"),
    (["ab\ud800"], ValueError, r'prompt 0 holds "\ud800" at 2, which is no character; takes text'),
]


@pytest.mark.parametrize("prompts, error, told", PROMPTS, ids=lambda v: str(v)[:30] if isinstance(v, str) else "")
def test_prompts(model, still_writes, prompts, error, told):
    refused(error, HERE + told, model, prompts=prompts)


def test_ids_of_any_kind(model):
    """Lists, tuples, ranges, arrays and tensors of ids are prompts; so are the rows of a matrix."""
    want = [out.token_ids for out in ramify.generate(model, [[1, 2, 3], [4, 5, 6]], method="plain", max_new_tokens=5)]
    matrix = np.array([[1, 2, 3], [4, 5, 6]])
    for prompts in (matrix, torch.tensor(matrix), ((1, 2, 3), range(4, 7)), [*torch.tensor(matrix)], [[torch.tensor(1), 2, 3], matrix[1]]):
        assert [out.token_ids for out in ramify.generate(model, prompts, method="plain", max_new_tokens=5)] == want
    assert [out.token_ids for out in ramify.generate(model, (p for p in matrix), method="plain", max_new_tokens=5)] == want
    for some in ([], (), torch.zeros(0, 3, dtype=torch.int64)):
        assert ramify.generate(model, some) == []
    [one], [other] = (ramify.generate(model, some, method="plain", max_new_tokens=5) for some in (np.array(["ab"]), "ab"))
    assert one.token_ids == other.token_ids


NUMBERS = [
    ("max_new_tokens", 0, ValueError, "takes 1 or more."),
    ("max_new_tokens", -1, ValueError, "takes 1 or more."),
    ("max_new_tokens", 1.5, TypeError, "takes a whole number."),
    ("max_new_tokens", True, TypeError, "takes a whole number."),
    ("max_new_tokens", None, TypeError, "takes a whole number."),
    ("seed", -1, ValueError, "takes 0 or more."),
    ("seed", 1 << 70, ValueError, "takes 0 to 2^64 - 1."),
    ("seed", "a", TypeError, "takes a whole number."),
    ("seed", [1, 2], TypeError, "takes a whole number."),
    ("temperature", "hot", TypeError, "takes a number."),
    ("temperature", float("nan"), ValueError, "takes a finite number."),
    ("temperature", float("inf"), ValueError, "takes a finite number."),
    ("temperature", -0.1, ValueError, "takes 0 or more."),
    ("temperature", None, TypeError, "takes a number."),
    ("top_k", 1.5, TypeError, "takes a whole number."),
    ("top_p", 2, ValueError, "takes 0 to 1."),
    ("min_p", -1, ValueError, "takes 0 to 1."),
    ("repetition_penalty", 0, ValueError, "takes 1e-30 to 1e+30. 1 switches it off."),
    ("repetition_penalty", 1e300, ValueError, "takes 1e-30 to 1e+30. 1 switches it off."),
    ("repetition_penalty", "x", TypeError, "takes a number."),
]


@pytest.mark.parametrize("name, value, error, told", NUMBERS)
def test_numbers(model, still_writes, name, value, error, told):
    refused(error, f"{HERE}{name} is ", model, **{name: value})
    refused(error, told, model, **{name: value})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["plain", "prompt_lookup", "draft_chain", "draft_tree", "draft_tree:stochastic=True"])
def test_temperatures_at_the_ends(model, method):
    """A temperature below every float32 takes the likeliest token, one above every logit takes any: without a warning on the way."""
    greedy, cold, hot = (
        ramify.generate(model, [PROMPT], method=method, drafter=model, max_new_tokens=12, temperature=temperature, size="fixed:rows_each=9")
        for temperature in (0.0, 1e-300, 1e300)
    )
    assert cold[0].token_ids == greedy[0].token_ids and len(hot[0].token_ids) == 12


def test_more_new_tokens_than_positions(model, still_writes):
    refused(ValueError, "together, the positions of the model.", model, max_new_tokens=1 << 100)


STOPS = [
    (5, TypeError, "stop is 5; takes a string, or a list of strings, ids and lists of ids."),
    (None, TypeError, "stop is None; takes a string"),
    (b"x", TypeError, "stop is b'x'; takes a string"),
    ({"a": 1}, TypeError, "stop is {'a': 1}; takes a string"),
    ([b"x"], TypeError, "stop holds b'x'; takes strings, ids and lists of ids."),
    ([True], TypeError, "stop holds True; takes strings"),
    ([None], TypeError, "stop holds None; takes strings"),
    ([[1.5]], TypeError, "stop holds 1.5; takes strings"),
    ([""], ValueError, 'stop has ""; takes strings of one character or more.'),
    ([[]], ValueError, "stop has []; takes one id or more."),
    ([-1], ValueError, "stop holds id -1; takes 0 to "),
    ([[1, 1 << 40]], ValueError, "stop holds id 1099511627776; takes 0 to "),
]


@pytest.mark.parametrize("stop, error, told", STOPS, ids=str)
def test_stops(model, still_writes, stop, error, told):
    refused(error, HERE + told, model, stop=stop)


def test_stops_of_any_kind(model):
    [free] = ramify.generate(model, [PROMPT], method="plain", max_new_tokens=9)
    id = free.token_ids[2]
    for stop in ([id], [[id]], (np.int64(id),), [np.array([id])], torch.tensor([id]), ["zzzzzz", torch.tensor([id])]):
        [out] = ramify.generate(model, [PROMPT], method="plain", max_new_tokens=9, stop=stop)
        assert out.finish_reason == "stop" and out.token_ids == free.token_ids[: free.token_ids.index(id) + 1]


def test_stream(model, still_writes):
    for wrong in (5, "x"):
        refused(TypeError, HERE + "stream is ", model, stream=wrong)


def test_a_stream_that_raises(model, still_writes):
    """The caller's own mistake is told as it is, and nothing stays behind."""
    refused(TypeError, "positional argument", model, stream=lambda: None)


METHODS = [
    (5, TypeError, HERE + "method is 5; takes a name or a Drafter. Known: auto,"),
    (None, TypeError, HERE + "method is None; takes a name or a Drafter."),
    (b"plain", TypeError, HERE + "method is b'plain'; takes a name or a Drafter."),
    (DraftChain, TypeError, HERE + "method is <class"),
    ("", ValueError, HERE + 'method "" is not known'),
    ("\ud800", ValueError, HERE + r'method "\ud800" is not known'),
    ("plain\n", ValueError, HERE + r'method "plain\n" is not known; nearest is "plain"'),
    ("draft_chain:nonsense=1", ValueError, HERE + '"draft_chain" has no option "nonsense"'),
    ("draft_chain:model=3", ValueError, HERE + 'option "model" of "draft_chain" is set by an argument; takes it there alone.'),
    ("draft_chain:most=x", TypeError, 'draft_chain: most is "x"; takes a whole number.'),
    ("draft_chain:stochastic=5", TypeError, "draft_chain: stochastic is 5; takes True or False."),
    ("draft_tree:stochastic=yes", TypeError, 'draft_tree: stochastic is "yes"; takes True or False.'),
    ("prompt_lookup:copy_on=7", TypeError, "prompt_lookup: copy_on is 7; takes True or False."),
    ("prompt_lookup:longest=1,longest=2", ValueError, HERE + 'option "longest" of "prompt_lookup" comes twice; takes it once.'),
    ("prompt_lookup:=3", ValueError, HERE + '"prompt_lookup" has no option ""'),
    ("token_recycling:keep=5", TypeError, "token_recycling: keep is 5; takes True or False."),
    ("token_recycling:table=5", TypeError, "token_recycling: table is 5; takes an int32 array"),
    ("auto:share=x", TypeError, 'auto: share is "x"; takes a number.'),
    ("auto:share=-1", ValueError, "auto: share is -1; takes 0 to 1."),
    ("oracle:accuracy=5", ValueError, "oracle: accuracy is 5; takes 0 to 1."),
    ("oracle:seed=[]", TypeError, "oracle: seed is []; takes a whole number."),
    ("oracle:continuations=5", TypeError, "oracle: continuations is 5; takes"),
    ("random_draft:seed=0.5", TypeError, "random_draft: seed is 0.5; takes a whole number."),
]


@pytest.mark.parametrize("method, error, told", METHODS, ids=str)
def test_methods(model, still_writes, method, error, told):
    refused(error, told, model, method=method, drafter=model)


def test_a_method_with_a_model_of_the_wrong_kind(model, still_writes):
    """By way of an object, and by way of `auto`, which takes a model or none."""
    for wrong in (3, "zoo", torch.nn.Linear(2, 2)):
        refused(TypeError, "draft_chain: model is ", model, method=DraftChain(model=wrong))
    refused(ValueError, "draft_chain: model is None", model, method=DraftChain())
    refused(ValueError, 'option "model" of "auto" is set by an argument', model, method="auto:model=3", drafter=model)
    refused(TypeError, "model is 3; takes a loaded model", model, method="auto:model=3")
    refused(ValueError, "drafter has 7 tokens in its vocabulary; takes ", model, method=DraftChain(model=FakeModel(7)))


def test_drafters(model, still_writes, tmp_path):
    for method in ("draft_chain", "plain"):
        for wrong in (5, b"x", True, object(), torch.nn.Linear(2, 2)):
            refused(TypeError, HERE + "drafter is ", model, method=method, drafter=wrong)
    for wrong in ("", "nowhere", tmp_path):
        refused(ramify.CheckpointError, "load: ", model, method="draft_chain", drafter=wrong)


SIZES = [
    (5, TypeError, HERE + "size is 5; takes a name or a SizePolicy. Known: fixed, measured, weighed."),
    (True, TypeError, HERE + "size is True; takes a name"),
    ([1], TypeError, HERE + "size is [1]; takes a name"),
    (Fixed, TypeError, HERE + "size is <class"),
    ("", ValueError, HERE + 'size "" is not known'),
    ("fixed:rows_each=0", ValueError, "fixed: rows_each is 0; takes 1"),
    ("fixed:rows_each=10000", ValueError, "fixed: rows_each is 10000; takes"),
    ("fixed:rows_each=x", TypeError, 'fixed: rows_each is "x"; takes a whole number.'),
    ("measured:costs=3", TypeError, "measured: costs is 3; takes a CostTable or None."),
    ("measured:about=3", TypeError, "measured: about is 3; takes a string."),
    ("measured:share=x", TypeError, 'measured: share is "x"; takes a number.'),
]


@pytest.mark.parametrize("size, error, told", SIZES, ids=str)
def test_sizes(model, still_writes, size, error, told):
    refused(error, told, model, size=size)


def test_a_verifier_of_the_wrong_kind(model, still_writes):
    for wrong in (5, "greedy"):
        with pytest.raises(TypeError, match="decode: verifier is .*; takes a Verifier or None"):
            decode(model, [Request(PROMPT, 4)], Plain(), Fixed(1), verifier=wrong)


def test_caches(model, still_writes):
    for wrong in (4, "x", torch.zeros(3)):
        refused(TypeError, HERE + "cache is ", model, cache=wrong)
    room = len(PROMPT) + 8
    refused(ValueError, HERE + "cache has slots of [5] tokens; takes [13] or more", model, cache=model.new_cache([5]))
    one = model.new_cache([20])
    refused(ValueError, HERE + "cache has slots of [20] tokens; takes [13, 9] or more", model, prompts=[PROMPT, [1]], cache=one)
    for other in (FakeModel(31), ramify.load("zoo-drafter")):
        refused(ValueError, HERE + "cache is another model's; takes", model, cache=other.new_cache([100]))
    used = model.new_cache([room])
    model.prefill([[1, 2]], used)
    refused(ValueError, HERE + "cache holds [2] tokens already; takes empty slots.", model, cache=used)
    used.of([0]).crop([0])
    [given] = ramify.generate(model, [PROMPT], method="plain", max_new_tokens=8, cache=used)
    [made] = ramify.generate(model, [PROMPT], method="plain", max_new_tokens=8)
    assert given.token_ids == made.token_ids
    refused(ValueError, HERE + "cache was freed; a cache serves one call.", model, cache=used)


def test_no_method_is_no_method(model, still_writes):
    for wrong in ("", ":longest=3"):
        refused(ValueError, HERE + 'method "" is not known; known: auto, ', model, method=wrong)


def test_a_refused_call_leaves_the_callers_cache(model):
    cache = model.new_cache([100])
    for wrong in ({"max_new_tokens": 0}, {"seed": -1}, {"stop": 5}, {"stream": 5}, {"method": None}, {"size": 5}, {"drafter": 5}):
        with pytest.raises((TypeError, ValueError)):
            ramify.generate(model, [PROMPT], **{"method": "plain", "max_new_tokens": 8, "cache": cache, **wrong})
    [given] = ramify.generate(model, [PROMPT], method="plain", max_new_tokens=8, cache=cache)
    [made] = ramify.generate(model, [PROMPT], method="plain", max_new_tokens=8)
    assert given.token_ids == made.token_ids


def test_measured_takes_a_table_or_none():
    with pytest.raises(TypeError, match="measured: costs is 3"):
        Measured(costs=3)
