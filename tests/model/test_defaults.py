"""Whatever torch's default dtype and device are: kernels write through addresses, so a buffer of another kind would be overrun."""

from contextlib import contextmanager

import pytest
import torch

import ramify
from ramify import ops
from ramify.ops import quantize_weight
from ramify.testing.tensors import attention_case, sample_case
from ramify.testing.tiny_models import write_tiny_model


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def calls():
    """Every op, on inputs that are made under the usual defaults."""
    g = torch.Generator().manual_seed(1)
    x, w, norm = (torch.randn(*shape, generator=g) for shape in ((6, 64), (96, 64), (64,)))
    half, int8 = x.bfloat16(), quantize_weight(w, "int8")
    angles, at = torch.rand(10, 32, generator=g), torch.arange(6)
    case = attention_case([70, 3], 5, 2, 1, 64, dtype=torch.bfloat16)
    *sampled, q = sample_case(2, 6, 40, mode="iid")
    ones, spans = torch.ones(2, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int32)
    rows, strided = torch.randn(2, 3, 1, 4, generator=g), torch.empty(6, 65, dtype=torch.bfloat16)[:, 1:]
    return {
        "linear": lambda: (ops.linear(x, w), ops.linear(half, w.bfloat16(), norm.new_ones(96)), ops.linear(half, int8)),
        "rms_norm": lambda: (ops.rms_norm(half, norm), *ops.rms_norm(half, norm, residual=half), ops.rms_norm(half, norm, out=strided)),
        "silu_mul": lambda: (ops.silu_mul(half),),
        "rope": lambda: (ops.rope(half.view(6, 1, 64), angles, angles, at),),
        "embed": lambda: (ops.embed(at, w.bfloat16()),),
        "topk_logits": lambda: ops.topk_logits(half, 5),
        "row_stats": lambda: tuple(ops.row_stats(half)),
        "tree_attention": lambda: ops.tree_attention(*case.tensors, return_lse=True),
        "interval_attention": lambda: (ops.interval_attention(case.q, case.k, case.v, spans, spans + 3),),
        "attention_colsum": lambda: (
            ops.attention_colsum(case.q, case.k, torch.full((2, 5, 2), 3.0, dtype=torch.float32, device="cpu"), case.prefix_len),
        ),
        "verify_sample": lambda: ops.verify_sample(*sampled, q, mode="iid"),
        "residual_sample": lambda: (ops.residual_sample(q[0], q[1], torch.full((6,), 0.5, dtype=torch.float64, device="cpu")),),
        "kv_append": lambda: (ops.kv_append(rows, rows, *(c := (rows.repeat(1, 3, 1, 1), rows.repeat(1, 3, 1, 1))), ones), *c)[1:],
    }


@pytest.mark.parametrize("default", DEFAULTS)
def test_ops(calls, default):
    want = {name: [x.clone() for x in call()] for name, call in calls.items()}
    with DEFAULTS[default]():
        got = {name: [x.clone() for x in call()] for name, call in calls.items()}
    for name, results in want.items():
        for a, b in zip(results, got[name], strict=True):
            assert a.dtype == b.dtype and b.device.type == "cpu" and torch.equal(a, b), name


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("weights", [None, "int4-g32"])
def test_models(tmp_path, default, weights):
    """Loaded and run under the default, loaded under it and run without, and the other way round."""
    write_tiny_model(tmp_path, "qwen2")

    def load():
        return ramify.load(tmp_path, dtype="bf16", weights=weights)

    def text(model):
        return [out.token_ids for out in ramify.generate(model, [[1, 2, 3, 1, 2], [7]], method="token_recycling", max_new_tokens=12)]

    usual = load()
    want = text(usual)
    with DEFAULTS[default]():
        other = load()
        assert text(other) == want and text(usual) == want
    assert text(other) == want
