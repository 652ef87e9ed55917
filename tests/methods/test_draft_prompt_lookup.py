"""Prompt lookup on hand-made strings: which place is copied from, how far, and when the copy moves on."""

from types import SimpleNamespace

import numpy as np
import pytest

from ramify.draft.prompt_lookup import PromptLookup
from ramify.verify import Verdict


class Target:
    """A model as far as the drafter looks at it."""

    def __init__(self, eos=""):
        self.config = SimpleNamespace(eos_token_ids=tuple(map(ord, eos)))


def guess(text, count, eos=(), **options):
    """What follows `text` (letters) in the drafter's eyes, as letters."""
    drafter = PromptLookup(**options)
    drafter.bind(Target(eos), [])
    drafter.begin([0], [list(map(ord, text))])
    tree = drafter.propose([0], [ord(text[-1])], [count + 1])
    return "".join(map(chr, tree.tokens[1:]))


def emit(drafter, tokens, slot=0):
    drafter.observe([slot], None, None, Verdict([np.arange(len(tokens), dtype=np.int32)], [list(map(ord, tokens))]))


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("abcXabcYab", {}, "cYa"),  # the latest "ab"
        ("XbcPaabcQbc", {"longest": 2}, "Qbc"),
        ("aXcbXdaX", {}, "cbX"),  # "aX" beats the later "X"
        ("aXcbXdaX", {"longest": 1}, "daX"),
        ("aXcbXdaX", {"shortest": 3}, ""),  # no trigram repeats
        ("abcdef", {}, ""),
        ("a", {}, ""),
        ("aa", {}, "aaa"),  # the copy reads itself
        ("abab", {}, "aba"),
        ("abcabcab", {}, "cab"),
    ],
)
def test_latest_and_longest(text, options, told):
    assert guess(text, 3, **options) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("abcdeb", "cde"),  # "b" stands once before
        ("abXcbYdb", ""),  # "b" stands twice, "db" nowhere
        ("abXcbYab", "Xcb"),  # "b" twice, "ab" once
        ("abXabYab", ""),  # all ambiguous
        ("xabXyabYxab", "XyabYxab"),  # three tokens are needed
    ],
)
def test_unique_and_shortest(text, told):
    assert guess(text, 8, anchor="unique")[: len(told)] == told
    assert bool(guess(text, 8, anchor="unique")) == bool(told)


def test_copy_ends_before_end_of_text():
    assert guess("abc.abdab", 4) == "dab" + "d"
    assert guess("ab.cdab", 4, eos=".") == ""
    assert guess("abcd.ab", 4, eos=".") == "cd"


def test_copy_goes_on_where_it_was():
    """After an accepted copy the place is kept, even when the newest tokens also stand somewhere else, later."""
    text = "abcdefgh cdX ab"
    for copy_on, told in ((True, "ef"), (False, "X ")):
        drafter = PromptLookup(longest=2, copy_on=copy_on)
        drafter.bind(Target(), [])
        drafter.begin([0], [list(map(ord, text))])
        assert "".join(map(chr, drafter.propose([0], [ord("b")], [2]).tokens[1:])) == "c"
        emit(drafter, "cd")
        assert "".join(map(chr, drafter.propose([0], [ord("d")], [3]).tokens[1:])) == told


def test_copy_ends_where_the_text_departs():
    drafter = PromptLookup()
    drafter.bind(Target(), [])
    drafter.begin([0], [list(map(ord, "abcdefgh.gX.ab"))])
    drafter.propose([0], [ord("b")], [4])
    emit(drafter, "cg")
    assert "".join(map(chr, drafter.propose([0], [ord("g")], [2]).tokens[1:])) == "X"


def test_rows_are_prefixes_and_slots_are_apart():
    drafter = PromptLookup()
    drafter.bind(Target(), [])
    prompts = [list(map(ord, text)) for text in ("abcdab", "xyz", "klmkl")]
    drafter.begin([0, 2, 5], prompts)
    wide = drafter.propose([0, 2, 5], [p[-1] for p in prompts], [7, 7, 7])
    narrow = drafter.propose([0, 2, 5], [p[-1] for p in prompts], [3, 1, 2])
    for b, n in enumerate((3, 1, 2)):
        assert narrow.tokens[narrow.span(b)].tolist() == wide.tokens[wide.span(b)].tolist()[:n]
    drafter.end([2])
    emit(drafter, "cd", slot=0)
    drafter.end([0, 5, 7])
    assert not drafter._sources


def chance(drafter, slot, root):
    """Of the first guess; 0 where it is not worth a row."""
    tree = drafter.propose([slot], [root], [9])
    return tree.chance[1] if tree.M > 1 else 0.0


def test_longer_agreement_is_likelier():
    drafter = PromptLookup()
    drafter.bind(Target(), [])
    texts = ("xbcdefgh yb", "abcdefgh ab", "abcdefgh abcde")  # one, two and five tokens agree with where the copy begins
    drafter.begin([0, 1, 2], [list(map(ord, text)) for text in texts])
    tree = drafter.propose([0, 1, 2], [ord(text[-1]) for text in texts], [4, 4, 4])
    one, two, five = (tree.chance[tree.span(b)] for b in range(3))
    assert one[0] == two[0] == five[0] == 1 and one[1] < two[1] < five[1] < 1
    assert all((np.diff(each) < 0).all() for each in (one, two, five))
    assert two[1] / two[0] == pytest.approx(one[2] / one[1])  # a token further on one more agrees


@pytest.mark.parametrize("right", [True, False])
def test_chances_are_learned_from_what_came(right):
    """Also where the guess was not verified, or only a part of it: what was emitted tells all the same."""
    drafter = PromptLookup(longest=1, shortest=1, copy_on=False)
    drafter.bind(Target(), [])
    told = []
    for slot in range(60):
        drafter.begin([slot], [[1, 2, 3, 4, 9, 8, 1]])
        told.append(chance(drafter, slot, 1))
        drafter.observe([slot], None, None, Verdict([np.zeros(1, np.int32)], [[2 if right else 5]]))
    assert told[-1] > 0.9 if right else told[-1] < 0.05
    assert (np.diff(told[:30]) > 0).all() if right else (np.diff(told[:30]) < 0).all()
    drafter.begin([60], [[1, 2, 3, 4, 9, 8, 1, 2]])
    if not right:  # of two tokens that agree nothing was seen
        assert chance(drafter, 60, 2) == 0.5


def test_later_texts_begin_with_what_earlier_ones_taught():
    """With the same target, at a temperature or at none; a few guesses of the new text outweigh it."""
    model = Target()

    def begun(temperature, slots=1):
        drafter = PromptLookup(longest=1, shortest=1, copy_on=False)
        drafter.bind(model, [SimpleNamespace(params=SimpleNamespace(temperature=temperature))])
        drafter.begin(list(range(slots)), [[1, 2, 3, 4, 9, 8, 1]] * slots)
        return drafter

    def told(drafter, right, slots):
        chances = []
        for slot in slots:
            chances.append(chance(drafter, slot, 1))
            drafter.observe([slot], None, None, Verdict([np.zeros(1, np.int32)], [[2 if right else 5]]))
        return chances

    fresh, *_, taught = told(begun(0.0, 60), False, range(60))
    later = told(begun(0.0, 20), True, range(20))
    assert later[0] <= taught < fresh / 4 and later[12] > 0.5
    assert told(begun(0.8), False, [0]) == [fresh]


def test_unlikely_guesses_take_no_rows():
    drafter = PromptLookup()
    drafter.bind(Target(), [])
    drafter.begin([0, 1], [list(range(60)) + [70, 3], [1, 2, 3]])
    tree = drafter.propose([0, 1], [3, 3], [200, 200])
    assert 4 < tree.rows[0] < 20 and tree.chance.min() >= 0.02 and tree.rows[1] == 1 and tree.chance[-1] == 1
    assert drafter.propose([1], [3], [200]).chance is None  # roots alone


def test_bad_options():
    for options, told in (
        ({"shortest": 0}, "shortest is 0"),
        ({"longest": 2, "shortest": 3}, "longest is 2"),
        ({"anchor": "x"}, "anchor is"),
    ):
        with pytest.raises(ValueError, match=told):
            PromptLookup(**options)
