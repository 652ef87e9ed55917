"""Prompt lookup: guess that a repeated n-gram goes on as it did before, and once a copy is running let it run.

Source: Saxena 2023 (prompt lookup decoding); the running copy and the unique-anchor rule are those of Ge et al. 2022 (input-guided
aggressive decoding). Exact with any exact verifier. No weights. Wins where the answer copies the prompt or itself.
Cost: one dict probe per n-gram length and sequence; no tensor is touched before the tree is built.

The longer a place has agreed with the text, the likelier it goes on to: how likely is counted while decoding, by the tokens before
the guess that agree, and said in the tree's `chance`. So a size policy can verify long copies and leave a chance match alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ramify.checks import flag, one_of, whole
from ramify.draft.base import Drafter, drafter
from ramify.sampling.pipeline import sampled
from ramify.size.base import SizePolicy
from ramify.size.weighed import Weighed
from ramify.tree import TokenTree

if TYPE_CHECKING:
    from ramify.decode.output import Request
    from ramify.verify import Verdict


@dataclass(slots=True)
class _Source:
    """A text and where each of its n-grams goes on; `cursor` is where the running copy reads next, -1 when none runs.

    An n-gram is one whole number, 32 bits a token. last: those that end the text, of 1, 2, ... tokens. after, twice: by length from the
    shortest on, where each goes on, and those that go on in several places.
    fresh: tokens after it that are not indexed yet; they are when a guess is wanted, and while none is the drafter costs nothing.
    guess: what was guessed to follow, until that is seen; agreed: tokens before it that also stand before the place it is copied from.
    """

    fresh: list[int]
    text: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    after: list[dict[int, int]] = field(default_factory=list)
    twice: list[set[int]] = field(default_factory=list)
    cursor: int = -1
    guess: list[int] = field(default_factory=list)
    agreed: int = 0


_LONG = 24  # tokens that agreed; more say no more
_HALF = 40.0  # guesses of a kind after which what they taught counts half
_LEAST = 0.02  # chance of a guess that is worth a row on any machine


_TRUST = 8.0  # guesses that what earlier texts taught counts as, at most: the next one may be of another kind


class _Odds:
    """How often the next guess was right, by the tokens before it that agreed. Before any was seen: n of n + 2."""

    def __init__(self) -> None:
        self.tried = [2.0] * (_LONG + 1)
        self.right = [2.0 * n / (n + 2) for n in range(_LONG + 1)]

    def learn(self, agreed: int, guess: Sequence[int], emitted: Sequence[int]) -> None:
        """Take in what came where `guess` was expected."""
        for n, (expected, came) in enumerate(zip(guess, emitted), agreed):
            n = min(n, _LONG)
            self.tried[n] += 1
            self.right[n] += expected == came
            if self.tried[n] > _HALF:
                self.tried[n] /= 2
                self.right[n] /= 2
            if expected != came:
                break

    def trust(self) -> None:
        """What was learned is of other texts now."""
        for n, tried in enumerate(self.tried):
            less = min(1.0, _TRUST / tried)
            self.tried[n] *= less
            self.right[n] *= less

    def of(self, agreed: int, count: int) -> list[float]:
        """The chance of each of `count` guesses in a row; the list ends before one that is not worth a row."""
        chance, odds = [], 1.0
        for n in range(agreed, agreed + count):
            n = min(n, _LONG)
            odds *= self.right[n] / self.tried[n]
            if odds < _LEAST:
                break
            chance.append(odds)
        return chance


_kept: WeakKeyDictionary[Any, dict[bool, _Odds]] = WeakKeyDictionary()  # target -> by whether text is sampled


@drafter("prompt_lookup", lossless=True, trained=False, portfolio=True, source="Saxena 2023; Ge et al. 2022")
@dataclass
class PromptLookup(Drafter):
    """One chain per sequence: what followed an earlier occurrence of its last tokens.

    longest, shortest: lengths of the n-grams that may match. anchor: "latest" tries the longest n-gram first and takes its latest
    occurrence; "unique" tries the shortest first and takes the first that occurs exactly once. copy_on: while the text keeps agreeing
    with the place it is copied from, go on there, whatever other places match. A copy ends before an end-of-text token.
    """

    longest: int = 3
    shortest: int = 1
    anchor: str = "latest"
    copy_on: bool = True
    _sources: dict[int, _Source] = field(default_factory=dict, init=False, repr=False)
    _odds: _Odds = field(default_factory=_Odds, init=False, repr=False)
    _eos: frozenset[int] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        whole("shortest", self.shortest, 1, "prompt_lookup")
        whole("longest", self.longest, self.shortest, "prompt_lookup")
        one_of("anchor", self.anchor, ("latest", "unique"), "prompt_lookup")
        flag("copy_on", self.copy_on, "prompt_lookup")

    def bind(self, model: Any, requests: Sequence[Request]) -> None:
        """Learn which tokens end a text, and how guesses did with this target before."""
        self._eos = frozenset(model.config.eos_token_ids)
        drawn = sampled(request.params for request in requests)
        self._odds = _kept.setdefault(model, {}).setdefault(drawn, self._odds)
        self._odds.trust()

    def size_policy(self) -> SizePolicy:
        """Guesses are there for the taking; which of them to verify is a matter of their chance."""
        return Weighed(about=self.name)

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Keep a copy of each prompt."""
        for slot, prompt in zip(slots, prompts, strict=True):
            lengths = range(self.shortest, self.longest + 1)
            self._sources[slot] = _Source(list(prompt), after=[{} for _ in lengths], twice=[set() for _ in lengths])

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """Chains of the running copies; a sequence without a match is its root alone."""
        guesses, chance = [], []
        for slot, n in zip(slots, rows, strict=True):
            source = self._sources[slot]
            guess = source.guess = self._guess(source, n - 1)
            odds = self._odds.of(source.agreed, len(guess)) if guess else []
            guesses.append(guess[: len(odds)])
            chance += [1.0, *odds]
        if len(chance) == len(slots):
            return TokenTree.roots(roots)
        tree = TokenTree.chains(roots, guesses)
        tree.chance = np.array(chance)
        return tree

    def observe(self, slots: Sequence[int], tree: TokenTree, out: Any, verdict: Verdict) -> None:
        """Append what was emitted."""
        for slot, tokens in zip(slots, verdict.emitted, strict=True):
            source = self._sources[slot]
            source.fresh += tokens
            if source.guess:
                self._odds.learn(source.agreed, source.guess, tokens)
                source.guess = []

    def end(self, slots: Sequence[int]) -> None:
        """Drop the texts."""
        for slot in slots:
            self._sources.pop(slot, None)

    def _extend(self, source: _Source) -> None:
        """Index the fresh tokens, and move or end the running copy."""
        tokens, text, after, twice = source.fresh, source.text, source.after, source.twice
        unique = self.anchor == "unique"
        last = source.last
        for token in tokens:
            end = len(text)
            for gram, places, more in zip(last[self.shortest - 1 :], after, twice):
                if unique and gram in places:
                    more.add(gram)
                places[gram] = end  # written one token late, so a suffix never matches itself
            text.append(token)
            last = [token, *[gram << 32 | token for gram in last[: self.longest - 1]]]
        source.last = last
        if (begin := source.cursor) >= 0:
            goes_on = text[begin : begin + len(tokens)] == tokens
            source.cursor, source.agreed = (begin + len(tokens), source.agreed + len(tokens)) if goes_on else (-1, 0)
        source.fresh = []

    def _guess(self, source: _Source, count: int) -> list[int]:
        if count < 1:
            return []
        self._extend(source)
        if source.cursor < 0 or not self.copy_on:
            source.cursor = self._anchor(source)
            source.agreed = _agreed(source.text, source.cursor)
        if source.cursor < 0:
            return []
        text, start = source.text, source.cursor
        guess = text[start : start + count]
        for i in range(start + len(guess), start + count):  # past its end the copy reads itself, so a period of two fills any width
            guess.append(guess[i - len(text)])
        if not self._eos.isdisjoint(guess):
            guess = guess[: next(i for i, token in enumerate(guess) if token in self._eos)]
        return guess

    def _anchor(self, source: _Source) -> int:
        grams = list(zip(source.last[self.shortest - 1 :], source.after, source.twice))  # the shortest first
        if self.anchor == "latest":
            for gram, places, _ in reversed(grams):
                if (start := places.get(gram)) is not None:
                    return start
            return -1
        for gram, places, more in grams:
            if gram not in places:
                return -1
            if gram not in more:
                return places[gram]
        return -1


def _agreed(text: list[int], start: int) -> int:
    """How many tokens at the end of the text stand before `start` too."""
    n, most = 0, min(start, _LONG)
    while n < most and text[start - 1 - n] == text[-1 - n]:
        n += 1
    return n
