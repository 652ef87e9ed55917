"""Every op as torch sees it: schema, fake, functionalisation, out form, torch.compile without a graph break."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ramify import backends, ops, reference
from ramify.quant import Format, QuantizedWeight
from ramify.testing.tensors import attention_case

I32 = torch.int32
case = attention_case([9, 4], 5, 4, 2, 64)
paged = attention_case([40, 17], 3, 2, 1, 64, page=16, tail_rows=[3, 1])
x, weight, table = torch.randn(3, 8), torch.randn(8), torch.randn(6, 4)
angles, at = torch.randn(10, 4), torch.arange(3)
rows, length = torch.randn(2, 3, 1, 4), torch.ones(2, dtype=I32)
tokens, parents = torch.tensor([[1, 2, 3]], dtype=I32), torch.tensor([[-1, 0, 0]], dtype=I32)
low_bit = QuantizedWeight(Format("int8"), torch.ones(5, 8, dtype=torch.int8), torch.ones(5, 1))
stats = torch.zeros(3, dtype=I32), torch.zeros(3), torch.zeros(3)


def caches():
    return torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 4)


# op.overload, arguments, out arguments: the ATen-level call
RAW = [
    ("tree_attention.default", (*case.tensors, None, 0.1, 0, 0, None), {}),
    ("tree_attention.default", (*paged.tensors, paged.page_table, 0.1, 7, 2, paged.tail_rows), {}),
    ("tree_attention.out", (*case.tensors, None, 0.1, 0, 0, None), {"out": torch.zeros(2, 5, 4, 64), "lse_out": torch.zeros(2, 5, 4)}),
    ("merge_states.default", (x, weight[:3], x, weight[3:6]), {}),
    ("merge_states.out", (x, weight[:3], x, weight[3:6]), {"out": torch.zeros(3, 8), "lse_out": torch.zeros(3)}),
    ("linear.default", (x, torch.randn(5, 8), torch.randn(5), "silu", torch.randn(3, 5)), {}),
    ("linear.out", (x, torch.randn(5, 8), None, None, None), {"out": torch.zeros(3, 5)}),
    ("linear.packed", (x, torch.randn(256), 5, None, "silu", torch.randn(3, 5)), {}),
    ("linear.packed_out", (x, torch.randn(256), 5, None, None, None), {"out": torch.zeros(3, 5)}),
    ("linear.low_bit", (x, low_bit.codes, low_bit.scale, None, None, None, "int8", torch.randn(5), "silu", None, "int8"), {}),
    ("linear.low_bit_out", (x, low_bit.codes, low_bit.scale, None, torch.arange(8).int(), None, "int8", None, None, None, "exact"),
     {"out": torch.zeros(3, 5)}),
    ("rms_norm.default", (x, weight, 1e-6), {}),
    ("rms_norm.out", (x, weight, 1e-6), {"out": torch.zeros(3, 8)}),
    ("rms_norm.residual", (x, weight, x + 1, 1e-6), {}),
    ("rms_norm.residual_out", (x, weight, x + 1, 1e-6), {"out": torch.zeros(3, 8), "residual_out": torch.zeros(3, 8)}),
    ("rope.default", (x.view(3, 1, 8), angles, angles, at), {}),
    ("rope.out", (x.view(3, 1, 8), angles, angles, at), {"out": torch.zeros(3, 1, 8)}),
    ("silu_mul.default", (x,), {}),
    ("silu_mul.out", (x,), {"out": torch.zeros(3, 4)}),
    ("embed.default", (at, table, torch.bfloat16), {}),
    ("embed.out", (at, table, torch.float32), {"out": torch.zeros(3, 4)}),
    ("row_stats.default", (x,), {}),
    ("row_stats.out", (x,), dict(zip(("argmax", "lse", "max"), stats))),
    ("topk_logits.default", (x, 2), {}),
    ("topk_logits.out", (x, 2), {"values": torch.zeros(3, 2), "ids": torch.zeros(3, 2, dtype=I32)}),
    ("verify_greedy.default", (tokens, parents, tokens + 1, length[:1] * 3), {}),
    ("verify_greedy.out", (tokens, parents, tokens + 1, length[:1] * 3),
     {"path": torch.zeros(1, 3, dtype=I32), "count": torch.zeros(1, dtype=I32), "bonus": torch.zeros(1, dtype=I32)}),
    ("kv_append.default", (rows, rows, *caches(), length, None, None), {}),
    ("kv_commit.default", (rows, rows, *caches(), torch.tensor([[0, 2], [1, 1]]), length, length, None), {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "outs"), RAW, ids=[f"{i}-{r[0]}" for i, r in enumerate(RAW)])
def test_opcheck(name, args, outs):
    packet, overload = name.split(".")
    torch.library.opcheck(getattr(getattr(torch.ops.ramify, packet), overload), args, outs)


@pytest.mark.parametrize(("name", "args", "outs"), [r for r in RAW if r[2]], ids=[r[0] for r in RAW if r[2]])
def test_out_form_is_the_functional_one(name, args, outs):
    """The same shapes, dtypes and bits, written where the caller says."""
    packet, into = name.split(".")
    packet = getattr(torch.ops.ramify, packet)
    got = getattr(packet, "default" if into == "out" else into.removesuffix("_out"))(*args)
    getattr(packet, into)(*args, **outs)
    for made, written in zip(got if isinstance(got, tuple) else (got,), outs.values()):
        assert made.dtype == written.dtype and torch.equal(made, written)


def test_every_op_is_here():
    """Public ops, the backend table, the reference, torch.ops and the list above name the same things."""
    public = {name for name in ops.__all__ if name.islower()}
    assert (
        public
        == set(backends.OPS)
        == set(backends.FLOORS)
        == {name.split(".")[0] for name, _, _ in RAW}
        == {name.split(".")[0] for name in CALLS}
    )
    assert all(hasattr(reference, name) and hasattr(torch.ops.ramify, name) for name in public)


def commit_both(path):
    k, v = caches()
    ops.kv_append(rows, rows, k, v, length)
    ops.kv_commit(rows, rows, k, v, path, length, length + 3)
    return k + 1, v


# One public call each, as a user writes it, with a torch op on either side so that there is a graph to break.
CALLS = {
    "tree_attention": lambda: ops.tree_attention(case.q * 2, *case.tensors[1:], window=5, sink=1, return_lse=True)[0] + 1,
    "merge_states": lambda: ops.merge_states(x * 2, weight[:3], x, weight[3:6])[0] + 1,
    "linear": lambda: ops.linear(x * 2, torch.ones(5, 8), activation="silu", out=torch.zeros(3, 5)) + 1,
    "linear.low_bit": lambda: ops.linear(x * 2, low_bit, activation="silu", activations="int8-group") + 1,
    "rms_norm": lambda: ops.rms_norm(x * 2, weight, x)[1] + 1,
    "rope": lambda: ops.rope(x.view(3, 1, 8) * 2, angles, angles, at) + 1,
    "silu_mul": lambda: ops.silu_mul(x * 2) + 1,
    "embed": lambda: ops.embed(at + 1, table, dtype=torch.bfloat16) + 1,
    "row_stats": lambda: ops.row_stats(x * 2).lse + 1,
    "topk_logits": lambda: ops.topk_logits(x * 2, 3)[1] + 1,
    "verify_greedy": lambda: ops.verify_greedy(tokens, parents, tokens + 1, length[:1] * 3)[0] + 1,
    "kv_append": lambda: commit_both(torch.tensor([[0, 2], [1, 1]]))[0],
    "kv_commit": lambda: commit_both(torch.tensor([[2, 2], [1, 1]]))[0],
}


def test_compiles_whole():
    """Each call is one graph, and the graph computes what the call does."""
    for name, call in CALLS.items():
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(), call()), name


@pytest.mark.slow
def test_compiles_with_inductor():
    """The same through the default compiler, all ops in one graph."""
    torch._dynamo.reset()
    everything = lambda: [call() for call in CALLS.values()]  # noqa: E731
    for name, got, want in zip(CALLS, torch.compile(everything, fullgraph=True)(), everything()):
        assert torch.allclose(got.float(), want.float(), rtol=1e-5, atol=1e-6), name  # inductor fuses its own part of the sums


def test_one_graph_for_all_lengths():
    """Dynamic sizes: another number of rows or of slots compiles nothing anew after the second."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda *tensors: ops.tree_attention(*tensors), fullgraph=True, dynamic=True, backend=counter)
    for T, n in ((5, 9), (6, 11), (9, 30), (17, 64)):
        inputs = attention_case([n, 3], T, 4, 2, 64).tensors
        assert torch.equal(compiled(*inputs), ops.tree_attention(*inputs))
    assert counter.frame_count <= 2


def test_fake_on_a_device_that_is_not_here():
    """Shapes, dtypes and devices of a CUDA call, worked out on a machine without one."""
    with FakeTensorMode():

        def cuda(*shape, dtype=torch.bfloat16):
            return torch.empty(*shape, device="cuda", dtype=dtype)

        q, kv, tail = cuda(2, 5, 4, 64), cuda(2, 9, 2, 64), cuda(2, 5, 2, 64)
        o, lse = ops.tree_attention(q, kv, kv, tail, tail, cuda(2, 5, 1, dtype=torch.int64), cuda(2, dtype=I32), return_lse=True)
        assert (o.shape, o.dtype, o.device.type) == (q.shape, q.dtype, "cuda")
        assert (lse.shape, lse.dtype, lse.device.type) == ((2, 5, 4), torch.float32, "cuda")
        assert ops.row_stats(cuda(3, 9)).argmax.dtype == I32
        assert ops.linear(q, cuda(7, 64)).shape == (2, 5, 4, 7)


def test_out_is_what_comes_back():
    out = torch.empty(3, 8), torch.empty(3, 8)
    got = ops.rms_norm(x, weight, x, out=out)
    assert got[0] is out[0] and got[1] is out[1] and torch.equal(out[1], x + x)
    o = torch.empty(3, 4)
    assert ops.silu_mul(x, out=o) is o and torch.equal(o, ops.silu_mul(x))
    o = torch.empty_like(case.q)
    assert ops.tree_attention(*case.tensors, out=o) is o and torch.equal(o, ops.tree_attention(*case.tensors))


def test_no_rows():
    assert ops.linear(x[:0], torch.ones(5, 8)).shape == (0, 5) and ops.row_stats(x[:0]).lse.shape == (0,)
    none = [t[:, :0] if t.ndim > 1 else t for t in case.tensors[:1] + case.tensors[3:6]]
    assert ops.tree_attention(none[0], case.k, case.v, *none[1:], case.prefix_len).shape == (2, 0, 4, 64)
