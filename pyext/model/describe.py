"""What a decoder computes, line by line, for a recorder that knows how its device computes each of them.

This is the only description of the model. A recorder turns every line into one call over fixed buffers, or into a few; what changes from
step to step (rows, tokens, positions, lengths, trees, page tables) those calls read from memory, so a step is recorded once and replayed.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ramify.model.weights import Weights


@dataclass(frozen=True)
class Plan:
    """What of the model a recorded step computes: `rows` packed rows on a CPU, rows of each sequence on another device.

    draws: whether it also draws a token at every row, which no step on a CPU does: there logits are at hand.
    """

    rows: int
    sequences: int
    layers: tuple[int, int]
    head: bool
    topk: int
    taps: tuple[int, ...]
    draws: bool = False


class Recorder(Protocol):
    """Buffers of a step, and what can be asked to be computed on them. T rows: the widest step of its plan.

    x [T, hidden]: the hidden state. qkv [T, (Hq + 2 Hkv) D], attention_out [T, Hq D], gate_up [T, 2 inner]: between two products.
    """

    weights: Weights
    plan: Plan
    x: torch.Tensor
    qkv: torch.Tensor
    attention_out: torch.Tensor
    gate_up: torch.Tensor

    def embed(self) -> None:
        """Rows of the embedding table into x."""

    def linear(
        self, x: torch.Tensor, parts: Any, out: torch.Tensor, *, norm: Any = None, gated: bool = False, residual: Any = None
    ) -> None:
        """Products of x, normed by `norm` or with silu(gate) * up taken first, side by side in out, and `residual` added."""

    def rope_append(self, i: int) -> None:
        """Norm and rotate queries and keys of qkv as layer i does; keys and values go to the draft region."""

    def attention(self, i: int) -> None:
        """Queries over the committed tokens of layer i and their own ancestors, into attention_out."""

    def tap(self, i: int) -> None:
        """Keep x as the hidden state after i layers, where the plan asks for it."""

    def head(self) -> None:
        """Logits of the normed x, and the statistics of their rows."""


def describe(record: Recorder) -> None:
    """Have the step of `record.plan` recorded. It ends with the last keys and values where nobody reads what follows, as in a prompt."""
    layers, (first, last) = record.weights.layers, record.plan.layers
    read = record.plan.head or last in record.plan.taps
    if first == 0:
        record.embed()
    for i in range(first, last):
        record.tap(i)
        layer = layers[i]
        record.linear(record.x, layer.qkv, record.qkv, norm=layer.attn_norm)
        record.rope_append(i)
        if i + 1 == last and not read:
            return
        record.attention(i)
        record.linear(record.attention_out, layer.o, record.x, residual=record.x)
        record.linear(record.x, layer.gate_up, record.gate_up, norm=layer.mlp_norm)
        record.linear(record.gate_up, layer.down, record.x, gated=True, residual=record.x)
    record.tap(last)
    if record.plan.head:
        record.head()
