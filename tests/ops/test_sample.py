"""verify_sample and residual_sample: against the reference, the verifiers themselves, and on every backend with the same numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramify import ops, reference
from ramify.sampling.rng import SAMPLE, uniform
from ramify.testing.tensors import TREES, padded, poisoned, running, runs, sample_case

I32, BF16, F32 = torch.int32, torch.bfloat16, torch.float32


@pytest.mark.parametrize(("backend", "level"), runs("verify_sample"))
@pytest.mark.parametrize("mode", ["det", "iid", "wor"])
@pytest.mark.parametrize(("B", "T", "V", "dtype"), [(1, 1, 9, F32), (2, 13, 300, BF16), (5, 20, 41, F32), (1, 6, 9001, BF16)], ids=str)
def test_against_reference(backend, level, mode, B, T, V, dtype):
    lengths = set()
    for seed in range(3):
        *given, q = sample_case(B, T, V, seed, dtype, mode)
        out = padded(poisoned((B, T), I32)), poisoned((B,), I32), poisoned((B,), I32)
        with running(backend, level):
            path, count, bonus = ops.verify_sample(*given, q, mode=mode, out=out)
        want = reference.verify_sample(*given, q, mode=mode)
        assert torch.equal(path, want[0]) and torch.equal(count, want[1]) and torch.equal(bonus, want[2])
        lengths |= set(count.tolist())
    assert T < 10 or len(lengths) > 1  # the trees were neither always nor never accepted


@pytest.mark.parametrize(("backend", "level"), runs("verify_sample"))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 5), T=st.integers(1, 24), V=st.integers(25, 400), mode=st.sampled_from(["det", "iid", "wor"]),
    tree=st.sampled_from(TREES), dtype=st.sampled_from([F32, BF16]), wide=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_tree(backend, level, B, T, V, mode, tree, dtype, wide, seed):
    logits, tokens, parents, *rest, q = sample_case(B, T, V, seed, dtype, mode, tree)
    if wide:
        tokens, parents = tokens.long(), parents.long()
    with running(backend, level):
        got = ops.verify_sample(logits, tokens, parents, *rest, q, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(got, reference.verify_sample(logits, tokens, parents, *rest, q, mode=mode)))


@pytest.mark.parametrize(("backend", "level"), runs("residual_sample"))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(R=st.integers(0, 6), V=st.integers(1, 3000), zeros=st.booleans(), seed=st.integers(0, 999))
def test_any_residual(backend, level, R, V, zeros, seed):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(R, V, generator=g) for _ in "pq")
    if zeros:
        p *= torch.rand(R, V, generator=g) < 0.2
        p[:, seed % V] = 0.5
    u = torch.rand(R, generator=g, dtype=torch.float64)
    with running(backend, level):
        ids = ops.residual_sample(padded(p), padded(q), u)
    want = reference.residual_sample(p.double(), q.double(), u)
    assert torch.equal(ids.long(), want)


def test_a_chain_of_one_row_is_plain_sampling():
    """The token of a single row is what inverse CDF gives for the seed's own number."""
    logits, _, _, _, _, _, _, _ = sample_case(1, 1, 200, seed=4)
    p = logits[0, 0].double().softmax(-1).cumsum(-1)
    for seed in range(20):
        u = uniform(seed, 12, SAMPLE)
        one, ids = torch.ones(1, dtype=I32), torch.zeros(1, 1, dtype=I32)
        got = ops.verify_sample(logits, ids, ids - 1, one, torch.ones(1), torch.tensor([seed]), one * 12)
        assert got[2].tolist() == [int((p <= u * p[-1]).sum())] and got[1].tolist() == [1]


@pytest.mark.parametrize(("backend", "level"), runs("residual_sample"))
@pytest.mark.parametrize(("R", "V"), [(1, 1), (5, 40), (3, 9001)])
def test_residual(backend, level, R, V):
    g = torch.Generator().manual_seed(V)
    p, q = (torch.randn(R, V, generator=g).softmax(-1) for _ in "pq")
    p[-1] = q[-1]  # nothing is left: p itself is drawn from
    u = torch.rand(R, generator=g, dtype=torch.float64)
    u[0] = 0
    with running(backend, level):
        ids = ops.residual_sample(padded(p), padded(q), u, out=poisoned((R,), I32))
    assert torch.equal(ids.long(), reference.residual_sample(p.double(), q.double(), u))


def test_residual_is_never_a_token_without_weight():
    p, q = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).repeat(3, 1), torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(3, 1)
    u = torch.tensor([0.0, 0.5, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert ops.residual_sample(p, q, u).tolist() == [2, 2, 2]


def test_says_what_it_does_not_take():
    *given, q = sample_case(2, 4, 9)
    names = ("logits", "tokens", "parents", "n_rows", "temperature", "seed", "position")
    good = dict(zip(names, given))
    bad = [
        (TypeError, "seed is int32; takes int64", {"seed": good["seed"].int()}),
        (TypeError, "temperature is float64; takes float32", {"temperature": good["temperature"].double()}),
        (ValueError, "temperature is [", {"temperature": good["temperature"] - 2}),
        (ValueError, 'mode is "greedy"', {"mode": "greedy"}),
        (ValueError, 'q is None and mode is "wor"', {"mode": "wor"}),
        (ValueError, "n_rows[0] is 9; takes 1 to 4", {"n_rows": good["n_rows"] * 0 + 9}),
        (ValueError, "parents[0, 0] is 0; takes -1", {"parents": good["parents"].contiguous() + 1}),
        (ValueError, "tokens is [2, 3]", {"tokens": good["tokens"][:, :3]}),
        (
            ValueError,
            "logits has 257 rows a sequence; takes 1 to 256",
            {
                **{name: torch.zeros(2, 257, dtype=I32) for name in ("tokens", "parents")},
                "logits": torch.zeros(2, 257, 9),
            },
        ),
    ]
    for kind, said, change in bad:
        with pytest.raises(kind) as error:
            ops.verify_sample(**good | change)
        assert said in str(error.value) and str(error.value).startswith("verify_sample: "), str(error.value)
    with pytest.raises(TypeError, match="residual_sample: u is float32; takes float64"):
        ops.residual_sample(q[0], q[0], torch.rand(4))
