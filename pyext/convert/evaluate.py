"""Perplexity before and after a conversion: on which text, how much of it, and how far the reading is."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ramify.checks import show
from ramify.convert import calibrate
from ramify.convert.conversion import Progress
from ramify.model.checkpoint import Checkpoint
from ramify.model.model import Model
from ramify.model.perplexity import Perplexity, perplexity
from ramify.model.tokenizer import Tokenizer
from ramify.model.weights import Settings, Weights
from ramify.quant import Format
from ramify.zoo import corpus

CHARACTERS = 4500
"""That are read of each held-out module."""

TOKENS = 1300
"""That these are, about: 21,000 in all."""

WORK = 4e12
"""Weights times tokens that are read where nobody names a text: a minute or two on a few cores. A model of 200 million weights reads
all the held-out modules, one of 3 billion or more one of them."""

WINDOW = 1024
"""Tokens that are predicted from one another, in models that have so many positions."""


@dataclass(frozen=True)
class Judged:
    """Text that perplexity is measured on. windows: lists of ids, each read alone; size: bytes of the text."""

    name: str
    tokenizer: Tokenizer
    windows: list[list[int]]
    size: int

    def measure(self, checkpoint: Checkpoint, head: Format | None, progress: Progress, stage: str) -> Perplexity:
        """Of a checkpoint as the model layer runs it: low-bit layers on rounded activations, the rest in float32."""
        model, nats, tokens = None, 0.0, 0
        for ids in progress(self.windows, stage):
            if model is None:  # under the bar: a large model takes a while to load
                model = Model(checkpoint.config, Weights.load(checkpoint, Settings(torch.float32, head=head)), self.tokenizer)
            found = perplexity(model, ids, window=len(ids) - 1)
            nats, tokens = nats + found.nats_per_token * found.tokens, tokens + found.tokens
        mean = nats / tokens
        return Perplexity(mean, nats / math.log(2) / self.size if self.size else None, math.exp(min(mean, 700.0)), tokens)


def judged(evaluate: str | Path | bool | None, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Judged | str:
    """The text to measure on, or why nothing is measured. evaluate: a text, the Path of one, None for the zoo's held-out modules, False
    for nothing. ValueError where a text that was given cannot be read or has no token to predict.
    """
    if evaluate is False:
        return "it was not asked for"
    if tokenizer is None:
        if evaluate is not None:
            raise ValueError("convert: evaluate is given and IN has no tokenizer.json; takes one to read a text with. Leave it out.")
        return "the model has no tokenizer.json"
    if evaluate is None:
        texts, name = _held_out(checkpoint)
        if not texts:
            return "this Python has no sources of the standard library"
        if needed := _too_large(checkpoint):
            return needed
    elif isinstance(evaluate, (str, Path)):
        texts, name = [calibrate.read_text(evaluate) if isinstance(evaluate, Path) else evaluate], calibrate.named(evaluate)
    else:
        raise TypeError(f"convert: evaluate is {show(evaluate)}; takes a text, a Path, None or False.")
    found = [tokenizer.encode(text) for text in texts]
    vocabulary = checkpoint.config.vocab_size
    if (last := max((token for ids in found for token in ids), default=0)) >= vocabulary:
        says = f"its tokenizer.json has token {last}, and the model takes 0 to {vocabulary - 1}"
        if evaluate is None:
            return says
        raise ValueError(f"convert: evaluate is given to a model with another's tokenizer: {says}. Fetch tokenizer.json again.")
    window = min(WINDOW, checkpoint.config.max_positions - 1)
    windows = [ids[first : first + window + 1] for ids in found for first in range(0, len(ids) - 1, window)]
    if not windows:
        raise ValueError(f"convert: evaluate, {name}, has no token to predict; takes two tokens or more. Give a longer text.")
    return Judged(name, tokenizer, windows, sum(len(text.encode()) for text in texts))


def held_out() -> list[str]:
    """The beginning of each of the zoo's held-out modules that this Python has."""
    return [text[:CHARACTERS] for text in corpus.held_out_texts().values()]


def _held_out(checkpoint: Checkpoint) -> tuple[list[str], str]:
    """As many of the zoo's held-out modules as the model's size allows, and what they are called."""
    texts = held_out()
    if not texts:
        return [], ""
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    count = min(len(texts), max(1, int(WORK / weights / TOKENS)))
    name = "the zoo's held-out modules" if count == len(texts) else f"{count} of the zoo's {len(texts)} held-out modules"
    return texts[:count], name


def _too_large(checkpoint: Checkpoint) -> str:
    """Why a model is not measured unasked: with all its weights at once it does not fit. Empty where it does, or nobody knows."""
    names = [*checkpoint.names, *(["embed"] if "lm_head" not in checkpoint.names else [])]  # the head is packed apart
    needed = sum(math.prod(checkpoint.shape(name)) * (1 if name in checkpoint.low_bit_names else 4) for name in names)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return ""
    if needed <= free:
        return ""
    return f"the model takes {needed / 1e9:.1f} GB of memory as float32, and {free / 1e9:.1f} GB are free"
