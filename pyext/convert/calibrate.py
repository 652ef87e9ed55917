"""Calibration: text on its way through the layers, and what each linear layer sees of it.

Every layer is seen through the low-bit layers before it, so that later layers learn to live with what earlier ones did.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ramify.model.checkpoint import Checkpoint
from ramify.model.rope import rope_tables
from ramify.model.tokenizer import Tokenizer
from ramify.reference.model import attend, gated, rms_norm
from ramify.zoo import corpus

log = logging.getLogger("ramify")

STAGES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""The linear layers of a layer in order of use; those of one stage share their input, so their Hessian and their act-order."""

WINDOW = 512
"""Tokens of a calibration text that see each other."""

TOKENS = 16384
"""Of a calibration text that are read where nobody says how many."""

LONGEST = 64
"""Characters a token at most, on average: of a whole library no more is read than is needed."""

LEAST = 128
"""Tokens below which a calibration text is taken for a mistake. `warn_of_few` says where more than these are too few."""

ZOO_TEXT = "Python standard library sources"
"""What a zoo model is calibrated on where no text is given."""


def windows(tokenizer: Tokenizer | None, text: str | Path | None, is_zoo: bool, limit: int) -> list[list[int]]:
    """Calibration text as lists of at most WINDOW ids, `limit` ids in all.

    text: a text, the Path of one, or None: then a zoo model takes sources like those it was trained on, never the held-out ones.
    Raises ValueError where there is no text or no tokenizer for it, and for less than LEAST tokens.
    """
    if text is None and not is_zoo:
        raise ValueError(
            'convert: calibration is missing; method "gptq" takes a text like those the model will read. '
            "Give --calibration FILE, or take --method rtn, which needs none."
        )
    if tokenizer is None:
        raise ValueError('convert: the model has no tokenizer.json, so it can read no calibration text. Take method "rtn".')
    texts = corpus.training_texts() if text is None else [read_text(text) if isinstance(text, Path) else text]
    found: list[list[int]] = []
    for each in texts:
        left = limit - sum(map(len, found))
        if text is None:  # one window out of the middle of each source, for variety
            middle = max(0, len(each) // 2 - 4 * WINDOW)
            ids = tokenizer.encode(each[middle : middle + 8 * WINDOW])[: min(WINDOW, left)]
        else:
            ids = tokenizer.encode(each[: LONGEST * left])[:left]
        found += [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
        if left <= len(ids):
            break
    if (tokens := sum(map(len, found))) < LEAST:
        raise ValueError(f"convert: calibration has {tokens} tokens; takes {LEAST} or more, better some thousand. Give a longer text.")
    return found


def warn_of_few(checkpoint: Checkpoint, tokens: int, limit: int) -> None:
    """One line where a layer has more inputs than the calibration has tokens, of which `limit` were asked for.

    So few leave directions of its inputs that X^T X has never seen. The zoo's target, 768 inputs wide, loses as much to int4-g64 from
    gptq with 256 tokens as from rtn, two thirds of it with 1,024 and half with 4,096; more change nothing.
    """
    name, widest = max(((name, checkpoint.shape(f"layers.0.{name}")[1]) for stage in STAGES for name in stage), key=lambda pair: pair[1])
    if tokens < widest:
        theirs = checkpoint.source_name(f"layers.0.{name}")
        more = "Raise calibration_tokens." if tokens == limit else "Give a longer text."
        log.warning(
            'convert: calibration has %d tokens; "gptq" takes %d or more here, one for each input of %s, to be better than "rtn". %s',
            *(tokens, widest, theirs, more),
        )


def read_text(file: Path) -> str:
    """A UTF-8 text file; ValueError that names it where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ValueError(f"convert: {file} cannot be read ({reason}); takes a UTF-8 text file.") from None


def named(text: str | Path) -> str:
    """What a text is called."""
    return text.name if isinstance(text, Path) else f"a text of {len(text):,} characters"


class Stream:
    """Hidden states of some texts between two layers, and the formulas of `reference.model` to move them on."""

    def __init__(self, checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> None:
        self.config = checkpoint.config
        embed = checkpoint.stored("embed")
        if (last := max(map(max, texts))) >= len(embed):
            raise ValueError(
                f"convert: calibration has token {last}, and the model takes 0 to {len(embed) - 1}: tokenizer.json is another model's. "
                "Fetch it again."
            )
        self.hidden = [embed[torch.tensor(ids, device="cpu")].float() for ids in texts]
        longest = max(map(len, texts))
        self._rope = rope_tables(self.config.rope, self.config.head_dim, longest)
        self._distance = torch.arange(longest, device="cpu")[:, None] - torch.arange(longest, device="cpu")

    def hessian(self, layer: int, stage: Sequence[str], w: Mapping[str, Tensor]) -> Tensor:
        """2 X^T X / tokens of the inputs X of one stage, f32 [K, K]. w: the layer's tensors by short name, low-bit ones where done."""
        total, tokens = torch.zeros(0, dtype=torch.float32, device="cpu"), 0
        for x in self._inputs(layer, stage, w):
            product = x.t() @ x
            total = product if tokens == 0 else total.add_(product)
            tokens += len(x)
        return total.mul_(2 / tokens)

    def advance(self, layer: int, stage: Sequence[str], w: Mapping[str, Tensor]) -> None:
        """Add the output of a stage that ends a block, ("o",) or ("down",), to the hidden states; other stages change nothing."""
        [*_, last] = stage
        if last not in ("o", "down"):
            return
        for i, x in enumerate(self._inputs(layer, stage, w)):
            self.hidden[i] = self.hidden[i] + functional.linear(x, w[last], w.get(f"{last}_bias"))

    def _inputs(self, layer: int, stage: Sequence[str], w: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The inputs [T, K] of a stage, text by text."""
        c = self.config
        window = c.sliding_windows[layer]
        for x in self.hidden:
            T = len(x)
            if stage[0] in ("gate", "down"):
                normed = rms_norm(x, w["mlp_norm"], c.norm_eps)
                yield normed if stage[0] == "gate" else gated(w, normed)
                continue
            normed = rms_norm(x, w["attn_norm"], c.norm_eps)
            if stage[0] == "q":
                yield normed
                continue
            distance = self._distance[:T, :T]
            visible = (distance >= 0) & (distance < (T if window is None else window))
            cos, sin = (table[:T] for table in self._rope)
            yield attend(w, c, normed, cos, sin, visible)
