"""What turns of a device refuse: bad input, and whatever would run on a state that is another's."""

import gc
from dataclasses import replace

import numpy as np
import pytest

import ramify
from ramify import backends
from ramify.draft.token_recycling import TokenRecycling
from ramify.model.device_turns import DeviceTurn
from ramify.registry import drafter as drafters
from ramify.sampling.pipeline import Draws
from ramify.testing.tiny_models import VOCABULARY
from ramify.tree import StaticTree, TokenTree


@pytest.fixture(autouse=True)
def nothing_of_it_is_the_kernels(engine):
    if (engine.name, engine.dtype) != ("table", "fp32"):
        pytest.skip("nothing of it is the kernels'")


def test_turns_own_their_cache_until_they_are_closed(engine, folders):
    """What would run on somebody else's state, or on keys that nobody counted, is refused: silent garbage came of each of these."""
    model, plain = engine.load(folders["llama"]), drafters.build("plain").static()
    cache = model.new_cache([60, 60, 20])
    model.prefill([[1, 2, 3, 4]] * 3, cache)
    view, other, small = cache.of([0]), cache.of([1]), cache.of([2])
    model.forward(TokenTree.roots([5]), other)
    with pytest.raises(ValueError, match="54 tokens in slot 2; takes at most 20"):  # its page has room for them
        model.turns(small, plain, [5], [50], None)
    turns = model.turns(view, plain, [5], [30], None)
    for act in (
        lambda: model.turns(other, plain, [6], [30], None),
        lambda: model.turns(view, plain, [6], [30], None),
        lambda: model.forward(TokenTree.roots([5]), other),
        lambda: model.prefill([[7]], cache, [1]),
        lambda: other.crop([2]),
    ):
        with pytest.raises(ValueError, match="turns of this cache are open; takes one at rest"):
            act()
    for stale in (view, other):
        with pytest.raises(ValueError, match="no forward has filled the draft region"):
            stale.commit([[0]])
    turns.queue(1), turns.queue(1)
    with pytest.raises(ValueError, match="2 are in flight; takes no more before one was taken"):
        turns.queue(1)
    first = turns.take().emitted[0]
    turns.close()
    turns.close()
    assert view.lengths.tolist() == [5]
    with pytest.raises(ValueError, match="they are closed or a slot was freed"):
        turns.queue(1)
    again = model.turns(view, plain, first, [30], None)
    again.queue(1)
    again.take()
    again.queue(1)
    cache.free([0])
    with pytest.raises(ValueError, match="they are closed or a slot was freed"):
        again.queue(1)
    with pytest.raises(ValueError, match="nothing is in flight"):
        again.take()
    with pytest.raises(ValueError, match="a slot of .* was freed"):
        model.forward(TokenTree.roots([5]), view)
    for draws in (None, Draws(np.full(1, 0.7, np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64))):
        lost = model.turns(other, plain, [6], [30], draws)  # forgotten without an end, and so over
        lost.queue(1)
        lost.take()
        del lost
        gc.collect()
        model.forward(TokenTree.roots([5]), other)
    cache.free([1, 2])


def test_a_cache_freed_under_turns_leaves_nothing_behind(engine, folders):
    """Its memory goes to another cache, which never had turns."""
    model, plain = engine.load(folders["llama"]), drafters.build("plain").static()
    cache = model.new_cache([60])
    model.prefill([[1, 2, 3, 4]], cache)
    turns = model.turns(cache.of([0]), plain, [5], [30], None)
    turns.queue(1)
    cache.free([0])
    other = model.new_cache([60])
    assert other.arena is cache.arena and not turns.open
    model.prefill([[1, 2, 3]], other)
    assert cache.lengths.tolist() == [0] and other.lengths.tolist() == [3]
    turns = model.turns(other.of([0]), plain, [5], [30], None)
    cache.free([0])  # once more, when the memory is no longer its own
    assert turns.open
    turns.close()
    other.free([0])


def test_a_turn_that_fails_on_its_way_ends_all(engine, folders, monkeypatch):
    """The device may have gone on by then: what it committed and nobody read is forgotten, and the text goes on from what was taken."""
    model, plain = engine.load(folders["llama"]), drafters.build("plain").static()
    cache = model.new_cache([60, 60])
    model.prefill([[1, 2, 3, 4]] * 2, cache)
    view, twin = cache.of([0]), cache.of([1])
    turns = model.turns(view, plain, [5], [30], None)
    turns.queue(1)
    root = turns.take().emitted[0]
    (turn,) = [each for each in cache.arena.programs.values() if isinstance(each, DeviceTurn)]

    class Fails:
        def run(self):
            raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(turn, "calls", [*turn.calls[:-2], Fails()])
        patch.setattr(turn, "graph", None)
        with pytest.raises(RuntimeError, match="out of luck"):
            turns.queue(1)
    assert not turns.open and view.lengths.tolist() == [5]
    rest = []
    for each, first, left in ((view, root, 6), (twin, [5], 7)):
        again = model.turns(each, plain, first, [left], None)
        text = []
        for _ in range(left):
            again.queue(1)
            text += again.take().emitted[0]
        again.close()
        rest.append(text)
    assert root + rest[0] == rest[1]
    cache.free([0, 1])


def test_rows_of_no_token_raise_nothing_and_the_others_end_the_turns(engine, folders):
    """Of a table that knows nothing, all rows but the root are of no token: what came out of them is nobody's business."""
    model = engine.load(folders["llama"])
    cache = model.new_cache([40])
    model.prefill([[1, 2, 3, 4]], cache)
    view, tree = cache.of([0]), TokenRecycling().static
    for row, fails in ((1, False), (0, True)):
        table = np.full((VOCABULARY, 8), -1, np.int32)
        turns = model.turns(view, replace(tree(), table=table), [5], [9], None)
        turns.queue(4)
        turn, host, _ = turns._flight[0]
        assert turn.results.hosts[host]["tokens"].ravel().tolist() == [5, -1, -1, -1]
        turn.results.hosts[host]["lse"][row] = np.nan
        before = view.lengths.tolist()
        if not fails:
            assert len(turns.take().emitted[0]) == 1
            turns.close()
            continue
        with pytest.raises(ValueError, match="logits of row 0 are not finite"):
            turns.take()
        assert view.lengths.tolist() == before and not turns.open
    cache.free([0])


def test_bad_requests(engine, folders):
    model = engine.load(folders["llama"])
    cache = model.new_cache([20])
    view, tree = cache.of([0]), drafters.build("plain").static()
    for root, says in (
        (VOCABULARY, f"token {VOCABULARY}; takes 0 to"),
        (2**32 + 1, "root is 4294967297; takes at most"),
        (-1, "root is -1"),
    ):
        with pytest.raises(ValueError, match=says):
            model.turns(view, tree, [root], [3], None)
    with pytest.raises(ValueError, match="21 tokens in slot 0; takes at most 20"):
        model.turns(view, tree, [1], [21], None)
    with pytest.raises(ValueError, match="turns: roots has 2 tokens; takes 1"):
        model.turns(view, tree, [1, 2], [3, 3], None)
    table, links = np.zeros((VOCABULARY, 8), np.int32), TokenRecycling().static
    for wrong, error, says in (
        (table[:-1], ValueError, rf"table is \[{VOCABULARY - 1}, 8\]; takes \[{VOCABULARY}, W\]"),
        (table.astype(np.int64), TypeError, "table is int64; takes an int32 array"),
        (table[:, :4].copy(), ValueError, "ranks reach 7; takes 0 to 3"),
        (np.zeros((VOCABULARY, 40), np.int32), ValueError, "table is 40 ids wide; takes at most 32"),
    ):
        with pytest.raises(error, match=says):
            model.turns(view, replace(links(), table=wrong), [1], [3], None)
    for left, says in (([0], "left is 0; takes 1 or more"), ([3, 3], "left has 2 numbers; takes 1")):
        with pytest.raises(ValueError, match=says):
            model.turns(view, tree, [1], left, None)
    for links_of, error, says in (
        (lambda rows: ((-1, 0), (0, 0)), ValueError, r"links\(\d+\) returned 2 parents and 2 ranks; takes as many of both, 1 to 1"),
        (lambda rows: ((-1, 0)[:rows], (0,)), ValueError, "2 parents and 1 ranks"),
        (lambda rows: ([-1], [0]), TypeError, "takes a tuple of parents and one of ranks"),
    ):
        with pytest.raises(error, match=says):
            model.turns(view, StaticTree(links_of, table), [1], [3], None).queue(1)
    each = np.zeros(1, np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64)
    for given, error, says in (
        ({"tree": None}, TypeError, "tree is None; takes a StaticTree"),
        ({"roots": 3}, TypeError, "roots is 3; takes a whole number for each sequence"),
        ({"left": None}, TypeError, "left is None; takes a whole number for each sequence"),
        ({"draws": 0.7}, TypeError, "draws is 0.7; takes Draws"),
        ({"draws": Draws(each[0] - 1, *each[1:])}, ValueError, r"temperature of draws is \[-1.0\]; takes finite numbers"),
        ({"draws": Draws(each[0], np.zeros(2, np.int64), each[2])}, TypeError, r"seed of draws is int64 \[2\]; takes an array of 1"),
    ):
        with pytest.raises(error, match=says):
            model.turns(**{"view": view, "tree": tree, "roots": [1], "left": [3], "draws": None, **given})
    turns = model.turns(view, tree, [1], [3], None)
    for rows in (0, -1, 257):
        with pytest.raises(ValueError, match=f"rows is {rows}; takes 1 to 256"):
            turns.queue(rows)
    for rows in ("a", 1.5, True, None):
        with pytest.raises(TypeError, match="rows is .*; takes a whole number"):
            turns.queue(rows)
    with pytest.raises(ValueError, match="nothing is in flight"):
        turns.take()
    turns.close()
    cache.free([0])
    with pytest.raises(ValueError, match="turns: cache was freed"):
        model.turns(view, tree, [1], [3], None)
    if not backends.missing("cpu"):
        here = ramify.load(folders["llama"], dtype="fp32")
        with pytest.raises(ValueError, match="turns: model is on cpu; takes one on a GPU"):
            here.turns(here.new_cache([20]).of([0]), tree, [1], [3], None)
