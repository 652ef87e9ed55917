"""linear over low-bit weights on the kernels for GPUs: against the reference in double. Triton runs in its interpreter where no GPU is."""

import importlib

import pytest
import torch

import ramify
from ramify import backends, ops
from ramify.quant.formats import ALL
from ramify.testing.linear import assert_linear, every_code, linear_inputs, low_bit_weight
from ramify.testing.tensors import padded, poisoned, running

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = [form.name for form in ALL]
HERE = pytest.mark.parametrize("place", [p for p in backends.params("linear", weight="int4-g64", activations="exact") if p.id == "triton"])


@pytest.fixture
def kernels(monkeypatch):
    """The module of the Triton kernel, made to split a few hundred inputs as it splits thousands."""
    pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module("ramify.kernels.linear_low_bit")
    monkeypatch.setattr(module, "SHORTEST", 64)
    return module


def make_weight(*args, device, **options):
    return low_bit_weight(*args, **options).to(device)


def make(M, weight, dtype, device, seed=0):
    return [tensor.to(device) for tensor in linear_inputs(M, *weight.shape, dtype, seed)]


def check(x, weight, bias=None, activation=None, residual=None):
    out = padded(poisoned((len(x), weight.shape[0]), x.dtype)).to(x.device)
    ops.linear(x, weight, bias, activation=activation, residual=residual, activations="exact", out=out)
    assert_linear(out, x, weight, bias, activation, residual, rounds_zeros=True)


# M, N, K, dtype of x, dtype of scales, epilogue (0 none, 1 bias, 2 all), act-order; the widest rows of codes lie at odd addresses
CASES = [
    (1, 65, 200, BF16, F16, 0, False),
    (2, 1, 1, F16, F32, 1, False),
    (5, 33, 160, F32, F16, 2, True),
    (16, 40, 96, F16, BF16, 2, False),
    (33, 3, 67, BF16, F32, 1, True),
    (128, 5, 33, BF16, F16, 2, False),
]


@HERE
@pytest.mark.parametrize("name", NAMES)
def test_against_reference(place, kernels, name):
    for seed, (M, N, K, dtype, scale_dtype, epilogue, perm) in enumerate(CASES):
        weight = make_weight(name, N, K, scale_dtype, perm, seed, device=place.device)
        x, bias, residual = make(M, weight, dtype, place.device, seed)
        given = [{}, {"bias": bias}, {"bias": bias, "activation": "silu", "residual": residual}][epilogue]
        with running("triton"):
            check(x, weight, **given)


@HERE
@pytest.mark.parametrize("name", ["int4-g32", "int4-g128-zp", "fp8-b128"])
def test_more_inputs_than_a_chunk(place, name):
    """The split that ships, on more than one panel of outputs."""
    weight = make_weight(name, 130 if name == "fp8-b128" else 3, 1152, device=place.device)
    x, bias, residual = make(2, weight, BF16, place.device)
    with running("triton"):
        check(x, weight, bias, "silu", residual)


@HERE
@pytest.mark.parametrize("name", ["int8", "int4-g32-zp", "fp8-b128"])
def test_row_is_its_own(place, kernels, name):
    """Row r of an M-row call has the bits of the call on row r alone, for M up to what one program takes and beyond."""
    weight = make_weight(name, 20, 192, device=place.device)
    x, bias, residual = make(40, weight, BF16, place.device)
    with running("triton"):
        whole = ops.linear(x, weight, bias, residual=residual, activations="exact")
        for M in (1, 7, 16):
            assert torch.equal(ops.linear(x[:M], weight, bias, residual=residual[:M], activations="exact"), whole[:M])


def test_split_is_of_the_weight_alone():
    low_bit = pytest.importorskip("ramify.kernels.linear_low_bit", reason="triton is not installed")
    for N, K in ((1, 1), (64, 511), (4096, 4096), (4096, 14336), (14336, 4096), (128256, 4096), (100, 100000)):
        chunk = low_bit.split(N, K)
        chunks = -(-K // chunk)
        assert chunk % low_bit.STEP == 0 and chunks <= low_bit.MOST and (chunks == 1 or chunk >= low_bit.SHORTEST)
    assert [low_bit.split(*shape) for shape in ((4096, 4096), (14336, 4096), (128256, 4096))] == [512, 832, 4096]


@HERE
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_code(place, dtype):
    """Rows of the unit matrix read the weight back: each code's value, exactly; a NaN code makes its output NaN."""
    for weight in every_code():
        weight = weight.to(place.device)
        with running("triton"):
            got = ops.linear(torch.eye(weight.shape[1], dtype=dtype, device=place.device)[-2:], weight, activations="exact")
        want = weight.dequantize().T[-2:]
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.float().nan_to_num(), want.nan_to_num())


@HERE
@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_rows_that_are_not_finite(place, kernels, name):
    """They are not finite, and their neighbours are what they were."""
    weight = make_weight(name, 10, 128, device=place.device)
    x, *_ = make(6, weight, BF16, place.device)
    with running("triton"):
        clean = ops.linear(x, weight, activations="exact")
        x[1, 5], x[3, 100], x[4] = torch.nan, torch.inf, 0
        got = ops.linear(x, weight, activations="exact")
    assert not got[[1, 3]].isfinite().any() and (got[4] == 0).all()
    assert torch.equal(got[[0, 2, 5]], clean[[0, 2, 5]])


@HERE
def test_an_order_that_names_no_input_gives_nan(place):
    """It is data on a device, so no message can say it; nothing outside x is read."""
    weight = make_weight("int8", 4, 64, device=place.device)
    perm = torch.arange(64, dtype=torch.int32, device=place.device)
    perm[[3, 60]] = torch.tensor([64, -1], dtype=torch.int32, device=place.device)
    x = torch.ones(2, 64, device=place.device)
    with running("triton"):
        got = torch.ops.ramify.linear.low_bit(x, weight.codes, weight.scale, None, perm, None, "int8", None, None, None, "exact")
    assert got.isnan().all()


@HERE
def test_rounded_inputs_are_refused_by_name(place):
    weight, x = make_weight("int4-g64", 4, 64, device=place.device), torch.ones(2, 64, device=place.device)
    for how in ("int8", "int8-group"):
        with running("triton"), pytest.raises(ValueError, match=f'"triton" was forced .* .activations is {how}, takes exact'):
            ops.linear(x, weight, activations=how)


def test_the_table_names_it_on_a_gpu(monkeypatch):
    facts = {"dtype": BF16, "device": "cuda", "weight": "int4-g64"}
    monkeypatch.setattr(backends, "missing", lambda name: "" if name in ("triton", "cpu") else "not here")
    got = ramify.explain("linear", (5, 128), (96, 128), **facts)
    assert got.backend == "triton" and "interpreted and compiled, not yet run on hardware" in got.why
    assert ramify.explain("linear", (5, 128), (96, 128), dtype=F16, device="cuda").backend == "reference"  # a dense weight
    got = ramify.explain("linear", (5, 128), (96, 128), activations="int8", **facts)
    assert got.backend == "reference" and got.others["triton"] == "activations is int8, takes exact"
