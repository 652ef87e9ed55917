"""The captured model against transformers, and against itself: a row's bits depend on nothing but its own path.

Tolerance against transformers: 1e-4 on fp32 logits of order 1, where both sum some hundred products in different orders.
Everything else is an equality of bits, on every ISA level of this machine, in fp32 and bf16.
"""

import json
import random

import numpy as np
import pytest
import torch

import ramify
from ramify import native
from ramify.tree import TokenTree

LEVELS = [level for level, runs in native.levels().items() if runs]
VOCABULARY = 199
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "llama3": {
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"num_key_value_heads": 2, "sliding_window": 37},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 64},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny random checkpoint of each family, written by transformers; norms are not ones, biases not zeros."""
    transformers = pytest.importorskip("transformers")
    made = {}
    for family, extra in FAMILIES.items():
        torch.manual_seed(len(made))
        config = transformers.AutoConfig.for_model(
            family.rstrip("3") if family == "llama3" else family,
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=700,
            tie_word_embeddings=family == "llama",
            **extra,
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name:
                    p.add_(0.3 * torch.randn_like(p))
                elif name.endswith("bias"):
                    p.copy_(0.3 * torch.randn_like(p))
                else:
                    p.mul_(3)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        made[family] = (folder, model)
    return made


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def model(request, folders):
    return ramify.load(folders["mistral"][0], dtype=request.param)


@pytest.fixture
def each_level():
    """Runs a check on every ISA level, then restores the best one."""
    before = native.isa()

    def run(check):
        for level in LEVELS:
            native.set_isa(level)
            check(level)

    yield run
    native.set_isa(before)


def random_tree(rng, root, rows, deep=False):
    parents = [-1] + [row - 1 if deep else rng.randrange(max(0, row - 6), row) for row in range(1, rows)]
    used, tokens = set(), [root]
    for parent in parents[1:]:
        token = rng.randrange(VOCABULARY)
        while (parent, token) in used:
            token = (token + 1) % VOCABULARY
        used.add((parent, token))
        tokens.append(token)
    return tokens, parents


def plain_logits(model, text, eager=False):
    """Logits after each token of `text`, one row a step."""
    cache = model.new_cache([len(text) + 1])
    view, rows = cache.of([0]), []
    for token in text:
        rows.append(model.forward(TokenTree.roots([token]), view, logits=True).logits[0].copy())
        view.commit([np.array([0], np.int32)])
    cache.free([0])
    return np.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(folders, family, each_level):
    folder, theirs = folders[family]
    text = np.random.default_rng(0).integers(0, VOCABULARY, 150)
    want = theirs(torch.tensor(text)[None]).logits[0].detach().numpy()

    def check(level):
        model = ramify.load(folder, dtype="fp32")
        cache = model.new_cache([160])
        model.prefill([text[:100].tolist()], cache, chunk=33)
        tree = TokenTree.chains([int(text[100])], [text[101:].tolist()])
        got = model.forward(tree, cache.of([0]), logits=True).logits
        np.testing.assert_allclose(got, want[100:], atol=1e-4 * max(1.0, np.abs(want).max()), err_msg=level)

    each_level(check)


def test_bf16_stays_close_to_fp32(folders):
    folder, theirs = folders["llama"]
    text = np.random.default_rng(1).integers(0, VOCABULARY, 60).tolist()
    want = theirs(torch.tensor(text)[None]).logits[0].detach().numpy()
    got = plain_logits(ramify.load(folder, dtype="bf16"), text)
    assert np.abs(got - want).max() < 0.04 * np.abs(want).max()  # 8 bits of weight, three layers


@pytest.mark.parametrize("B", [1, 2, 5])
def test_tree_rows_equal_plain_decoding(model, B, each_level):
    """I6: a row of a random tree has the logits of a plain forward on its prefix and its path; law 8: to the bit, on every ISA level.

    Prefixes across pages and a chunk border, trees wider than an ancestor word.
    """
    sizes = [(63, 9), (120, 90), (505, 20), (1, 12), (64, 33)]

    def check(level):
        for begin in range(0, len(sizes) - B + 1, B):
            rng = random.Random(3 + begin)
            batch = sizes[begin : begin + B]
            texts = [[rng.randrange(VOCABULARY) for _ in range(prefix)] for prefix, _ in batch]
            grown = [random_tree(rng, rng.randrange(VOCABULARY), rows, deep=prefix == 505) for prefix, rows in batch]
            tree = TokenTree.from_parents([tokens for tokens, _ in grown], [parents for _, parents in grown])
            cache = model.new_cache([prefix + 1 for prefix, _ in batch])
            model.prefill(texts, cache, chunk=rng.choice([7, 64, 512]))
            got = model.forward(tree, cache.of(range(B)), logits=True).logits.copy()
            for b, (prefix, rows) in enumerate(batch):
                for row in sorted({0, rows - 1, rng.randrange(rows)}):
                    path = tree.path(b, row)
                    want = plain_logits(model, texts[b] + [grown[b][0][r] for r in path])[-1]
                    assert np.array_equal(got[tree.span(b)][row], want), f"{level}: prefix {prefix}, row {row}"
            cache.free(range(B))

    each_level(check)


@pytest.mark.parametrize("B", [2, 5])
def test_batch_and_threads_change_no_bit(model, B, each_level):
    def check(level):
        rng = random.Random(B)
        texts = [[rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 30, 64, 200]))] for _ in range(B)]
        trees = [random_tree(rng, 5, rng.choice([1, 4, 17, 66])) for _ in range(B)]
        cache = model.new_cache([len(t) + 1 for t in texts])
        model.prefill(texts, cache)
        both = TokenTree.from_parents([t for t, _ in trees], [p for _, p in trees])
        got = model.forward(both, cache.of(list(range(B))), logits=True).logits.copy()
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            for b in range(B):
                alone = TokenTree.from_parents([trees[b][0]], [trees[b][1]])
                want = model.forward(alone, cache.of([b]), logits=True).logits
                assert np.array_equal(got[both.span(b)], want), f"{level}: sequence {b}"
        finally:
            torch.set_num_threads(threads)

    each_level(check)


@pytest.mark.parametrize("B", [1, 2, 5])
def test_commit_equals_fresh_prefill(model, B):
    """I5 without a tolerance: after trees with branches were committed, the pages hold what a prefill of the same ids writes."""
    rng = random.Random(11 + B)
    texts = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (130, 1, 64, 63, 200)[:B]]
    cache, fresh = model.new_cache([500] * B), model.new_cache([500] * B)
    model.prefill(texts, cache)
    view = cache.of(range(B))
    for _ in range(12):
        grown = [random_tree(rng, rng.randrange(VOCABULARY), rng.choice([1, 5, 40])) for _ in range(B)]
        tree = TokenTree.from_parents([tokens for tokens, _ in grown], [parents for _, parents in grown])
        model.forward(tree, view)
        paths = [tree.path(b, rng.randrange(len(tokens))) for b, (tokens, _) in enumerate(grown)]
        view.commit(paths)
        for text, (tokens, _), path in zip(texts, grown, paths, strict=True):
            text += [tokens[row] for row in path]
    cache.arena.flush()
    model.prefill(texts, fresh, chunk=50)
    fresh.arena.flush()
    assert view.lengths.tolist() == [len(text) for text in texts]

    def slots(c, which, b):
        n = len(texts[b])
        pages = getattr(c.arena, which)[:, c.page_table[b, : -(-n // 64)]].float()
        L, P = pages.shape[:2]
        D, pair = 64, 2 if model.dtype == "bf16" else 1
        if which == "k":
            x = pages.reshape(L, P, -1, 2, D // pair, 32, pair).permute(0, 2, 1, 3, 5, 4, 6)
        else:
            x = pages.reshape(L, P, -1, 64 // pair, D, pair).permute(0, 2, 1, 3, 5, 4)
        return x.reshape(L, x.shape[1], P * 64, D)[:, :, :n]

    for b in range(B):
        for which in ("k", "v"):
            assert torch.equal(slots(cache, which, b), slots(fresh, which, b))
    cache.free(range(B))
    fresh.free(range(B))


def test_eager_equals_captured(model):
    tree = TokenTree.chains([3, 9], [[1, 2, 3, 4], []])
    outs = []
    for eager in (False, True):
        model.eager = eager
        cache = model.new_cache([80, 80])
        model.prefill([[7] * 70, [1, 2]], cache)
        out = model.forward(tree, cache.of([0, 1]), topk=5, logits=True, taps=(0, 2, -1))
        outs.append([out.logits.copy(), out.argmax.copy(), out.lse.copy(), out.topk_ids.copy(), *(t.copy() for t in out.taps.values())])
    model.eager = False
    assert all(np.array_equal(a, b) for a, b in zip(*outs, strict=True))


def test_row_statistics_are_those_of_the_logits(model):
    cache = model.new_cache([90])
    model.prefill([list(range(80))], cache)
    out = model.forward(TokenTree.chains([3], [[1, 2, 3, 4]]), cache.of([0]), topk=8, logits=True)
    logits = torch.from_numpy(out.logits.copy())
    assert np.array_equal(out.argmax, logits.argmax(-1).numpy())
    values, ids = logits.topk(8)
    assert np.array_equal(out.topk_ids, ids.numpy())
    assert np.array_equal(out.topk_values, values.numpy())
    np.testing.assert_allclose(out.lse, logits.double().logsumexp(-1), rtol=1e-6)


def test_layer_ranges_and_taps_compose(model):
    """Layers [0, k) and then [k, L) on the handed-over hidden state equal the whole, bit for bit; taps are the states in between."""
    tree = TokenTree.from_parents([[3, 4, 5, 6]], [[-1, 0, 0, 1]])
    cache = model.new_cache([40])
    model.prefill([list(range(20))], cache)
    view = cache.of([0])
    whole = model.forward(tree, view, logits=True, taps=(1,))
    logits, tap = whole.logits.copy(), whole.taps[1].copy()
    part = model.forward(tree, view, layers=(0, 1))
    assert part.logits is None and np.array_equal(part.taps[1], tap)
    rest = model.forward(tree, view, layers=(1, 3), hidden=part.taps[1].copy(), logits=True)
    assert np.array_equal(rest.logits, logits)


def test_a_tree_may_grow_level_by_level(model):
    rng = random.Random(5)
    trees = [random_tree(rng, 1, 70), random_tree(rng, 2, 20)]
    full = TokenTree.from_parents([t for t, _ in trees], [p for _, p in trees])
    cache = model.new_cache([40, 40])
    model.prefill([[5] * 20, [6] * 30], cache)
    view = cache.of([0, 1])
    want = model.forward(full, view, logits=True).logits.copy()
    first = np.zeros(2, np.int32)
    for rows in ([1, 1], [7, 2], [66, 19], [70, 20]):
        part = full.prefix(rows)
        got = model.forward(part, view, first=first, logits=True).logits
        at = 0
        for b in range(2):
            n = rows[b] - first[b]
            begin = full.row_start[b] + first[b]
            assert np.array_equal(got[at : at + n], want[begin : begin + n])
            at += n
        first = np.array(rows, np.int32)


def test_bad_requests_name_what_came(model):
    cache = model.new_cache([20])
    view = cache.of([0])
    with pytest.raises(ValueError, match="forward: token 199"):
        model.forward(TokenTree.roots([VOCABULARY]), view)
    with pytest.raises(ValueError, match="forward: tree has 2 sequences; takes 1"):
        model.forward(TokenTree.roots([1, 2]), view)
    with pytest.raises(ValueError, match="topk is 99"):
        model.forward(TokenTree.roots([1]), view, topk=99)
    with pytest.raises(ValueError, match="prompt of slot 0 is empty"):
        model.prefill([[]], cache)
    with pytest.raises(ValueError, match="21 tokens in slot 0; takes at most 20"):
        model.prefill([[1] * 21], cache)
    with pytest.raises(ValueError, match="capacity is 701"):
        model.new_cache([701])
    with pytest.raises(TypeError, match="capacity is 1.5; takes a whole number"):
        model.new_cache([1.5])
    with pytest.raises(ValueError, match="capacities is empty"):
        model.new_cache([])
    with pytest.raises(ValueError, match="pages"):
        model.new_cache([7], pages="f33")
    with pytest.raises(ValueError, match="no forward"):
        cache.of([0]).commit([np.array([0], np.int32)])
    with pytest.raises(ValueError, match="length is 9"):
        view.crop([9])
    with pytest.raises(ValueError, match="first is"):
        model.forward(TokenTree.roots([1]), view, first=[1])


def test_a_cache_serves_its_model_and_its_slots_alone(model):
    """Another model's pages are of another size, and a freed cache's memory is the next cache's: neither may be written."""
    tree = TokenTree.roots([1])
    cache = model.new_cache([20, 20])
    view = cache.of([0])
    with pytest.raises(ValueError, match="forward: cache is another model's"):
        ramify.load("zoo-drafter").forward(tree, view)
    with pytest.raises(ValueError, match="forward: cache is another model's"):
        ramify.load("zoo-drafter").prefill([[1, 2]], cache)
    for slots in ([2], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"Cache.of: slots is .*; takes different ones of \[0, 1\]"):
            cache.of(slots)
    cache.free([0])
    with pytest.raises(ValueError, match=r"takes different ones of \[1\]"):
        model.prefill([[1, 2]], cache)
    cache.free([1])
    with pytest.raises(ValueError, match="forward: cache was freed"):
        model.forward(tree, view)


def test_nan_weights_are_reported(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(folders["llama"][0], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = ramify.load(folder)
    with pytest.raises(ValueError, match="logits of row 0 are not finite"):
        model.forward(TokenTree.roots([1]), model.new_cache([5]).of([0]))


def test_load_refuses_by_name(folders, tmp_path):
    folder = folders["llama"][0]
    for arguments, told in (
        ({"dtype": "fp8"}, 'dtype is "fp8"; takes bf16 or fp32.'),
        ({"dtype": None}, "dtype is None; takes bf16 or fp32."),
        ({"device": "cuda:99"}, 'device is "cuda:99"; takes "cpu"'),
        ({"device": "tpu"}, 'device is "tpu"; takes "cpu", "cuda" or'),
        ({"weights": "int5"}, 'weights is "int5"; takes int8, int4-g32'),
        ({"weights": 5}, "weights is 5; takes int8"),
        ({"head": True}, "head is True; takes int8"),
        ({"activations": 5}, 'activations is 5; takes "int8"'),
    ):
        with pytest.raises(ValueError, match=f"^load: {told}"):
            ramify.load(folder, **arguments)
    for wrong in (None, 5, b"zoo", ["zoo"]):
        with pytest.raises(TypeError, match='load: model is .*; takes a path, "zoo" or "zoo-drafter".'):
            ramify.load(wrong)
    with pytest.raises(ramify.CheckpointError, match='load: model is ""'):
        ramify.load("")
    with pytest.raises(ramify.CheckpointError, match="no folder"):
        ramify.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    with pytest.raises(ramify.UnsupportedModelError, match="MambaForCausalLM"):
        ramify.load(tmp_path)


def test_hand_made_trees_and_paths_are_checked(model):
    """What would become a wrong address is refused: depths outside the tree, arrays of other lengths, rows that no forward ran."""
    view = model.new_cache([20]).of([0])
    tree = TokenTree.chains([1], [[2, 3]])
    for depth in ([0, -2_000_000, 2], [0, 1, 900]):
        bad = TokenTree(tree.tokens, tree.parent, np.array(depth, np.int32), tree.row_start, tree.ancestors, tree.kind)
        with pytest.raises(ValueError, match="depth"):
            model.forward(bad, view)
    short = TokenTree(tree.tokens, tree.parent, tree.depth[:2], tree.row_start, tree.ancestors, tree.kind)
    with pytest.raises(ValueError, match="other lengths"):
        model.forward(short, view)
    model.forward(tree, view)
    for path in ([100_000_000], [0, -1], [0, 3]):
        with pytest.raises(ValueError, match="takes rows 0 to 2"):
            view.commit([np.array(path, np.int32)])
    assert view.lengths[0] == 0
    view.commit([np.array([0, 1, 2], np.int32)])
    assert view.lengths[0] == 3
