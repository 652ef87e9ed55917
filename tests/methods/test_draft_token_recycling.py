"""Token Recycling: the template, its prefixes, and the table's rule for repeated tokens."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import ramify
from ramify.draft.token_recycling import WIDTH, TokenRecycling, template
from ramify.size.fixed import Fixed
from ramify.testing import FakeModel
from ramify.tree import TokenTree
from ramify.verify import Verdict

VOCAB = 50


def bound(**options):
    drafter = TokenRecycling(**{"keep": False, **options})
    drafter.bind(FakeModel(VOCAB), [])
    return drafter


def filled(seed=0, vocab=VOCAB):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(vocab)[:WIDTH] for _ in range(vocab)]).astype(np.int32)


def test_template_has_the_published_shape():
    levels, parents = template(256)
    assert len(parents) == 81
    assert [len(rows) for rows, _, _ in levels] == [8, 21, 25, 15, 8, 3]
    assert Counter(Counter(parents[1:]).values())[8] == 3  # root, node 0 and node 0.0 have eight children


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 40, 80])
def test_small_templates_are_prefixes(rows):
    assert template(rows)[1] == template(81)[1][:rows]


def test_rows_are_looked_up():
    drafter = bound(table=filled())
    tree = drafter.propose([0, 1], [7, 9], [81, 81]).check()
    for b in range(2):
        span = tree.span(b)
        tokens, parents = tree.tokens[span], tree.parent[span]
        for parent, kids in enumerate(tree.children(b)):
            assert tokens[kids].tolist() == drafter.table[tokens[parent], : len(kids)].tolist()
            assert all(parents[kid] == parent for kid in kids)


@pytest.mark.parametrize("holes", [0.0, 0.3, 0.9])
def test_every_budget_is_a_prefix(holes):
    drafter = bound(table=filled(1))
    drafter.table[np.random.default_rng(2).random(VOCAB) < holes] = -1
    roots = [3, 4, 5]
    whole = drafter.propose([0, 1, 2], roots, [81] * 3).check()
    for rows in ([1, 1, 1], [2, 9, 30], [81, 1, 40], [256, 12, 3]):
        tree = drafter.propose([0, 1, 2], roots, rows).check()
        for b in range(3):
            mine, all_rows = tree.span(b), whole.span(b)
            n = mine.stop - mine.start
            assert n <= rows[b] and (tree.tokens[mine] >= 0).all()
            assert tree.tokens[mine].tolist() == whole.tokens[all_rows].tolist()[:n]
            assert tree.parent[mine].tolist() == whole.parent[all_rows].tolist()[:n]


def test_empty_table_is_plain_decoding():
    assert bound().propose([0, 1], [3, 4], [81, 81]).M == 2


def test_last_row_in_order_wins():
    drafter = bound()
    tree = TokenTree.from_parents([[5, 6, 5, 7], [6, 5]], [[-1, 0, 1, 0], [-1, 0]])
    likely = np.arange(tree.M * WIDTH, dtype=np.int32).reshape(tree.M, WIDTH) % VOCAB
    drafter.observe([0, 1], tree, SimpleNamespace(topk_ids=likely), Verdict([], []))
    assert drafter.table[5].tolist() == likely[5].tolist()
    assert drafter.table[6].tolist() == likely[4].tolist()
    assert drafter.table[7].tolist() == likely[3].tolist()
    assert (drafter.table[8:] == -1).all()


def test_after_a_step_the_table_holds_a_row_of_that_token():
    """Rejected rows teach as well as accepted ones."""
    model = FakeModel(VOCAB, order=1, contexts=4096)
    drafter = TokenRecycling(keep=False)
    ramify.generate(model, [[1, 2, 3], [4]], method=drafter, size=Fixed(81), max_new_tokens=60)
    seen = np.flatnonzero(drafter.table[:, 0] >= 0)
    assert len(seen) > 20
    for token in seen:  # a model of order 1 has one law per token
        assert drafter.table[token].tolist() == np.argsort(-model.law([token]), kind="stable")[:WIDTH].tolist()


def test_a_prompt_teaches_as_asked():
    model = FakeModel(VOCAB)
    for prompt, known in (("rows", 20), ("pairs", 20), ("none", 1)):
        drafter = TokenRecycling(keep=False, prompt=prompt)
        ramify.generate(model, [list(range(20))], method=drafter, size=Fixed(1), max_new_tokens=1)
        assert (drafter.table[:, 0] >= 0).sum() == known


def test_pairs_of_the_prompt_stand_latest_first():
    drafter = bound()
    drafter.table[9] = 4
    drafter.begin([0, 1], [[1, 2, 1, 3, 1, 2], [5, 9, 6, *range(10, 20), 9, 7]])
    assert drafter.table[1].tolist() == [2, 3] + [-1] * 6
    assert drafter.table[3].tolist() == [1] + [-1] * 7
    assert drafter.table[9].tolist() == [4] * 8  # what the target said is worth more
    many = bound()
    many.begin([0], [[x for follower in range(10, 30) for x in (1, follower)]])
    assert many.table[1].tolist() == list(range(29, 21, -1))


def test_table_is_kept_per_target_and_can_be_reset_and_saved(tmp_path):
    model, other = FakeModel(VOCAB), FakeModel(VOCAB)
    first, second, apart = TokenRecycling(), TokenRecycling(), TokenRecycling()
    first.bind(model, [])
    second.bind(model, [])
    apart.bind(other, [])
    assert first.table is second.table and first.table is not apart.table
    first.table[:] = filled()
    first.save(tmp_path / "table.npy")
    first.reset()
    assert (second.table == -1).all()
    loaded = TokenRecycling(table=np.load(tmp_path / "table.npy"))
    loaded.bind(model, [])
    assert (loaded.table == filled()).all()
    with pytest.raises(ValueError, match=r"table is int32 \[50, 8\]; takes int32 \[60, 8\]"):
        TokenRecycling(table=filled()).bind(FakeModel(60), [])
