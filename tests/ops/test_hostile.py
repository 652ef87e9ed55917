"""Arguments that somebody tries in order to break an op: each is refused in one line, or answered like the plain tensors it stands for.

No crash, no number out of nothing. How tensors of a wrong shape or dtype are refused is in test_library.py.
"""

import warnings

import pytest
import torch

from ramify import ops, reference
from ramify.testing.tensors import attention_case

I32, NAN, INF = torch.int32, float("nan"), float("inf")


def refused(error, told, call, *args, **options):
    """The call raises this error, one line long, that says this."""
    with pytest.raises((ValueError, TypeError)) as raised:
        call(*args, **options)
    said = str(raised.value)
    assert told in said and "\n" not in said
    assert type(raised.value) is error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tree(device=None):
    """A root with two children, as verify_greedy and verify_sample take it: tokens, parents, n_rows."""
    return torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 0, 0]]), torch.tensor([3], dtype=I32)


def sampled(**changed):
    """Arguments of verify_sample for that tree."""
    tokens, parents, n_rows = tree()
    one = torch.ones(1, dtype=torch.int64)
    args = {"logits": torch.randn(1, 3, 8), "tokens": tokens, "parents": parents, "n_rows": n_rows, "temperature": torch.ones(1)}
    return {**args, "seed": one, "position": one, "q": torch.rand(1, 3, 8), "mode": "wor", **changed}


def attending(**changed):
    """Arguments of tree_attention."""
    case = attention_case([9], 2, 2, 1, 64)
    names = ("q", "k", "v", "tail_k", "tail_v", "ancestors", "prefix_len")
    return {**dict(zip(names, case.tensors, strict=True)), **changed}


def odd(x):
    """Tensors that are no plain ones, by what they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "nested": torch.nested.nested_tensor([x, x]),
            "jagged": torch.nested.nested_tensor([x, x], layout=torch.jagged),
            "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "sparse": x.to_sparse(),
            "mkldnn": x.to_mkldnn(),
        }


@pytest.mark.parametrize("kind", odd(torch.ones(3, 4)))
def test_tensors_of_another_kind(kind):
    wrong = odd(torch.ones(3, 4))[kind]
    calls = {
        "x": lambda: ops.rms_norm(wrong, torch.ones(4)),
        "weight": lambda: ops.rms_norm(torch.ones(3, 4), wrong),
        "out": lambda: ops.rms_norm(torch.ones(3, 4), torch.ones(4), out=wrong),
        "logits": lambda: ops.row_stats(wrong),
        "table": lambda: ops.embed(torch.zeros(2, dtype=I32), wrong),
        "k_cache": lambda: ops.kv_append(*torch.ones(2, 1, 1, 1, 4), wrong, torch.ones(1, 8, 1, 4), torch.zeros(1, dtype=I32)),
    }
    for name, call in calls.items():
        refused(TypeError, f": {name} is a ", call)


def test_numbers_that_are_none():
    x, w, logits = torch.randn(3, 4), torch.ones(4), torch.randn(2, 9)
    for eps in (-1.0, -1e-30, NAN, INF, 10**400):
        refused(ValueError, "rms_norm: eps is ", ops.rms_norm, x, w, eps=eps)
    for eps in ("x", None, True, 1j, torch.tensor(1e-6)):
        refused(TypeError, "rms_norm: eps is ", ops.rms_norm, x, w, eps=eps)
    for k in (True, 1.0, "1", None, torch.tensor(1)):
        refused(TypeError, "topk_logits: k is ", ops.topk_logits, logits, k)
    for k in (0, -1, 10, 1 << 70):
        refused(ValueError, "topk_logits: k is ", ops.topk_logits, logits, k)
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", float):
        refused(TypeError, "embed: dtype is ", ops.embed, torch.zeros(2, dtype=I32), x, dtype=dtype)
    for name, wrong in {"scale": NAN, "window": 0, "sink": -1}.items():
        refused(ValueError, f"tree_attention: {name} is ", ops.tree_attention, **attending(**{name: wrong}))
    for name in ("scale", "window", "sink"):
        refused(TypeError, f"tree_attention: {name} is ", ops.tree_attention, **attending(**{name: True}))


def test_axes_of_no_size():
    none = torch.zeros(1, 2, 1, 0)
    heads = {name: none for name in ("q", "tail_k", "tail_v")} | {name: torch.zeros(1, 9, 1, 0) for name in ("k", "v")}
    refused(ValueError, "with D of 1 or more", ops.tree_attention, **attending(**heads))
    pages = {"k": torch.zeros(3, 0, 1, 64), "v": torch.zeros(3, 0, 1, 64), "page_table": torch.zeros(1, 2, dtype=I32)}
    refused(ValueError, "with page of 1 or more", ops.tree_attention, **attending(**pages))
    cache, rows, length = torch.zeros(3, 0, 1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, dtype=I32)
    table = torch.zeros(1, 2, dtype=I32)
    refused(ValueError, "with page of 1 or more", ops.kv_append, rows, rows, cache, cache.clone(), length, page_table=table)
    angles = torch.zeros(0, 2)
    refused(ValueError, "rope: cos is [0, 2]; takes one position or more", ops.rope, torch.zeros(3, 1, 4), angles, angles, torch.arange(3))


def test_a_caller_who_wants_gradients():
    """An op has none: it says so when they are asked for, not with a gradient that is missing a part."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.nn.Parameter(torch.ones(4))
    for y in (ops.rms_norm(x, w), ops.rms_norm(x, w, x)[1]):
        with pytest.raises(NotImplementedError, match="^rms_norm: backward is not built; .*ramify.reference.rms_norm") as raised:
            (y.sum() + x.sum()).backward()
        assert "\n" not in str(raised.value)
    assert torch.equal(ops.rms_norm(x, w), ops.rms_norm(x.detach(), w.detach()))
    with torch.no_grad():
        assert not ops.rms_norm(x, w).requires_grad
    assert not ops.rms_norm(x, w, out=torch.zeros(3, 4)).requires_grad
    refused(ValueError, "rms_norm: out requires gradients", ops.rms_norm, x, w, out=torch.zeros(3, 4, requires_grad=True))
    whole, part = ops.rms_norm(x, w), reference.rms_norm(x, w)
    torch.testing.assert_close(whole, part)
    part.sum().backward()
    assert x.grad is not None


def test_caches_that_want_gradients():
    cache, rows = torch.zeros(1, 8, 1, 4, requires_grad=True), torch.ones(1, 2, 1, 4)
    other, length = torch.zeros(1, 8, 1, 4), torch.zeros(1, dtype=I32)
    refused(ValueError, "kv_append: k_cache requires gradients", ops.kv_append, rows, rows, cache, other, length)
    with torch.no_grad():
        ops.kv_append(rows, rows, cache, other, length)
    assert cache[0, :2].eq(1).all() and cache[0, 2:].eq(0).all()


def test_greedy_walks_of_ids_beyond_int32():
    tokens, parents, n_rows = tree()
    argmax = torch.tensor([[2, 7, 7]])
    path, count, bonus = ops.verify_greedy(tokens, parents, argmax, n_rows)
    assert (path.tolist(), count.tolist(), bonus.tolist()) == ([[0, 1, -1]], [2], [7])
    for far in (1 << 31, -(1 << 31) - 1, 1 << 40):
        told = f"verify_greedy: argmax holds {far}; takes"
        refused(ValueError, told, ops.verify_greedy, tokens, parents, torch.full_like(argmax, far), n_rows)
    far = 1 << 40  # a token that no argmax can be is a guess that fails
    assert ops.verify_greedy(tokens + far, parents, argmax, n_rows)[1].tolist() == [1]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"temperature": torch.tensor([NAN])}, "temperature is [nan]; takes 0 or more, finite."),
        ({"temperature": torch.tensor([INF])}, "temperature is [inf]; takes 0 or more, finite."),
        ({"temperature": torch.tensor([-1.0])}, "temperature is [-1.0]; takes 0 or more, finite."),
        ({"position": torch.tensor([-5])}, "position is [-5]; takes 0 or more."),
        ({"tokens": torch.tensor([[1, 2, 8]])}, "tokens[0, 2] is 8; takes 0 to 7"),
        ({"tokens": torch.tensor([[1, -2, 3]])}, "tokens[0, 1] is -2; takes 0 to 7"),
        ({"logits": torch.full((1, 3, 8), NAN)}, "logits[0, 0] hold NaN or +inf, or -inf alone; takes"),
        ({"logits": torch.full((1, 3, 8), INF)}, "logits[0, 0] hold NaN"),
        ({"logits": torch.full((1, 3, 8), -INF)}, "logits[0, 0] hold NaN"),
        ({"logits": torch.full((1, 3, 8), NAN), "temperature": torch.zeros(1)}, "logits[0, 0] hold NaN"),
        ({"logits": torch.full((1, 3, 8), NAN), "mode": "det"}, "logits[0, 0] hold NaN"),
        ({"q": torch.full((1, 3, 8), NAN)}, "q[0, 0] holds nan; takes finite weights of 0 or more"),
        ({"q": torch.full((1, 3, 8), INF)}, "q[0, 0] holds inf; takes"),
        ({"q": torch.full((1, 3, 8), -0.5), "mode": "iid"}, "q[0, 0] holds -0.5; takes"),
        ({"q": torch.zeros(1, 3, 8)}, "q[0, 0] holds no weight; takes"),
        ({"mode": "x"}, 'mode is "x"; takes'),
        ({"mode": None}, "mode is None; takes"),
    ],
    ids=str,
)
def test_samples_of_what_is_no_law(changed, told):
    refused(ValueError, f"verify_sample: {told}", ops.verify_sample, **sampled(**changed))


def test_rows_that_no_walk_visits_may_hold_anything():
    """As when a grammar masks all that could follow a guess that it forbids."""
    logits, q = torch.randn(1, 3, 8), torch.full((1, 3, 8), NAN)
    logits[0, 0, 5], logits[0, 1:], q[0, 0] = INF, NAN, torch.full((8,), 0.125)
    logits[0, 0] = torch.where(torch.arange(8) == 5, 0.0, -INF)  # 5 alone, and no child holds it
    path, count, bonus = ops.verify_sample(**sampled(logits=logits, q=q))
    assert (path.tolist(), count.tolist(), bonus.tolist()) == ([[0, -1, -1]], [1], [5])
    path, count, bonus = ops.verify_sample(**sampled(logits=logits, mode="det", tokens=torch.tensor([[1, 99, -3]])))
    assert (count.tolist(), bonus.tolist()) == ([1], [5])


@pytest.mark.parametrize(
    ("p", "q", "u", "told"),
    [
        (NAN, 0.5, 0.5, "p holds nan; takes finite weights of 0 or more."),
        (INF, 0.5, 0.5, "p holds inf; takes"),
        (-0.5, 0.5, 0.5, "p holds -0.5; takes"),
        (0.5, NAN, 0.5, "q holds nan; takes"),
        (0.5, -1.0, 0.5, "q holds -1.0; takes"),
        (0.0, 0.5, 0.5, "p[0] holds no weight above 0; takes one or more."),
        (0.5, 0.5, 1.0, "u holds 1.0; takes 0 up to and without 1."),
        (0.5, 0.5, -0.5, "u holds -0.5; takes 0 up to and without 1."),
        (0.5, 0.5, NAN, "u holds nan; takes 0 up to and without 1."),
    ],
)
def test_draws_from_what_is_no_law(p, q, u, told):
    args = torch.full((2, 3), p), torch.full((2, 3), q), torch.full((2,), u).double()
    refused(ValueError, f"residual_sample: {told}", ops.residual_sample, *args)


def test_packed_weights_made_by_hand():
    x, weight = torch.randn(3, 64), torch.randn(5, 64)
    packed = ops.PackedWeight.of(weight)
    for wrong in (None, [[1.0]], 5):
        refused(TypeError, "PackedWeight.of: weight is ", ops.PackedWeight.of, wrong)
        refused(TypeError, "PackedWeight: panels is ", ops.PackedWeight, wrong, 5, 64)
    refused(TypeError, 'PackedWeight: N is "5"', ops.PackedWeight, packed.panels, "5", 64)
    for N, K in ((-5, 64), (5, 0), (1 << 70, 64), (33, 64), (5, 63)):
        refused(ValueError, "PackedWeight: ", ops.PackedWeight, packed.panels, N, K)
    refused(ValueError, "PackedWeight: panels is [10]", ops.PackedWeight, torch.randn(10), 5, 64)
    refused(TypeError, "PackedWeight: panels is float64", ops.PackedWeight, packed.panels.double(), 5, 64)
    same = ops.PackedWeight(packed.panels, 5, 64)
    assert torch.equal(same.unpack(), weight) and torch.equal(ops.linear(x, same), ops.linear(x, packed))


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"format": "int5"}, ValueError, 'quantize_weight: format is "int5"; takes int8'),
        ({"zero_point": "no"}, TypeError, 'quantize_weight: zero_point is "no"; takes True or False.'),
        ({"group": True}, TypeError, "quantize_weight: group is True; takes a whole number."),
        ({"method": "gptq", "hessian": 5}, TypeError, "quantize_weight: hessian is 5; takes a float tensor [64, 64]"),
        ({"method": "gptq", "hessian": torch.ones(64, 64, dtype=I32)}, TypeError, "quantize_weight: hessian is "),
        ({"method": "gptq", "hessian": torch.full((64, 64), NAN)}, ValueError, "quantize_weight: hessian is [64, 64]; takes"),
        ({"hessian": torch.eye(64)}, ValueError, 'quantize_weight: hessian is given and method is "rtn"; takes it with "gptq"'),
        ({"w": torch.ones(32, 64, device="meta")}, ValueError, "quantize_weight: w is on meta; takes a tensor that has values."),
        ({"w": torch.full((32, 64), 1e200, dtype=torch.float64)}, ValueError, "quantize_weight: w holds NaN"),
        ({"w": torch.full((32, 64), NAN)}, ValueError, "quantize_weight: w holds NaN"),
        ({"w": torch.ones(32, 64).to_sparse()}, TypeError, "quantize_weight: w is a sparse_coo tensor"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_quantised(changed, error, told):
    refused(error, told, ops.quantize_weight, **{"w": torch.randn(32, 64), **changed})


@pytest.mark.parametrize("format", ["int4", "int4-g32-zp", "int8", "fp8", "fp8-b128"])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30, 3e38])
def test_weights_at_the_ends_of_float32(format, size):
    """However large or small the numbers of a row: a format gives back what its codes can say, or refuses."""
    w = torch.randn(32, 256).clamp(-1, 1) * size
    try:
        got = ops.quantize_weight(w, format).dequantize()
    except ValueError as error:
        assert "quantize_weight: w holds" in str(error)
        return
    assert got.isfinite().all()
    assert (got - w).abs().max() <= 0.5 * size
