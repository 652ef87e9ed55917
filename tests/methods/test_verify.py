"""Verifiers against the plain reference, against plain decoding, and in every company: batches, modes, penalties, odd rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ramify.reference.verify import accept_path, residual_sample, verify_greedy
from ramify.registry import verifier
from ramify.sampling.pipeline import Sampling, SamplingParams, draw_children
from ramify.sampling.rng import ACCEPT, RESIDUAL, SAMPLE, uniform
from ramify.tree import CANDIDATE, PAD, PROBE, TokenTree
from ramify.verify import Verdict, Verifier, choose_verifier, residual

V = 9
NAMES = ["greedy", "sample_match", "speculative", "recursive_rejection"]


def verify(name, tree, out, sampling):
    verdict = verifier.build(name)(tree, out, sampling)
    for b, (path, emitted) in enumerate(zip(verdict.path, verdict.emitted)):
        assert path.dtype == np.int32 and path[0] == 0 and len(path) == len(emitted)
        assert tree.path(b, int(path[-1])).tolist() == path.tolist()
        assert tree.tokens[tree.span(b)][path[1:]].tolist() == emitted[:-1]
    return verdict


def same(one, other):
    return one.emitted == other.emitted and [p.tolist() for p in one.path] == [p.tolist() for p in other.path]


def make(B, mode, seed, most=14, fan=3):
    """A random tree whose children were drawn from random q, and what a target that tends to agree might say of its rows."""
    rng = np.random.default_rng(seed)
    all_tokens, all_parents, q = [], [], []
    for b in range(B):
        tokens, parents = [int(rng.integers(V))], [-1]
        draft = rng.dirichlet(np.full(V, 0.7), int(rng.integers(1, most))).astype(np.float32)
        row = 0
        while row < len(tokens) and len(tokens) < len(draft):
            kids = draw_children(draft[row], min(int(rng.integers(1, fan + 1)), len(draft) - len(tokens)), mode, seed, row, b)
            tokens += kids
            parents += [row] * len(kids)
            row += 1
        all_tokens.append(tokens)
        all_parents.append(parents)
        q.append(draft[: len(tokens)])
    q = np.concatenate([np.pad(d, ((0, len(t) - len(d)), (0, 0)), constant_values=1 / V) for d, t in zip(q, all_tokens)])
    tree = TokenTree.from_parents(all_tokens, all_parents, mode=mode, q=q)
    logits = (np.log(q + 0.02) + rng.standard_normal(q.shape)).astype(np.float32)
    return tree, SimpleNamespace(logits=logits, argmax=logits.argmax(1).astype(np.int32))


def sampling_for(tree, seed=0, **options):
    """Ragged texts that end in the roots."""
    rng = np.random.default_rng(seed)
    options = {"temperature": 0.8, **options}
    text = [[*rng.integers(0, V, rng.integers(0, 6)).tolist(), int(tree.tokens[tree.span(b).start])] for b in range(tree.B)]
    return Sampling([SamplingParams(seed=1000 * seed + b, **options) for b in range(tree.B)], text)


def only(tree, out, sampling, b):
    """Sequence b in a batch of its own."""
    span = tree.span(b)
    q = None if tree.q is None else tree.q[span]
    alone = TokenTree.from_parents([tree.tokens[span]], [tree.parent[span]], mode=tree.mode, q=q)
    out = SimpleNamespace(logits=None if out.logits is None else out.logits[span], argmax=out.argmax[span])
    return alone, out, Sampling([sampling.params[b]], [sampling.text[b]])


def padded(tree):
    """tokens, parents [B, T], n_rows [B] and a function that lays out one value per row, as the reference takes them."""
    n = tree.rows

    def lay(values, fill=0):
        full = torch.full((tree.B, int(n.max()), *values.shape[1:]), fill, dtype=torch.tensor(values[:1]).dtype)
        for b in range(tree.B):
            full[b, : n[b]] = torch.tensor(values[tree.span(b)])
        return full

    return lay(tree.tokens), lay(tree.parent, -1), torch.from_numpy(n), lay


@pytest.mark.parametrize("B", [1, 2, 5])
def test_greedy_is_the_reference(B):
    for seed in range(30):
        tree, out = make(B, "wor", seed)
        tree.mode = "det"
        got = verify("greedy", tree, SimpleNamespace(logits=None, argmax=out.argmax), sampling_for(tree, temperature=0.0))
        tokens, parents, n, lay = padded(tree)
        path, count, bonus = verify_greedy(tokens, parents, lay(out.argmax), n)
        for b in range(B):
            assert got.path[b].tolist() == path[b, : count[b]].tolist()
        assert got.bonus == bonus.tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}], ids=str)
def test_temperature_zero_is_greedy(name, options):
    for seed in range(30):
        tree, out = make(3, "wor", seed, fan=1 if name == "speculative" else 3)
        sampling = sampling_for(tree, seed, temperature=0.0, **options)
        assert same(verify(name, tree, out, sampling), verify("greedy", tree, out, sampling))


def plain(b, tree, out, sampling):
    """Decode sequence b one token at a time, reading rows of the tree as long as the text stays inside it."""
    text, row, emitted = list(sampling.text[b]), 0, []
    while row >= 0:
        token = Sampling([sampling.params[b]], [text]).draw(0, out.logits[tree.span(b).start + row])
        text.append(token)
        emitted.append(token)
        row = next((c for c in tree.children(b)[row] if tree.tokens[tree.span(b)][c] == token), -1)
    return emitted


OPTIONS = [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.15}, {"repetition_penalty": 1.5}, {"temperature": 0.0, "repetition_penalty": 0.8}]


@pytest.mark.parametrize("mode", ["det", "wor"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sample_match_emits_what_plain_decoding_emits(mode, options):
    accepted = 0
    for seed in range(20):
        tree, out = make(5, "wor", seed)
        tree.mode = mode
        sampling = sampling_for(tree, seed, **options)
        verdict = verify("sample_match", tree, out, sampling)
        assert verdict.emitted == [plain(b, tree, out, sampling) for b in range(5)]
        accepted += sum(len(p) - 1 for p in verdict.path)
    assert accepted > 20


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_batch_does_not_matter(name, options):
    for seed in range(10):
        tree, out = make(5, "wor", seed, fan=1 if name == "speculative" else 3)
        sampling = sampling_for(tree, seed, **options)
        together = verify(name, tree, out, sampling)
        for b in range(5):
            alone = verify(name, *only(tree, out, sampling, b))
            assert alone.emitted[0] == together.emitted[b] and alone.path[0].tolist() == together.path[b].tolist()


@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("mode", ["det", "iid", "wor"])
def test_stochastic_verifiers_are_the_reference(mode, B):
    lengths = set()
    for seed in range(25):
        tree, out = make(B, "iid" if mode == "iid" else "wor", seed)
        tree.mode = mode
        sampling = sampling_for(tree, seed, top_k=5)
        got = verify("sample_match" if mode == "det" else "recursive_rejection", tree, out, sampling)
        p, u = np.zeros((tree.M, V)), np.zeros((tree.M, 3))
        for b in range(B):
            first, text, s = tree.span(b).start, sampling.text[b], sampling.params[b].seed
            for row, kids in enumerate(tree.children(b)):
                depth = int(tree.depth[first + row])
                on_path = tree.tokens[first + tree.path(b, row)[1:]].tolist()
                p[first + row] = sampling.probabilities(b, out.logits[first + row], on_path)
                u[first + row, 0], u[first + row, 2] = (uniform(s, len(text) + depth, what) for what in (SAMPLE, RESIDUAL))
                for lane, child in enumerate(kids):
                    u[first + child, 1] = uniform(s, len(text) + depth, ACCEPT, lane)
        tokens, parents, n, lay = padded(tree)
        path, count, bonus = accept_path(tokens, parents, lay(p), n, lay(u), mode, lay(tree.q))
        for b in range(B):
            assert got.path[b].tolist() == path[b, : count[b]].tolist()
            lengths.add(int(count[b]))
        assert got.bonus == bonus.tolist()
    assert len(lengths) > 2  # the trees were neither always nor never accepted


def test_on_a_chain_recursive_rejection_is_speculative_sampling():
    for seed in range(40):
        for mode in ("iid", "wor"):
            tree, out = make(2, mode, seed, fan=1)
            sampling = sampling_for(tree, seed)
            assert same(verify("speculative", tree, out, sampling), verify("recursive_rejection", tree, out, sampling))


def test_a_row_without_children_takes_the_same_number_everywhere():
    rng = np.random.default_rng(0)
    for seed in range(50):
        tree = TokenTree.roots([1, 2])
        tree.mode = "wor"
        out = SimpleNamespace(logits=rng.standard_normal((2, V)).astype(np.float32))
        sampling = sampling_for(tree, seed)
        emitted = [verify(name, tree, out, sampling).emitted for name in NAMES[1:]]
        assert emitted[0] == emitted[1] == emitted[2] == [plain(b, tree, out, sampling) for b in range(2)]


def test_support_that_runs_out_stops_at_the_residual():
    """q holds two tokens and the tree has both; a third child was not drawn from q and must not be tested against anything."""
    q = np.zeros((4, V), np.float32)
    q[0, :2] = 0.5, 0.5
    tree = TokenTree.from_parents([[8, 0, 1, 2]], [[-1, 0, 0, 0]], mode="wor", q=q)
    logits = np.log(np.array([0.05, 0.6, *[0.05] * (V - 2)], np.float32))
    out = SimpleNamespace(logits=np.tile(logits, (4, 1)))
    seen = set()
    for seed in range(300):
        verdict = verify("recursive_rejection", tree, out, Sampling([SamplingParams(temperature=1, seed=seed)], [[8]]))
        seen.add((len(verdict.path[0]), verdict.emitted[0][0]))
    assert {(2, 0), (2, 1), *((1, t) for t in range(2, V))} == seen


def test_q_of_a_det_tree_is_not_read():
    tree, out = make(3, "wor", 4)
    sampling = sampling_for(tree)
    tree.mode = "det"
    with_q = verify("sample_match", tree, out, sampling)
    tree.q = np.full_like(tree.q, np.nan)
    assert same(verify("sample_match", tree, out, sampling), with_q)


def test_the_penalty_sees_the_path():
    tree = TokenTree.from_parents([[0, 1, 1]], [[-1, 0, 1]])
    logits = np.zeros((3, V), np.float32)
    logits[:, 1], logits[:, 2] = 3, 2.5
    out = SimpleNamespace(logits=logits, argmax=logits.argmax(1).astype(np.int32))
    free = Sampling([SamplingParams()], [[0]])
    assert verify("greedy", tree, out, free).emitted == [[1, 1, 1]]
    penal = Sampling([SamplingParams(repetition_penalty=1.5)], [[0]])
    assert verify("greedy", tree, out, penal).emitted == verify("sample_match", tree, out, penal).emitted == [[1, 2]]


@pytest.mark.parametrize("kind", [PROBE, PAD])
def test_probe_and_pad_rows_are_never_accepted(kind):
    tree = TokenTree.from_parents([[0, 1, 1, 2]], [[-1, 0, 0, 2]], kinds=[[CANDIDATE, kind, CANDIDATE, kind]])
    argmax = np.array([1, 5, 2, 5], np.int32)
    verdict = verify("greedy", tree, SimpleNamespace(logits=None, argmax=argmax), sampling_for(tree, temperature=0.0))
    assert verdict.path[0].tolist() == [0, 2] and verdict.emitted == [[1, 2]]


def test_cut_keeps_the_first_tokens_and_their_rows():
    verdict = Verdict([np.array([0, 2, 5], np.int32), np.array([0], np.int32)], [[7, 8, 9], [4]])
    cut = verdict.cut([2, 5])
    assert [p.tolist() for p in cut.path] == [[0, 2], [0]] and cut.emitted == [[7, 8], [4]] and cut.bonus == [8, 4]
    assert verdict.cut([3, 1]) is verdict
    none = verdict.cut([0, 0])
    assert [len(p) for p in none.path] == [0, 0] and none.emitted == [[], []] and none.bonus == [-1, -1]


def test_wrong_use_is_told():
    tree, out = make(2, "wor", 1)
    sampling = sampling_for(tree)
    with pytest.raises(ValueError, match="greedy: temperature is 0.8 in sequence 0; takes 0"):
        verify("greedy", tree, out, sampling)
    with pytest.raises(ValueError, match="speculative: row 0 of sequence 0 has 2 children; takes chains"):
        two = TokenTree.from_parents([[1, 2, 3]], [[-1, 0, 0]], mode="wor", q=np.full((3, V), 1 / V, np.float32))
        verify("speculative", two, SimpleNamespace(logits=np.zeros((3, V), np.float32)), sampling_for(two))
    with pytest.raises(ValueError, match='tree.mode is "det"; takes iid, wor'):
        verify("recursive_rejection", TokenTree.chains([1, 2], [[1], [2]]), out, sampling)
    with pytest.raises(ValueError, match="tree has 1 sequences; takes 2"):
        verify("sample_match", TokenTree.roots([1]), out, sampling)
    with pytest.raises(ValueError, match="out.logits is None"):
        verify("sample_match", tree, SimpleNamespace(logits=None, argmax=out.argmax), sampling)
    with pytest.raises(ValueError, match="logits hold NaN"):
        verify("sample_match", tree, SimpleNamespace(logits=np.full_like(out.logits, np.nan)), sampling)
    for bad in (np.zeros_like(tree.q), np.full_like(tree.q, np.nan), -tree.q):
        chain = TokenTree.chains([1], [[2]], mode="iid", q=bad[:2])
        with pytest.raises(ValueError, match="q of row 0 .*; takes probabilities"):
            verify("speculative", chain, SimpleNamespace(logits=np.zeros((2, V), np.float32)), sampling_for(chain))


def test_choice_of_the_verifier():
    hot, cold = SamplingParams(temperature=1), SamplingParams()
    assert choose_verifier("wor", [cold, cold]) == "greedy"
    assert choose_verifier("det", [cold, hot]) == "sample_match"
    assert choose_verifier("wor", [hot]) == "recursive_rejection"
    assert choose_verifier("iid", [hot], chain=True) == "speculative"
    for name in NAMES:
        made = verifier.get(name)
        assert made.lossless and made.summary and issubclass(made, Verifier)


def test_residual_against_the_reference():
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(V), 50), rng.dirichlet(np.ones(V), 50)
    p[0] = q[0]
    u = rng.random(50)
    want = residual_sample(torch.from_numpy(p), torch.from_numpy(q), torch.from_numpy(u))
    for r in range(50):
        rest = residual(p[r], q[r])
        assert rest.sum() == pytest.approx(1) and (r == 0 or (rest[p[r] <= q[r]] == 0).all())
        assert int((rest.cumsum() > u[r]).argmax()) == int(want[r])
