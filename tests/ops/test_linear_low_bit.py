"""linear over int8, int4 and fp8 weights: against the reference in double, and every row against itself alone, bit for bit."""

import math
from ctypes import addressof, c_int32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ramify
from ramify import backends, ops, reference
from ramify.quant import Format, QuantizedWeight
from ramify.quant.formats import ALL
from ramify.quant.packing import packed
from ramify.quant.weight import pack_nibbles
from ramify.testing.linear import low_bit_weight
from ramify.testing.tensors import levels, padded, poisoned, running, runs, threads

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33, 64, 70)
NAMES = [form.name for form in ALL]


def modes(form):
    return backends.ROUNDED[2:] if form.kind == "fp8" else backends.ROUNDED


def make(M, weight, dtype=F32, seed=0):
    g, (N, K) = torch.Generator().manual_seed(seed), weight.shape
    x = torch.randn(M, K, generator=g) * torch.rand(M, 1, generator=g).exp()
    return padded(x.to(dtype)), torch.randn(N, generator=g).to(dtype), padded(torch.randn(M, N, generator=g).to(dtype))


def magnitudes(x, weight):
    """Sum of |term| of every output; a zero counts as a term of its own."""
    if weight.zero is None:
        return x.double().abs() @ weight.dequantize().double().abs().T
    parts = QuantizedWeight(weight.format, weight.codes, weight.scale, -weight.zero.abs(), weight.perm)
    return x.double().abs() @ parts.dequantize().double().abs().T


def check(x, weight, how, bias=None, activation=None, residual=None):
    N, K = weight.shape
    out = ops.linear(
        x, weight, bias, activation=activation, residual=residual, activations=how, out=padded(poisoned((*x.shape[:-1], N), x.dtype))
    )
    wide = [None if t is None else t.double() for t in (x, bias, residual)]
    want = reference.linear(wide[0], weight, wide[1], activation=activation, residual=wide[2], activations=how)
    # Rounded inputs: both sides hold the same integers, so what differs is one f32 chain over groups of at least 32 inputs, in its
    # worst case. Exact: a chain of K additions wanders like a random walk, four half-ulps of the sum of magnitudes. Then one rounding
    # of the result.
    limit = 2**-24 * (4 if how == "exact" else K / 32 + 4) * magnitudes(x, weight)
    limit += (2**-8 if x.dtype == BF16 else 2**-21) * (want.abs() + 1)
    worst = ((out.double() - want).abs() / limit).nan_to_num(nan=torch.inf)
    assert worst.max() <= 1, f"{how}: row {(worst == worst.max()).nonzero()[0].tolist()} is {worst.max():.3g} limits away"


@pytest.mark.parametrize(("backend", "level"), runs("linear", activations="int8"))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("perm", [False, True], ids=["", "perm"])
def test_against_reference(backend, level, name, perm):
    """Every scale dtype, activation mode and epilogue; ragged N and K; rows of one tile, of several, of one more."""
    shapes = [(1, 1, 1), (2, 31, 33), (3, 16, 64), (5, 96, 130), (7, 48, 260), (9, 33, 384), (17, 200, 700), (64, 70, 128), (70, 33, 1030)]
    for i, (M, N, K) in enumerate(shapes):
        for j, scale_dtype in enumerate((F16, BF16, F32)):
            weight = low_bit_weight(name, N, K, scale_dtype, perm, seed=i)
            for how in modes(weight.format):
                x, bias, residual = make(M, weight, BF16 if (i + j) % 3 == 2 else F32, seed=M)
                epilogue = [{}, {"bias": bias}, {"bias": bias, "activation": "silu", "residual": residual}][(i + j) % 3]
                with running(backend, level):
                    check(x, weight, how, **epilogue)


@pytest.mark.parametrize(("backend", "level"), runs("linear", activations="int8"))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES), lead=st.lists(st.integers(1, 6), min_size=1, max_size=2), N=st.integers(1, 100), K=st.integers(1, 300),
    scales=st.sampled_from([F16, BF16, F32]), perm=st.booleans(), dtype=st.sampled_from([F32, BF16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(backend, level, name, lead, N, K, scales, perm, dtype, seed):
    weight = low_bit_weight(name, N, K, scales, perm, seed=seed % 9)
    how = modes(weight.format)[seed % len(modes(weight.format))]
    x, bias, residual = make(math.prod(lead), weight, dtype, seed)
    with running(backend, level):
        check(x.reshape(*lead, -1), weight, how, bias, "silu" if seed % 2 else None, residual.reshape(*lead, -1))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("name", NAMES)
def test_row_is_its_own(level, name):
    """Row r of an M-row call has the bits of the call on row r alone, on one thread and on two."""
    for N, K in ((33, 140), (95, 520), (300, 140)):  # the last has tiles of every width on either number of threads
        weight = low_bit_weight(name, N, K, seed=N)
        x, bias, residual = make(max(ROWS), weight, seed=N)
        for how in modes(weight.format):
            given = {"bias": bias, "activation": "silu", "activations": how}
            with running("cpu", level):
                with threads(1):
                    alone = torch.cat([ops.linear(x[r : r + 1], weight, residual=residual[r : r + 1], **given) for r in range(len(x))])
                for M in ROWS:
                    with threads(1 + M % 2):
                        got = ops.linear(x[:M], weight, residual=residual[:M], **given)
                    assert torch.equal(got, alone[:M]), f"{how}, M = {M}: rows {(got != alone[:M]).any(1).nonzero().flatten().tolist()}"


@pytest.mark.parametrize("level", levels())
def test_many_rows(level):
    """More rows than a panel serves at once."""
    weight = low_bit_weight("int4-g32", 40, 160)
    x, *_ = make(512, weight)
    for how in modes(weight.format):
        with running("cpu", level):
            check(x, weight, how)
            assert torch.equal(ops.linear(x, weight, activations=how)[500:501], ops.linear(x[500:501], weight, activations=how))


@pytest.mark.parametrize(("backend", "level"), runs("linear", activations="int8"))
@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g128"])
def test_extreme_codes_do_not_saturate(backend, level, name):
    """Codes and inputs at their limits, in runs and alternating, make the largest sums there are: whole numbers, to be met exactly."""
    form, K = Format.parse(name), 1024
    low, high = (0, 15) if form.kind == "int4" else (-128, 127)
    patterns = torch.tensor([[low] * 4, [high] * 4, [low, high] * 2, [low, low, high, high], [low + 1, high] * 2], dtype=torch.int16)
    patterns = patterns.repeat(7, K // 4)[:33]
    codes = pack_nibbles(patterns) if form.kind == "int4" else patterns.to(torch.int8)
    weight = QuantizedWeight(form, codes, torch.ones(form.scale_shape(33, K)))
    x = torch.tensor([[127.0] * 4, [-127.0] * 4, [127, -127] * 2, [127, 127, -127, -127], [-127, 0, 0, 127]]).repeat(1, K // 4)
    want = x.double() @ weight.dequantize().double().T
    assert want.abs().max() < 2**24
    for how in ("int8", "int8-group"):
        with running(backend, level):
            assert torch.equal(ops.linear(x, weight, activations=how).double(), want)


@pytest.mark.parametrize("level", levels())
def test_every_fp8_code(level):
    """Rows of the unit matrix read the weight back: each code's value, exactly; a NaN code makes its row's group NaN."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).view(2, 128).T.contiguous()
    for name in ("fp8", "fp8-b128"):
        weight = QuantizedWeight(Format.parse(name), codes, torch.ones(128 if name == "fp8" else 1, 1))
        with running("cpu", level):
            got = ops.linear(torch.eye(2), weight)
        assert torch.equal(got[:, :127], codes.float().T[:, :127]) and got[:, 127].isnan().all()


@pytest.mark.parametrize(("backend", "level"), runs("linear", activations="int8"))
@pytest.mark.parametrize("how", backends.ROUNDED)
def test_rows_that_are_not_finite(backend, level, how):
    """They are NaN, or not finite where inputs stay floats, all of them, and their neighbours and rows of zeros are not."""
    weight = low_bit_weight("int4-g64-zp", 48, 192)
    x, *_ = make(9, weight)
    x[1, 5], x[4, 100], x[6, 0], x[7] = torch.nan, torch.inf, -torch.inf, 0
    with running(backend, level):
        got, clean = ops.linear(x, weight, activations=how), ops.linear(x[[0, 2, 3, 5, 8]], weight, activations=how)
    bad = got[[1, 4, 6]]
    assert bad.isnan().all() if how.startswith("int8") else (bad.isnan() | bad.isinf()).all()
    assert torch.equal(got[[0, 2, 3, 5, 8]], clean) if backend == "cpu" else clean.isfinite().all()
    assert (got[7] == 0).all()


def test_quantize_rows():
    x = torch.tensor([[127, -63.5, 0.5, 1.5, -0.4], [0, 0, 0, 0, 0], [1, torch.inf, 0, 0, 4], [1e-43, -1e-44, 0, 0, 0]])
    codes, scale = reference.quantize_rows(x)
    assert codes.dtype == torch.int8 and codes[0].tolist() == [127, -64, 0, 2, 0]  # ties go to even
    assert scale[:2].tolist() == [[1.0], [0.0]] and codes[1].count_nonzero() == 0
    assert scale[2].isnan().all() and codes[2].count_nonzero() == 0
    assert codes.min() >= -127
    codes, scale = reference.quantize_rows(x[:1], 2)
    assert scale.tolist() == [[1.0, x[0, 3] / 127, x[0, 4].abs() / 127]] and codes.tolist() == [[127, -64, 42, 127, -127]]


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("how", ["int8", "int8-group"])
def test_rows_of_the_smallest_floats(level, how):
    """A scale of 1.5 of them is one, and by it the largest code would be 190: it ends at 127, as the reference's does."""
    least, weight = 2.0**-149, low_bit_weight("int4-g64", 48, 192)
    x = torch.randint(-190, 191, (9, 192), generator=torch.Generator().manual_seed(0)) * least
    x[:, ::64] = 190 * least
    codes, scale = reference.quantize_rows(x)
    assert (scale == least).all() and codes.max() == 127 and codes.min() == -127
    with running("cpu", level):
        got = ops.linear(x.float(), weight, activations=how)
    want = codes.double() @ weight.dequantize().double().T * least
    assert (got.double() - want).abs().max() <= 8 * least * (1 + want.abs().max() / least * 2**-24), "a chain of four roundings"


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("how", "name"), [("int8", "int4-g64"), ("int8-group", "int8"), ("exact", "fp8-b128"), ("bf16", "int4-g32-zp")])
@pytest.mark.parametrize("prologue", ["copy", "rms_norm", "silu_mul"])
def test_as_a_layer_of_a_step(level, how, name, prologue):
    """The fused layer that a captured step calls: prologue, row count through a pointer, residual in place, row statistics."""
    native, M, N, K, topk = backends.native(), 6, 1100, 192, 5
    weight = low_bit_weight(name, N, K, perm=name == "int8")
    g = torch.Generator().manual_seed(3)
    x, gain = torch.randn(M, 2 * K if prologue == "silu_mul" else K, generator=g), torch.randn(K, generator=g)
    out = torch.randn(M + 1, N, generator=g)
    residual = out.clone()
    rows, panels = c_int32(M + 1), packed(weight)
    args = native.LinearLowBitArgs(rows=addressof(rows), x=x.data_ptr(), x_stride=x.stride(0), K=K, N=N, weight=panels.data_ptr())
    args.dtype, args.group = native.LOW_BIT[weight.format.kind], weight.format.group
    args.scale_dtype, args.perm = native.DTYPES[weight.scale.dtype], native.pointer(weight.perm)
    args.zeros = weight.zero is not None
    args.activations = native.ACTIVATIONS[how]
    args.prologue, args.norm_weight, args.eps = ["copy", "rms_norm", "silu_mul"].index(prologue), gain.data_ptr(), 1e-5
    args.residual, args.residual_stride, args.out, args.out_stride = out.data_ptr(), N, out.data_ptr(), N
    stats = torch.empty(M, dtype=torch.int32), torch.empty(M), torch.empty(M)
    ids, values = torch.empty(M, topk, dtype=torch.int32), torch.empty(M, topk)
    args.argmax, args.top, args.lse = (t.data_ptr() for t in stats)
    args.topk, args.topk_ids, args.topk_values = topk, ids.data_ptr(), values.data_ptr()
    with running("cpu", level), threads(2):
        scratch = native.with_scratch(args)
        rows.value = M
        native.run(args)
        ready = {"copy": lambda: x, "rms_norm": lambda: ops.rms_norm(x, gain, eps=1e-5), "silu_mul": lambda: ops.silu_mul(x)}[prologue]()
        want = ops.linear(ready, weight, residual=residual[:M], activations=how)
        assert torch.equal(out[:M], want) and torch.equal(out[M:], residual[M:])
        of = ops.row_stats(want)
        assert torch.equal(stats[0], of.argmax) and torch.equal(stats[1], of.max) and torch.equal(stats[2], of.lse)
        want_values, want_ids = ops.topk_logits(want, topk)
        assert torch.equal(values, want_values) and torch.equal(ids, want_ids)
    del scratch


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(
    ("how", "name"), [("int8", "int4-g64"), ("int8-group", "int4-g32-zp"), ("int8", "int8"), ("exact", "fp8"), ("bf16", "int4-g64")]
)
def test_fewer_rows_than_there_is_room_for(level, how, name):
    """A captured step runs any number of rows in the scratch of its bucket, and writes nowhere else."""
    native, N, K, spare = backends.native(), 300, 192, 4096
    weight = low_bit_weight(name, N, K)
    x, *_ = make(13, weight)
    x, rows, panels = x.contiguous(), c_int32(0), packed(weight)
    out = torch.empty(len(x), N)
    args = native.LinearLowBitArgs(rows=addressof(rows), x=x.data_ptr(), x_stride=K, K=K, N=N, weight=panels.data_ptr())
    args.dtype, args.group, args.zeros = native.LOW_BIT[weight.format.kind], weight.format.group, weight.zero is not None
    args.scale_dtype, args.activations, args.prologue = native.DTYPES[weight.scale.dtype], native.ACTIVATIONS[how], native.COPY
    args.out, args.out_stride = out.data_ptr(), N
    with running("cpu", level), threads(1):
        want = ops.linear(x, weight, activations=how)
        for room in (1, 2, 3, 5, 6, 8, 9, 13):
            rows.value = room
            size = native.scratch_bytes(args)
            buffer = torch.full((size + 64 + spare,), 0x5A, dtype=torch.uint8)
            args.scratch = (buffer.data_ptr() + 63) // 64 * 64
            for M in range(1, room + 1):
                rows.value = M
                native.run(args)
                assert torch.equal(out[:M], want[:M]), f"{M} rows in the room of {room}"
            behind = buffer[args.scratch - buffer.data_ptr() + size :]
            assert (behind == 0x5A).all(), f"the scratch of {room} rows was left"


def test_packs_once():
    weight = low_bit_weight("int4-g64", 40, 128)
    x, *_ = make(2, weight)
    ops.linear(x, weight)
    first = packed(weight)
    ops.linear(x, weight)
    assert packed(weight) is first
    assert first.nbytes == 64 * (128 // 2 + 2 * 2)  # outputs padded to 64; two groups' float16 scales each


@pytest.mark.skipif(bool(backends.missing("cpu")), reason="the CPU kernels are not built")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_packed_weight_is_the_weight(dtype):
    g = torch.Generator().manual_seed(1)
    x, dense = torch.randn(5, 65, generator=g), torch.randn(40, 65, generator=g).to(dtype)
    ready = ops.PackedWeight.of(dense)
    assert ready.shape == (40, 65) and torch.equal(ready.unpack(), dense)
    assert torch.equal(ops.linear(x, ready), ops.linear(x, dense))
    with ramify.backend("reference"):
        assert torch.equal(ops.linear(x, ready), ops.linear(x, dense))


def test_formats_of_the_table():
    assert list(backends.LOW_BIT) == NAMES
    got = ramify.explain("linear", (5, 128), (96, 128), weight="int4-g64")
    assert got.bytes == 96 * (64 + 4) + 4 * 5 * (128 + 96) and got.backend == backends.choose("linear", "cpu", F32, weight=F32)
    with pytest.raises(ValueError, match='explain: weight is "int5"; takes "int8" or "int4-g32"'):
        ramify.explain("linear", (5, 128), (96, 128), weight="int5")


def test_says_what_it_does_not_take():
    weight, fp8, x = low_bit_weight("int4-g32", 5, 64), low_bit_weight("fp8", 5, 64), torch.randn(3, 64)
    bad = [
        (ValueError, "weight is [5, 64]; takes [N, K] with K = 60, as in x", (x[:, :60], weight), {}),
        (ValueError, 'activations is "int4"; takes "int8" or "int8-group" or "bf16" or "exact"', (x, weight), {"activations": "int4"}),
        (ValueError, 'activations is "int8"; takes "bf16" or "exact"', (x, fp8), {"activations": "int8"}),
        (ValueError, 'activations is "int8"; takes None with a dense weight', (x, x), {"activations": "int8"}),
        (TypeError, "weight is [1]; takes a tensor [N, K], a QuantizedWeight or a PackedWeight", (x, [1]), {}),
        (TypeError, "x is int64; takes float32", (x.long(), weight), {}),
        (ValueError, "bias is [4]; takes [N] with N = 5, as in weight", (x, weight, torch.zeros(4)), {}),
        (ValueError, "codes is on meta and x on cpu", (x, weight.to("meta")), {}),
    ]
    for kind, said, args, kwargs in bad:
        with pytest.raises(kind) as error:
            ops.linear(*args, **kwargs)
        assert said in str(error.value) and str(error.value).startswith("linear: "), str(error.value)
    with pytest.raises(ValueError, match=r"PackedWeight.of: weight is \[2, 3\] on meta; takes a weight on the CPU"):
        ops.PackedWeight.of(torch.empty(2, 3, device="meta"))
