"""Sampling against transformers' own processors, and the random numbers against Random123's vectors and the C++ header."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ramify import native
from ramify.sampling.pipeline import Sampling, SamplingParams, draw_children, inverse_cdf, probabilities, weights
from ramify.sampling.rng import ACCEPT, DRAFT, SAMPLE, philox, uniform, uniforms
from ramify.testing.headers import run_cpp

COMMON = Path(__file__).resolve().parents[2] / "csrc" / "common"

OPTIONS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.7, "min_p": 0.2},
    {"top_k": 12, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2},
]


def by_transformers(logits, params, ids):
    """What transformers' generate would sample from, in its own order and with its own conditions."""
    tr = pytest.importorskip("transformers")
    steps = tr.LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(tr.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        steps.append(tr.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(tr.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(tr.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        steps.append(tr.MinPLogitsWarper(params.min_p))
    scores = steps(torch.tensor([ids]), torch.from_numpy(logits.copy())[None])
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_probabilities_are_those_of_transformers(options, temperature):
    rng = np.random.default_rng(7)
    params = SamplingParams(temperature=temperature, **options)
    for V, spread in ((7, 1.0), (50, 3.0), (1000, 2.0), (5000, 4.0), (5000, 0.05), (40_000, 1.0)):
        logits = (spread * rng.standard_normal(V)).astype(np.float32)
        ids = rng.integers(0, V + 3, 40).tolist()  # some ids lie past the rows of the head, as with padded vocabularies
        ids[-1] = ids[0]
        got = probabilities(logits, params, np.array(ids))
        want = by_transformers(logits, params, ids)
        different = np.flatnonzero((got > 0) != (want > 0))
        # the two round differently, so a token whose cumulative mass is top_p itself to 1e-6 may fall on either side
        assert len(different) <= (1 if V > 1000 and params.top_p < 1 else 0)
        assert got.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(np.delete(got, different), np.delete(want, different), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ties_fall_as_in_transformers(options):
    rng = np.random.default_rng(8)
    params = SamplingParams(temperature=0.8, **options)
    for V in (6, 10, 64, 3000):
        for _ in range(10):
            logits = rng.integers(0, 4, V).astype(np.float32)
            logits[rng.integers(0, V)] = -np.inf
            got, want = probabilities(logits, params, np.array([0, 1])), by_transformers(logits, params, [0, 1])
            assert abs(np.count_nonzero(got) - np.count_nonzero(want)) <= (1 if V == 3000 else 0)
            if V < 3000:  # which of equals stay is torch.sort's choice: in order when few, not in order when many
                np.testing.assert_allclose(np.sort(got), np.sort(want), rtol=2e-6)
            if V <= 10:
                np.testing.assert_array_equal(got > 0, want > 0)
    even = np.zeros(10, np.float32)  # ten times 0.1: the edge of top-p lies exactly between two tokens
    np.testing.assert_array_equal(probabilities(even, params, np.array([0])) > 0, by_transformers(even, params, [0]) > 0)


def test_top_p_keeps_the_later_of_equals_wherever_it_is_cut():
    logits = np.zeros(50_000, np.float32)
    logits[:100] = 1
    for top_p in (0.001, 0.2, 0.5, 0.999):
        p = probabilities(logits, SamplingParams(temperature=1, top_p=top_p), np.array([]))
        kept = np.flatnonzero(p)
        order = np.lexsort((np.arange(50_000), logits))  # ascending, the lower id first among equals
        assert sorted(order[-len(kept) :]) == kept.tolist()
        w = np.exp(logits.astype(np.float64))
        assert w[kept].sum() / w.sum() == pytest.approx(top_p, abs=1e-4)


def test_temperature_zero_takes_the_arg_max_after_the_penalty():
    logits = np.array([1.0, 3.0, 2.5, -1.0], np.float32)
    assert Sampling([SamplingParams()], [[1]]).draw(0, logits) == 1
    penal = SamplingParams(repetition_penalty=1.5)
    assert Sampling([penal], [[1]]).draw(0, logits) == 2
    assert Sampling([penal], [[3]]).draw(0, logits, path=[1]) == 2  # the path counts as seen
    assert Sampling([penal], [[3]]).probabilities(0, logits, [1]).tolist() == [0, 0, 1, 0]
    assert SamplingParams().needs_logits is False and penal.needs_logits is True


def test_text_that_grows_or_changes_is_seen():
    params = SamplingParams(temperature=1, repetition_penalty=2.0)
    text = [[1, 2]]
    sampling = Sampling([params], text)
    assert sampling.seen(0).tolist() == [1, 2] and sampling.seen(0, [5]).tolist() == [1, 2, 5]
    text[0] += [7, 2]
    assert sampling.seen(0).tolist() == [1, 2, 7]
    del text[0][1:]
    assert sampling.seen(0).tolist() == [1]
    sampling.text = [[9]]
    assert sampling.seen(0).tolist() == [9]


def test_tiny_temperatures_do_not_overflow():
    logits = np.array([30.0, 29.0, -40.0], np.float32)
    for temperature in (1e-6, 1e-38, 1e-45, 1e-300):
        p = probabilities(logits, SamplingParams(temperature=temperature), np.array([]))
        np.testing.assert_array_equal(p, [1, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [*OPTIONS[:5], {"min_p": 0.1}], ids=str)
def test_logits_that_are_no_numbers_are_refused(bad, options):
    logits = np.array([1, 2, bad, 3], np.float32)
    for temperature in (0.0, 0.5, 1.0):
        with pytest.raises(ValueError, match="logits hold (NaN|.inf)"):
            Sampling([SamplingParams(temperature=temperature, **options)], [[0]]).draw(0, logits)
    with pytest.raises(ValueError, match="-inf everywhere"):
        weights(np.full(4, -np.inf, np.float32), SamplingParams(temperature=1), np.array([]))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", "hot", TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 2.5, TypeError),
        ("top_p", 1.1, ValueError),
        ("top_p", -0.1, ValueError),
        ("min_p", 2, ValueError),
        ("repetition_penalty", 0, ValueError),
        ("repetition_penalty", -1.0, ValueError),
        ("seed", -1, ValueError),
        ("seed", 1 << 64, ValueError),
        ("seed", 1.5, TypeError),
    ],
)
def test_parameters_are_checked(name, value, error):
    with pytest.raises(error, match=f"generate: {name} is .*; takes "):
        SamplingParams(**{name: value})


def test_philox_known_answers():
    """The vectors that Random123 publishes for philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def cases(count=500):
    rng = np.random.default_rng(3)
    seeds = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    seeds[:3] = 0, 1, (1 << 64) - 1
    return seeds, rng.integers(0, 1 << 40, count), rng.integers(0, 4, count), rng.integers(0, 1 << 32, count)


def test_many_uniforms_are_the_single_ones():
    seeds, index, _, lane = cases()
    for purpose in (SAMPLE, DRAFT):
        want = [uniform(int(s), int(i), purpose, int(n)) for s, i, n in zip(seeds, index, lane)]
        assert uniforms(seeds, index, purpose, lane).tolist() == want
    assert uniforms(5, 6, ACCEPT, np.arange(3)).tolist() == [uniform(5, 6, ACCEPT, n) for n in range(3)]


def test_uniforms_are_uniform_and_unrelated():
    n = 200_000
    streams = [uniforms(np.arange(n), 9, p) for p in range(4)] + [uniforms(3, np.arange(n), 0), uniforms(3, 9, 0, np.arange(1, n + 1))]
    for u in streams:
        assert 0 <= u.min() and u.max() < 1
        hits = np.bincount((u * 64).astype(int), minlength=64)
        assert ((hits - n / 64) ** 2 / (n / 64)).sum() < 63 + 6 * np.sqrt(126)
    assert np.abs(np.corrcoef(streams) - np.eye(len(streams))).max() < 5 / np.sqrt(n)


def test_header_gives_the_same_numbers(tmp_path):
    source = (
        '#include "rng.h"\n#include <stdio.h>\nint main() {\n  unsigned long long s, i; unsigned p, n;\n'
        '  while (scanf("%llu %llu %u %u", &s, &i, &p, &n) == 4) printf("%a\\n", ramify::uniform(s, i, p, n));\n}\n'
    )
    rows = list(zip(*(c.tolist() for c in cases())))
    fed = "\n".join(" ".join(map(str, row)) for row in rows)
    got = run_cpp(source, fed, COMMON, tmp_path).split()
    assert [float.fromhex(x) for x in got] == [uniform(*row) for row in rows]


def test_rounding_at_the_far_edge_stays_on_a_weight():
    rng = np.random.default_rng(0)
    for _ in range(300):  # sums of blocks and sums within one round differently, so the target may pass the last partial sum
        w = np.exp(8 * rng.standard_normal(700)).astype(np.float32)
        w[600:] = 0
        assert w[inverse_cdf(w, 1 - 2**-53)] > 0


@pytest.mark.parametrize("V", [1, 5, 512, 513, 3000])
def test_inverse_cdf_gives_each_weight_its_share(V):
    rng = np.random.default_rng(V)
    w = rng.random(V).astype(np.float32) * (rng.random(V) < 0.5)
    w[rng.integers(0, V)] = 1
    edges = np.concatenate([[0], w.cumsum(dtype=np.float64)]) / w.sum(dtype=np.float64)
    for u in [0.0, 1 - 2**-53, *rng.random(300)]:
        at = inverse_cdf(w, u)
        assert w[at] > 0
        assert edges[at] - 1e-12 <= u <= edges[at + 1] + 1e-12
    dead = np.zeros(V + 1, np.float32)
    dead[:V] = w
    assert inverse_cdf(dead, 1 - 2**-53) < V  # a trailing weight of zero is never reached


@pytest.fixture(params=[name for name, runs in native.levels().items() if runs])
def level(request):
    was = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(was)


@pytest.mark.parametrize("V", [1, 2, 7, 33, 511, 512, 513, 1024, 4096, 5003])
def test_draw_of_the_library_gives_each_token_its_share(level, V):
    """Within 1e-6 of the exact borders (f32 exponentials, blocks of 512 summed in f32), and never a masked token."""
    rng = np.random.default_rng(V)
    for trial in range(60):
        logits = (rng.standard_normal(V) * 4).astype(np.float32)
        logits[rng.random(V) < 0.3] = -np.inf
        logits[rng.integers(V)] = 2
        heat, seed, at = (
            float(rng.choice([1e-4, 0.3, 1.0, 2.5, 1e4])),
            int(rng.integers(1 << 63)) * 2 + trial % 2,
            int(rng.integers(1 << 40)),
        )
        token = native.draw(logits.ctypes.data, V, heat, seed, at)
        scores = logits.astype(np.float64) / np.float32(heat)
        w = np.exp(scores - scores.max())
        edges = np.concatenate([[0], w.cumsum()]) / w.sum()
        assert logits[token] > -np.inf
        assert edges[token] - 1e-6 <= uniform(seed, at, SAMPLE) <= edges[token + 1] + 1e-6


def test_draws_follow_the_distribution(level):
    """Chi-square of 20,000 draws over 40 tokens (39 degrees of freedom: beyond 90 once in 100,000 runs); and of a wrong temperature."""
    logits = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    sampling = Sampling([SamplingParams(temperature=0.7, seed=5)], [[0]])
    n = 20_000
    drawn = np.zeros(40)
    for position in range(n):
        drawn[native.draw(logits.ctypes.data, 40, 0.7, 5, position)] += 1

    def surprise(temperature):
        want = n * probabilities(logits, SamplingParams(temperature=temperature), np.array([]))
        return ((drawn - want) ** 2 / want).sum()

    assert surprise(0.7) < 90 < surprise(0.8)
    assert sampling.draw(0, logits) == native.draw(logits.ctypes.data, 40, 0.7, 5, 1)


def test_draw_of_bad_weights_is_none(level):
    for bad in (np.nan, np.inf):
        for at in (0, 3, 599):
            logits = np.zeros(600, np.float32)
            logits[at] = bad
            assert native.draw(logits.ctypes.data, 600, 1.0, 0, 0) == -1
    assert native.draw(np.full(9, -np.inf, np.float32).ctypes.data, 9, 1.0, 0, 0) == -1


def test_draw_children_without_replacement():
    q = np.array([0.5, 0.3, 0.2, 0.0], np.float32)
    n = 20_000
    drawn = [draw_children(q, 2, "wor", seed, 4, row=1) for seed in range(n)]
    pairs = np.zeros((4, 4))
    np.add.at(pairs, tuple(np.array(drawn).T), 1)
    want = np.array([[q[a] * q[b] / (1 - q[a]) if a != b else 0 for b in range(4)] for a in range(4)])
    assert pairs[want == 0].sum() == 0
    live = want > 0
    assert ((pairs[live] - n * want[live]) ** 2 / (n * want[live])).sum() < 40  # chi-square, 5 degrees of freedom
    assert [len(draw_children(q, 9, mode, 0, 4)) for mode in ("wor", "iid")] == [3, 9]
    assert sum(draw_children(q, 1, "wor", seed, 4, row=0) != draw_children(q, 1, "wor", seed, 4, row=1) for seed in range(100)) > 20
    assert draw_children(q, 2, "wor", 0, 4, row=1) == draw_children(q, 3, "wor", 0, 4, row=1)[:2]
