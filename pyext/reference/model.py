"""A whole decoder in plain torch and float32: the oracle of the model layer. Written to be read, not to be fast.

The formulas are those of the Llama, Mistral, Qwen2 and Qwen3 papers; which of them a model uses, its ModelConfig says.
Rows may be any subset of a text or of a token tree: every row has its own position, and `mask` says who sees whom.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ramify.model.config import ModelConfig
from ramify.model.rope import rope_tables


@dataclass
class ModelRows:
    """`logits` f32 [T, V]; `taps[i]` f32 [T, hidden]: the hidden state after i layers, before the norm that follows."""

    logits: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def forward(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    tokens: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor | None = None,
    mask: Tensor | None = None,
    taps: Sequence[int] = (),
) -> ModelRows:
    """Logits of T rows of one sequence, each computed from nothing: there is no cache.

    weights: canonical tensors of `ramify.model.checkpoint`, any float dtype. positions [T]: default 0 .. T-1.
    mask bool [T, T]: row i sees row j, self bits included; default causal.
    A layer with a sliding window w also hides keys whose position is w or more behind the row's.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.int64)
    rows = len(tokens)
    positions = torch.arange(rows) if positions is None else torch.as_tensor(positions, dtype=torch.int64)
    mask = torch.ones(rows, rows, dtype=torch.bool).tril() if mask is None else mask
    distance = positions[:, None] - positions[None, :]
    cos, sin = (table[positions] for table in rope_tables(config.rope, config.head_dim, int(positions.max()) + 1))
    x = weights["embed"].float()[tokens]
    out = ModelRows(logits=x)
    for i in range(config.num_layers):
        if i in taps:
            out.taps[i] = x
        w = {name.removeprefix(f"layers.{i}."): t.float() for name, t in weights.items() if name.startswith(f"layers.{i}.")}
        window = config.sliding_windows[i]
        visible = mask if window is None else mask & (distance < window)
        x = x + F.linear(attend(w, config, rms_norm(x, w["attn_norm"], config.norm_eps), cos, sin, visible), w["o"], w.get("o_bias"))
        x = x + F.linear(gated(w, rms_norm(x, w["mlp_norm"], config.norm_eps)), w["down"], w.get("down_bias"))
    if config.num_layers in taps:
        out.taps[config.num_layers] = x
    head = weights["embed" if config.tied_embeddings else "lm_head"].float()
    out.logits = rms_norm(x, weights["final_norm"].float(), config.norm_eps) @ head.T
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scales x to a root mean square of 1 over the last axis, times weight (Zhang and Sennrich 2019)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [T, H, D] by tables [T, D/2]: feature d is paired with d + D/2 (Su et al. 2021, Hugging Face's order)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(w: Mapping[str, Tensor], c: ModelConfig, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
    """Attention of one layer on its normed input x [T, hidden]: what o_proj takes, [T, Hq * D]. w: the layer's tensors by short name."""
    q = F.linear(x, w["q"], w.get("q_bias")).view(len(x), c.num_heads, c.head_dim)
    k = F.linear(x, w["k"], w.get("k_bias")).view(len(x), c.num_kv_heads, c.head_dim)
    v = F.linear(x, w["v"], w.get("v_bias")).view(len(x), c.num_kv_heads, c.head_dim)
    if c.qk_norm:
        q, k = rms_norm(q, w["q_norm"], c.norm_eps), rms_norm(k, w["k_norm"], c.norm_eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    group = c.num_heads // c.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * c.head_dim**-0.5
    share = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", share, v).reshape(len(x), c.num_heads * c.head_dim)


def gated(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """SiLU(gate) * up of one layer on its normed input x [T, hidden]: what down_proj takes, [T, inner] (Shazeer 2020, SwiGLU)."""
    gate = F.linear(x, w["gate"], w.get("gate_bias"))
    up = F.linear(x, w["up"], w.get("up_bias"))
    return F.silu(gate) * up
