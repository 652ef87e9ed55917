"""How well a model predicts text it is given: the natural-log loss of every token after those before it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ramify.checks import whole

if TYPE_CHECKING:
    from ramify.model.model import Model, StepOut


@dataclass(frozen=True)
class Perplexity:
    """Mean loss over `tokens` predicted tokens. perplexity is e^nats_per_token; bits_per_byte is None where the text came as ids."""

    nats_per_token: float
    bits_per_byte: float | None
    perplexity: float
    tokens: int


def perplexity(model: "Model", texts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], window: int = 1024) -> Perplexity:
    """Loss of `model` on texts, or on texts as lists of ids; a single one needs no list around it.

    Each text is cut into windows of `window` predicted tokens (fewer at its end) that know nothing of what was before; the first token
    of a text is not predicted. Same weights, same bits, whatever the number of threads.
    Raises ValueError for a window beyond the model's positions, text without a tokenizer, and texts of less than two tokens in all.
    """
    limit = model.config.max_positions - 1
    if whole("window", window, 1, "perplexity") > limit:
        raise ValueError(f"perplexity: window is {window}; takes 1 to {limit}, one less than the positions of {model.config.name}.")
    single = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], (int, np.integer)))
    listed: list[Any] = [texts] if single else list(texts)
    nats, tokens, size = 0.0, 0, 0
    for text in listed:
        ids = _encode(model, text) if isinstance(text, str) else list(text)
        size += len(text.encode()) if isinstance(text, str) else 0
        for first in range(0, len(ids) - 1, window):
            part = ids[first : first + window + 1]
            nats += _loss(model, part)
            tokens += len(part) - 1
    if tokens == 0:
        raise ValueError("perplexity: texts have no token to predict; takes two tokens or more.")
    mean = nats / tokens
    return Perplexity(mean, nats / math.log(2) / size if size else None, math.exp(min(mean, 700.0)), tokens)


def _encode(model: "Model", text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError(f"perplexity: {model.config.name} has no tokenizer.json; takes lists of token ids then.")
    return model.tokenizer.encode(text)


def _loss(model: "Model", ids: Sequence[int]) -> float:
    """Sum of the losses of all ids but the first."""
    wanted, losses = np.asarray(ids[1:], np.int64), np.zeros(len(ids) - 1)
    done = 0

    def note(slot: int, tokens: Sequence[int], out: "StepOut") -> None:
        nonlocal done
        assert out.lse is not None and out.logits is not None  # prefill computes both for rows_out
        here = slice(done, done + len(tokens))
        losses[here] = out.lse.astype(np.float64) - out.logits[np.arange(len(tokens)), wanted[here]]
        done += len(tokens)

    cache = model.new_cache([len(wanted)])
    try:
        model.prefill([ids[:-1]], cache, rows_out=note)
    finally:
        cache.free([0])
    return float(losses.sum())
