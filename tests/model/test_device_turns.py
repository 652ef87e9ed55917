"""Turns: steps that a device drafts, decides and commits by itself. Engines as in test_device_model.py; on a GPU this file runs unchanged.

What they are held against is the same model stepped by its host, which that file holds against the oracle: equal texts and an equal table
of the drafter. Keys and values within 1e-4 of the largest: the host leaves rows without a token out, and torch's products of other numbers
of rows add in another order. So in bf16 a text may differ, and a GPU compares texts in fp32 alone.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import ramify
from ramify.decode.loop import decode
from ramify.decode.output import Request
from ramify.decode.rounds import Rounds
from ramify.draft.token_recycling import TokenRecycling
from ramify.model import device_turns
from ramify.model.device_steps import DeviceSteps
from ramify.model.device_turns import DeviceTurn, DeviceTurns
from ramify.model.step_out import check_finite
from ramify.registry import drafter as drafters
from ramify.sampling import SamplingParams
from ramify.size.base import SizePolicy
from ramify.size.fixed import Fixed
from ramify.testing.tiny_models import VOCABULARY

LENGTHS = (40, 1, 33, 64, 7)


@pytest.fixture(autouse=True)
def not_in_the_interpreter(engine):
    if engine.name == "triton":
        pytest.skip("minutes; the ops of a turn are tested there one by one")
    if (engine.name, engine.dtype) == ("cuda", "bf16"):
        pytest.skip("texts are compared in fp32")


def prompts(engine, B):
    rng = random.Random(B)
    shorter = 5 if engine.slow else 1
    return [[rng.randrange(VOCABULARY) for _ in range(-(-n // shorter))] * 2 for n in LENGTHS[:B]]


@pytest.fixture
def by_host(monkeypatch):
    """A function that switches turns off, so that the host takes every step; with as many rows as a device, which has no text's end."""

    def switch():
        monkeypatch.setattr(DeviceSteps, "takes_turns", False)
        monkeypatch.setattr(Rounds, "_fit", lambda rounds, rows: list(rows))

    return switch


def taken(monkeypatch):
    """A list that grows by the turns that are taken."""
    found, take = [], DeviceTurns.take
    monkeypatch.setattr(DeviceTurns, "take", lambda turns: (found.append(turns), take(turns))[1])
    return found


def texts(model, given, drafter, **named):
    outs = ramify.generate(model, given, drafter, **named)
    return [(out.token_ids, out.finish_reason, out.stats.tokens) for out in outs]


@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("method", ["plain", "token_recycling"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_and_tables_are_those_of_the_host(engine, folders, method, temperature, B, monkeypatch, by_host):
    """Ragged texts that end at their lengths, one after the other: nothing is learned from a text that has ended."""
    if (engine.slow and B == 5) or (engine.name == "reference" and B != 2):
        pytest.skip("other batches show it here")
    model, found, count = engine.load(folders["mistral"]), taken(monkeypatch), 4 if engine.slow else 24
    params = [SamplingParams(temperature, seed=b) for b in range(B)]
    results = []
    for host in (False, True):
        if host:
            assert len(found) > 0
            by_host()
            found.clear()
        drafter = drafters.build(method)
        if method == "token_recycling":
            drafter.keep = False
        requests = [Request(p, count + 3 * b, params[b]) for b, p in enumerate(prompts(engine, B))]
        outs = decode(model, requests, drafter, Fixed(1 if method == "plain" else 6))
        results.append([(out.ids, out.finish_reason, out.stats) for out in outs] + [getattr(drafter, "table", None)])
    assert not found
    for got, want in zip(*results, strict=True):
        if isinstance(want, np.ndarray):
            assert np.array_equal(got, want) and (want >= 0).any()
        elif want is not None:
            assert got[:2] == want[:2] and (got[2].steps, got[2].accepted) == (want[2].steps, want[2].accepted)


def test_each_call_has_its_own_seeds(engine, folders, by_host):
    """The same recorded turn under other temperatures and seeds, then under the first ones again."""
    model, results, count = engine.load(folders["llama"]), [], 3 if engine.slow else 12
    calls = [{"temperature": t, "seed": seed} for t, seed in ((0.9, 1), (0.9, 2**63 + 5), (2.0, 1), (0.9, 1))]
    for host in (False, True):
        if host:
            by_host()
        results.append([texts(model, [[1, 2, 3]], "plain", max_new_tokens=count, **how)[0] for how in calls])
    assert results[0] == results[1] and results[0][0] == results[0][3]
    assert len({tuple(ids) for ids, _, _ in results[0]}) == 3


def test_committed_keys_and_values_are_those_of_the_host(engine, folders, by_host):
    model, count, kept = engine.load(folders["qwen3"]), 5 if engine.slow else 70, []
    for host in (False, True):
        if host:
            by_host()
        cache = model.new_cache([2 * n + count for n in LENGTHS[:2]])
        freed, cache.free = cache.free, lambda slots: None  # what was written stays to be looked at
        requests = [Request(p, count) for p in prompts(engine, 2)]
        outs = decode(model, requests, drafters.build("token_recycling:keep=False"), Fixed(4), cache=cache)
        cache.arena.flush()
        assert cache.lengths.tolist() == [len(out.ids) - 1 for out in outs]
        where = [[int(cache.page_table[b, p // 64]) * 64 + p % 64 for p in range(n)] for b, n in enumerate(cache.lengths)]
        kept.append([x.flatten(1, 2)[:, slots].cpu().clone() for x in (cache.arena.k, cache.arena.v) for slots in where])
        freed([0, 1])
    for got, want in zip(*kept, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=(1e-4 if engine.dtype == "fp32" else 0.03) * float(want.abs().max()))


def test_a_text_may_end_anywhere(engine, folders, by_host):
    """At an end-of-text id, at a stop sequence, or at its length, while the others go on; with a stream, and a cache that was given."""
    model, count = engine.load(folders["llama"]), 6 if engine.slow else 40
    given = prompts(engine, 2 if engine.slow else 5)
    plain = [out.token_ids for out in ramify.generate(model, given, "plain", max_new_tokens=count)]
    stops = [plain[0][count // 2], [plain[-1][1], plain[-1][2]]]
    results, said = [], []
    for host in (False, True):
        if host:
            by_host()
        told = [[] for _ in given]

        def stream(i, new, _, told=told):
            told[i] += new

        cache = model.new_cache([len(p) + count + 100 for p in given])
        how = {"max_new_tokens": count, "stop": stops, "size": "fixed:rows_each=6", "cache": cache}
        results.append(texts(model, given, "token_recycling", stream=stream, **how))
        said.append(told)
        assert cache.live == 0
    assert results[0] == results[1] and {reason for _, reason, _ in results[0]} >= {"stop"}
    assert said[0] == said[1] == [ids for ids, _, _ in results[0]]


class Changing(SizePolicy):
    """Asks for other rows in every step, and is told of exactly the steps that it asked for."""

    def __init__(self, rows):
        self.wanted, self.asked, self.told = rows, [], []

    def rows(self, live, lengths):
        assert len(self.told) == len(self.asked)
        self.asked.append(self.wanted[len(self.asked) % len(self.wanted)])
        return [self.asked[-1]] * len(live)

    def observe(self, tree, verdict, clock):
        self.told.append(int(tree.rows.max()))


@pytest.mark.parametrize("rows", [[3], [1, 4], [4, 4, 4, 2], [2, 3, 4, 6, 8]])
def test_the_policy_is_told_what_it_asked_for(engine, folders, rows):
    if engine.slow and len(rows) > 2:
        pytest.skip("recorded steps of many widths")
    model, count, policy = engine.load(folders["llama"]), 6 if engine.slow else 30, Changing(rows)
    given = prompts(engine, 1)
    want = [out.token_ids for out in ramify.generate(model, given, "plain", max_new_tokens=count)]
    outs = decode(model, [Request(p, count) for p in given], drafters.build("token_recycling"), policy)
    assert [out.token_ids for out in outs] == want or engine.dtype == "bf16"  # there another width may round otherwise
    assert policy.told == policy.asked[: len(policy.told)] and len(policy.told) >= 2


def test_the_next_turn_is_queued_before_this_one_is_read(engine, folders, monkeypatch):
    model, count = engine.load(folders["llama"]), 5 if engine.slow else 20
    how = {"max_new_tokens": count, "size": "fixed:rows_each=4", "temperature": 0.7}
    ramify.generate(model, [[1, 2, 3] * 3, [5, 6]], "token_recycling", **how)  # records the turns
    log, queue = [], DeviceTurn.queue
    monkeypatch.setattr(DeviceTurn, "queue", lambda turn, *args: (log.append("queue"), queue(turn, *args))[1])
    waits, take = engine.counted_waits(monkeypatch), DeviceTurns.take
    monkeypatch.setattr(DeviceTurns, "take", lambda turns: (log.append("take"), take(turns))[1])
    with engine.waits("error"):
        outs = ramify.generate(model, [[1, 2, 3] * 3, [5, 6]], "token_recycling", **how)
    takes = log.count("take")
    assert takes == log.count("queue") >= max(out.stats.steps for out in outs)
    assert log[:4] == ["queue", "queue", "take", "queue"] and "takequeuetake" in "".join(log)
    assert len(waits) <= takes + 2 * 2 + 3  # a turn's own; prompts and their moves; the end of each batch of texts


def test_a_turn_asks_the_device_nothing(engine, folders, monkeypatch):
    """But for the CPU's own attention and references, which are never captured."""
    model = engine.load(folders["qwen3"])
    ramify.generate(model, [[1, 2, 3], [4]], "token_recycling", max_new_tokens=3, size="fixed:rows_each=4", temperature=0.5)
    recorded = [turn for arena in model._arenas for turn in arena.programs.values() if isinstance(turn, DeviceTurn)]
    [turn] = [turn for turn in recorded if turn.plan.sequences == 2]
    ops = [op for call in turn.calls for op in call.op.split(" + ")]
    assert {"table_draft", "tree_attention", "verify_sample", "verify_greedy", "kv_commit", "table_learn"} <= set(ops)
    assert ops.index("table_draft") < ops.index("embed") < ops.index("verify_greedy") < ops.index("kv_commit") < ops.index("where")
    with engine.no_answers(monkeypatch):
        for call in turn.calls:
            if call.backend not in ("cpu", "reference"):
                call.run()


def test_an_idle_turn_changes_nothing(engine, folders):
    """As it runs before its capture, over a state that is in use."""
    model = engine.load(folders["mistral"])
    cache = model.new_cache([30, 30])
    model.prefill([[1, 2, 3], [4] * 9], cache)
    view, drafter = cache.of([0, 1]), TokenRecycling(keep=False)
    drafter.bind(model, [])
    drafter.begin([0, 1], [[1, 2, 3, 1, 2], [4, 4]])
    turns = model.turns(view, drafter.static(), [1, 4], [9, 1], None)
    turns.queue(4)
    first = turns.take()
    arena, state, turn = cache.arena, turns._state, turns._turn(drafter.static().links(4))
    before = [x.clone() for x in (arena.k, arena.v, state.table, state.mirror.buffer)]
    with turn.idle():
        turn.launch()
    after = [arena.k, arena.v, state.table, state.mirror.buffer]
    used = [slot for slot in range(arena.k.shape[1] * 64) if slot != arena.spare_slot]
    for x, y in zip(before[:2], after[:2], strict=True):
        assert torch.equal(x.flatten(1, 2)[:, used], y.flatten(1, 2)[:, used])
    assert all(torch.equal(x, y) for x, y in zip(before[2:], after[2:], strict=True))
    assert len(first.emitted[1]) == 1 and first.tree.rows.tolist() == [4, 4]
    turns.queue(4)
    second = turns.take()
    assert second.emitted[1] == [] and len(second.path[1]) == 0 and second.emitted[0]  # the second text had one token left
    turns.close()
    cache.free([0, 1])


def test_eager_turns_are_recorded_turns(engine, folders):
    model, results, how = engine.load(folders["qwen2"]), [], {"max_new_tokens": 4 if engine.slow else 20, "size": "fixed:rows_each=6"}
    for eager in (False, True):
        model.eager = eager
        results.append(texts(model, prompts(engine, 2), "token_recycling", **how))
    assert results[0] == results[1]


def test_what_the_host_decides_takes_no_turns(engine, folders, monkeypatch):
    """Processed logits, other drafters, another class over the same table, and a verifier of the caller's."""
    if engine.name != "table":
        pytest.skip("nothing of it is the kernels'")

    class Other(TokenRecycling):
        pass

    model, found = engine.load(folders["llama"]), taken(monkeypatch)
    for method, how in (
        ("plain", {"repetition_penalty": 1.2}),
        ("token_recycling", {"temperature": 0.8, "top_k": 3}),
        ("token_recycling", {"temperature": 0.8, "top_p": 0.5}),
        ("prompt_lookup", {}),
        (Other(), {}),
    ):
        ramify.generate(model, [[1, 2, 3]], method, max_new_tokens=4, **how)
    greedy = ramify.verifier.build("greedy")
    decode(model, [Request([1, 2, 3], 4)], drafters.build("plain"), Fixed(1), greedy)
    assert not found
    ramify.generate(model, [[1, 2, 3]], "plain", max_new_tokens=4)
    assert found


@pytest.mark.parametrize("spare", [0, 1, 3, 40])
def test_the_last_positions(engine, folders, spare, monkeypatch):
    """A text that uses up the positions of its model: trees shrink to what has a position."""
    if engine.slow:
        pytest.skip("long texts")
    model, given = engine.load(folders["llama"]), [[3, 1, 4, 1, 5] * 6]
    small = replace(model.config, max_positions=120)
    for holder in (model, model._steps):
        monkeypatch.setattr(holder, "config", small)
    count = 120 - len(given[0]) - spare
    want = ramify.generate(model, given, "plain", max_new_tokens=count)[0].token_ids
    got = ramify.generate(model, given, "token_recycling", max_new_tokens=count, size="fixed:rows_each=30")[0].token_ids
    assert len(got) == count and (got == want or engine.dtype == "bf16")
    cache = model.new_cache([119])
    turns = model.turns(cache.of([0]), TokenRecycling(keep=False, table=np.full((VOCABULARY, 8), 5, np.int32)).static(), [1], [119], None)
    assert turns.queue(30) == 24  # few shapes, and all of their positions there are
    turns.close()
    cache.free([0])


def test_a_text_to_the_end_of_the_positions_is_drafted_for(engine, folders, monkeypatch):
    """Trees shrink with the positions that are left, not with those that a text may once need."""
    if engine.name != "table" or engine.dtype != "fp32":
        pytest.skip("nothing of it is the kernels'")
    model, steps = engine.load(folders["llama"]), []
    small = replace(model.config, max_positions=160)
    for holder in (model, model._steps):
        monkeypatch.setattr(holder, "config", small)
    for host in (False, True):
        if host:
            monkeypatch.setattr(DeviceSteps, "takes_turns", False)
        [out] = decode(model, [Request([3, 1, 4] * 10, 130)], drafters.build("token_recycling:keep=False"), Fixed(24))
        steps.append(out.stats.steps)
    assert steps[1] < 100 and steps[0] <= steps[1] + 8


def test_few_shapes_are_recorded(engine, folders):
    if engine.name != "table" or engine.dtype != "fp32":
        pytest.skip("nothing of it is the kernels'")
    model = engine.load(folders["llama"])
    for rows in range(1, 100):
        ramify.generate(model, [[1, 2, 3]], "token_recycling", max_new_tokens=2, size=f"fixed:rows_each={rows}")
    turns = [turn for turn in model._arenas[-1].programs.values() if isinstance(turn, DeviceTurn)]
    assert {turn.plan.rows for turn in turns} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 81} and len(turns) == 13


def test_what_goes_wrong_leaves_nothing_behind(engine, folders, monkeypatch):
    """An interrupt from the stream, and logits that are no numbers; the next call decodes as before."""
    model, count = engine.load(folders["mistral"]), 4 if engine.slow else 20
    given = prompts(engine, 2)
    want = texts(model, given, "token_recycling", max_new_tokens=count, size="fixed:rows_each=5")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ramify.generate(model, given, "token_recycling", max_new_tokens=count, size="fixed:rows_each=5", stream=stop)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="logits of row 0 are not finite"):
        patch.setattr(device_turns, "check_finite", lambda lse: check_finite(np.full_like(lse, np.nan)))
        ramify.generate(model, given, "plain", max_new_tokens=count)
    assert texts(model, given, "token_recycling", max_new_tokens=count, size="fixed:rows_each=5") == want
