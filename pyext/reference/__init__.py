"""The meaning of every op in plain torch: the oracle of every test, and the backend of last resort.

Written to be read. Any float dtype, float64 included: a test compares a kernel with these functions in double.
"""

from ramify.reference.attention import attention_colsum, interval_attention, merge_states, tree_attention
from ramify.reference.draft import table_draft, table_learn
from ramify.reference.glue import embed, rms_norm, rope, rope_append, silu_mul
from ramify.reference.kv import kv_append, kv_commit
from ramify.reference.linear import linear, quantize_rows
from ramify.reference.verify import residual_sample, row_stats, topk_logits, verify_greedy, verify_sample

__all__ = [
    "attention_colsum",
    "embed",
    "interval_attention",
    "kv_append",
    "kv_commit",
    "linear",
    "merge_states",
    "quantize_rows",
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
