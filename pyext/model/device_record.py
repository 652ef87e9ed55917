"""A step of the model recorded for a device: each line of the description becomes calls of our ops over fixed tensors of that device.

Activations are in the dtype of the model and logits in float32. A step computes `plan.rows` rows of each sequence, row i of sequence b at
b * plan.rows + i; those without a row of a tree are computed like the others, from token 0 at position 0, and nobody looks at them.
"""

from functools import partial

import torch
from torch import Tensor

from ramify.backends import invariant
from ramify.cache.device_arena import DeviceArena
from ramify.model.config import ModelConfig
from ramify.model.describe import Plan
from ramify.model.weights import DeviceLinear, Weights
from ramify.ops import _bound as bound
from ramify.ops._library import Bound


class DeviceRecorder:
    """`calls`, in order, over tensors of the device by their names. describe.Recorder says the rest."""

    def __init__(
        self, config: ModelConfig, weights: Weights, arena: DeviceArena, plan: Plan, inputs: dict[str, Tensor], results: dict[str, Tensor]
    ):
        self.config, self.weights, self.arena, self.plan = config, weights, arena, plan
        self.inputs, self.results = inputs, results
        self.rows, self.dtype = plan.rows * plan.sequences, weights.dtype
        c = config
        self.x = self._buffer("x", c.hidden_size)
        self.qkv = self._buffer("qkv", (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
        self.attention_out = self._buffer("attention", c.num_heads * c.head_dim)
        self.gate_up = self._buffer("gate_up", 2 * c.inner_size)
        self.q = self._buffer("q", c.num_heads * c.head_dim).view(self.rows, c.num_heads, c.head_dim)
        self.logits: Tensor | None = None
        self.calls: list[Bound] = []
        if plan.layers[0] > 0:
            self._copy(self.inputs["hidden"], self.x)

    def embed(self) -> None:
        """Tokens to hidden states."""
        self.calls.append(bound.embed(self.inputs["tokens"], self.weights.embed, self.x))

    def linear(
        self, x: Tensor, parts: tuple, out: Tensor, *, norm: Tensor | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> None:
        """A norm or a gate as a call of its own, then a product for each part. A residual is what out holds already."""
        if norm is not None:
            x = self._normed(x, norm)
        if gated:
            source, x = x, self._buffer("gated", x.shape[1] // 2)
            self.calls.append(bound.silu_mul(source, x))
        column = 0
        for part in parts:
            self._product(x, part, out[:, column : column + part.N], residual is not None)
            column += part.N

    def rope_append(self, i: int) -> None:
        """Queries into a buffer of their own, keys and values into the draft region."""
        layer, arena, named = self.weights.layers[i], self.arena, self.inputs
        rows = self.qkv, arena.cos, arena.sin, named["position"], named["slot"], self.q
        self.calls.append(bound.rope_append(*rows, arena.draft_k[i], arena.draft_v[i], layer.q_norm, layer.k_norm, self.config.norm_eps))

    def attention(self, i: int) -> None:
        """Every sequence of the step over its pages and its tree."""
        arena, named, shape = self.arena, self.inputs, (self.plan.sequences, self.plan.rows, *self.q.shape[1:])
        out, lse = self.attention_out.view(shape), self._buffer("attention_lse", shape[2], dtype=torch.float32).view(shape[:3])
        keys = arena.k[i], arena.v[i], *arena.tail(i, *shape[:2])
        trees = named["ancestors"], named["prefix"], named["page_table"]
        window = self.config.sliding_windows[i] or 0
        self.calls.append(bound.tree_attention(self.q.view(shape), *keys, *trees, window, named["tail_rows"], out, lse))

    def tap(self, i: int) -> None:
        """The hidden state among the results."""
        if i in self.plan.taps:
            self._copy(self.x, self.results[f"tap{i}"])

    def head(self) -> None:
        """Logits stay on the device; their statistics are results."""
        x = self._normed(self.x, self.weights.final_norm)
        self.logits = self._buffer("logits", self.config.vocab_size, dtype=torch.float32)
        [part] = self.weights.lm_head
        self._product(x, part, self.logits, False)
        got, named = self.results, self.inputs
        stats = got["argmax"], got["lse"], got["top"]
        largest = (got["topk_values"], got["topk_ids"]) if self.plan.topk else ()
        draws = (named["temperature"], named["seed"], named["index"], got["drawn"]) if self.plan.draws else ()
        self.calls += bound.decide_rows(self.logits, stats, largest, draws)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        out = self._buffer("normed", x.shape[1])
        self.calls.append(bound.rms_norm(x, weight, self.config.norm_eps, out))
        return out

    def _product(self, x: Tensor, part: DeviceLinear, out: Tensor, add: bool) -> None:
        if isinstance(part.weight, Tensor) and not invariant():
            self.calls.append(bound.product(x, part.weight, part.bias, out, add))
            return
        straight = out.dtype == x.dtype and not add  # a kernel writes no tensor that it reads, and rounds to x's dtype
        made = out if straight else self._buffer("product", part.N)
        self.calls.append(bound.linear(x, part.weight, part.bias, out if add else None, made))
        if not straight:
            self._copy(made, out)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        self.calls.append(Bound("copy", "torch", partial(target.copy_, source)))

    def _buffer(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.arena.workspace(name, self.rows, width, dtype=dtype or self.dtype)
