"""ramify inside transformers' generate: greedy text is generate's own, sampled text follows its distribution."""

import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, OPTConfig, Qwen3Config, T5Config

import ramify
from ramify import CustomGenerate, UnsupportedModelError
from ramify.hf.model import HFModel
from ramify.tree import TokenTree

VOCAB, NEW = 61, 60
ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": LlamaConfig(**ROPE),
    "mistral": MistralConfig(**ROPE, sliding_window=11),
    "qwen3": Qwen3Config(**ROPE, use_sliding_window=True, sliding_window=11, layer_types=MIXED),
    "gemma3": Gemma3TextConfig(**ROPE, sliding_window=11, layer_types=MIXED),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=96,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        ffn_dim=96,
        num_attention_heads=4,
        max_position_embeddings=96,
        word_embed_proj_dim=64,
        init_std=0.3,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    ),
}
METHODS = {"plain": {"size": 1}, "prompt_lookup": {"size": 9}, "token_recycling": {"size": 24}}
_built = {}


def build(name, seed=0, attention="sdpa"):
    key = name, seed, attention
    if key not in _built:
        torch.manual_seed(seed)
        _built[key] = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()
    return _built[key]


def batch(lengths, seed=1):
    """Random prompts of these lengths, padded on the left."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, -n:] = torch.randint(1, VOCAB, (n,), generator=rng)
        mask[row, -n:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def steps(decoder):
    return max(out.stats.steps for out in decoder.outputs)


# ---- the model behind the interface -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tree_rows_equal_plain_text(name, attention):
    """Ragged batches, trees, commits by index, trees grown in two forwards, a slot that ends: every row is the row of its path."""
    hf, rng = build(name, attention=attention), np.random.default_rng(3)
    model = HFModel(hf)
    texts = [rng.integers(1, VOCAB, n).tolist() for n in (13, 2, 21)]
    cache = model.new_cache([90] * 3)
    model.prefill([text[:-1] for text in texts], cache)
    live = [0, 1, 2]
    for step in range(4):
        view = cache.of(live)
        tokens = [[texts[i][-1], *rng.choice(VOCAB, int(rng.integers(0, 8)), replace=False).tolist()] for i in live]
        tree = TokenTree.from_parents(tokens, [[-1, *(int(rng.integers(0, j)) for j in range(1, len(t)))] for t in tokens])
        first = np.zeros(len(live), np.int32)
        if step % 2:
            first = np.array([int(rng.integers(1, n + 1)) if n > 1 else 0 for n in tree.rows], np.int32)
            first = np.minimum(first, tree.rows - 1)
            model.forward(tree.prefix(np.maximum(first, 1)), view)
        out = model.forward(tree, view, first=first, logits=True, topk=3)
        row, paths = 0, []
        for b, i in enumerate(live):
            for r in range(first[b], tree.rows[b]):
                with torch.no_grad():
                    plain = hf(torch.tensor([texts[i][:-1] + [tokens[b][j] for j in tree.path(b, r)]])).logits[0, -1]
                np.testing.assert_allclose(out.logits[row], plain, atol=1e-4, rtol=1e-4)
                assert out.argmax[row] == out.topk_ids[row, 0] == out.logits[row].argmax()
                np.testing.assert_allclose(out.lse[row], plain.logsumexp(-1), atol=1e-4)
                row += 1
            paths.append(tree.path(b, int(rng.integers(0, tree.rows[b]))))
            texts[i] += [tokens[b][j] for j in paths[-1][1:]] + [int(rng.integers(1, VOCAB))]
        assert row == len(out.argmax)
        view.commit(paths)
        if step == 1:
            cache.free([1])
            live = [0, 2]
    assert cache.of([0]).lengths[0] == len(texts[0]) - 1


def test_prefill_in_chunks(monkeypatch):
    """Chunks and ragged prompts change nothing; rows_out sees every token once, in order; crop takes tokens back."""
    monkeypatch.setattr("ramify.hf.model.PREFILL_ROWS", 7)
    hf = build("qwen3")
    model, rng = HFModel(hf), np.random.default_rng(5)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in (23, 4, 15)]
    cache, seen = model.new_cache([40] * 3), {0: [], 1: [], 2: []}

    def look(slot, tokens, out):
        with torch.no_grad():
            rows = hf(torch.tensor([prompts[slot]])).logits[0, len(seen[slot]) : len(seen[slot]) + len(tokens)]
        np.testing.assert_array_equal(out.topk_ids, rows.topk(2, dim=-1).indices)
        assert out.taps[1].shape == (len(tokens), 64)
        seen[slot] += tokens

    model.prefill(prompts, cache, topk=2, taps=(1,), rows_out=look)
    assert [seen[i] for i in range(3)] == prompts
    view = cache.of([0, 1, 2])
    view.crop([20, 4, 11])
    out = model.forward(TokenTree.roots([prompts[0][20], 3, prompts[2][11]]), view)
    with torch.no_grad():
        assert out.argmax[0] == hf(torch.tensor([prompts[0][:21]])).logits[0, -1].argmax()
        assert out.argmax[2] == hf(torch.tensor([prompts[2][:12]])).logits[0, -1].argmax()


# ---- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "gemma3"])
def test_greedy_is_generate(name, method):
    model = build(name)
    decoder = CustomGenerate(method, **METHODS[method])
    for lengths in ([7], [5, 12]):
        inputs = batch(lengths)
        plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        ours = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder)
        assert torch.equal(ours, plain)
        assert all(out.stats.tokens == NEW for out in decoder.outputs)
    if method == "plain":
        assert steps(decoder) == NEW


def test_measured_width_and_auto():
    """Whatever the size policy finds on this machine, and whichever method `auto` takes, the text stays."""
    model, inputs = build("llama"), batch([5, 12])
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    for method in ("token_recycling", "auto"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=CustomGenerate(method)), plain)


@pytest.mark.parametrize("method", ["draft_chain", "draft_tree"])
def test_draft_model(method):
    """With the target itself as the drafter every guess of a chain is right."""
    model = build("llama")
    inputs = batch([6, 9])
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    for draft in (build("llama"), build("gpt2")):
        decoder = CustomGenerate(method, drafter=draft, size=6)
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder), plain)
    decoder = CustomGenerate(method, drafter=model, size=6)
    model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder)
    assert steps(decoder) < NEW / 2


def test_ends_of_texts():
    """End-of-text ids, stopping criteria and padding on the right, for a ragged batch whose texts end apart."""
    model = build("llama")
    inputs = batch([4, 9, 6, 11, 5])
    assert inputs["input_ids"].shape[1] == 11
    free = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, 11:]
    eos = [int(free[0, 20]), int(free[1, 33])]

    def three_in_a_row(ids, scores, **kwargs):
        return (ids[:, -1] % 3 == 0) & (ids[:, -2] % 3 == 0) & (ids[:, -3] % 3 == 0)

    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    for extra in (
        {"eos_token_id": eos},
        {"eos_token_id": eos[1:], "stopping_criteria": [three_in_a_row]},
        {"eos_token_id": eos[:1], "min_new_tokens": 30},
    ):
        plain = model.generate(**inputs, **settings, **extra)
        for method in METHODS:
            ours = model.generate(**inputs, **settings, **extra, custom_generate=CustomGenerate(method, **METHODS[method]))
            assert torch.equal(ours, plain), (method, extra)


def test_processors_see_their_own_path():
    """Greedy under processors that depend on the text, padding included."""
    model = build("llama")
    inputs = batch([8, 5])
    settings = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    settings["prefix_allowed_tokens_fn"] = lambda row, ids: range(row, VOCAB - 20 * row)  # differs from row to row
    plain = model.generate(**inputs, **settings)
    assert not torch.equal(plain, model.generate(**inputs, max_new_tokens=NEW, do_sample=False))
    for method in METHODS:
        assert torch.equal(model.generate(**inputs, **settings, custom_generate=CustomGenerate(method, **METHODS[method])), plain)


@pytest.mark.parametrize("method", ["token_recycling", "draft_chain"])
def test_samples_follow_generate(method):
    """First and second token of 400 texts against the exact joint distribution, by chi-square over its likeliest pairs."""
    model, count = build("llama"), 400
    inputs = {"input_ids": batch([6])["input_ids"].repeat(count, 1)}
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 4, "top_p": 0.95}
    options = {"drafter": build("llama", seed=5)} if method == "draft_chain" else {}
    torch.manual_seed(11)
    decoder = CustomGenerate(method, size=5, **options)
    ids = model.generate(**inputs, **settings, max_new_tokens=3, custom_generate=decoder)[:, 6:8].tolist()
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warp = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(4), TopPLogitsWarper(0.95)])

    def law(text):
        with torch.no_grad():
            return warp(None, model(text[None]).logits[:, -1]).softmax(-1)[0].double()

    first, joint = law(inputs["input_ids"][0]), {}
    for a in first.nonzero().flatten():
        second = law(torch.cat([inputs["input_ids"][0], a[None]]))
        joint.update({(int(a), int(b)): float(first[a] * second[b]) for b in second.nonzero().flatten()})
    assert all(tuple(pair) in joint for pair in ids)
    pairs = [pair for pair, p in joint.items() if p * count >= 5]
    seen = np.array([sum(tuple(x) == pair for x in ids) for pair in pairs])
    wanted = np.array([joint[pair] * count for pair in pairs])
    assert ((seen - wanted) ** 2 / wanted).sum() < len(pairs) + 4 * np.sqrt(2 * len(pairs))


def test_sampling_is_reproducible():
    model, inputs = build("llama"), batch([6, 3])
    settings = {"do_sample": True, "max_new_tokens": 20, "num_return_sequences": 2}
    texts = []
    for seed, method in ((1, "plain"), (1, "token_recycling"), (2, "plain")):
        torch.manual_seed(seed)
        texts.append(model.generate(**inputs, **settings, custom_generate=CustomGenerate(method, size=12)))
    assert texts[0].shape == (4, 26)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0][0], texts[0][1])


def test_streamer_and_dict_output():
    class Streamer:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, inputs, streamer = build("llama"), batch([6]), Streamer()
    decoder = CustomGenerate("prompt_lookup", size=5, streamer=streamer)
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, custom_generate=decoder)
    assert [token for part in streamer.parts for token in part] == out.sequences[0].tolist()
    assert streamer.ended and streamer.parts[0] == inputs["input_ids"][0].tolist()
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**batch([6, 7]), max_new_tokens=2, custom_generate=decoder)


def test_refusals():
    model, inputs = build("llama"), batch([6, 4])
    run = CustomGenerate("prompt_lookup")
    for settings, says in (
        ({"num_beams": 2}, "num_beams"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"attention_mask": inputs["attention_mask"].flip(1)}, "left"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidance"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            model.generate(**{**inputs, **settings}, max_new_tokens=4, custom_generate=run)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="prompt_lookup"):
        CustomGenerate("prompt_lokup")
    with pytest.raises(TypeError, match="CustomGenerate: method is 5; takes a name or a Drafter"):
        CustomGenerate(5)
    with pytest.raises(ValueError, match="vocabulary"):
        other = transformers.AutoModelForCausalLM.from_config(LlamaConfig(**{**ROPE, "vocab_size": 70}))
        model.generate(**inputs, max_new_tokens=4, custom_generate=CustomGenerate("draft_chain", drafter=other))
    with pytest.raises(UnsupportedModelError, match="encoder"):
        HFModel(
            transformers.AutoModelForSeq2SeqLM.from_config(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=1, d_kv=16, vocab_size=9))
        )


def test_ramify_does_not_import_transformers():
    import subprocess

    code = "import ramify, sys; assert not {'transformers', 'matplotlib', 'rich'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ramify.CustomGenerate is CustomGenerate
