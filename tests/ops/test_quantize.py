"""quantize_weight: error bounds of every format and method, exactness, determinism, and what it refuses."""

import pytest
import torch

from ramify import ops
from ramify.quant import METHODS, Format, QuantizedWeight, gptq, grid, hqq, quantize, rtn
from ramify.quant.formats import ALL

INT4 = [format for format in ALL if format.kind == "int4"]
BY_NAME = {"ids": lambda value: getattr(value, "name", value)}


def weight(N=37, K=256, seed=0, scale=0.02):
    """Gaussian weights with an outlier in some rows, as real ones have."""
    g = torch.Generator().manual_seed(seed)
    w = scale * torch.randn(N, K, generator=g)
    w[::5, 7] *= 12
    return w


def hessian(K=256, seed=0, rank=40, tokens=2000):
    """2 X^T X of inputs that move together."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, rank, generator=g) @ torch.randn(rank, K, generator=g) + 0.3 * torch.randn(tokens, K, generator=g)
    return 2 * X.T @ X / tokens


def made_by(method, format, K=256):
    """Whether a method takes a format."""
    return method != "hqq" or format.kind == "int4"


CASES = [(method, format) for method in METHODS for format in ALL if made_by(method, format)]


def plain_step(w, format):
    """Distance between neighbouring codes of the simplest symmetric rounding, for every weight; fp8's is that of its largest codes."""
    peak = w.abs()
    if format.kind == "fp8" and format.group:
        N, K = w.shape
        peak = torch.nn.functional.pad(peak, (0, -K % 128, 0, -N % 128)).unfold(0, 128, 128).unfold(1, 128, 128).amax((2, 3))
        peak = peak.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    elif format.group:
        peak = peak.view(len(w), -1, format.group).amax(2, keepdim=True).expand(-1, -1, format.group).reshape(w.shape)
    else:
        peak = peak.amax(1, keepdim=True).expand_as(w)
    return peak / {"int8": 127, "int4": 7, "fp8": 14}[format.kind]  # fp8: the top codes 416 and 448 lie 1/14 of the largest apart


@pytest.mark.parametrize("format", ALL, **BY_NAME)
def test_rtn_is_within_half_a_step(format):
    """int8 and fp8: every weight. int4: in the mean of every group, whose extreme a search may clip, and below that of no search."""
    w = weight(N=133)
    error = rtn.quantize(w, format).dequantize() - w
    step = plain_step(w, format)
    if format.kind == "int4":
        groups = error.square().view(133, -1, format.group).sum(2)
        step = step.view(133, -1, format.group)[..., 0]
        assert (groups <= 1.01 * format.group * (step / 2) ** 2).all()  # 1%: float16 scales
        if format.zero_point:
            low, high = (getattr(w.view(133, -1, format.group), end)(2) for end in ("amin", "amax"))
            assert (groups <= 1.01 * format.group * ((high - low) / 30) ** 2).all()
        else:
            plain = ((w.view(133, -1, format.group) / step[..., None]).round() * step[..., None] - w.view(133, -1, format.group)).square()
            assert (groups <= 1.01 * plain.sum(2)).all() and groups.sum() < 0.8 * plain.sum()
    else:
        assert (error.abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("format", INT4, **BY_NAME)
def test_fitting_leaves_less_error_in_every_group(format, monkeypatch):
    """Beside the search alone."""
    w = weight(N=133)

    def errors():
        return (rtn.quantize(w, format).dequantize() - w).square().view(-1, format.group).sum(1)

    fitted = errors()
    monkeypatch.setattr(grid, "REFITS", 0)
    searched = errors()
    assert (fitted <= searched * (1 + 1e-5)).all() and fitted.sum() < 0.998 * searched.sum()


def test_int8_against_a_plain_reference():
    w = weight(N=5, K=33)
    q = quantize(w, Format("int8"))
    scale = w.abs().amax(1, keepdim=True) / 127
    assert torch.equal(q.scale, scale) and torch.equal(q.codes, (w / scale).round().to(torch.int8))
    assert int(q.codes.abs().max()) == 127


@pytest.mark.parametrize("format", ALL, **BY_NAME)
def test_representable_weights_come_back_exactly(format):
    """Weights that are codes times a scale, the largest code among them in every group."""
    g = torch.Generator().manual_seed(3)
    N, K = 130, 256
    scale = (2.0 ** torch.randint(-8, -5, format.scale_shape(N, K), generator=g)).to(torch.float16)
    if format.kind == "fp8":
        codes = torch.randn(N, K, generator=g).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        codes[:, ::128] = 448
        zero = None
    else:
        low, high = (0, 16) if format.kind == "int4" else (-127, 128)
        codes = torch.randint(low, high, (N, K), generator=g).float()
        codes[:, ::32], codes[:, 1::32] = low, high - 1
        zero = torch.randint(1, 15, scale.shape, generator=g).half() if format.zero_point else None
    stored = grid.packed(codes, scale if format.kind == "int4" else scale.float(), zero, format)
    w = stored.dequantize()
    again = quantize(w, format)
    assert torch.equal(again.dequantize(), w)
    assert torch.equal(again.scale.abs().float(), stored.scale.float())


@pytest.mark.parametrize(("method", "format"), CASES, **BY_NAME)
def test_every_method_is_deterministic_and_ragged(method, format):
    for N in (1, 2, 5, 131):
        K = 256 if format.kind == "int4" else 193
        w, H = weight(N, K, seed=N), hessian(K)
        one, two = (quantize(w, format, method, H) for _ in range(2))
        assert one.shape == (N, K) and one.format == format
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor.view(torch.uint8), two.state_dict()[name].view(torch.uint8)), name
        relative = float((one.dequantize() - w).norm() / w.norm())
        assert relative < (0.5 if format.kind == "int4" else 0.15)  # gptq trades weight error for output error
        assert one.scale.dtype == (torch.float16 if format.kind == "int4" else torch.float32)


def test_input_is_left_alone_and_dtypes_agree():
    for N, K in ((37, 256), (1, 256), (7, 128)):
        w, H = weight(N, K).bfloat16(), hessian(K)
        wide, before, hessian_before = w.float(), w.clone(), H.clone()
        for method in METHODS:
            as_float, as_bf16 = (quantize(each, Format("int4", 128), method, H) for each in (wide, w))
            assert torch.equal(as_float.codes, as_bf16.codes)
        assert torch.equal(w, before) and torch.equal(wide, before.float()) and torch.equal(H, hessian_before)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3, 1.0, 1e5, 1e15])
@pytest.mark.parametrize("format", ALL, **BY_NAME)
def test_any_magnitude(format, scale):
    """Scales leave float16 where it would round them away or overflow."""
    w = weight(scale=scale)
    error, usual = (rtn.quantize(each, format).dequantize() - each for each in (w, weight(scale=1.0)))
    assert torch.isfinite(error).all()
    assert float(error.norm()) <= 1.02 * scale * float(usual.norm())


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_zeros_and_constants(method):
    for format in INT4:
        w = weight(6)
        w[0], w[1], w[2, :128] = 0, 0.5, 0
        q = quantize(w, format, method, torch.eye(256)).dequantize()
        assert torch.equal(q[0], w[0]) and torch.equal(q[2, :128], w[2, :128])
        torch.testing.assert_close(q[1], w[1], rtol=1e-3, atol=0)


# ---- hqq ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", INT4, **BY_NAME)
def test_hqq_is_never_worse_than_rtn_in_its_norm(format):
    w = weight(64, seed=2)

    def norms(q):
        return (q.dequantize() - w).abs().pow(hqq.POWER).view(-1, format.group).sum(1)

    mine, plain = norms(hqq.quantize(w, format)), norms(rtn.quantize(w, format))
    assert (mine <= plain * (1 + 1e-5)).all() and mine.sum() < 0.99 * plain.sum()


def test_hqq_zeros_are_fractional():
    zero = hqq.quantize(weight(), Format("int4", 64, zero_point=True)).zero
    assert float((zero - zero.round()).abs().max()) > 0.1


# ---- gptq ---------------------------------------------------------------------------------------------------------


def output_error(q, w, H):
    error = q.dequantize() - w
    return float(((error @ H) * error).sum())


@pytest.mark.parametrize("format", ALL, **BY_NAME)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rtn_on_correlated_inputs(format, act_order):
    for seed in range(3):
        w, H = weight(seed=seed), hessian(seed=seed)
        mine = output_error(gptq.quantize(w, format, H, act_order=act_order), w, H)
        assert mine < 0.4 * output_error(rtn.quantize(w, format), w, H)


@pytest.mark.parametrize("format", ALL, **BY_NAME)
def test_gptq_with_independent_inputs_is_rtn(format):
    """Nothing to make up for: a diagonal Hessian gives the codes of rounding to nearest."""
    w = weight(140)
    mine, plain = gptq.quantize(w, format, torch.eye(256), act_order=False), rtn.quantize(w, format)
    assert torch.equal(mine.dequantize(), plain.dequantize()) and torch.equal(mine.scale, plain.scale)


def slow_gptq(w, scale, H, damp):
    """The published recurrence in double, int8 rows: after each column, the rest and the inverse are updated by hand."""
    K = w.shape[1]
    w, inverse = w.double().clone(), torch.linalg.inv(H.double() + damp * H.double().diagonal().mean() * torch.eye(K))
    q = torch.zeros_like(w)
    for k in range(K):
        q[:, k] = (w[:, k] / scale[:, 0]).round().clamp(-127, 127)
        error = (w[:, k] - q[:, k] * scale[:, 0]) / inverse[0, 0]
        w[:, k + 1 :] -= error[:, None] * inverse[0, 1:]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return q


def test_gptq_is_the_published_recurrence():
    """Blocks and the Cholesky factor change nothing but rounding: nearly all codes agree, none by more than a step or so."""
    w, H = weight(9, 200), hessian(200)
    q = gptq.quantize(w, Format("int8"), H, act_order=False)
    difference = (q.codes - slow_gptq(w, q.scale.double(), H, 0.01)).abs()
    assert float((difference > 0).double().mean()) < 0.02 and difference.max() <= 2


def test_act_order_sorts_by_the_diagonal_and_groups_after_it():
    w, H = weight(), hessian()
    H = H * torch.linspace(0.1, 3, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(1))].outer(torch.ones(256)).sqrt()
    H = (H + H.T) / 2 + 50 * torch.eye(256)
    q = gptq.quantize(w, Format("int4", 64), H)
    assert q.perm.dtype == torch.int32
    sorted_diagonal = H.diagonal()[q.perm.long()]
    assert (sorted_diagonal.diff() <= 0).all()
    # The canonical form: column j of the codes multiplies input perm[j].
    plain = QuantizedWeight(q.format, q.codes, q.scale).dequantize()
    assert torch.equal(q.dequantize()[:, q.perm.long()], plain)
    for format in (Format("int8"), Format("fp8"), Format("fp8", 128)):
        assert gptq.quantize(w, format, H).perm is None


def test_inputs_that_calibration_never_used():
    """They keep their weights, to nearest, and disturb nothing."""
    w, H = weight(), hessian()
    dead = torch.arange(0, 256, 16)
    H[dead], H[:, dead] = 0, 0
    q = gptq.quantize(w, Format("int4", 32), H).dequantize()
    assert float((q[:, dead] - w[:, dead]).norm()) < 0.15 * float(w[:, dead].norm())
    nothing = gptq.quantize(w, Format("int4", 32), torch.zeros(256, 256))
    assert torch.equal(nothing.dequantize(), rtn.quantize(w, Format("int4", 32)).dequantize())


def test_too_little_calibration():
    """Fewer tokens than inputs: damping makes it solvable."""
    w, H = weight(), hessian(tokens=3)
    q = gptq.quantize(w, Format("int4", 64), H)
    assert output_error(q, w, H) < 0.2 * output_error(rtn.quantize(w, Format("int4", 64)), w, H)


def test_gptq_refuses():
    w = weight()
    with pytest.raises(ValueError, match='hessian is None; method "gptq" takes'):
        quantize(w, Format("int8"), "gptq")
    for wrong in (torch.eye(255), torch.full((256, 256), float("nan")), torch.ones(256)):
        with pytest.raises(ValueError, match=r"hessian is .*takes \[256, 256\]"):
            quantize(w, Format("int8"), "gptq", wrong)
    with pytest.raises(ValueError, match="positive semidefinite"):
        quantize(w, Format("int8"), "gptq", torch.eye(256) - 2 * torch.ones(256, 256))


# ---- the op -------------------------------------------------------------------------------------------------------


def test_the_op_reads_names_and_arguments():
    w = weight()
    assert ops.quantize_weight(w).format == Format("int4", 64)
    assert ops.quantize_weight(w, group=128, zero_point=True).format == Format("int4", 128, True)
    assert ops.quantize_weight(w, "int4-g32-zp", method="hqq").format == Format("int4", 32, True)
    assert ops.quantize_weight(w, "fp8-b128", method="gptq", hessian=hessian()).format == Format("fp8", 128)
    q = ops.quantize_weight(w, "int4", 32)
    assert q.nbytes == 37 * 128 + 37 * 8 * 2 and q.dequantize().shape == (37, 256)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"format": "int5"}, ValueError, 'format is "int5"; takes int8, int4-g32'),
        ({"format": 4}, TypeError, "format is 4; takes a name"),
        ({"group": 48}, ValueError, "group is 48; int4 takes 32 or 64 or 128"),
        ({"group": "64"}, TypeError, 'group is "64"'),
        ({"method": "awq"}, ValueError, 'method is "awq"; takes "rtn" or "hqq" or "gptq"'),
        ({"format": "int8", "method": "hqq"}, ValueError, 'method "hqq": format is "int8"; takes "int4"'),
        ({"w": torch.zeros(3, 96)}, ValueError, "K = 96; int4-g64 takes multiples of 64"),
        ({"w": torch.zeros(96)}, ValueError, r"w is \[96\]; takes two axes"),
        ({"w": torch.zeros(0, 64)}, ValueError, "none empty"),
        ({"w": torch.zeros(3, 64, dtype=torch.int32)}, TypeError, "w is torch.int32; takes a float"),
        ({"w": [[1.0]]}, TypeError, "w is list"),
        ({"w": torch.full((3, 64), float("inf"))}, ValueError, "NaN or infinity"),
    ],
)
def test_the_op_refuses(arguments, error, says):
    with pytest.raises(error, match=says) as caught:
        ops.quantize_weight(**{"w": weight(), **arguments})
    assert "\n" not in str(caught.value)


# ---- what float16 does not hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "format"), CASES, **BY_NAME)
def test_a_row_far_below_the_others_is_not_lost(method, format):
    """Its scale is no normal float16, so all scales are float32; blocks of fp8 share theirs with other rows. Rows of zeros need none."""
    w = weight(4)
    w[3] = 0
    ordinary = quantize(w, format, method, torch.eye(256)).scale.dtype
    assert ordinary == (torch.float16 if format.kind == "int4" else torch.float32)
    w[1] *= 1e-7
    w[2, :128] *= 1e-7
    made = quantize(w, format, method, torch.eye(256))
    assert made.scale.dtype == torch.float32
    if format.name != "fp8-b128":
        error = made.dequantize() - w
        assert float(error[1].norm() / w[1].norm()) < 0.15 and bool((error[3] == 0).all())
    if format.kind == "int4":
        assert float(error[2, :128].norm() / w[2, :128].norm()) < 0.15


def spread_error(w, format, method="rtn"):
    """Root mean square of the error in every group, as a share of the group's own spread."""
    groups = w.view(-1, format.group)
    error = (quantize(w, format, method, torch.eye(w.shape[1])).dequantize() - w).view(-1, format.group)
    return error.square().mean(1).sqrt() / groups.std(1)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("middle", "most"), [(3, 0.12), (-10, 0.12), (100, 0.12), (-1000, 0.25), (1e4, 1.0)])
def test_zero_points_serve_groups_that_lie_apart_from_zero(middle, most, group):
    """A zero far from the codes gives them the group's own span, as far as its 11 bits and those of the scale go."""
    w = weight(64, scale=1.0, seed=1).clamp(-3, 3) + middle
    assert float(spread_error(w, Format("int4", group, zero_point=True)).mean()) < most


@pytest.mark.parametrize("format", [format for format in INT4 if format.zero_point], **BY_NAME)
@pytest.mark.parametrize(("middle", "spread"), [(1000, 1e-3), (1003.7, 1e-3), (-0.02, 1e-6), (1000, 0.0), (5e4, 1.0), (1e30, 1e22)])
def test_zero_points_are_never_worse_than_none(format, middle, spread):
    """In groups apart from 0, even where neither grid comes near the weights: a zero of 8 is tried too."""
    w = middle + spread * weight(16, scale=1.0)
    with_zero, without = (spread_error(w, each) for each in (format, Format("int4", format.group)))
    assert bool((with_zero <= 1.001 * without)[without.isfinite()].all())
