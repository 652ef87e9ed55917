"""Every op as torch sees it: schema, fake, functionalisation, out form, torch.compile without a graph break."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ramify import backends, floors, ops, reference
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
weights = torch.full((2, 5, 4), 3.0)
start, end = torch.zeros(2, 5, dtype=I32), torch.full((2, 5), 4, dtype=I32)
intervals = case.q, case.k[:, :4], case.v[:, :4], start, end
verdict = torch.zeros(1, 3, dtype=I32), torch.zeros(1, dtype=I32), torch.zeros(1, dtype=I32)
q = torch.rand(1, 3, 8)
sampled = x[None], tokens, parents, length[:1] * 3, torch.ones(1), torch.ones(1, dtype=torch.int64), length[:1]


successors = torch.arange(18, dtype=I32).view(6, 3) % 6
qkv, slots = torch.randn(3, 16), torch.tensor([5, 0, 2], dtype=I32)


def heads():
    return torch.zeros(6, 1, 4), torch.zeros(6, 1, 4)


def caches():
    return torch.zeros(2, 8, 1, 4), torch.zeros(2, 8, 1, 4)


# op.overload, arguments, out arguments: the ATen-level call
RAW = [
    ("tree_attention.default", (*case.tensors, None, 0.1, 0, 0, None), {}),
    ("tree_attention.default", (*paged.tensors, paged.page_table, 0.1, 7, 2, paged.tail_rows), {}),
    ("tree_attention.out", (*case.tensors, None, 0.1, 0, 0, None), {"out": torch.zeros(2, 5, 4, 64), "lse_out": torch.zeros(2, 5, 4)}),
    ("interval_attention.default", (*intervals, 0.1), {}),
    ("interval_attention.out", (*intervals, 0.1), {"out": torch.zeros(2, 5, 4, 64), "lse_out": torch.zeros(2, 5, 4)}),
    ("attention_colsum.default", (case.q, case.k, weights, case.prefix_len, case.ancestors, None, 0.1, 5, 2, None), {}),
    ("attention_colsum.default", (paged.q, paged.k, weights[:, :3, :2], paged.prefix_len, None, paged.page_table, 0.1, 0, 0,
                                  paged.tail_rows), {}),
    ("attention_colsum.out", (case.q, case.k, weights, case.prefix_len, None, None, 0.1, 0, 0, None), {"out": torch.zeros(2, 2, 14)}),
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
    ("rope_append.default", (qkv, angles[:, :2], angles[:, :2], at, slots, *heads(), weight[:4], weight[4:], 1e-6), {}),
    ("rope_append.default", (qkv, angles[:, :1], angles[:, :1], at, slots - 1, *heads(), None, None, 1e-6), {}),
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
    ("verify_sample.default", (*sampled, q, "wor"), {}),
    ("verify_sample.out", (*sampled, None, "det"), dict(zip(("path", "count", "bonus"), verdict))),
    ("residual_sample.default", (q[0], q[0].flip(0), torch.rand(3).double()), {}),
    ("residual_sample.out", (q[0], q[0].flip(0), torch.rand(3).double()), {"ids": torch.zeros(3, dtype=I32)}),
    ("table_draft.default", (successors, at, parents[0], tokens[0] - 2), {}),
    ("table_draft.out", (successors, at, parents[0], tokens[0] - 2), {"tokens": torch.zeros(3, 3, dtype=I32)}),
    ("table_learn.default", (successors.clone(), tokens[0], successors[:3]), {}),
    ("kv_append.default", (rows, rows, *caches(), length, None, None), {}),
    ("kv_commit.default", (rows, rows, *caches(), torch.tensor([[0, 2], [1, 1]]), length, length, None), {}),
]  # fmt: skip


def packet(name):
    """The overload "op.overload" of torch.ops.ramify."""
    op, overload = name.split(".")
    return getattr(getattr(torch.ops.ramify, op), overload)


@pytest.mark.parametrize(("name", "args", "outs"), RAW, ids=[f"{i}-{r[0]}" for i, r in enumerate(RAW)])
def test_opcheck(name, args, outs):
    torch.library.opcheck(packet(name), args, outs)


@pytest.mark.parametrize(("name", "args", "outs"), [r for r in RAW if r[2]], ids=[r[0] for r in RAW if r[2]])
def test_out_form_is_the_functional_one(name, args, outs):
    """The same shapes, dtypes and bits, written where the caller says."""
    op, into = name.split(".")
    got = packet(f"{op}.{'default' if into == 'out' else into.removesuffix('_out')}")(*args)
    packet(name)(*args, **outs)
    for made, written in zip(got if isinstance(got, tuple) else (got,), outs.values()):
        assert made.dtype == written.dtype and torch.equal(made, written)


def outcome(call):
    """Shapes and dtypes of what came back, or what was said; an op says it in one line that begins with its name."""
    try:
        got = call()
    except (ValueError, TypeError) as error:
        assert "\n" not in str(error) and str(error).partition(":")[0] in backends.OPS, error
        return type(error).__name__, str(error)
    got = got if isinstance(got, tuple) else () if got is None else (got,)
    return [(tuple(x.shape), x.dtype) for x in got]


def changed(x, how, axis):
    """A tensor that an op may not be ready for."""
    axis = axis % x.ndim if x.ndim else 0
    if how == "half" and x.ndim:
        return x.narrow(axis, 0, x.shape[axis] // 2)
    if how == "twice" and x.ndim:
        return torch.cat([x, x], axis)
    if how == "none" and x.ndim:
        return x.narrow(axis, 0, 0)
    if how == "strided":
        return torch.stack([x, x], -1)[..., 0]
    if how == "expanded":
        return x.flatten()[:1].reshape([1] * x.ndim).expand(x.shape)
    casts = {"wider": x[None], "flat": x.flatten(), "float": x.float(), "double": x.double(), "short": x.to(torch.int16), "long": x.long()}
    return casts.get(how, x)


HOW = ["half", "twice", "none", "strided", "expanded", "wider", "flat", "float", "double", "short", "long"]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(raw=st.sampled_from(RAW), place=st.integers(0, 99), how=st.sampled_from(HOW), axis=st.integers(0, 3))
def test_no_way_in_is_unchecked(raw, place, how, axis):
    """One argument of a torch op changed: it is refused in one line or runs, and its fake says the same; nothing reads a wrong address."""
    name, args, outs = raw
    op, values = packet(name), [*args, *outs.values()]
    tensors = [i for i, x in enumerate(values) if isinstance(x, torch.Tensor)]
    i = tensors[place % len(tensors)]
    values = [x.clone() if isinstance(x, torch.Tensor) else x for x in values]
    values[i] = changed(values[i], how, axis)
    inputs, named = values[: len(args)], dict(zip(outs, values[len(args) :]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in values]
        fake = outcome(lambda: op(*faked[: len(args)], **dict(zip(outs, faked[len(args) :]))))
    real = outcome(lambda: op(*inputs, **named))
    value_level = isinstance(real, tuple) and real[0] == "ValueError" and isinstance(fake, list)  # a fake has no values and no addresses
    assert real == fake or value_level


def test_torch_ops_are_checked_as_the_public_ones_are():
    """What the public function refuses, torch.ops refuses with the same words."""
    raw = torch.ops.ramify
    bad = [
        (raw.rms_norm, (x, weight[:4], 1e-6), "rms_norm: weight is [4]; takes [H] with H = 8, as in x."),
        (raw.rms_norm, (x, weight, -1.0), "rms_norm: eps is -1.0; takes a finite number of 0 or more."),
        (raw.rms_norm.out, (x, weight, 1e-6, torch.zeros(2, 8)), "rms_norm: out is [2, 8]; takes [3, 8], the shape of the result."),
        (raw.topk_logits, (x, 9), "topk_logits: k is 9; takes 1 to 8, the columns of logits."),
        (raw.linear, (x, torch.zeros(5, 9), None, None, None), "linear: weight is [5, 9]; takes [N, K] with K = 8, as in x."),
        (raw.linear, (x, torch.zeros(5, 8), None, "gelu", None), 'linear: activation is "gelu"; takes None or "silu".'),
        (raw.silu_mul, (x[:, :7].contiguous(),), "silu_mul: x is [3, 7]; takes an even last axis, gate and up side by side. "
         "Use torch.cat([gate, up], -1)."),
        (raw.row_stats, (x[:, :0],), "row_stats: logits is [3, 0]; takes [R, V] with V of 1 or more."),
        (raw.kv_append, (rows, rows, *caches(), length[:1], None, None), "kv_append: length is [1]; takes [B] with B = 2, as in k."),
        (raw.tree_attention, (*case.tensors, None, 0.1, -1, 0, None), "tree_attention: window is -1; takes 0 or more."),
        (raw.tree_attention, (case.q[:, :, :, :32].contiguous(), *case.tensors[1:], None, 0.1, 0, 0, None),
         "tree_attention: tail_k is [2, 5, 2, 64]; takes [B, T, Hkv, D] with D = 32, as in q."),
    ]  # fmt: skip
    for op, args, said in bad:
        args, outs = (args[:3], {"out": args[3]}) if op is raw.rms_norm.out else (args, {})
        with pytest.raises(ValueError) as error:
            op(*args, **outs)
        assert str(error.value) == said


def test_empty_axes_are_refused():
    """An axis that is divided by or summed over has an entry at least; rows and sequences may be none."""
    page = torch.zeros(2, 0, 1, 4), torch.zeros(2, 0, 1, 4)
    bad = [
        (lambda: ops.kv_append(rows, rows, *page, length, page_table=torch.zeros(2, 4, dtype=I32)), "page of 1 or more"),
        (lambda: ops.tree_attention(*[t[..., :0] if t.is_floating_point() else t for t in case.tensors]), "D of 1 or more"),
        (lambda: ops.tree_attention(*[t[:, :, :0] if t.ndim == 4 else t for t in case.tensors]), "Hkv of 1 or more"),
        (lambda: ops.merge_states(x[:, :0], weight[:3], x[:, :0], weight[:3]), "D of 1 or more"),
        (lambda: ops.linear(x[:, :0], torch.zeros(5, 0)), "K of 1 or more"),
    ]
    for call, said in bad:
        with pytest.raises(ValueError, match=said):
            call()


def test_kinds_are_refused_in_one_line():
    z, sparse = torch.zeros(3, 8), torch.zeros(3, 8).to_sparse()
    bad = [
        (TypeError, lambda: ops.rms_norm(x, "weight"), 'rms_norm: weight is "weight"; takes a tensor.'),
        (TypeError, lambda: ops.rms_norm(x, weight, eps="a"), 'rms_norm: eps is "a"; takes a number.'),
        (ValueError, lambda: ops.rms_norm(x, weight, eps=-1), "rms_norm: eps is -1.0; takes a finite number of 0 or more."),
        (ValueError, lambda: ops.rms_norm(x, weight, eps=float("nan")), "rms_norm: eps is nan; takes a finite number of 0 or more."),
        (ValueError, lambda: ops.rms_norm(x, weight, eps=10**400), f"rms_norm: eps is 1{'0' * 56}...; takes a finite number."),
        (TypeError, lambda: ops.rms_norm(sparse, weight), "rms_norm: x is a sparse_coo tensor; takes a strided one. Use x.to_dense()."),
        (TypeError, lambda: ops.rms_norm(x, weight, out=[z]), "rms_norm: out is list; takes a tensor."),
        (TypeError, lambda: ops.rms_norm(x, weight, x, out=(z, 5)),
         "rms_norm: out is tuple of 2; takes a tuple of 2 tensors, in the order they are returned."),
        (TypeError, lambda: ops.embed(at, table, dtype=torch.int32),
         "embed: dtype is int32; takes float32 or bfloat16 or float16 or float64."),
        (TypeError, lambda: ops.embed(at, table, dtype="float32"), 'embed: dtype is "float32"; takes a torch.dtype.'),
        (TypeError, lambda: ops.embed(at, [1.0]), "embed: table is [1.0]; takes a tensor."),
        (TypeError, lambda: ops.linear(x, x, activation=5), "linear: activation is 5; takes None or a name."),
        (ValueError, lambda: ops.topk_logits(x, 2**70), f"topk_logits: k is {2**70}; takes at most {2**63 - 1}."),
        (ValueError, lambda: ops.tree_attention(*case.tensors, window=2**70),
         f"tree_attention: window is {2**70}; takes at most {2**63 - 1}."),
        (TypeError, lambda: ops.tree_attention("q", *case.tensors[1:]), 'tree_attention: q is "q"; takes a tensor.'),
        (TypeError, lambda: ops.kv_append(rows, None, *caches(), length), "kv_append: v is None; takes a tensor."),
    ]  # fmt: skip
    for kind, call, said in bad:
        with pytest.raises(kind) as error:
            call()
        assert str(error.value) == said
    far = ops.tree_attention(*case.tensors, window=2**63 - 1, sink=2**63 - 1)
    assert torch.equal(far, ops.tree_attention(*case.tensors))


def test_outputs_that_share_memory():
    """Outputs lie apart from each other; one that is an input, or a part of it, gets what a new one would have got."""
    z, pair = torch.zeros(3, 8), torch.zeros(3, 16)
    wanted = ops.rms_norm(x, weight, x)
    for out, said in (
        ((z, z), r"out\[1\] shares memory with out\[0\]"),
        ((pair[:, :8], pair[:, 4:12]), r"out\[1\] shares memory with out\[0\]"),
        ((z[:1].expand(3, 8), z), r"out\[0\] is \[3, 8\] with strides \[0, 1\]; takes elements at addresses of their own"),
    ):
        with pytest.raises(ValueError, match=said):
            ops.rms_norm(x, weight, x, out=out)
    ops.rms_norm(x, weight, x, out=(pair[:, :8], pair[:, 8:]))  # interleaved rows, and no byte in common
    assert torch.equal(pair, torch.cat(wanted, -1))
    square = torch.randn(8, 8)
    calls = [
        (x, lambda buffer, out: ops.rms_norm(buffer, weight, out=out)),
        (x, lambda buffer, out: ops.linear(buffer, square, residual=x, out=out)),
        (x.view(3, 1, 8), lambda buffer, out: ops.rope(buffer, angles, angles, at, out=out)),
    ]
    for data, call in calls:
        for shift in (0, 1, 5, 8, 16):
            buffer = torch.zeros(64)
            view, out = buffer[:24].view(data.shape), buffer[shift : shift + 24].view(data.shape)
            view.copy_(data)
            call(view, out)
            assert torch.equal(out, call(data, None)), shift
    q, tail = case.q.clone(), case.tail_v[:, :, [0, 0, 1, 1]].clone()
    wanted = ops.tree_attention(*case.tensors)
    assert torch.equal(ops.tree_attention(q, *case.tensors[1:], out=q), wanted)
    every = [case.k, case.v, case.tail_k]
    full = [t[:, :, [0, 0, 1, 1]] for t in every]
    assert torch.equal(ops.tree_attention(case.q, *full, tail, *case.tensors[5:], out=tail), wanted)


def test_caches_that_share_memory():
    k, v = caches()
    for pair, said in (
        ((k, k), "v_cache shares memory with k_cache"),
        ((k[:1].expand(2, 8, 1, 4), v), "k_cache is .* takes elements at addresses of their own"),
    ):
        with pytest.raises(ValueError, match=f"kv_append: {said}"):
            ops.kv_append(rows, rows, *pair, length)
    both = torch.randn(2, 8, 2, 1, 4)  # keys and values side by side, the rows to commit in the cache itself
    k, v = both[:, :, 0], both[:, :, 1]
    want_k, want_v = k[:, [3, 5]].clone(), v[:, [3, 5]].clone()
    ops.kv_commit(k[:, 3:6], v[:, 3:6], k, v, torch.tensor([[0, 2], [0, 2]]), length * 2, length)
    assert torch.equal(k[:, 1:3], want_k) and torch.equal(v[:, 1:3], want_v)
    one = torch.zeros(2, 1, dtype=I32)
    with pytest.raises(ValueError, match=r"kv_append: page_table\[1\] writes page 0, as another entry does; takes pages of its own"):
        ops.kv_append(rows, rows, *caches(), length, page_table=one)


def test_every_op_is_here():
    """Public ops, the backend table, the reference, torch.ops and the list above name the same things."""
    public = {name for name in ops.__all__ if name.islower()} - {"quantize_weight"}  # makes an object, so torch cannot hold it
    assert (
        public
        == set(backends.OPS)
        == set(floors.FLOORS)
        == {name.split(".")[0] for name, _, _ in RAW}
        == {name.split(".")[0] for name in CALLS}
    )
    assert all(hasattr(reference, name) and hasattr(torch.ops.ramify, name) for name in public)


def commit_both(path):
    k, v = caches()
    ops.kv_append(rows, rows, k, v, length)
    ops.kv_commit(rows, rows, k, v, path, length, length + 3)
    return k + 1, v


def taught(table):
    ops.table_learn(table, tokens[0], table[3:] + 1)
    return table


def turned(rows):
    k, v = heads()
    q = ops.rope_append(rows, angles[:, :2], angles[:, :2], at, slots - 1, k, v, k_norm=weight[:4])
    return torch.cat([q[:, :1], k[slots.long()], v[slots.long() - 1]]) + 1


# One public call each, as a user writes it, with a torch op on either side so that there is a graph to break.
CALLS = {
    "tree_attention": lambda: ops.tree_attention(case.q * 2, *case.tensors[1:], window=5, sink=1, return_lse=True)[0] + 1,
    "interval_attention": lambda: ops.interval_attention(case.q * 2, *intervals[1:]) + 1,
    "attention_colsum": lambda: ops.attention_colsum(case.q * 2, case.k, weights, case.prefix_len, window=5, sink=1) + 1,
    "merge_states": lambda: ops.merge_states(x * 2, weight[:3], x, weight[3:6])[0] + 1,
    "linear": lambda: ops.linear(x * 2, torch.ones(5, 8), activation="silu", out=torch.zeros(3, 5)) + 1,
    "linear.low_bit": lambda: ops.linear(x * 2, low_bit, activation="silu", activations="int8-group") + 1,
    "rms_norm": lambda: ops.rms_norm(x * 2, weight, x)[1] + 1,
    "rope": lambda: ops.rope(x.view(3, 1, 8) * 2, angles, angles, at) + 1,
    "rope_append": lambda: turned(qkv * 2),
    "silu_mul": lambda: ops.silu_mul(x * 2) + 1,
    "embed": lambda: ops.embed(at + 1, table, dtype=torch.bfloat16) + 1,
    "row_stats": lambda: ops.row_stats(x * 2).lse + 1,
    "topk_logits": lambda: ops.topk_logits(x * 2, 3)[1] + 1,
    "verify_greedy": lambda: ops.verify_greedy(tokens, parents, tokens + 1, length[:1] * 3)[0] + 1,
    "verify_sample": lambda: ops.verify_sample(sampled[0] * 2, *sampled[1:], q, mode="iid")[0] + 1,
    "residual_sample": lambda: ops.residual_sample(q[0] * 2, q[0], torch.full((3,), 0.5, dtype=torch.float64)) + 1,
    "table_draft": lambda: ops.table_draft(successors * 1, at, parents[0], tokens[0] - 2) + 1,
    "table_learn": lambda: taught(successors * 1) + 1,
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
