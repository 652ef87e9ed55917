"""CUDA linear layers against the reference: every format and dense, ragged shapes, epilogues, orders, shares; and row invariance."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramify import backends, native_cuda, ops
from ramify.ops import _cuda_linear
from ramify.quant import Format, QuantizedWeight
from ramify.quant.formats import ALL
from ramify.testing.linear import assert_linear, every_code, linear_inputs, low_bit_weight
from ramify.testing.tensors import padded, poisoned

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = pytest.mark.parametrize("name", ["dense", *(form.name for form in ALL)])
LOW_BIT = pytest.mark.parametrize("name", [form.name for form in ALL])
FEW = pytest.mark.parametrize("name", ["int4-g32-zp", "int4-g128", "int8", "fp8-b128"])  # every branch, where a case takes seconds
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


@pytest.fixture
def many_rows(place, monkeypatch):
    """Low-bit layers go to the wgmma kernel, however few their rows are."""
    if place.library is None and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs sm_90a")
    monkeypatch.setattr(_cuda_linear, "VARIANT", "many rows")


def weight_of(name, N, K, dtype=BF16, scale_dtype=F16, perm=False, seed=0):
    """A weight of this format, or for "dense" a matrix of x's dtype; the gaps behind its rows put them at odd addresses, or not."""
    if name != "dense":
        return low_bit_weight(name, N, K, scale_dtype, perm, seed)
    return padded((0.05 * torch.randn(N, K, generator=torch.Generator().manual_seed(seed))).to(dtype), 8 if seed % 2 else 3)


def run(place, x, weight, bias=None, residual=None, activation=None, copies=False):
    """The layer into an output of NaN with gaps, the same bits in every schedule."""
    here = [None if t is None else t.to(place.device) for t in (x, weight, bias, residual)]
    low_bit = not isinstance(weight, torch.Tensor)

    def call():
        out = padded(poisoned((*x.shape[:-1], weight.shape[0]), x.dtype)).to(place.device)
        how = {"activations": "exact"} if low_bit else {}
        return ops.linear(*here[:3], activation=activation, residual=here[3], out=out, **how)

    return place.everywhere(call, copies).cpu()


def check(place, M, N, K, name, dtype, scale_dtype=F16, epilogue=0, perm=False, seed=0, copies=False):
    weight = weight_of(name, N, K, dtype, scale_dtype, perm, seed)
    x, bias, residual = linear_inputs(M, *weight.shape, dtype, seed)
    given = [{}, {"bias": bias}, {"bias": bias, "activation": "silu", "residual": residual}][epilogue]
    assert_linear(run(place, x, weight, copies=copies, **given), x, weight, **given)


# M, N, K, dtype of x, dtype of scales, epilogue (0 none, 1 bias, 2 all), act-order. Codes lie at odd addresses but in the first row; three
# of the six have several shares, and so many rows that their blocks take 8, 16 or 32, or that there are two launches
CASES = [
    (1, 65, 200, BF16, F16, 0, False),
    (2, 1, 1, F16, F32, 1, False),
    (9, 130, 1184, BF16, F16, 2, True),
    (16, 40, 96, F16, BF16, 2, False),
    (33, 3, 1100, BF16, F32, 1, True),
    (261, 5, 1030, F16, F16, 2, False),
]


@FORMATS
def test_against_reference(place, name):
    for seed, (M, N, K, dtype, scale_dtype, epilogue, perm) in enumerate(CASES):
        check(place, M, N, K, name, dtype, scale_dtype, epilogue, perm, seed)


# as above; 256 outputs and 64 rows are a block, 128 inputs a round, and the number of shares is another
MANY_CASES = [
    (1, 65, 200, BF16, F16, 0, False),
    (70, 257, 1184, BF16, F16, 2, True),
    (33, 40, 96, F16, BF16, 2, False),
    (9, 1, 1100, F16, F32, 1, True),
    (261, 5, 1030, BF16, F16, 2, False),
]


@LOW_BIT
def test_many_rows_against_reference(place, many_rows, name):
    for seed, (M, N, K, dtype, scale_dtype, epilogue, perm) in enumerate(MANY_CASES):
        check(place, M, N, K, name, dtype, scale_dtype, epilogue, perm, seed)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 130), st.integers(1, 270), st.integers(1, 1300), st.sampled_from([form.name for form in ALL]), st.data())
def test_many_rows_in_any_shape(place, many_rows, M, N, K, name, data):
    dtype, scale = data.draw(st.sampled_from([BF16, F16])), data.draw(st.sampled_from([F32, BF16, F16]))
    check(place, M, N, K, name, dtype, scale, data.draw(st.integers(0, 2)), data.draw(st.booleans()), data.draw(st.integers(0, 17)))


@FORMATS
def test_copies_land_when_they_like(place, name):
    """Rows at whole addresses, so that every byte comes through the ring; the last piece of a row is cut."""
    check(place, 5, 129, 1104, name, BF16, epilogue=1, copies=True)


@LOW_BIT
def test_copies_for_many_rows_land_when_they_like(place, many_rows, name):
    check(place, 65, 129, 1104, name, F16, epilogue=1, copies=True)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 140), st.integers(1, 1300), st.sampled_from([form.name for form in ALL] + ["dense"]), st.data())
def test_any_shape(place, M, N, K, name, data):
    dtype, scale = data.draw(st.sampled_from([BF16, F16])), data.draw(st.sampled_from([F32, BF16, F16]))
    check(place, M, N, K, name, dtype, scale, data.draw(st.integers(0, 2)), data.draw(st.booleans()), data.draw(st.integers(0, 17)))


@FORMATS
def test_row_is_its_own(place, name):
    """Row r of an M-row call has the bits of the call on row r alone, for every M up to what two blocks take, over three parts."""
    dtype = F16 if name.endswith("-zp") else BF16
    weight = weight_of(name, 20, 1152, dtype)
    x, bias, residual = linear_inputs(40, *weight.shape, dtype)
    whole = run(place, x, weight, bias, residual)
    here = [t.to(place.device) for t in (x, bias, residual)]
    moved, how = weight.to(place.device), {} if name == "dense" else {"activations": "exact"}
    with place.running():
        for M in range(1, 41):
            got = ops.linear(here[0][:M], moved, here[1], residual=here[2][:M], **how)
            assert torch.equal(got.cpu(), whole[:M]), f"{M} rows"
            alone = ops.linear(here[0][M - 1 : M], moved, here[1], residual=here[2][M - 1 : M], **how)
            assert torch.equal(alone.cpu(), whole[M - 1 : M]), f"row {M - 1} alone"


@LOW_BIT
def test_row_is_its_own_among_many(place, many_rows, name):
    """So is one of the kernel for many rows, among any number that it takes."""
    weight = weight_of(name, 20, 1152)
    x, bias, residual = (t.to(place.device) for t in linear_inputs(140, *weight.shape, BF16))
    weight = weight.to(place.device)
    with place.running():
        whole = ops.linear(x, weight, bias, residual=residual, activations="exact")
        for M in (1, 7, 33, 64, 65, 128):
            assert torch.equal(ops.linear(x[:M], weight, bias, residual=residual[:M], activations="exact"), whole[:M]), f"{M} rows"
            alone = ops.linear(x[M - 1 : M], weight, bias, residual=residual[M - 1 : M], activations="exact")
            assert torch.equal(alone, whole[M - 1 : M]), f"row {M - 1} alone"


def test_batch_axes_and_strides(place):
    """Rows over several axes, rows that overlap, an output that is no view of rows."""
    weight = low_bit_weight("int4-g64", 24, 128)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).to(BF16)
    flat = run(place, x.reshape(6, 128), weight)
    assert torch.equal(run(place, x.transpose(0, 1), weight), flat.view(2, 3, 24).transpose(0, 1))
    long = torch.randn(200, generator=torch.Generator().manual_seed(2)).to(BF16)
    assert torch.equal(run(place, long.as_strided((5, 128), (7, 1)), weight), run(place, long.as_strided((5, 128), (7, 1)).clone(), weight))
    with place.running():
        out = poisoned((2, 3, 30), BF16).to(place.device)
        ops.linear(x.to(place.device), weight.to(place.device), activations="exact", out=out[..., 3:27])
        assert torch.equal(out[..., 3:27].cpu(), flat.view(2, 3, 24)) and out[..., [0, 1, 2, 27, 28, 29]].isnan().all()
        assert ops.linear(x[:0].to(place.device), weight.to(place.device), activations="exact").shape == (0, 3, 24)


@HALVES
@pytest.mark.parametrize("variant", ["few rows", "many rows"])
def test_every_code(place, dtype, variant, request):
    """Rows of the unit matrix read the weight back: each code's value, exactly; a NaN code makes its output NaN."""
    if variant == "many rows":
        request.getfixturevalue("many_rows")
    for weight in every_code():
        rows = [0, 1, weight.shape[1] - 1]
        got = run(place, torch.eye(weight.shape[1], dtype=dtype)[rows], weight)
        want = weight.dequantize().T[rows]
        nan = weight.dequantize().isnan().any(1)  # 0 * NaN is NaN
        assert got[:, nan].isnan().all() and torch.equal(got[:, ~nan].float(), want[:, ~nan])


@LOW_BIT
def test_many_rows_that_are_not_finite(place, many_rows, name):
    test_rows_that_are_not_finite(place, name)


@FORMATS
def test_rows_that_are_not_finite(place, name):
    """They are not finite, and their neighbours are what they were."""
    weight = weight_of(name, 10, 128)
    x = linear_inputs(6, *weight.shape, BF16)[0]
    clean = run(place, x, weight)
    x[1, 5], x[3, 100], x[4] = torch.nan, torch.inf, 0
    got = run(place, x, weight)
    assert not got[[1, 3]].isfinite().any() and (got[4] == 0).all()
    assert torch.equal(got[[0, 2, 5]], clean[[0, 2, 5]])


def test_an_order_that_names_no_input_gives_nan(place):
    """It is data on a device, so no message can say it; nothing outside x is read."""
    weight = low_bit_weight("int8", 4, 64).to(place.device)
    perm = torch.arange(64, dtype=torch.int32)
    perm[[3, 60]] = torch.tensor([64, -1], dtype=torch.int32)
    x, out = torch.ones(2, 64, dtype=BF16, device=place.device), torch.zeros(2, 4, dtype=BF16, device=place.device)
    with place.running():
        _cuda_linear.linear_low_bit(
            (out,), x, weight.codes, weight.scale, None, perm.to(place.device), None, "int8", None, None, None, "exact"
        )
    assert out.isnan().all()


def test_live_rows(place):
    """Rows from the count on, which lies on the device, stay as they were, and the tickets are left at zero."""
    weight, live = torch.randn(3, 1024).to(BF16).to(place.device), torch.tensor([35], dtype=torch.int32, device=place.device)
    x, out = torch.randn(70, 1024).to(BF16).to(place.device), torch.full((70, 3), 7.0, dtype=BF16, device=place.device)
    scratch, tickets = torch.empty(96 * 128 * 2, device=place.device), torch.zeros(3, dtype=torch.int32, device=place.device)
    args = native_cuda.LinearArgs(live=live.data_ptr(), rows=70, N=3, K=1024, type=1, x=x.data_ptr(), x_stride=1024, kind=0, lines=1)
    args.weight, args.weight_stride, args.out, args.out_stride = weight.data_ptr(), 2048, out.data_ptr(), 3
    args.shares, args.scratch, args.tickets = 2, scratch.data_ptr(), tickets.data_ptr()
    with place.running():
        native_cuda.run(args, live, x, weight, out, scratch, tickets)
    assert_linear(out[:35].cpu(), x[:35].cpu(), weight.cpu())
    assert (out[35:] == 7).all() and (tickets == 0).all()
    args.shares = 0
    with place.running(), pytest.raises(native_cuda.CudaError, match="LinearArgs"):
        native_cuda.run(args, live, x, weight, out, scratch, tickets)


def test_live_rows_among_many(place, many_rows):
    """The same in the kernel for many rows; a block without a live row ends at once."""
    weight, live = low_bit_weight("int8", 3, 1024).to(place.device), torch.tensor([35], dtype=torch.int32, device=place.device)
    x, out = torch.randn(70, 1024).to(BF16).to(place.device), torch.full((70, 3), 7.0, dtype=BF16, device=place.device)
    scratch, tickets = torch.empty(128 * 256 * 2, device=place.device), torch.zeros(2, dtype=torch.int32, device=place.device)
    args = native_cuda.LinearArgs(live=live.data_ptr(), rows=70, N=3, K=1024, type=1, x=x.data_ptr(), x_stride=1024, kind=2, lines=1)
    args.weight, args.weight_stride, args.out, args.out_stride = weight.codes.data_ptr(), 1024, out.data_ptr(), 3
    args.scale, args.scale_type, args.scale_stride, args.variant = weight.scale.data_ptr(), native_cuda.F16, 1, 2
    args.shares, args.scratch, args.tickets = 4, scratch.data_ptr(), tickets.data_ptr()
    with place.running():
        native_cuda.run(args, live, x, weight.codes, weight.scale, out, scratch, tickets)
    assert_linear(out[:35].cpu(), x[:35].cpu(), weight.to("cpu"))
    assert (out[35:] == 7).all() and (tickets == 0).all()


@pytest.fixture
def watched(monkeypatch):
    """Every layer is launched twice, into an output and scratch of NaN: the same bits, and tickets at zero behind each."""
    launch = native_cuda.run

    def twice(args, *tensors):
        out, scratch, tickets, seen = tensors[1], *tensors[-2:], []
        for _ in range(2):
            for t in (out, scratch):
                if t is not None:
                    t.fill_(torch.nan)
            launch(args, *tensors)
            seen.append(out.clone())
            assert tickets is None or not tickets.any()
        assert torch.equal(*(t.nan_to_num() for t in seen))

    monkeypatch.setattr(native_cuda, "run", twice)


# blocks, M, N, K, epilogue: shares of less than a panel, of several, and of parts of two and three; panels that one, two and all shares
# meet in; shares as many as windows, and no more than one; 1, 2, 3 and 5 panels, 1 to 9 windows, ragged or not
SHARED = [
    (1, 2, 257, 600, 1),
    (2, 1, 300, 1500, 2),
    (3, 5, 129, 4600, 0),
    (2, 8, 640, 512, 0),
    (4, 9, 520, 1024, 2),
    (7, 17, 384, 1100, 1),
    (3, 33, 200, 2049, 2),
    (50, 2, 128, 3584, 0),
    (5, 1, 513, 100, 1),
]
# of the kernel for many rows: half as many blocks of twice as many outputs
SHARED_BY_MANY = [
    (5, 33, 300, 1500, 2),
    (4, 70, 600, 512, 1),
    (10, 2, 257, 1100, 0),
    (50, 9, 256, 1280, 1),
]


@FEW
def test_shares_that_cross_panels(place, watched, monkeypatch, name):
    for seed, (blocks, M, N, K, epilogue) in enumerate(SHARED):
        monkeypatch.setattr(_cuda_linear, "BLOCKS", blocks)
        dtype = F16 if (seed + len(name)) % 2 else BF16
        check(place, M, N, K, name, dtype, epilogue=epilogue, seed=seed)


@FORMATS
def test_copies_run_on_into_the_next_panel(place, watched, monkeypatch, name):
    """Rows at whole addresses, so that the ring holds copies of the next panel while the sums of the last are joined."""
    for M, blocks in ((5, 2), (20, 5)):
        monkeypatch.setattr(_cuda_linear, "BLOCKS", blocks)
        check(place, M, 400, 1104, name, BF16, epilogue=2, copies=True)


@FEW
def test_shares_of_many_rows_that_cross_panels(place, many_rows, watched, monkeypatch, name):
    for seed, (blocks, M, N, K, epilogue) in enumerate(SHARED_BY_MANY):
        monkeypatch.setattr(_cuda_linear, "BLOCKS", blocks)
        dtype = F16 if (seed + len(name)) % 2 else BF16
        check(place, M, N, K, name, dtype, epilogue=epilogue, seed=seed)


@pytest.mark.parametrize("name", ["dense", "int4-g32-zp"])
def test_row_is_its_own_where_shares_cross_panels(place, watched, monkeypatch, name):
    """Alone, in two launches of 256 rows and whatever its block takes: where shares end says the weight's shape."""
    monkeypatch.setattr(_cuda_linear, "BLOCKS", 4)
    weight = weight_of(name, 270, 1060)
    x, bias, residual = (t.to(place.device) for t in linear_inputs(261, *weight.shape, BF16))
    weight, how = weight.to(place.device), {} if name == "dense" else {"activations": "exact"}
    monkeypatch.setattr(_cuda_linear, "VARIANT", "few rows")
    with place.running():
        whole = ops.linear(x, weight, bias, residual=residual, **how)
        for M in (1, 2, 9, 33):
            assert torch.equal(ops.linear(x[-M:], weight, bias, residual=residual[-M:], **how), whole[-M:]), f"{M} rows"


@pytest.mark.parametrize("variant", ["few rows", "many rows"])
def test_parts_are_added_in_the_order_of_the_inputs(place, watched, monkeypatch, variant, request):
    """2^40 - 2^40 + 1 is 1 in f32 in no other order, whichever block comes last; every window is a part."""
    if variant == "many rows":
        request.getfixturevalue("many_rows")
    monkeypatch.setattr(_cuda_linear, "BLOCKS", 20)
    weight = QuantizedWeight(Format.parse("int8"), torch.ones(400, 2560, dtype=torch.int8), torch.ones(400, 1))
    x = torch.zeros(3, 2560, dtype=BF16)
    x[:, 511], x[:, 2000], x[:, 2559] = 2.0**40, -(2.0**40), 1
    assert (run(place, x, weight) == 1).all()


def shared_by(panels, pieces, count):
    """Shares of the list of all panels' pieces, and for each panel the shares that it is in: as Shares of linear_parts.cuh."""
    total = panels * pieces
    begins = [share * total // count for share in range(count + 1)]
    owners = [[((piece + 1) * count - 1) // total for piece in range(panel * pieces, (panel + 1) * pieces)] for panel in range(panels)]
    return begins, owners


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7, 16, 264])
def test_every_part_has_a_place_of_its_own(blocks, monkeypatch):
    """Shares are equal but for a piece and none is empty; no two panels share a ticket or a slot; and the scratch has room for all."""
    monkeypatch.setattr(_cuda_linear, "BLOCKS", blocks)
    for N, K in itertools.product((1, 129, 300, 640, 1400, 40000), (1, 512, 700, 1536, 4608)):
        few, many = (_cuda_linear.scratch_of(M, N, K, "by rows") for M in (1, 64))
        windows = -(-K // 512)
        kernels = (1, few, 8, 512, blocks), (1, many, 64, 512, blocks), (2, many, 64, 128, blocks // 2)
        for wide, (floats, tickets), rows, each, most in kernels:
            panels, pieces = -(-N // (128 * wide)), -(-K // each)
            count = max(1, min(most, panels * windows))
            begins, owners = shared_by(panels, pieces, count)
            sizes = [b - a for a, b in itertools.pairwise(begins)]
            assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1 and begins[-1] == panels * pieces
            assert [share for panel in owners for share in panel] == [s for s, size in enumerate(sizes) for _ in range(size)]
            cut = [(panel, own[0], own[-1]) for panel, own in enumerate(owners) if own[0] != own[-1]]
            names = [min(panel, first) for panel, first, _ in cut]
            slots = [first + name + i for name, (_, first, last) in zip(names, cut) for i in range(last - first + 1)]
            assert len({*names}) == len(names) and len({*slots}) == len(slots)
            assert max(names, default=-1) < tickets and (max(slots, default=-1) + 1) * 128 * wide * rows <= floats


def test_a_share_is_a_window_or_more():
    """What a weight's shape alone decides: shares, windows of the smallest and the largest, slots of the scratch for 1 row."""
    seen = {}
    for N, K in ((1, 1), (128, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096), (128256, 4096)):
        panels, windows = -(-N // 128), -(-K // 512)
        count = min(_cuda_linear.BLOCKS, panels * windows)
        begins, _ = shared_by(panels, windows, count)
        sizes = [b - a for a, b in itertools.pairwise(begins)]
        seen[N, K] = (count, min(sizes), max(sizes), _cuda_linear.scratch_of(1, N, K, "by rows")[0] // (128 * 8))
    assert seen == {
        (1, 1): (1, 1, 1, 0),
        (128, 4096): (8, 1, 1, 8),
        (4096, 4096): (256, 1, 1, 287),
        (14336, 4096): (264, 3, 4, 375),
        (4096, 14336): (264, 3, 4, 295),
        (6144, 4096): (264, 1, 2, 311),
        (28672, 4096): (264, 6, 7, 487),
        (128256, 4096): (264, 30, 31, 526),
    }


def test_what_is_not_taken_is_refused_by_name(place):
    weight = low_bit_weight("int4-g64", 4, 64).to(place.device)
    x, dense = torch.ones(2, 64, device=place.device), torch.ones(4, 64, dtype=F16, device=place.device)
    for how in ("int8", "int8-group"):
        with place.running(), pytest.raises(ValueError, match=f'"cuda" was forced .* .activations is {how}, takes exact'):
            ops.linear(x.to(BF16), weight, activations=how)
    with place.running(), pytest.raises(ValueError, match=r'"cuda" was forced .* .dtype is float32, takes bfloat16'):
        ops.linear(x, weight, activations="exact")
    with place.running(), pytest.raises(ValueError, match=r'"cuda" was forced .* .weight is float16, takes bfloat16'):
        ops.linear(x.to(BF16), dense)


def test_the_table_names_it_where_triton_is_not(monkeypatch):
    import ramify

    monkeypatch.setattr(backends, "missing", lambda name: "" if name == "cuda" else "not here")
    for weight in ("int4-g64", BF16):
        got = ramify.explain("linear", (5, 128), (96, 128), dtype=BF16, device="cuda", weight=weight)
        assert got.backend == "cuda" and "compiled and emulated, not yet run on hardware" in got.why
