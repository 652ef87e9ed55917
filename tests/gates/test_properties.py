"""Any shape, dtype, stride and tree that a backend takes, against the reference in double: one table of strategies, each on every backend.

What is drawn comes from the table of backends, so a dtype or head size that is added there is drawn here. The backends are the CPU's
kernels at each level, Triton in the interpreter (a process of its own: test_triton_values.py) or on a GPU, and CUDA under the emulator
or on a GPU. A function of the table returns a call and what it must give: results, each with a limit, exact where that is 0. Ops that
decide, keep and multiply are in test_properties_more.py.
"""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ramify import backends, ops, reference
from ramify.testing import emulator
from ramify.testing.tensors import TREES, attention_case, intervals, padded, poisoned, running, runs, unseen_slots

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
STEP = {F32: 2.0**-23, BF16: 2.0**-8, F16: 2.0**-11}  # half a last place of 16 bits; of float32 a whole one
EXAMPLES = {"cpu": 30, "triton": 5, "cuda": 12}


class Draw:
    """Random choices of one example, and tensors made from them."""

    def __init__(self, data, row):
        self.data, self.row = data, row
        self.dtype = self.of(row.dtypes)
        self.g = torch.Generator().manual_seed(self.whole(0, 999))

    def of(self, values):
        return self.data.draw(st.sampled_from(list(values)))

    def whole(self, low, high):
        return self.data.draw(st.integers(low, high))

    def flag(self):
        return self.data.draw(st.booleans())

    def limit(self, name, otherwise):
        """A value that the row of the table takes for this size."""
        return self.of(self.row.limits.get(name, otherwise))

    def shape(self, most=4):
        return self.data.draw(st.lists(st.integers(0, most), max_size=3))

    def strided(self, x):
        """The same values, as they are or with gaps of NaN after every axis but the last."""
        return padded(x, self.of([1, 3, 8])) if self.flag() else x

    def normal(self, *shape, dtype=None, size=1.0):
        return self.strided((size * torch.randn(shape, generator=self.g)).to(dtype or self.dtype))

    def index(self, high, *shape):
        return torch.randint(0, high, shape, generator=self.g).to(self.of([I32, torch.int64]))

    def out(self, *shape, dtype=None):
        return self.strided(poisoned(shape, dtype or self.dtype))


def rounded(want, dtype, terms=None, times=4):
    """Limits: some last places of float32 at the size of the terms, and one rounding to the result's dtype."""
    return times * STEP[F32] * (want.abs() if terms is None else terms) + 1e-6 + (STEP[dtype] * want.abs() if dtype != F32 else 0)


def rms_norm(draw):
    shape = (*draw.shape(), draw.whole(1, 300))
    x, residual = draw.normal(*shape), draw.normal(*shape)
    weight, eps = draw.normal(shape[-1], dtype=draw.limit("weight", [draw.dtype])), draw.of([0.0, 1e-6, 0.3])
    if draw.flag():
        want = reference.rms_norm(x.double(), weight.double(), eps=eps)
        return (lambda: [ops.rms_norm(x, weight, eps=eps, out=draw.out(*shape))]), [(want, rounded(want, draw.dtype, times=16))]
    both = x + residual  # one addition, one rounding
    want = reference.rms_norm(both.double(), weight.double(), eps=eps)
    return (lambda: ops.rms_norm(x, weight, residual, eps=eps, out=(draw.out(*shape), draw.out(*shape)))), [
        (want, rounded(want, draw.dtype, times=16)),
        (both.double(), 0),
    ]


def angles(draw, half):
    angle = torch.rand(40, half, generator=draw.g) * 6
    return draw.strided(angle.cos()), draw.strided(angle.sin())


def rope(draw):
    lead, H, half = draw.shape(), draw.whole(1, 4), draw.whole(1, 40)
    rest = 0 if "rotary" in draw.row.limits else draw.whole(0, 9)  # features that are not rotated
    x, (cos, sin) = draw.normal(*lead, H, 2 * half + rest), angles(draw, half)
    positions = draw.index(40, *lead)
    want = reference.rope(x.double(), cos.double(), sin.double(), positions)
    return (lambda: [ops.rope(x, cos, sin, positions, out=draw.out(*x.shape))]), [
        (want, rounded(want, draw.dtype, torch.full_like(want, 2 * float(x.abs().max()) if x.numel() else 0)))
    ]


def rope_append(draw):
    M, Hq, Hkv, half, S = draw.whole(0, 9), draw.whole(1, 5), draw.whole(1, 3), draw.whole(1, 40), 12
    D, cache = 2 * half + (0 if "rotary" in draw.row.limits else 2 * draw.whole(0, 3)), draw.limit("cache", [draw.dtype])
    slots = draw.strided(torch.randperm(S, generator=draw.g)[:M].int())
    slots[draw.whole(1, 4) :: 3] = -1
    weight = draw.limit("weight", [draw.dtype])
    norms = {name: draw.normal(D, dtype=weight) if draw.flag() else None for name in ("q_norm", "k_norm")}
    qkv, (cos, sin), at = draw.normal(M, (Hq + 2 * Hkv) * D), angles(draw, half), draw.index(40, M)
    caches = [draw.out(S, Hkv, D, dtype=cache) for _ in "kv"]
    exact = [torch.full((S, Hkv, D), torch.nan, dtype=torch.float64) for _ in "kv"]
    wide = {name: None if norm is None else norm.double() for name, norm in norms.items()}
    q = reference.rope_append(qkv.double(), cos.double(), sin.double(), at, slots, *exact, **wide)
    size = 4 + 4 * max(float(norm.abs().max()) if norm is not None else 1 for norm in norms.values())
    wants = [(q, draw.dtype), (exact[0], cache), (exact[1], cache)]
    return (lambda: [ops.rope_append(qkv, cos, sin, at, slots, *caches, **norms), *caches]), [
        (want, rounded(want, dtype, torch.full_like(want, 8 * size))) for want, dtype in wants
    ]


def silu_mul(draw):
    shape = (*draw.shape(), 2 * draw.whole(1, 200))
    x = draw.normal(*shape, size=draw.of([1, 20]))
    want = reference.silu_mul(x.double())
    return (lambda: [ops.silu_mul(x, out=draw.out(*shape[:-1], shape[-1] // 2))]), [(want, rounded(want, draw.dtype, times=16))]


def embed(draw):
    table, ids, dtype = draw.normal(draw.whole(1, 50), draw.whole(1, 200)), None, draw.limit("out", [draw.dtype])
    ids = draw.index(table.shape[0], *draw.shape())
    return (lambda: [ops.embed(ids, table, dtype=dtype, out=draw.out(*ids.shape, table.shape[1], dtype=dtype))]), [
        (reference.embed(ids, table).to(dtype).double(), 0)
    ]


def logits(draw):
    """Few values, so that maxima tie; columns of -inf, and now and then a row of nothing else."""
    x = (2 * torch.randn(draw.whole(0, 5), draw.whole(1, 1500), generator=draw.g)).round()
    if draw.flag():
        x[:, :: draw.whole(1, 5)] = -torch.inf
    return draw.strided(x.to(draw.dtype))


def row_stats(draw):
    x = logits(draw)
    R = len(x)
    want = reference.row_stats(x.double())
    return (lambda: ops.row_stats(x, out=(poisoned([R], I32), poisoned([R]), poisoned([R])))), [
        (want.argmax, 0),
        (want.lse, 2.0**-20 * want.lse.abs().clamp_min(1)),
        (want.max, 0),
    ]


def topk_logits(draw):
    x = logits(draw)
    k = draw.whole(1, min(32, x.shape[1]))
    return (lambda: ops.topk_logits(x, k, out=(draw.out(len(x), k), draw.out(len(x), k, dtype=I32)))), [
        (want.double(), 0) for want in reference.topk_logits(x, k)
    ]


def weighted(want, of_sizes, *kinds):
    """Limits of a weighted mean of values: weights and the result are rounded to 16 bits, and a CPU level may round q as well."""
    narrow = max((STEP[kind] for kind in kinds if kind != F32), default=0)
    return 2e-5 + (0.02 if narrow else 0) + 2 * narrow * (want.abs() + of_sizes)


def tree_attention(draw):
    prefix = [draw.whole(0, 140) for _ in range(draw.whole(1, 3))]
    T, group, Hkv, D = draw.whole(1, 70), draw.of([1, 2, 3, 8]), draw.whole(1, 2), draw.limit("D", [64])
    kv, tree, page = draw.limit("kv", [draw.dtype]), draw.of(TREES), draw.of([None, 1, 16, 64])
    rows = [draw.whole(0, T) for _ in prefix] if draw.flag() else None
    window = draw.of([None, draw.whole(1, 150)])
    seed = draw.whole(0, 99)
    case = attention_case(
        prefix, T, group * Hkv, Hkv, D, dtype=draw.dtype, kv_dtype=kv, tree=tree, tail_rows=rows, page=page, seed=seed
    )  # what no row may read is NaN; heads of q lie outermost, and k, v and the tail have gaps
    options = case.options | {"window": window, "sink": None if window is None else draw.whole(0, 6)}
    out = draw.out(*case.q.shape), draw.out(*case.q.shape[:3], dtype=F32)
    exact = case.double()
    o, lse = reference.tree_attention(*exact.tensors, **(exact.options | options), return_lse=True)
    return (lambda: ops.tree_attention(*case.tensors, **options, return_lse=True, out=out)), [
        (o, weighted(o, 3, draw.dtype, kv)),
        (lse, 1e-5 if {draw.dtype, kv} == {F32} else 0.02),
    ]


def interval_attention(draw):
    B, T, S, group = draw.whole(1, 3), draw.whole(1, 60), draw.whole(1, 200), draw.of([1, 2, 3, 8])
    Hkv, D, kv = draw.whole(1, 2), draw.limit("D", [64]), draw.limit("kv", [draw.dtype])
    start, end = (draw.strided(x) for x in intervals(draw.of(["causal", "window", "blocks", "full", "random"]), B, T, S, draw.g))
    q, k, v = draw.normal(B, T, group * Hkv, D), *(draw.normal(B, S, Hkv, D, dtype=kv) for _ in "kv")
    unseen = unseen_slots(start, end, S)
    k[unseen], v[unseen] = torch.nan, torch.nan
    out = draw.out(*q.shape), draw.out(*q.shape[:3], dtype=F32)
    o, lse = reference.interval_attention(q.double(), k.double(), v.double(), start, end, return_lse=True)
    return (lambda: ops.interval_attention(q, k, v, start, end, return_lse=True, out=out)), [
        (o, weighted(o, 3, draw.dtype, kv)),
        (lse, 1e-5 if {draw.dtype, kv} == {F32} else 0.02),
    ]


def merge_states(draw):
    shape, D = draw.shape(), draw.whole(1, 130)
    sides = [(draw.normal(*shape, D), draw.normal(*shape, dtype=F32, size=10)) for _ in "12"]
    for o, lse in sides:
        if draw.flag() and shape and lse.numel():
            o[..., 0, :], lse[..., 0] = torch.nan, -torch.inf  # a side that saw nothing may hold anything
    (o1, lse1), (o2, lse2) = sides
    o, lse = reference.merge_states(o1.double(), lse1.double(), o2.double(), lse2.double())
    return (lambda: ops.merge_states(o1, lse1, o2, lse2, out=(draw.out(*shape, D), draw.out(*shape, dtype=F32)))), [
        (o, rounded(o, draw.dtype, torch.full_like(o, 100))),
        (lse, 1e-5),
    ]


TABLE = (
    rms_norm, rope, rope_append, silu_mul, embed, row_stats, topk_logits, tree_attention, interval_attention, merge_states
)  # fmt: skip


def places(op):
    """pytest parameters: every backend of the op but the reference, and the emulator."""
    return [param for param in runs(op) if param.values[0] != "reference"] + [pytest.param("emulated", None, id="emulated")]


@contextmanager
def at(backend, level, request):
    if backend != "emulated":
        with running(backend, level):
            yield
    else:
        with emulator.emulating(request.getfixturevalue("emulated")):
            yield


def agree(op, got, wants):
    for i, (result, (want, limit)) in enumerate(zip(got, wants, strict=True)):
        result, want = result.double(), want.double()
        assert result.shape == want.shape and torch.equal(result.isnan(), want.isnan()), f"{op.__name__}: result {i}"
        off = (result - want).abs().masked_fill(result == want, 0).nan_to_num(0)  # -inf equals -inf
        beyond = off > (limit.nan_to_num(0) if isinstance(limit, torch.Tensor) else limit)
        assert not beyond.any(), f"{op.__name__}: result {i} is {float(off[beyond].max()):.3g} off at {beyond.nonzero()[0].tolist()}"


def cases(table):
    """pytest parameters (op, backend, level): every op of a table on every backend that has it."""
    return [pytest.param(op, *p.values, id=f"{op.__name__}-{p.id}", marks=p.marks) for op in table for p in places(op.__name__)]


def hold(op, backend, level, request, examples=EXAMPLES):
    """Random calls of an op there give what they must."""
    kernels = "cuda" if backend == "emulated" else backend
    rows = [row for row in backends.TABLE if row.op == op.__name__ and row.backend == kernels]

    phases = [Phase.generate, Phase.shrink] if kernels == "cpu" else [Phase.generate]  # an interpreted call takes a second
    how = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=examples[kernels], phases=phases, **how)
    @given(data=st.data())
    def holds(data):
        call, wants = op(Draw(data, data.draw(st.sampled_from(rows))))
        with at(backend, level, request):
            got = call()
        agree(op, got, wants)

    holds()


@pytest.mark.parametrize(("op", "backend", "level"), cases(TABLE))
def test_any_call(op, backend, level, request):
    hold(op, backend, level, request)
