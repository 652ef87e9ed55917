"""A request, what comes out of it, and the rules that end it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

from ramify.checks import sequence, show, whole
from ramify.decode.text import TextStream
from ramify.sampling.pipeline import SamplingParams

Stream = Callable[[int, list[int], str], None]
"""Called with the request's index, its new token ids, and the text that they finished (text that may still change is held back)."""


@dataclass(frozen=True)
class Request:
    """One prompt and what is asked of its continuation.

    prompt: token ids, at least one. eos: ids that end the text; the id is emitted, its text is not. stop_ids: sequences of ids that end
    it, emitted too. stop_strings: the text ends before the first of them, the ids after the token that completed it.
    stop_when: shown prompt and emitted ids after each emitted id (do not change them); True ends the text there.
    """

    prompt: list[int]
    max_new_tokens: int = 128
    params: SamplingParams = SamplingParams()
    eos: frozenset[int] = frozenset()
    stop_ids: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()
    stop_when: Callable[[list[int]], bool] | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        whole("max_new_tokens", self.max_new_tokens, 1, "generate")
        if not self.prompt:
            raise ValueError("generate: prompt is empty; takes one token or more. Start with the model's begin-of-text token.")
        if self.stop_strings and self.tokenizer is None:
            raise ValueError(f'generate: stop has "{self.stop_strings[0]}" and the model has no tokenizer; takes ids. Give stop as ids.')

    @property
    def capacity(self) -> int:
        """Tokens that the cache must hold."""
        return len(self.prompt) + self.max_new_tokens


@dataclass
class Stats:
    """Counts and seconds of one output.

    steps: target steps it took part in. tokens: ids emitted. accepted: accepted[n] steps took n guesses.
    seconds: of the whole call until this output ended, for each of "prefill", "draft", "forward", "verify", "commit"; in a batch the
    phases are shared, so the seconds of two outputs overlap.
    """

    steps: int = 0
    tokens: int = 0
    accepted: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a target step brought on average; 1 is plain decoding."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the seconds of all phases but the prefill."""
        spent = sum(seconds for phase, seconds in self.seconds.items() if phase != "prefill")
        return self.tokens / spent if spent else 0.0


class Output:
    """The continuation of one request: text, token_ids, finish_reason ("eos", "stop", "length"; "" while it grows), stats."""

    def __init__(self, request: Request, index: int = 0, stream: Stream | None = None) -> None:
        self.request, self.index = request, index
        self.ids = list(request.prompt)  # prompt and everything emitted; Sampling and the drafters read this very list
        self.finish_reason = ""
        self.stats = Stats()
        self._stream = stream
        self._left = request.max_new_tokens
        self._start = len(request.prompt)
        self._reader: TextStream | None = None
        if request.tokenizer is not None and (request.stop_strings or stream):
            self._reader = TextStream(request.tokenizer, self.ids, self._start, request.stop_strings)
        self._one_by_one = bool(request.stop_ids or request.stop_strings or request.stop_when)

    @property
    def token_ids(self) -> list[int]:
        """The ids after the prompt."""
        return self.ids[self._start :]

    @property
    def last(self) -> int:
        """The newest id: the root of the next tree."""
        return self.ids[-1]

    @property
    def left(self) -> int:
        """How many ids may still come."""
        return self._left

    @property
    def text(self) -> str:
        """The text after the prompt, without end-of-text ids and stop strings; "" when the model has no tokenizer."""
        tokenizer = self.request.tokenizer
        if tokenizer is None:
            return ""
        if self._reader is not None and self.finish_reason:
            return self._reader.text
        ended = len(self.ids) > self._start and self.ids[-1] in self.request.eos
        reader = TextStream(tokenizer, self.ids[:-1] if ended else self.ids, self._start)
        reader.finish()
        return reader.text

    def take(self, tokens: list[int]) -> int:
        """Append what one step emitted, up to and including the token that ends the text; return how many were kept.

        Once the text has ended none are: a device may be a step ahead of whoever tells it so.
        """
        if self.finish_reason:
            return 0
        count = min(len(tokens), self._left)
        if self._one_by_one or not self.request.eos.isdisjoint(tokens):
            count = self._take_singly(tokens[:count])
        else:
            self.ids += tokens if count == len(tokens) else tokens[:count]
        self._left -= count
        if not self._left and not self.finish_reason:
            self.finish_reason = "length"
        stats = self.stats
        stats.steps += 1
        stats.tokens += count
        while len(stats.accepted) < count:
            stats.accepted.append(0)
        stats.accepted[count - 1] += 1
        return count

    def tell(self, count: int) -> None:
        """Pass the newest `count` ids, and the text that they finished, to the stream."""
        if self._stream is None or not count:
            return
        piece = ""
        if self._reader is not None:
            self._read(self._reader)
            piece = self._reader.take(last=bool(self.finish_reason))
        self._stream(self.index, self.ids[len(self.ids) - count :], piece)

    def close(self, seconds: dict[str, float]) -> None:
        """The text has ended: the seconds so far are its seconds."""
        self.stats.seconds = seconds
        if self._reader is not None:
            self._read(self._reader)

    def _take_singly(self, tokens: list[int]) -> int:
        request, ids = self.request, self.ids
        reader = self._reader if request.stop_strings else None
        for count, token in enumerate(tokens, 1):
            ids.append(token)
            if token in request.eos:
                self.finish_reason = "eos"
            elif self._stopped(reader):
                self.finish_reason = "stop"
            if self.finish_reason:
                return count
        return len(tokens)

    def _stopped(self, reader: TextStream | None) -> bool:
        """Whether the newest id completes a stop string (`reader` looks for them) or a stop sequence, or the request's own rule ends it."""
        request, ids = self.request, self.ids
        if reader is not None and reader.read():
            return True
        came = len(ids) - self._start
        if any(came >= len(stop) and tuple(ids[-len(stop) :]) == stop for stop in request.stop_ids):
            return True
        return request.stop_when is not None and request.stop_when(ids)

    def _read(self, reader: TextStream) -> None:
        if self.finish_reason == "eos":  # the end-of-text id has no text
            end = self.ids.pop()
            reader.finish()
            self.ids.append(end)
            return
        reader.read()
        if self.finish_reason:
            reader.finish()

    def __repr__(self) -> str:
        return f"Output({len(self.token_ids)} ids, {self.finish_reason!r}, {self.stats.tokens_per_step:.2f} tokens per step)"


def read_stops(stop: str | Sequence[Any], vocab: int) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Split `stop=` into stop strings and id sequences. Takes one string, or a sequence of strings, ids and lists of ids."""
    items = [stop] if isinstance(stop, str) else sequence(stop)
    if items is None:
        raise TypeError(f"generate: stop is {show(stop)}; takes a string, or a list of strings, ids and lists of ids. () is none.")
    strings = tuple(item for item in items if isinstance(item, str))
    if "" in strings:
        raise ValueError('generate: stop has ""; takes strings of one character or more. Leave it out.')
    ids = []
    for item in items:
        if not isinstance(item, str):
            several = sequence(item)
            ids.append(tuple(token_ids("stop", [item] if several is None else several, vocab, "strings, ids and lists of ids.")))
            if not ids[-1]:
                raise ValueError("generate: stop has []; takes one id or more. Leave it out.")
    return strings, tuple(ids)


def token_ids(name: str, ids: Sequence[Any], vocab: int, takes: str) -> list[int]:
    """Ids of a vocabulary, each any whole number but a bool, as ints. Raises TypeError for another kind, which tells what it `takes`."""
    found = []
    for item in ids:
        try:
            token = None if isinstance(item, bool) else index(item)
        except TypeError:
            token = None
        if token is None:
            raise TypeError(f"generate: {name} holds {show(item)}; takes {takes}")
        if not 0 <= token < vocab:
            raise ValueError(f"generate: {name} holds id {show(token)}; takes 0 to {vocab - 1}, the model's vocabulary. Use its tokenizer.")
        found.append(token)
    return found
