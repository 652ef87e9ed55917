"""A model whose steps are recorded as a GPU's are, on whatever is at hand; on a GPU the same file runs unchanged.

Engines: "table", CPU tensors on the kernels that the table names; "reference", the same in plain torch; "emulated", the CUDA kernels under
the emulator; "triton", the Triton kernels in the interpreter (TRITON_INTERPRET=1); "cuda", a GPU and CUDA graphs.

Tolerance in fp32: 1e-4 of the largest logit, as between any two orders of summing some hundred products. In bf16 a hidden state keeps 8
bits and is rounded some six times a layer: 3% of the largest logit, of which half is seen.
"""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import ramify
from ramify import backends
from ramify.model import device_steps
from ramify.model.checkpoint import Checkpoint
from ramify.reference.model import forward
from ramify.sampling import Sampling, SamplingParams
from ramify.testing.device_model import device_model
from ramify.testing.tiny_models import FAMILIES, VOCABULARY
from ramify.tree import MAX_ROWS, TokenTree

NEAR = {"fp32": 1e-4, "bf16": 0.03}


def oracle(folder, text):
    """Logits of every row in plain torch, float32."""
    checkpoint = Checkpoint(folder)
    return forward(dict(checkpoint.tensors()), checkpoint.config, text).logits.numpy()


def after(folder, text, paths, tree_tokens):
    """The oracle's logits after text and each path of tokens."""
    return np.stack([oracle(folder, text + [tree_tokens[row] for row in path])[-1] for path in paths])


def close(got, want, dtype):
    np.testing.assert_allclose(got, want, rtol=0, atol=NEAR[dtype] * np.abs(want).max())


def random_tree(rng, rows):
    parents = [-1] + [rng.randrange(max(0, row - 6), row) for row in range(1, rows)]
    tokens = []
    for row, parent in enumerate(parents):
        taken = {tokens[i] for i in range(row) if parents[i] == parent}
        tokens.append(rng.choice([t for t in range(VOCABULARY) if t not in taken]))
    return tokens, parents


def random_text(rng, length):
    return [rng.randrange(VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_oracle(engine, folders, family):
    """Prefill in chunks of any size, then ragged trees, across pages and windows."""
    if family not in {"emulated": ("mistral", "qwen3"), "triton": ("mistral",)}.get(engine.name, FAMILIES):
        pytest.skip("other families show it here")
    rng = random.Random(len(family))
    model = engine.load(folders[family])
    sizes = [(66, 5), (3, 2)] if engine.slow else [(150, 9), (1, 4), (64, 70), (63, 1), (300, 33)]
    for chunk in (512,) if engine.slow else (7, 64, 512):
        texts = [random_text(rng, n) for n, _ in sizes]
        grown = [random_tree(rng, rows) for _, rows in sizes]
        cache = model.new_cache([n + 1 for n, _ in sizes])
        model.prefill(texts, cache, chunk=chunk)
        tree = TokenTree.from_parents([t for t, _ in grown], [p for _, p in grown])
        out = model.forward(tree, cache.of(range(len(sizes))), logits=True)
        for b, (tokens, _) in enumerate(grown):
            rows = sorted({0, len(tokens) - 1, rng.randrange(len(tokens))})
            want = after(folders[family], texts[b], [tree.path(b, row) for row in rows], tokens)
            close(out.logits[tree.span(b)][rows], want, engine.dtype)
            if engine.dtype == "fp32":
                assert np.array_equal(out.argmax[tree.span(b)][rows], want.argmax(1))
        cache.free(range(len(sizes)))


@pytest.mark.parametrize("method", ["plain", "prompt_lookup", "token_recycling", "draft_tree"])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_greedy_ids_are_those_of_the_cpu(engine, folders, method, B):
    if engine.slow or engine.dtype != "fp32" or (engine.name == "reference" and B != 2):
        pytest.skip("ids are compared in fp32, and once in plain torch")
    rng = random.Random(B)
    prompts = [random_text(rng, n) * 2 for n in (40, 1, 33, 64, 7)[:B]]
    with backends.backend(None):
        truth = ramify.load(folders["mistral"], dtype="fp32") if not backends.missing("cpu") else device_model(folders["mistral"])
        want = [out.token_ids for out in ramify.generate(truth, prompts, method="plain", max_new_tokens=40)]
    model, size = engine.load(folders["mistral"]), None if method == "plain" else "fixed:rows_each=11"
    drafter = engine.load(folders["llama"]) if method == "draft_tree" else None
    outs = ramify.generate(model, prompts, method=method, drafter=drafter, max_new_tokens=40, size=size)
    assert [out.token_ids for out in outs] == want
    if method == "prompt_lookup":
        assert any(out.stats.steps < len(out.token_ids) for out in outs)


def test_a_text_goes_on_after_commit_and_crop(engine, folders):
    """What was committed out of branching trees, cropped and committed again gives the logits of a fresh text."""
    if engine.name == "triton":
        pytest.skip("minutes, and no other kernels than in the other tests")
    folder, rng = folders["qwen3"], random.Random(3)
    model, B = engine.load(folder), 2
    texts = [random_text(rng, n) for n in ((9, 60) if engine.slow else (61, 200))]
    cache = model.new_cache([500] * B)
    model.prefill(texts, cache)
    view = cache.of(range(B))
    for step in range(2 if engine.slow else 8):
        grown = [random_tree(rng, rng.choice([1, 5, 40] if not engine.slow else [1, 3])) for _ in range(B)]
        tree = TokenTree.from_parents([t for t, _ in grown], [p for _, p in grown])
        model.forward(tree, view)
        paths = [tree.path(b, rng.randrange(len(tokens))) for b, (tokens, _) in enumerate(grown)]
        view.commit(paths)
        for text, (tokens, _), path in zip(texts, grown, paths, strict=True):
            text += [tokens[row] for row in path]
        if step % 3 == 1:
            view.crop([len(text) - 2 for text in texts])
            texts = [text[:-2] for text in texts]
    assert view.lengths.tolist() == [len(text) for text in texts]
    got = model.forward(TokenTree.roots([7, 8]), view, logits=True).logits
    for b, root in enumerate((7, 8)):
        close(got[b], oracle(folder, [*texts[b], root])[-1], engine.dtype)
    cache.free(range(B))


def test_taps_ranges_and_the_largest(engine, folders):
    """Taps, layers [0, k) then [k, L), top-k and the row statistics, all of one tree."""
    folder = folders["qwen3"]
    model = engine.load(folder)
    tree = TokenTree.from_parents([[3, 4, 5, 6], [9]], [[-1, 0, 0, 1], [-1]])
    cache = model.new_cache([40, 40])
    model.prefill([list(range(20)), [5]], cache)
    view = cache.of([0, 1])
    whole = model.forward(tree, view, logits=True, taps=(0, 1, -1), topk=5)
    assert sorted(whole.taps) == [0, 1, 2] and [len(x) for x in whole.taps.values()] == [5, 5, 5]
    logits, tap = torch.from_numpy(whole.logits.copy()), whole.taps[1].copy()
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    assert np.array_equal(whole.topk_ids, ids[:, :5].numpy()) and np.array_equal(whole.topk_values, values[:, :5].numpy())
    assert np.array_equal(whole.argmax, ids[:, 0].numpy()) and np.array_equal(whole.top, values[:, 0].numpy())
    np.testing.assert_allclose(whole.lse, logits.double().logsumexp(-1), rtol=1e-6)
    embedded = Checkpoint(folder).tensor("embed").float()[[3, 4, 5, 6, 9]].numpy()
    close(whole.taps[0], embedded, engine.dtype)
    part = model.forward(tree, view, layers=(0, 1))
    assert part.argmax is None and part.logits is None and np.array_equal(part.taps[1], tap)
    rest = model.forward(tree, view, layers=(1, 2), hidden=part.taps[1].copy(), logits=True)
    assert np.array_equal(rest.logits, logits.numpy())
    assert model.forward(tree, view).logits is None


def test_a_tree_may_grow_level_by_level(engine, folders):
    """Rows of an earlier forward are neither computed nor written again, whatever bucket they were in."""
    if engine.name == "triton":
        pytest.skip("minutes, and no other kernels than in the other tests")
    rng = random.Random(5)
    folder, rows = folders["llama"], (12, 5) if engine.slow else (70, 20)
    model = engine.load(folder)
    grown, texts = [random_tree(rng, n) for n in rows], [[5] * 20, [6] * 30]
    full = TokenTree.from_parents([t for t, _ in grown], [p for _, p in grown])
    cache = model.new_cache([40, 40])
    model.prefill(texts, cache)
    view, first = cache.of([0, 1]), np.zeros(2, np.int32)
    for now in ([1, 1], [3, 2], [rows[0] - 4, rows[1] - 1], list(rows)):
        out = model.forward(full.prefix(now), view, first=first, logits=True)
        assert len(out.argmax) == len(out.logits) == sum(now) - int(first.sum())
        at = 0
        for b in range(2):
            path = full.path(b, now[b] - 1)
            at += now[b] - int(first[b])
            close(out.logits[at - 1], after(folder, texts[b], [path], grown[b][0])[0], engine.dtype)
        first = np.array(now, np.int32)


def test_a_step_is_recorded_once_and_replayed(engine, folders):
    """Other lengths, trees, batches of slots and pages run on the same recording, with one copy back each."""
    rng = random.Random(8)
    folder = folders["mistral"]
    model = engine.load(folder)
    texts = [random_text(rng, n) for n in ((20, 5, 12) if engine.slow else (70, 5, 130))]
    cache = model.new_cache([200] * 3)
    for slot, text in enumerate(texts):
        model.prefill([text], cache, slots=[slot])
    model.forward(TokenTree.from_parents(*zip(random_tree(rng, 6), random_tree(rng, 5))), cache.of([0, 1]))
    [step] = [step for step in cache.arena.programs.values() if step.plan.sequences == 2]
    recorded, copies = model._steps.recorded, step.copies
    for slots in ([2, 0], [1, 2], [0, 1])[: 2 if engine.slow else 3]:
        grown = [random_tree(rng, rng.randrange(5, 9)) for _ in slots]
        tree, view = TokenTree.from_parents([t for t, _ in grown], [p for _, p in grown]), cache.of(slots)
        got = model.forward(tree, view, logits=True).logits
        for b, slot in enumerate(slots):
            close(got[tree.span(b)][-1:], after(folder, texts[slot], [tree.path(b, len(grown[b][0]) - 1)], grown[b][0]), engine.dtype)
        view.commit([tree.path(b, 3) for b in range(2)])
        for b, slot in enumerate(slots):
            texts[slot] += [grown[b][0][row] for row in tree.path(b, 3)]
    assert model._steps.recorded == recorded and step.copies == copies + (2 if engine.slow else 3)
    assert (step.graph is not None) == (engine.device == "cuda" and step.captures)
    cache.free(range(3))
    again = model.new_cache([200] * 3)  # an idle arena keeps its recordings
    model.forward(TokenTree.from_parents(*zip(random_tree(rng, 8), random_tree(rng, 1))), again.of([1, 2]))
    assert model._steps.recorded == recorded


def test_rows_that_fill_up_write_nothing(engine, folders):
    """Everything that no row may read is NaN before the step; only the draft slots of its own rows are written, and nobody's slot."""
    rng = random.Random(13)
    model = engine.load(folders["llama"])
    texts = [random_text(rng, n) for n in (12 if engine.slow else 70, 3)]
    cache = model.new_cache([100, 100])
    model.prefill(texts, cache)
    arena, view = cache.arena, cache.of([0, 1])
    arena.flush()
    used = {int(cache.page_table[b, p // 64]) * 64 + p % 64 for b, text in enumerate(texts) for p in range(len(text))}
    unused = [slot for slot in range(arena.k.shape[1] * 64) if slot not in used]
    for name in ("k", "v"):
        getattr(arena, name).flatten(1, 2)[:, unused] = torch.nan
        getattr(arena, f"draft_{name}").fill_(torch.nan)
    for held in arena._workspace.values():
        held.fill_(torch.nan)
    before = [x.clone() for x in (arena.k, arena.v)]
    grown = [random_tree(rng, 5), random_tree(rng, 2)]
    tree = TokenTree.from_parents([t for t, _ in grown], [p for _, p in grown])
    out = model.forward(tree, view, logits=True)
    assert np.isfinite(out.logits).all() and len(out.logits) == 7
    written = set(range(5)) | {MAX_ROWS, MAX_ROWS + 1}
    for draft in (arena.draft_k, arena.draft_v):
        here = {int(slot) for slot in (~draft.isnan()).flatten(2).any(-1).any(0).nonzero()}
        assert written <= here <= written | {arena.spare_draft}
    for now, old in zip((arena.k, arena.v), before):
        assert torch.equal(now.flatten(1, 2)[:, sorted(used)], old.flatten(1, 2)[:, sorted(used)])
        assert bool(now.flatten(1, 2)[:, [slot for slot in unused if slot != arena.spare_slot]].isnan().all())


def test_a_replay_asks_the_device_nothing(engine, folders, monkeypatch):
    """But for the CPU's own attention and the reference's, which are never captured."""
    model = engine.load(folders["qwen3"])
    cache = model.new_cache([40, 40])
    model.prefill([[1, 2, 3], [4]], cache)
    tree = TokenTree.chains([3, 9], [[1, 2], []])
    model.forward(tree, cache.of([0, 1]), topk=3, taps=(1,))
    [step] = [step for step in cache.arena.programs.values() if step.plan.sequences == 2]
    calls = [call for call in step.calls if call.op != "tree_attention" or call.backend not in ("cpu", "reference")]
    ops = {"kv_commit", "embed", "rms_norm", "rope_append", "linear", "silu_mul", "row_stats", "topk_logits", "copy"}
    assert ops <= {op for call in calls for op in call.op.split(" + ")}
    assert calls[-1].op == "row_stats + topk_logits" or engine.name in ("table", "reference")  # a GPU reads its logits once
    assert engine.name in ("table", "reference") or step.captures == (len(calls) == len(step.calls))

    with engine.no_answers(monkeypatch):
        for call in calls:
            call.run()
    waits = engine.counted_waits(monkeypatch)
    with engine.waits("error"):
        model.forward(tree, cache.of([0, 1]), topk=3, taps=(1,))
    assert len(waits) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_text_waits_once_a_step(engine, folders, temperature, monkeypatch):
    """Sampling, verification and commits need nothing of the device but what each step brings back."""
    if engine.name == "triton":
        pytest.skip("minutes, and nothing of the loop is other than in the other engines")
    model, ran, run = engine.load(folders["llama"]), [], device_steps.DeviceStep.run
    how = {"method": "prompt_lookup", "size": "fixed:rows_each=5", "temperature": temperature, "max_new_tokens": 3 if engine.slow else 24}
    ramify.generate(model, [[1, 2, 3] * 3, [5, 6]], **how)  # records the steps
    monkeypatch.setattr(device_steps.DeviceStep, "run", lambda step, *args: (ran.append(step), run(step, *args)))
    waits = engine.counted_waits(monkeypatch)
    with engine.waits("error"):
        outs = ramify.generate(model, [[1, 2, 3] * 3, [5, 6]], **how)
    steps = max(out.stats.steps for out in outs)
    assert steps <= len(ran) <= steps + 2 and len(waits) <= len(ran) + 2  # one for each prompt that was read, one for its last moves


def test_eager_equals_replayed(engine, folders):
    if engine.slow:
        pytest.skip("the same calls here")
    outs, model = [], engine.load(folders["qwen2"])
    for eager in (False, True):
        model.eager = eager
        cache = model.new_cache([80, 80])
        model.prefill([[7] * 70, [1, 2]], cache)
        out = model.forward(TokenTree.chains([3, 9], [[1, 2, 3, 4], []]), cache.of([0, 1]), topk=5, logits=True, taps=(0, -1))
        outs.append([out.logits.copy(), out.argmax.copy(), out.lse.copy(), out.topk_ids.copy(), *(t.copy() for t in out.taps.values())])
        cache.free([0, 1])
    assert all(np.array_equal(a, b) for a, b in zip(*outs, strict=True))


def test_tokens_are_drawn_where_the_logits_are(engine, folders):
    """Every row's draw is what the host makes of the same logits, for sequences of their own temperatures, seeds and positions."""
    rng = random.Random(4)
    model = engine.load(folders["llama"])
    params = [SamplingParams(temperature=0.7, seed=2**64 - 5), SamplingParams(), SamplingParams(temperature=30.0, seed=3)]
    params += [SamplingParams(temperature=1.0, seed=1, top_k=5), SamplingParams(temperature=1e-3, seed=9)]
    texts = [random_text(rng, n) for n in (5, 70, 1, 8, 30)]
    cache = model.new_cache([len(text) + 1 for text in texts])
    model.prefill(texts, cache)
    sampling = Sampling(params, texts)
    for _ in range(1 if engine.slow else 6):
        grown = [random_tree(rng, rng.choice([1, 3, 7])) for _ in texts]
        tree = TokenTree.from_parents([t for t, _ in grown], [p for _, p in grown])
        out = model.forward(tree, cache.of(range(5)), logits=True, draws=sampling.draws())
        assert out.drawn.dtype == np.int32 and len(out.drawn) == tree.M
        for b, each in enumerate(params):
            for row in range(len(grown[b][0])) if each.is_plain else ():
                at = tree.span(b).start + row
                path = [grown[b][0][i] for i in tree.path(b, row)[1:]]
                assert out.drawn[at] == sampling.draw(b, out.logits[at], path)
    assert Sampling([SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5)], [[1], [2]]).draws() is None
    assert model.forward(TokenTree.roots([1]), cache.of([0])).drawn is None


@pytest.mark.parametrize("method", ["plain", "token_recycling"])
def test_sampled_ids_are_those_of_the_cpu(engine, folders, method, monkeypatch):
    """The same seed gives the same text, and no row of logits leaves the device for it."""
    if engine.name not in ("table", "cuda") or engine.dtype != "fp32" or backends.missing("cpu"):
        pytest.skip("ids are compared in fp32")
    prompts = [random_text(random.Random(1), n) for n in (20, 3)]
    common = {"method": method, "max_new_tokens": 40, "temperature": 0.8, "seed": 11}
    truth = ramify.load(folders["llama"], dtype="fp32")
    want = [out.token_ids for out in ramify.generate(truth, prompts, **common)]
    model = engine.load(folders["llama"])
    size = None if method == "plain" else "fixed:rows_each=9"
    with monkeypatch.context() as patch:
        patch.setattr(device_steps.DeviceStep, "_download_logits", lambda step: pytest.fail("logits were asked for"))
        outs = ramify.generate(model, prompts, size=size, **common)
    assert [out.token_ids for out in outs] == want
    narrow = [ramify.generate(each, prompts, size=size, top_k=3, **common) for each in (truth, model)]  # the host has to see these logits
    assert [out.token_ids for out in narrow[0]] == [out.token_ids for out in narrow[1]]


@pytest.mark.parametrize("weights", ["int8", "int4-g64"])
def test_low_bit_weights(engine, folders, weights):
    """The dequantised weights in the oracle are what a low-bit model computes with; its head is int8."""
    if engine.name == "emulated" and not any(row.op == "linear" and row.backend == "cuda" for row in backends.TABLE):
        pytest.skip("a low-bit linear has no CUDA kernel yet")
    folder = folders["llama"]
    model = engine.load(folder, weights)
    held = model.weights.layers[0].qkv[0].weight
    assert held.format.name == weights and held.codes.device.type == torch.device(engine.device).type
    text = random_text(random.Random(1), 4 if engine.slow else 40)
    cache = model.new_cache([50])
    got = model.forward(TokenTree.chains([text[0]], [text[1:]]), cache.of([0]), logits=True).logits

    checkpoint = Checkpoint(folder)
    tensors = {}
    for name, x in checkpoint.tensors():
        short = name.rpartition(".")[2]
        tensors[name] = ramify.ops.quantize_weight(x, weights).dequantize() if short in ("q", "k", "v", "o", "gate", "up", "down") else x
    config = checkpoint.config
    whole = forward(tensors, config, text, taps=(config.num_layers,))
    x = whole.taps[config.num_layers]
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * tensors["final_norm"]
    want = normed @ ramify.ops.quantize_weight(tensors["embed"], "int8").dequantize().T
    close(got, want.numpy(), engine.dtype)


def test_moves_beyond_what_a_step_carries(engine, folders):
    """A prompt's rows are more than a narrow step moves; they are moved before it, and moves of a freed slot never later."""
    if engine.slow:
        pytest.skip("long texts")
    folder, rng = folders["llama"], random.Random(2)
    model = engine.load(folder)
    text = random_text(rng, 90)
    cache = model.new_cache([100, 100])
    model.prefill([text, text[:40]], cache)
    assert cache.arena.pending == 40
    cache.free([1])
    assert cache.arena.pending == 0
    got = model.forward(TokenTree.roots([3]), cache.of([0]), logits=True).logits
    close(got[0], oracle(folder, [*text, 3])[-1], engine.dtype)


@pytest.mark.parametrize("sums", ["in order", "aligned"])
def test_rows_of_a_tree_are_plain_decoding_under_the_mode(engine, folders, sums):
    """Logits of a tree's rows have the bits of decoding their paths token by token, however the chip adds inside one instruction."""
    if engine.dtype != "bf16" or engine.name not in ("emulated", "cuda") or (engine.name == "cuda" and sums != "in order"):
        pytest.skip("the mode is the CUDA kernels', in 16 bits")
    rng = random.Random(5)
    text, (tokens, parents) = random_text(rng, 21), random_tree(rng, 7)
    tree = TokenTree.from_parents([tokens], [parents])
    with ramify.row_invariant(True), engine.library.sums(sums) if engine.library else nullcontext():
        model = engine.load(folders["qwen3"])
        cache = model.new_cache([64])
        model.prefill([text], cache)
        got = model.forward(tree, cache.of([0]), logits=True).logits.copy()
        cache.free([0])
        for row in (3, 6):
            cache = model.new_cache([64])
            model.prefill([text], cache, chunk=8)
            view = cache.of([0])
            for at in tree.path(0, row):
                out = model.forward(TokenTree.roots([tokens[at]]), view, logits=True)
                view.commit([np.array([0], np.int32)])
            assert np.array_equal(out.logits[0], got[row])
            cache.free([0])
