"""I3 and I4: what a verifier emits follows the target's own distribution, and it accepts as often as theory says.

A toy target gives every pair of last tokens a distribution of its own, and so does a toy drafter. Thousands of sequences with seeds of
their own take one step (two where the first emitted a single token), and the first token, and the second given the first, are
compared with the target by a chi-square test. The second half breaks verifiers on purpose: the same test must notice each time.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ramify.registry import verifier
from ramify.sampling.pipeline import Sampling, SamplingParams, draw_children, inverse_cdf, weights
from ramify.sampling.rng import ACCEPT, RESIDUAL, SAMPLE, uniforms
from ramify.tree import TokenTree
from ramify.verify import Verifier, residual

V, PROMPT, CHUNK = 8, [1, 2], 2000
TARGET = np.random.default_rng(11).normal(0, 1.3, (V, V, V)).astype(np.float32)
DRAFT = np.random.default_rng(12).dirichlet(np.full(V, 0.8), (V, V))
DRAFT = (0.5 * DRAFT + 0.5 * (np.exp(TARGET) / np.exp(TARGET).sum(-1, keepdims=True))).astype(np.float32)

CHAIN = [-1, 0, 1]
TREE = [-1, 0, 0, 0, 1, 1, 2]


class Remembering(Sampling):
    """A Sampling that computes each processed row and each random number once for thousands of sequences; same bits."""

    def __init__(self, params, seeds, text, rows):
        super().__init__([params] * len(text), text)
        self.seeds, self.rows, self.numbers = seeds, rows, {}

    def uniform(self, b, depth, purpose, lane=0):
        index = len(self.text[b]) + depth
        key = (index, purpose, lane)
        if key not in self.numbers:
            self.numbers[key] = uniforms(self.seeds, index, purpose, lane).tolist()
        return self.numbers[key][b]

    def row(self, b, path):
        key = (*self.text[b], *path)
        if key not in self.rows:
            logits, seen = TARGET[key[-2], key[-1]], np.array(key)
            self.rows[key] = (weights(logits, self.params[b], seen), super().probabilities(b, logits, path))
        return self.rows[key]

    def probabilities(self, b, logits_row, path=()):
        return self.row(b, path)[1]

    def draw(self, b, logits_row, path=()):
        ids, w = self.row(b, path)[0]
        at = inverse_cdf(w, self.uniform(b, len(path), SAMPLE))
        return at if ids is None else int(ids[at])


def draft(rng, texts, parents, mode):
    """Trees of one shape with children as the mode says, and the toy target's logits of every row."""
    n, T = len(texts), len(parents)
    context = np.array([t[-2:] for t in texts])
    before, tokens = np.zeros((n, T), int), np.zeros((n, T), int)
    before[:, 0], tokens[:, 0] = context.T
    q = np.zeros((n, T, V), np.float32)
    for row in range(T):
        q[:, row] = DRAFT[before[:, row], tokens[:, row]]
        kids = [c for c in range(T) if parents[c] == row]
        if mode == "det":
            order = np.argsort(-q[:, row], axis=1)
        elif mode == "wor":  # an exponential race: the arrivals of rates q, in order, are draws without replacement
            order = np.argsort(rng.exponential(size=(n, V)) / q[:, row], axis=1)
        else:
            order = (rng.random((n, len(kids) or 1, 1)) > q[:, row].astype(float).cumsum(-1)[:, None]).sum(-1).clip(max=V - 1)
        for i, child in enumerate(kids):
            before[:, child], tokens[:, child] = tokens[:, row], order[:, i]
    tree = TokenTree.from_parents(tokens.tolist(), [parents] * n, mode=mode, q=q.reshape(-1, V))
    return tree, SimpleNamespace(logits=TARGET[before, tokens].reshape(-1, V))


def emit(judge, mode, parents, n, change=None, batch=CHUNK, **options):
    """The first two tokens of n sequences, so many in a batch, and how many of them accepted a guess at the root."""
    rng = np.random.default_rng(5)
    params, rows, accepted = SamplingParams(**{"temperature": 1.0, **options}), {}, 0
    pairs = []
    for start in range(0, n, batch):
        seeds = np.arange(start, min(start + batch, n))
        texts = [list(PROMPT) for _ in seeds]
        live = np.arange(len(seeds))
        while len(live):
            tree, out = draft(rng, [texts[i] for i in live], parents, mode)
            if change:
                change(tree)
            verdict = judge(tree, out, Remembering(params, seeds[live], [texts[i] for i in live], rows))
            if all(len(texts[i]) == len(PROMPT) for i in live):  # the first step
                accepted += sum(len(path) > 1 for path in verdict.path)
            for i, tokens in zip(live, verdict.emitted):
                texts[i] += tokens
            live = live[[len(texts[i]) < len(PROMPT) + 2 for i in live]]
        pairs += [t[len(PROMPT) : len(PROMPT) + 2] for t in texts]
    return np.array(pairs), accepted


def law(text, **options):
    params = SamplingParams(**{"temperature": 1.0, **options})
    return Sampling([params], [list(text)]).probabilities(0, TARGET[text[-2], text[-1]])


def chi_square(counts, p):
    """(statistic, degrees of freedom); rare tokens share a bin. A token of no probability must not occur at all."""
    if counts[p == 0].any():
        return np.inf, 1
    want = counts.sum() * p
    rare = want < 5
    counts, want = np.append(counts[~rare], counts[rare].sum()), np.append(want[~rare], want[rare].sum())
    live = want > 0
    return float(((counts - want)[live] ** 2 / want[live]).sum()), int(live.sum()) - 1


def p_values(pairs, **options):
    """The chances of a first token, and of a second given the first, that fit the target no better than these."""
    first = chi_square(np.bincount(pairs[:, 0], minlength=V), law(PROMPT, **options))
    parts = [chi_square(np.bincount(pairs[pairs[:, 0] == a, 1], minlength=V), law([*PROMPT, a], **options)) for a in np.unique(pairs[:, 0])]
    second = sum(x for x, _ in parts), sum(df for _, df in parts)
    return [upper_tail(x, df) for x, df in (first, second)]


def upper_tail(x, df):
    half = torch.tensor([df / 2, x / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half)) if df else float(x == 0)


def rate(p, q, mode, children, det=()):
    """The exact chance that one of `children` guesses passes, by enumeration of the draws."""
    if mode == "det":
        return p[list(det)].sum()
    if children == 0:
        return 0.0
    total = 0.0
    for x in np.flatnonzero(q):
        passes = min(1.0, p[x] / q[x])
        left = q.copy()
        if mode == "wor":
            left[x] = 0
            left /= max(left.sum(), 1e-300)
        if passes < 1:
            passes += (1 - passes) * rate(residual(p, q), left, mode, children - 1)
        total += q[x] * passes
    return total


EXACT = [
    ("sample_match", "det", CHAIN, 50_000),
    ("sample_match", "det", TREE, 50_000),
    ("speculative", "iid", CHAIN, 100_000),
    ("recursive_rejection", "wor", TREE, 100_000),
    ("recursive_rejection", "iid", TREE, 50_000),
]
"""Sequences of the main test; two tokens are drawn in each, so every verifier draws 2e5 at least."""
VARIANTS = [
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
]


def check_rate(accepted, n, mode, parents, **options):
    q = DRAFT[PROMPT[-2], PROMPT[-1]].astype(float)
    q /= q.sum()
    children = parents.count(0)
    want = rate(law(PROMPT, **options), q, mode, children, det=np.argsort(-q)[:children])
    assert abs(accepted / n - want) <= 4 * np.sqrt(want * (1 - want) / n) + 1e-9, (accepted / n, want)


@pytest.mark.parametrize(("name", "mode", "parents", "n"), EXACT, ids=str)
def test_distribution_and_acceptance(name, mode, parents, n):
    """I3: first and second token follow the target's law. I4: guesses pass as often as the formula says."""
    pairs, accepted = emit(verifier.build(name), mode, parents, n)
    assert min(p_values(pairs)) > 1e-4
    check_rate(accepted, n, mode, parents)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(("name", "mode", "parents"), [row[:3] for row in EXACT], ids=str)
def test_small_batches_follow_the_same_law(name, mode, parents, batch):
    """I3 and I4 for batches as a user has them; fewer draws, the same limits."""
    n = 1000 * (1 + batch)
    pairs, accepted = emit(verifier.build(name), mode, parents, n, batch=batch)
    assert min(p_values(pairs)) > 1e-4
    check_rate(accepted, n, mode, parents)


def test_memory_changes_no_bit():
    rng = np.random.default_rng(5)
    seeds = np.arange(300)
    texts = [list(PROMPT) for _ in seeds]
    params = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    for name, mode, parents, _ in EXACT:
        tree, out = draft(rng, texts, parents, mode)
        quick = verifier.build(name)(tree, out, Remembering(params, seeds, texts, {}))
        slow = verifier.build(name)(tree, out, Sampling([replace(params, seed=int(s)) for s in seeds], texts))
        assert quick.emitted == slow.emitted


def test_drafts_of_the_library_are_what_q_says():
    """Children from draw_children, whose numbers share seed and position with the verifier's, keep the law too."""
    n, parents = 5000, [-1, 0, 0, 0]
    q = np.tile(DRAFT[PROMPT[-2], PROMPT[-1]], (4, 1))
    params, rows, counts, accepted = SamplingParams(temperature=1.0), {}, np.zeros(V, int), 0
    judge = verifier.build("recursive_rejection")
    out = SimpleNamespace(logits=np.tile(TARGET[PROMPT[-2], PROMPT[-1]], (4 * n, 1)))
    tokens = [[PROMPT[-1], *draw_children(q[0], 3, "wor", seed, len(PROMPT))] for seed in range(n)]
    tree = TokenTree.from_parents(tokens, [parents] * n, mode="wor", q=np.tile(q, (n, 1)))
    verdict = judge(tree, out, Remembering(params, np.arange(n), [PROMPT] * n, rows))
    for path, emitted in zip(verdict.path, verdict.emitted):
        counts[emitted[0]] += 1
        accepted += len(path) > 1
    assert upper_tail(*chi_square(counts, law(PROMPT))) > 1e-4
    check_rate(accepted, n, "wor", parents)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize(("name", "mode", "parents"), [row[:3] for row in EXACT[1:4]], ids=str)
def test_processed_distributions(name, mode, parents, options):
    n = 10_000
    pairs, accepted = emit(verifier.build(name), mode, parents, n, **options)
    assert min(p_values(pairs, **options)) > 1e-4
    check_rate(accepted, n, mode, parents, **options)


# What follows is wrong on purpose.


class SkipsTheResidual(Verifier):
    """After a rejection it draws from p, as if nothing had been learnt."""

    def decide(self, walk):
        children = walk.children()
        if not children:
            return walk.choose(), -1
        p, q, token = walk.p(), walk.q(), walk.tokens[children[0]]
        if walk.uniform(ACCEPT) * q[token] < p[token]:
            return token, children[0]
        return inverse_cdf(p, walk.uniform(RESIDUAL)), -1


class SpendsOneNumberTwice(SkipsTheResidual):
    """The number that rejected a guess also draws the token instead of it."""

    def decide(self, walk):
        children = walk.children()
        if not children:
            return walk.choose(), -1
        p, q, token = walk.p(), walk.q(), walk.tokens[children[0]]
        if walk.uniform(ACCEPT) * q[token] < p[token]:
            return token, children[0]
        return inverse_cdf(residual(p, q), walk.uniform(ACCEPT)), -1


class KeepsRejectedInQ(Verifier):
    """Recursive rejection that forgets to take a rejected child out of q."""

    def decide(self, walk):
        p, children = walk.p(), walk.children()
        for lane, child in enumerate(children):
            q, token = walk.q(), walk.tokens[child]
            if walk.uniform(ACCEPT, lane) * q[token] < p[token]:
                return token, child
            p = residual(p, q)
        return inverse_cdf(p, walk.uniform(RESIDUAL)), -1


class DrawsForEveryPath(Verifier):
    """One draw per root-to-leaf path instead of one per row: a guess shared by paths, or any of several, gets several chances."""

    def decide(self, walk):
        draws = [inverse_cdf(walk.p(), walk.uniform(SAMPLE, lane)) for lane in range(1 + len(walk.children()))]
        for child, token in zip(walk.children(), draws):
            if walk.tokens[child] == token:
                return token, child
        return draws[-1], -1


class DrawsAgainAfterAMiss(Verifier):
    """When no guess holds the draw it emits another draw."""

    def decide(self, walk):
        token = walk.choose()
        child = walk.match(token)
        if child < 0 and walk.children():
            token = inverse_cdf(walk.p(), walk.uniform(RESIDUAL))
        return token, child


class DrawsTheSameNumberAtEveryRow(Verifier):
    """Its random number knows the step but not the depth."""

    def decide(self, walk):
        token = inverse_cdf(walk.p(), walk.sampling.uniform(walk.b, 0, SAMPLE))
        return token, walk.match(token)


def tell_another_q(tree):
    tree.q = np.full_like(tree.q, 1 / V)


def sort_siblings(tree):
    """Puts the children of each root in the order of their score; draw order is lost."""
    rows = tree.tokens.reshape(tree.B, -1)
    q = tree.q.reshape(*rows.shape, V)[:, 0]
    kids = rows[:, 1:]
    rows[:, 1:] = np.take_along_axis(kids, np.argsort(np.take_along_axis(q, kids, 1), 1), 1)


def call_it_drawn(tree):
    tree.mode = "iid"


BROKEN = [
    ("speculative", "iid", CHAIN, tell_another_q),
    ("recursive_rejection", "wor", TREE, tell_another_q),
    ("recursive_rejection", "wor", [-1, 0, 0, 0], sort_siblings),
    ("speculative", "det", CHAIN, call_it_drawn),
    (SkipsTheResidual(), "iid", CHAIN, None),
    (SpendsOneNumberTwice(), "iid", CHAIN, None),
    (KeepsRejectedInQ(), "wor", TREE, None),
    (DrawsForEveryPath(), "det", TREE, None),
    (DrawsAgainAfterAMiss(), "det", CHAIN, None),
    (DrawsTheSameNumberAtEveryRow(), "det", CHAIN, None),
]


@pytest.mark.parametrize(
    ("judge", "mode", "parents", "change"),
    BROKEN,
    ids=[f"{j if isinstance(j, str) else type(j).__name__}-{m}-{c.__name__ if c else ''}" for j, m, _, c in BROKEN],
)
def test_the_test_can_fail(judge, mode, parents, change):
    judge = verifier.build(judge) if isinstance(judge, str) else judge
    pairs, _ = emit(judge, mode, parents, 10_000, change)
    assert min(p_values(pairs)) < 1e-9


def test_an_acceptance_rate_that_is_off_is_noticed():
    """And drawn children may be matched too: that loses guesses, not exactness."""
    pairs, accepted = emit(verifier.build("sample_match"), "wor", TREE, 20_000)
    assert min(p_values(pairs)) > 1e-4
    with pytest.raises(AssertionError):
        check_rate(accepted, 20_000, "wor", TREE)
