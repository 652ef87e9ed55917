"""From a row of logits to a token: the processing that users know from transformers, and one inverse-CDF draw.

Order and meaning are those of transformers' generate: repetition penalty over every id seen so far, temperature, top-k, top-p, min-p.
Everything is a function of one row, its request's parameters, its own text and its own position; a row's neighbours never matter.
Only rows that a verifier visits are processed, and after top-k only what it kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ramify.checks import at_least, between, number, show, whole
from ramify.sampling.rng import DRAFT, SAMPLE, uniform
from ramify.tree import MAX_ROWS

_WHO = "generate"  # whose arguments these are
_PENALTIES = 1e-30, 1e30  # beyond these a logit leaves float32
_COLDEST = 1e-4
_BLOCK = 256
_HEAD = 512
_NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What one request asks of its tokens. Raises TypeError or ValueError for what no sampler can follow.

    temperature: 0 takes the most likely token (after the repetition penalty); else logits are divided by it.
    top_k: keep the k largest logits and their ties; 0 keeps all. top_p: keep the fewest tokens whose mass reaches it; 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the likeliest. repetition_penalty: above 1 makes ids already seen less likely.
    seed: 0 to 2^64 - 1.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("temperature", self.temperature, 0, _WHO)
        whole("top_k", self.top_k, 0, _WHO)
        between("top_p", self.top_p, 0, 1, _WHO)
        between("min_p", self.min_p, 0, 1, _WHO)
        low, high = _PENALTIES
        if not low <= number("repetition_penalty", self.repetition_penalty, _WHO) <= high:
            raise ValueError(f"{_WHO}: repetition_penalty is {show(self.repetition_penalty)}; takes {low} to {high}. 1 switches it off.")
        if whole("seed", self.seed, 0, _WHO) >= 1 << 64:
            raise ValueError(f"{_WHO}: seed is {self.seed}; takes 0 to 2^64 - 1. Take it modulo 2**64.")

    @property
    def needs_logits(self) -> bool:
        """False when the arg-max that the model returns decides by itself."""
        return self.temperature > 0 or self.repetition_penalty != 1

    @property
    def is_plain(self) -> bool:
        """Whether a draw from softmax(logits / temperature) is all that is asked, at a temperature by which any logit can be divided."""
        return self.temperature >= _COLDEST and not self.top_k and self.top_p == 1 and not self.min_p and self.repetition_penalty == 1


def sampled(texts: Iterable[SamplingParams]) -> bool:
    """Whether any of these texts is drawn: each token of a text at temperature 0 is the most likely one."""
    return any(params.temperature > 0 for params in texts)


class Draws(NamedTuple):
    """What a model needs to draw the tokens itself: of every sequence its temperature, its seed, and the position of the root's successor.

    temperature float32 [B], 0 where the draw does not count; seed int64 [B], read as 64 bits without a sign; position int64 [B].
    """

    temperature: np.ndarray
    seed: np.ndarray
    position: np.ndarray

    def check(self, B: int, caller: str) -> None:
        """Raises TypeError or ValueError for what is not B temperatures of 0 or more, with seeds and positions."""
        for name, array in self._asdict().items():
            if not isinstance(array, np.ndarray) or array.shape != (B,) or array.dtype.kind != ("f" if name == "temperature" else "i"):
                came = show(array) if not isinstance(array, np.ndarray) else f"{array.dtype} {list(array.shape)}"
                raise TypeError(f"{caller}: {name} of draws is {came}; takes an array of {B}, as Draws says.")
        if not (np.isfinite(self.temperature) & (self.temperature >= 0)).all():
            raise ValueError(f"{caller}: temperature of draws is {self.temperature.tolist()}; takes finite numbers, 0 or more.")


def penalize(logits: np.ndarray, penalty: float, seen: np.ndarray) -> np.ndarray:
    """Return logits with those of the ids in `seen` (each once or often) divided by the penalty if positive, else multiplied."""
    if penalty == 1 or not len(seen):
        return logits
    seen = seen[seen < len(logits)]
    score = logits[seen]
    logits = logits.copy()
    logits[seen] = np.where(score < 0, score * penalty, score / penalty)
    return logits


def weights(logits: np.ndarray, params: SamplingParams, seen: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Return (ids, w): tokens (None: all, in order; else int64, ascending) and their weights, float32, the largest 1, 0 for the dropped.

    logits: float32 [V]. seen: ids for the repetition penalty. The temperature is above 0. Raises ValueError for NaN or +inf logits.
    """
    raw = penalize(logits, params.repetition_penalty, seen)
    scores = raw
    if params.temperature != 1:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            scores = raw / np.float32(params.temperature)
    top = scores.max()
    if not np.isfinite(top):
        scores, top = _tempered_from_top(raw, params.temperature), np.float32(0)
    ids = None
    if 0 < params.top_k < len(scores):
        cut = len(scores) - params.top_k
        ids = np.flatnonzero(scores >= np.partition(scores, cut)[cut])
        scores = scores[ids]
    w = np.exp(scores - top)
    least, ties = _nucleus(w, params.top_p) if params.top_p < 1 else (np.float32(0), 0)
    if np.float32(params.min_p) > least:
        least, ties = np.float32(params.min_p), 0
    if least > 0:
        w *= w >= least
        if ties:
            w[np.flatnonzero(w == least)[:ties]] = 0
    return ids, w


def probabilities(logits: np.ndarray, params: SamplingParams, seen: np.ndarray) -> np.ndarray:
    """Return the distribution that `weights` describes, float64 [V], summing to 1; at temperature 0 one entry is 1."""
    ids: Any
    if params.temperature == 0:
        ids, w = argmax(logits, params, seen), np.ones(())
    else:
        ids, w = weights(logits, params, seen)
    share = w.astype(np.float64)
    share /= share.sum()
    if ids is None:
        return share
    p = np.zeros(len(logits))
    p[ids] = share
    return p


def argmax(logits: np.ndarray, params: SamplingParams, seen: np.ndarray) -> int:
    """Return the most likely token after the repetition penalty, the lowest id on a tie. Raises ValueError for NaN logits."""
    scores = penalize(logits, params.repetition_penalty, seen)
    best = int(scores.argmax())
    if not np.isfinite(scores[best]):
        raise ValueError(_not_finite(logits))
    return best


def inverse_cdf(w: np.ndarray, u: float) -> int:
    """Return the index whose share of the total weight holds u in [0, 1); an index of zero weight is never returned."""
    first, base = 0, 0.0
    if len(w) > 2 * _BLOCK:  # find the block by the sums of blocks: a running sum over a whole vocabulary is slow
        starts = _block_starts(len(w))
        cdf = np.add.reduceat(w, starts, dtype=np.float64).cumsum()
        target = u * cdf[-1]  # below cdf[-1], since u is below 1
        block = int(cdf.searchsorted(target, side="right"))
        base = cdf[block - 1] if block else 0.0
        first = block * _BLOCK
        w = w[first : first + _BLOCK]
        cdf = w.cumsum(dtype=np.float64)
    else:
        cdf = w.cumsum(dtype=np.float64)
        target = u * cdf[-1]
    at = int(cdf.searchsorted(target - base, side="right"))
    if at == len(cdf):  # the sum of a block and the sums within it round differently
        at = int(np.flatnonzero(w)[-1])
    return first + at


def draw_children(q: np.ndarray, count: int, mode: str, seed: int, index: int, row: int = 0) -> list[int]:
    """Draw up to `count` children of tree row `row` from q [V]; fewer when "wor" runs out of support. In draw order.

    index: absolute position of the children. The numbers depend on (seed, index, row, child) alone.
    mode: "wor", without replacement, or "iid", with.
    """
    w = np.array(q, np.float64)
    drawn: list[int] = []
    for child in range(count):
        if not w.any():
            break
        drawn.append(inverse_cdf(w, uniform(seed, index, DRAFT, row * MAX_ROWS + child)))
        if mode == "wor":
            w[drawn[-1]] = 0
    return drawn


@dataclass
class Sampling:
    """The requests of one step: their parameters and their texts, in the order of the tree's sequences.

    params: one SamplingParams per sequence. text: prompt and emitted ids of each; its last is the root of the tree. The lists may
    grow between steps. A path is the list of tokens from the root (left out) to a row.
    """

    params: Sequence[SamplingParams]
    text: Sequence[list[int]]
    _seen: dict[int, tuple[list[int], int, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.params) != len(self.text):
            raise ValueError(f"Sampling: params has {len(self.params)} entries and text {len(self.text)}; takes one of each a sequence.")

    @property
    def needs_logits(self) -> bool:
        """Whether any sequence needs more of a row than its arg-max."""
        return any(p.needs_logits for p in self.params)

    def probabilities(self, b: int, logits_row: np.ndarray, path: Sequence[int] = ()) -> np.ndarray:
        """Return the distribution of the token after `path`, float64 [V]."""
        return probabilities(logits_row, self.params[b], self.seen(b, path))

    def uniform(self, b: int, depth: int, purpose: int, lane: int = 0) -> float:
        """Return the random number for the token that follows a path of `depth` tokens."""
        return uniform(self.params[b].seed, len(self.text[b]) + depth, purpose, lane)

    def draw(self, b: int, logits_row: np.ndarray, path: Sequence[int] = ()) -> int:
        """Return the token that plain decoding with this seed would emit after `path`."""
        params = self.params[b]
        seen = self.seen(b, path)
        if params.temperature == 0:
            return argmax(logits_row, params, seen)
        if params.is_plain and logits_row.dtype == np.float32 and logits_row.strides[0] == 4 and (library := _library()):
            address = logits_row.__array_interface__["data"][0]
            at = library.draw(address, len(logits_row), params.temperature, params.seed, len(self.text[b]) + len(path))
            if at >= 0:  # what is wrong with bad logits is told below
                return at
        ids, w = weights(logits_row, params, seen)
        at = inverse_cdf(w, self.uniform(b, len(path), SAMPLE))
        return at if ids is None else int(ids[at])

    def draws(self) -> Draws | None:
        """What a model that draws needs; None where it would decide nothing.

        Its tokens are those of `draw`, but for a random number within rounding of the border between two of them.
        """
        plain = [p.is_plain for p in self.params]
        if not any(plain):
            return None
        heat = np.array([p.temperature if is_plain else 0 for p, is_plain in zip(self.params, plain, strict=True)], np.float32)
        return Draws(heat, np.array([p.seed for p in self.params], np.uint64).view(np.int64), np.array([len(text) for text in self.text]))

    def choose(self, b: int, out: Any, row: int, path: Sequence[int] = ()) -> int:
        """Return `draw` for packed row `row` of a StepOut; reads its logits only when neither its arg-max nor the model's draw decides."""
        params = self.params[b]
        if not params.needs_logits:
            return int(out.argmax[row])
        if getattr(out, "drawn", None) is not None and params.is_plain:
            return int(out.drawn[row])
        return self.draw(b, logits_of(out, row), path)

    def seen(self, b: int, path: Sequence[int] = ()) -> np.ndarray:
        """Return the ids that the repetition penalty of sequence b looks at; empty when it is off."""
        if self.params[b].repetition_penalty == 1:
            return _NOTHING
        text = self.text[b]
        known, length, ids = self._seen.get(b, (None, 0, _NOTHING))
        if known is not text or length > len(text):
            length, ids = 0, _NOTHING
        if length < len(text):
            ids = np.union1d(ids, np.array(text[length:], np.int64))
            self._seen[b] = (text, len(text), ids)
        return np.concatenate([ids, np.array(path, np.int64)]) if len(path) else ids


def logits_of(out: Any, row: int) -> np.ndarray:
    """Return row `row` of a StepOut's logits. Raises ValueError when the step was run without them."""
    if out.logits is None:
        raise ValueError("verify: out.logits is None; sampling takes float32 [M, V]. Run forward with logits=True.")
    return out.logits[row]


@lru_cache(maxsize=1)
def _library() -> Any:
    """The CPU kernels; None in a build without them, as one for a GPU alone may be: numpy draws then."""
    try:
        from ramify import native
    except ImportError:
        return None
    return native


@lru_cache(maxsize=64)
def _block_starts(size: int) -> np.ndarray:
    return np.arange(0, size, _BLOCK)


def _nucleus(w: np.ndarray, top_p: float) -> tuple[np.float32, int]:
    """The least weight among the fewest of the largest weights that hold top_p of the mass, and how many of its equals stay out.

    Of equal weights the lower ids leave first, as in a stable ascending sort; the mass left out is compared in float32, as transformers
    does.
    """
    total = w.sum(dtype=np.float64)
    out = np.float32(1 - top_p)
    rest, below, left_out = w, 0.0, 0  # where the edge is searched, the mass and the number of weights below it
    cut = len(w) - _HEAD
    while len(rest) > 2 * _HEAD:  # is the edge above or below the cut? Likely among the _HEAD largest; else halve
        rest = np.partition(rest, cut)
        light = rest[:cut].sum(dtype=np.float64)
        if (below + light) / total > out:
            rest = rest[:cut]
        else:
            rest, below, left_out = rest[cut:], below + light, left_out + cut
        cut = len(rest) // 2
    rest = np.sort(rest)
    share = rest / np.float32(total)  # rounded as a float32 softmax rounds, and then summed wide
    mass = below / total + share.cumsum(dtype=np.float64)
    at = min(int(mass.astype(np.float32).searchsorted(out, side="right")), len(rest) - 1)
    edge = rest[at]
    return edge, left_out + at - np.count_nonzero(w < edge)


def _tempered_from_top(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(logits - max) / temperature, for temperatures so small that logits / temperature overflows. Raises ValueError for bad logits."""
    top = logits.max()
    if not np.isfinite(top):
        raise ValueError(_not_finite(logits))
    with np.errstate(over="ignore"):
        return ((logits.astype(np.float64) - top) / temperature).astype(np.float32)


def _not_finite(logits: np.ndarray) -> str:
    bad = "NaN" if np.isnan(logits).any() else "+inf" if np.isposinf(logits).any() else "-inf everywhere"
    return f"sampling: logits hold {bad}; takes finite numbers, or -inf for what must not be drawn. Check the weights and the dtype."
