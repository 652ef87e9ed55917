"""Ops: plain tensors in, plain tensors out. Each is also torch.ops.ramify.<name> and works under torch.compile.

They take the user's own tensors, whose outer strides are free (the last axis must be dense), accept `out=`, and run on the
kernel that `ramify.explain` names.
"""

from ramify.ops.attention import interval_attention, merge_states, tree_attention
from ramify.ops.colsum import attention_colsum
from ramify.ops.draft import table_draft, table_learn
from ramify.ops.glue import embed, rms_norm, rope, rope_append, silu_mul
from ramify.ops.kv import kv_append, kv_commit
from ramify.ops.linear import PackedWeight, linear
from ramify.ops.quantize import quantize_weight
from ramify.ops.sample import residual_sample, verify_sample
from ramify.ops.verify import RowStats, row_stats, topk_logits, verify_greedy

__all__ = [
    "PackedWeight",
    "RowStats",
    "attention_colsum",
    "embed",
    "interval_attention",
    "kv_append",
    "kv_commit",
    "linear",
    "merge_states",
    "quantize_weight",
    "residual_sample",
    "rms_norm",
    "rope",
    "rope_append",
    "row_stats",
    "silu_mul",
    "table_draft",
    "table_learn",
    "topk_logits",
    "tree_attention",
    "verify_greedy",
    "verify_sample",
]
