"""Drafters with a second model: what they guess, that the draft cache follows the text, and that trees are the best of their size."""

import heapq
import math

import numpy as np
import pytest

import ramify
from ramify.decode.output import Request
from ramify.draft.draft_chain import DraftChain
from ramify.draft.draft_tree import DraftTree, static_tree
from ramify.registry import drafter
from ramify.sampling.pipeline import SamplingParams
from ramify.size.fixed import Fixed
from ramify.testing import FakeModel
from ramify.verify import Verdict

PROMPTS = [[5, 6, 7], [8], list(range(1, 41))]


def begun(method, model, params=None, prompts=PROMPTS, **options):
    made = drafter.build(method, model=model, **options)
    made.bind(model, [Request(prompt, 400, params or SamplingParams()) for prompt in prompts])
    made.begin(range(len(prompts)), prompts)
    return made


def proposed(made, rows, prompts=PROMPTS):
    return made.propose(list(range(len(prompts))), [prompt[-1] for prompt in prompts], rows)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_chain_is_what_the_draft_model_would_say():
    model = FakeModel(64, sharpness=4.0)
    tree = proposed(begun("draft_chain", model, confidence=0), [9, 1, 5]).check()
    assert tree.rows.tolist() == [9, 1, 5] and tree.mode == "det"
    for b, count in enumerate((8, 0, 4)):
        assert tree.tokens[tree.span(b)].tolist()[1:] == model.continuation(PROMPTS[b], count)


def test_chain_stops_after_an_unsure_guess():
    model = FakeModel(64, sharpness=2.5)
    made = begun("draft_chain", model, confidence=0.4, most=12)
    tree = proposed(made, [30] * 3)
    lengths = []
    for b, prompt in enumerate(PROMPTS):
        text, chain = list(prompt), tree.tokens[tree.span(b)].tolist()[1:]
        for i, token in enumerate(chain):
            law = softmax(model.law(text).astype(np.float64))
            assert token == law.argmax() and (law.max() >= 0.4 or i == len(chain) - 1)
            last = law.max()
            text.append(token)
        assert last < 0.4 or len(chain) == 12
        lengths.append(len(chain))
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("method", ["draft_chain", "draft_tree"])
def test_same_model_same_seed_is_always_accepted(method):
    """Above temperature 0 both models throw the request's dice: with equal laws every guess of the chain is right."""
    model = FakeModel(64, sharpness=1.5)
    options = "confidence=0" if method == "draft_chain" else "min_odds=0,width=4"
    [out] = ramify.generate(
        model, [PROMPTS[0]], f"{method}:{options}", model, max_new_tokens=60, temperature=0.9, top_k=20, seed=4, size=Fixed(8)
    )
    [plain] = ramify.generate(model, [PROMPTS[0]], "plain", max_new_tokens=60, temperature=0.9, top_k=20, seed=4)
    assert out.token_ids == plain.token_ids
    assert out.stats.tokens_per_step > (7.4 if method == "draft_chain" else 2.5)


def best_first(model, text, count, width, depth):
    """The `count` likeliest paths, by brute force over everything that could be among them."""
    found, heap = [], [(-1.0, ())]
    while heap and len(found) < count + 1:
        minus, path = heapq.heappop(heap)
        found.append((-minus, path))
        if len(path) < depth:
            law = softmax(model.law([*text, *path]).astype(np.float64))
            for token in np.argsort(-law, kind="stable")[:width]:
                heapq.heappush(heap, (minus * law[token], (*path, int(token))))
    return found[1:]


def paths_of(tree, b):
    tokens = tree.tokens[tree.span(b)]
    return [tuple(tokens[tree.path(b, row)[1:]].tolist()) for row in range(1, len(tokens))]


@pytest.mark.parametrize("rows", [2, 3, 6, 11, 24])
def test_tree_holds_the_likeliest_paths(rows):
    model = FakeModel(64, sharpness=2.0)
    tree = proposed(begun("draft_tree", model, width=24, depth=5, frontier=24, min_odds=0), [rows] * 3).check()
    for b, prompt in enumerate(PROMPTS):
        wanted = best_first(model, prompt, rows - 1, 24, 5)
        mass = {path: odds for odds, path in wanted}
        assert set(paths_of(tree, b)) == set(mass)
        odds = [mass[path] for path in paths_of(tree, b)]
        assert odds == sorted(odds, reverse=True)


def test_no_tree_of_that_size_has_more_mass():
    """Against every connected tree of four guesses over three tokens."""
    model, prompts = FakeModel(3, sharpness=1.0), [[0, 1, 2], [1], [2, 2]]
    tree = proposed(begun("draft_tree", model, prompts=prompts, width=3, depth=4, min_odds=0), [5] * 3, prompts)
    trees = {frozenset({()})}
    for _ in range(4):
        trees = {some | {(*path, token)} for some in trees for path in some for token in range(3) if (*path, token) not in some}
    for b, prompt in enumerate(prompts):

        def odds(path, prompt=prompt):
            return math.prod(softmax(model.law([*prompt, *path[:i]]).astype(np.float64))[token] for i, token in enumerate(path))

        known = {path: odds(path) for path in set().union(*trees)}
        best = max(sum(known[path] for path in some) - 1 for some in trees)
        assert sum(known[path] for path in paths_of(tree, b)) == pytest.approx(best)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "method", ["draft_chain", "draft_tree", "draft_tree:frontier=2", "draft_tree:stochastic=True", "draft_chain:stochastic=True"]
)
def test_every_budget_is_a_prefix(method, temperature):
    model = FakeModel(64, sharpness=2.0)
    params = SamplingParams(temperature, seed=3)
    whole = proposed(begun(method, model, params), [60] * 3).check()
    for rows in ([1, 1, 2], [5, 9, 33], [17, 3, 60]):
        tree = proposed(begun(method, model, params), rows).check()
        for b, n in enumerate(rows):
            mine, all_rows = tree.span(b), whole.span(b)
            size = min(n, all_rows.stop - all_rows.start)
            assert tree.tokens[mine].tolist() == whole.tokens[all_rows].tolist()[:size]
            assert tree.parent[mine].tolist() == whole.parent[all_rows].tolist()[:size]


@pytest.mark.parametrize("method", ["draft_chain", "draft_tree", "draft_chain:stochastic=True", "draft_tree:stochastic=True"])
def test_draft_cache_follows_the_text(method):
    """I5 for the draft cache: after every step it holds the text but the pending tokens and the root, whoever proposed the tree."""
    model = FakeModel(64, sharpness=2.0)
    made = begun(method, model, SamplingParams(0.8))
    other = drafter.build("random_draft")
    other.bind(model, [])
    rng = np.random.default_rng(0)
    text = [list(prompt) for prompt in PROMPTS]
    live = [0, 1, 2]
    for step in range(60):
        if step == 40:
            made.end([1])
            live = [0, 2]
        if step == 50:  # `auto` lets drafters sleep: they end, and begin again with the text so far
            asleep = made.second.cache
            made.end(live)
            assert asleep.live == [False] * 3
            made.begin(live, [text[slot] for slot in live])
        roots, rows = [text[slot][-1] for slot in live], rng.integers(1, 20, len(live)).tolist()
        tree = made.propose(live, roots, rows)
        if step % 3 == 1 or 20 < step < 30:
            tree = other.propose(live, roots, rows)
        ends = [int(rng.integers(n)) for n in tree.rows]
        path = [tree.path(b, end) for b, end in enumerate(ends)]
        emitted = [[*tree.tokens[tree.span(b)][p[1:]].tolist(), int(rng.integers(64))] for b, p in enumerate(path)]
        made.observe(live, tree, None, Verdict(path, emitted))
        for slot, tokens in zip(live, emitted, strict=True):
            text[slot] += tokens
            assert made.second.cache.tokens[slot] + made.second.pending(slot) == text[slot][:-1]
            assert made.second._length[slot] == len(made.second.cache.tokens[slot])
    held = made.second.cache
    made.end([0, 1, 2])
    assert held is not asleep and held.live == [False] * 3


def test_drawn_children_come_from_q():
    model = FakeModel(64, sharpness=1.0)
    for method in ("draft_chain:stochastic=True,confidence=0", "draft_tree:stochastic=True"):
        made = begun(method, model, SamplingParams(0.7, top_k=6))
        tree = proposed(made, [12] * 3).check()
        assert tree.mode == "wor" and tree.q.shape == (tree.M, 64)
        for b in range(3):
            first = tree.span(b).start
            for row, kids in enumerate(tree.children(b)):
                q = tree.q[first + row]
                assert (q > 0).sum() == (6 if kids else 0)
                assert all(q[tree.tokens[first + kid]] > 0 for kid in kids)


def test_a_support_that_runs_out():
    model = FakeModel(64, sharpness=1.0)
    tree = proposed(begun("draft_tree:stochastic=True", model, SamplingParams(0.7, top_k=1)), [30] * 3).check()
    assert max(len(kids) for b in range(3) for kids in tree.children(b)) == 1 and tree.rows.max() == 8


def test_static_trees():
    parents = static_tree(40, 5, 4)
    assert parents[:2] == [-1, 0] and len(parents) == 40 and all(parent < row for row, parent in enumerate(parents))
    assert static_tree(10, 5, 4) == parents[:10]
    assert static_tree(100, 1, 3) == [-1, 0, 0, 0]


def test_levels_cost_one_forward_each():
    model = FakeModel(64, sharpness=2.0)
    made = begun("draft_tree", model, depth=4, min_odds=0)
    model.forwards.clear()
    proposed(made, [40] * 3)
    assert len(model.forwards) == 4 and max(model.forwards) <= 3 * made.frontier


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", ["draft_chain", "draft_tree", "draft_tree:stochastic=True"])
def test_nan_of_the_drafter_is_told_as_the_drafters(method, temperature):
    """Of a model that looks at its logits (ramify's) and of one that does not, and never as the target's."""
    where = rf"^{method.partition(':')[0]}: the drafter's logits of row \d+ (are not finite|hold NaN or infinity); takes "
    target, blind = FakeModel(64), FakeModel(64)
    blind.table.fill(np.nan)
    with pytest.raises(ValueError, match=where):
        ramify.generate(target, [PROMPTS[0]], method, blind, max_new_tokens=8, temperature=temperature, size=Fixed(8))
    zoo, looks = ramify.load("zoo-drafter"), ramify.load("zoo-drafter")
    looks.weights.final_norm.fill_(float("nan"))
    with pytest.raises(ValueError, match=where):
        ramify.generate(zoo, [PROMPTS[0]], method, looks, max_new_tokens=8, temperature=temperature, size=Fixed(8))


def test_bad_options():
    with pytest.raises(ValueError, match="most is 0"):
        DraftChain(most=0)
    with pytest.raises(ValueError, match="frontier 99"):
        DraftTree(frontier=99)
    with pytest.raises(ValueError, match="model is None"):
        DraftTree().bind(FakeModel(8), [])
