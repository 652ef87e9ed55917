"""The table of backends: who is chosen, why not another, what is forced, and that a fallback is said once."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ramify
from ramify import backends, floors, ops
from ramify.ops import _checks
from ramify.testing.tensors import ancestor_words, random_tree

x = torch.randn(3, 8)
here = "reference" if backends.missing("cpu") else "cpu"


def test_first_that_takes_the_call():
    assert backends.choose("silu_mul", "cpu", dtype=torch.bfloat16) == here
    assert backends.choose("tree_attention", "cpu", dtype=torch.float32, D=64, kv=torch.bfloat16) == here
    assert backends.choose("tree_attention", "cpu", dtype=torch.float32, D=80, kv=torch.float32) == "reference"
    assert backends.choose("kv_commit", "cpu", dtype=torch.float16) == "reference"
    assert backends.choose("linear", "cuda", dtype=torch.float32, weight=torch.float32) == "reference"


def test_setter_and_context_manager():
    with ramify.backend("reference"):
        assert backends.forced() == "reference" and backends.choose("silu_mul", "cpu", dtype=torch.float32) == "reference"
        with ramify.backend(None):
            assert backends.choose("silu_mul", "cpu", dtype=torch.float32) == here
        assert backends.forced() == "reference"
    assert backends.forced() is None
    with pytest.raises(RuntimeError), ramify.backend("reference"):
        raise RuntimeError
    assert backends.forced() is None
    ramify.backend("reference")
    assert backends.forced() == "reference"
    ramify.backend(None)
    assert backends.forced() is None
    with pytest.raises(ValueError, match='backend: name is "gpu"; takes "cpu" or "triton" or "cuda" or "reference"'):
        ramify.backend("gpu")


def test_forced_backend_that_cannot():
    with ramify.backend("triton"), pytest.raises(ValueError, match='silu_mul: backend "triton" was forced and cannot run this call'):
        ops.silu_mul(x)
    with ramify.backend("cpu"), pytest.raises(ValueError, match=r"dtype is float64, takes float32 or bfloat16.*takes reference\. Use"):
        ops.silu_mul(x.double())
    with ramify.backend("cpu"):  # an op that has only its plain form runs it
        assert ops.merge_states(x, x[:, 0], x, x[:, 0])[0].shape == x.shape


def test_fallback_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(backends, "_chosen", {})
    with caplog.at_level(logging.WARNING, logger="ramify"):
        for _ in range(3):
            ops.silu_mul(x.double())
            ops.silu_mul(x.half())
            ops.merge_states(x, x[:, 0], x, x[:, 0])
            ramify.backend(None)  # forgets what was chosen, not what was said
    assert [r.getMessage() for r in caplog.records] == [
        "silu_mul on cpu float64 runs on the reference (cpu: dtype is float64, takes float32 or bfloat16).",
        "silu_mul on cpu float16 runs on the reference (cpu: dtype is float16, takes float32 or bfloat16).",
    ]


def test_environment(monkeypatch):
    for name, taken in (("reference", "reference"), ("", None)):
        monkeypatch.setattr(backends, "_environment_read", False)
        monkeypatch.setenv("RAMIFY_BACKEND", name)
        assert backends.forced() == taken
    monkeypatch.setattr(backends, "_environment_read", False)
    monkeypatch.setenv("RAMIFY_BACKEND", "gpu")
    with pytest.raises(ValueError, match='RAMIFY_BACKEND is "gpu"; takes "cpu" or'):
        backends.forced()
    monkeypatch.delenv("RAMIFY_BACKEND")
    assert backends.forced() is None


def test_explain():
    got = ramify.explain("tree_attention", (2, 8, 32, 128), (2, 4096, 8, 128), dtype=torch.bfloat16)
    assert got.backend == here
    assert got.bytes == 2 * (2 * 2 * 4096 * 8 * 128) + 2 * 2 * (2 * 8 * 32 * 128)  # K and V once, q in, o out
    assert got.flops == 4 * 2 * 8 * 32 * 128 * 4096
    assert "tree_attention runs on" in str(got) and "floor:" in str(got) and "triton does not: " in str(got)
    assert ramify.explain("tree_attention", (2, 8, 32, 80)).backend == "reference"
    assert "D is 80, takes 64, 96, 128 or 256" in str(ramify.explain("tree_attention", (2, 8, 32, 80)))
    assert "give the shapes of q, k" in str(ramify.explain("tree_attention", (2, 8, 32, 80)))
    paged = ramify.explain("tree_attention", (2, 8, 32, 128), (128, 64, 8, 128), dtype=torch.bfloat16)
    assert (paged.bytes, paged.flops) == (got.bytes, got.flops)
    linear = ramify.explain("linear", (5, 64), (96, 64), weight=torch.bfloat16)
    assert (linear.bytes, linear.flops) == (2 * 96 * 64 + 4 * 5 * (64 + 96), 2 * 5 * 96 * 64)
    with ramify.backend("reference"):
        assert ramify.explain("silu_mul", (3, 8)).why == "it is forced"
    with pytest.raises(ValueError, match='explain: op is "tree_atention"; takes "tree_attention"'):
        ramify.explain("tree_atention")


def test_explain_refuses_what_plays_no_part():
    bad = [
        (ValueError, ("linear", (5, 64), (96, 63)), {}, "explain: weight is [96, 63]; takes [N, K], K = 64."),
        (ValueError, ("linear", (), (96, 63)), {}, "explain: x is []; takes [..., K]."),
        (ValueError, ("tree_attention", (2, 3)), {}, "explain: q is [2, 3]; takes [B, T, Hq, D]."),
        (
            ValueError,
            ("tree_attention", (2, 3, 4, 64), (2, 9, 2, 32)),
            {},
            "explain: k is [2, 9, 2, 32]; takes [pages, page, Hkv, D], D = 64.",
        ),
        (TypeError, ("rms_norm", 5), {}, "explain: shape 0 is 5; takes a tuple of whole numbers of 1 or more, as x.shape is."),
        (TypeError, ("rms_norm", (2, 0)), {}, "explain: shape 0 is (2, 0); takes a tuple of whole numbers of 1 or more, as x.shape is."),
        (TypeError, ("rms_norm", (2, 8), "x"), {}, 'explain: shape 1 is "x"; takes a tuple of whole numbers of 1 or more, as x.shape is.'),
        (ValueError, ("rms_norm",), {"heads": 3}, "explain: heads is 3, and rms_norm asks for no heads; takes dtype, device, weight, H."),
        (
            ValueError,
            ("linear",),
            {"kv": torch.float32},
            "explain: kv is torch.float32, and linear asks for no kv; takes dtype, device, weight, activations.",
        ),
        (TypeError, ("tree_attention",), {"D": "64"}, 'explain: D is "64"; takes a whole number.'),
        (TypeError, ("tree_attention",), {"kv": "bf16"}, 'explain: kv is "bf16"; takes a dtype.'),
        (ValueError, ("linear",), {"weight": "int3"}, 'explain: weight is "int3"; takes "int8" or '),
        (TypeError, ("linear",), {"weight": 4}, "explain: weight is 4; takes a dtype or a format."),
        (TypeError, ("linear",), {"dtype": "bf16"}, 'explain: dtype is "bf16"; takes a torch.dtype.'),
        (ValueError, ("linear",), {"device": "tpu-9"}, 'explain: device is "tpu-9"; takes "cpu" or "cuda".'),
        (ValueError, (5,), {}, "explain: op is 5; takes "),
        (ValueError, (torch.zeros(3),), {}, "explain: op is tensor([0., 0., 0.]); takes "),
    ]
    for kind, args, kwargs, said in bad:
        with pytest.raises(kind) as error:
            ramify.explain(*args, **kwargs)
        assert str(error.value).startswith(said) and "\n" not in str(error.value), str(error.value)
    assert ramify.explain("silu_mul", x.shape, device="cuda:0").others["cpu"] == "tensors are on cuda"
    assert ramify.explain("linear", (5, 64), (96, 64), (96,)).bytes  # shapes behind those that the floor needs are fine


@pytest.mark.parametrize("op", backends.OPS)
def test_every_floor_is_a_number(op):
    sizes = {"...": (3,), "K": (8,), "B": (2,), "2F": (6,)}  # any other letter is 64
    shapes = [sum((sizes.get(letter, (64,)) for letter in axes.split()), ()) for axes in floors.FLOORS[op][0].values()]
    got = ramify.explain(op, *shapes)
    assert got.bytes > 0 and got.flops >= 0 and got.backend in backends.BACKENDS
    assert ramify.explain(op).bytes is None


def test_params_name_what_runs():
    params = {p.id: p for p in backends.params("silu_mul")}
    assert set(params) == {"cpu", "cuda", "triton", "reference"} and params["reference"].values[0].device == "cpu"
    for name in ("cpu", "triton"):
        assert bool(params[name].marks) == bool(backends.missing(name))


def test_limits_are_those_of_the_kernels():
    source = (Path(__file__).parents[2] / "csrc/common/args.h").read_text()
    assert f"kMaxTopK = {backends.MAX_TOPK};" in source


WITHOUT = """if True:
    import sys
    sys.modules["ramify._cpu"] = None  # as if it were not there
    import torch, ramify
    from ramify import ops
    from ramify.testing.tensors import attention_case
    case = attention_case([30, 5], 20, tail_rows=[20, 3])
    lse = torch.zeros(case.q.shape[:3])
    def tried(call):
        try: return tuple(call().shape)
        except (ValueError, RuntimeError) as error: return f"{type(error).__name__}: {error}"
    for bit in (None, 7, 2):
        if bit is not None: case.ancestors[1, 2, 0] ^= 1 << bit  # sees a later row; then does not see itself either
        print(tried(lambda: ops.tree_attention(*case.tensors, **case.options)))
        print(tried(lambda: ops.attention_colsum(case.q, case.k, lse, case.prefix_len, ancestors=case.ancestors, window=9,
                                                 tail_rows=case.tail_rows)))
    print(tried(lambda: ramify.load("zoo")))
"""


def test_a_build_without_cpu_kernels_checks_values_and_says_what_a_model_lacks():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *ran, load = done.stdout.splitlines()
    assert ran[:2] == ["(2, 20, 4, 64)", "(2, 2, 35)"]
    for tree, colsum in zip(ran[2::2], ran[3::2]):
        assert tree.startswith("ValueError: tree_attention: ancestors[1, 2] is ")
        assert colsum.startswith("ValueError: attention_colsum: ancestors[1, 2] is ")
    assert load.startswith("RuntimeError: ramify._cpu is not built, ") and 'or load the model with device="cuda".' in load


@pytest.mark.skipif(bool(backends.missing("cpu")), reason="needs the CPU kernels")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), B=st.integers(1, 3), T=st.integers(1, 130), more=st.integers(0, 1), ragged=st.booleans())
def test_ancestor_words_are_judged_alike_with_and_without_the_cpu_kernels(data, B, T, more, ragged):
    W = -(-T // 64) + more
    words = torch.stack([ancestor_words(random_tree(T), W) for _ in range(B)])
    used = torch.tensor(data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B)), dtype=torch.int32) if ragged else None
    bits = st.tuples(st.integers(0, B - 1), st.integers(0, T - 1), st.integers(0, 64 * W - 1))
    for b, i, j in data.draw(st.lists(bits, max_size=3)):
        words[b, i, j // 64] ^= torch.ones((), dtype=torch.int64) << j % 64
    assert _checks._first_wrong(words, used) == backends.native().check_words(words, used)
