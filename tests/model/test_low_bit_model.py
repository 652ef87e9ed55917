"""Whole models on low-bit weights: against the plain-torch model of the dequantised weights, and against themselves.

Tolerance of "exact" layers in fp32: 1e-4 on logits of order 1, as for dense ones. With activations rounded to int8 a logit is off by
about the rounding itself, some percent of the logits' spread; the bound there is what a wrong scale or a wrong row would pass.
"""

import random

import numpy as np
import pytest
import torch

import ramify
from ramify import native, reference
from ramify.model.checkpoint import Checkpoint
from ramify.model.model import Model
from ramify.model.weights import Settings, Weights
from ramify.quant import Format, QuantizedWeight, quantize
from ramify.reference.model import forward
from ramify.tree import TokenTree

VOCABULARY = 199
LEVELS = [level for level, runs in native.levels().items() if runs]
FAMILIES = {"llama": True, "qwen2": False, "qwen3": False, "mistral": True}  # family -> whether its head is tied


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny random checkpoint of each family."""
    transformers = pytest.importorskip("transformers")
    made = {}
    for family, tied in FAMILIES.items():
        torch.manual_seed(len(made))
        config = transformers.AutoConfig.for_model(
            family,
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=700,
            tie_word_embeddings=tied,
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(0.3 * torch.randn_like(p) if name.endswith("bias") else p + 0.2 * torch.randn_like(p) if "norm" in name else 3 * p)
        made[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(made[family])
    return made


class Held(Checkpoint):
    """A checkpoint whose layers are quantised before the model layer sees them: each matrix by a rule of its own."""

    def __init__(self, folder, rule):
        super().__init__(folder)
        self.low_bit = {}
        for name in self.names:
            short = name.rpartition(".")[2]
            if short in ("q", "k", "v", "o", "gate", "up", "down"):
                self.low_bit[name] = rule(short, super().tensor(name).float())

    def tensor(self, name):
        return self.low_bit[name] if name in self.low_bit else super().tensor(name)

    def dense(self):
        """Canonical tensors, dequantised."""
        return {name: t.dequantize() if isinstance(t, QuantizedWeight) else t for name, t in self.tensors()}


def logits_of(model, text, eager=False):
    model.eager = eager
    cache, tree = model.new_cache([len(text)]), TokenTree.chains([text[0]], [text[1:]])
    try:
        return model.forward(tree, cache.of([0]), logits=True).logits.copy()
    finally:
        cache.free([0])
        model.eager = False


def in_format(name):
    return lambda short, w: quantize(w, Format.parse(name))


def shuffled(short, w):
    """int4 with zeros and an order of inputs that differs between q, k and v."""
    perm = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(len(short) + ord(short[0]))).int()
    plain = quantize(w[:, perm.long()], Format("int4", 32, zero_point=True))
    return QuantizedWeight(plain.format, plain.codes, plain.scale, plain.zero, perm)


def mixed(short, w):
    """Formats that cannot lie in one matrix."""
    return quantize(w, Format.parse({"q": "int4-g64", "k": "int8", "v": "fp8"}.get(short, "int4-g32")))


@pytest.mark.parametrize("rule", [*map(in_format, ("int8", "int4-g32", "int4-g64-zp", "fp8", "fp8-b128")), shuffled, mixed])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_plain_model(folders, family, rule):
    checkpoint = Held(folders[family], rule)
    text = np.random.default_rng(0).integers(0, VOCABULARY, 90).tolist()
    want = forward(checkpoint.dense(), checkpoint.config, text).logits.numpy()
    exact = Model(checkpoint.config, Weights.load(checkpoint, Settings(torch.float32, activations="exact")))
    got = logits_of(exact, text)
    assert np.abs(got - want).max() < 1e-4 * max(1.0, np.abs(want).max())
    assert (logits_of(exact, text, eager=True) == got).all()
    rounded = Model(checkpoint.config, Weights.load(checkpoint, Settings(torch.float32)))
    error = np.abs(logits_of(rounded, text) - want).mean() / np.abs(want - want.mean(axis=1, keepdims=True)).mean()
    assert error < 0.15


@pytest.mark.parametrize("weights", ["int4-g64", "int8", "fp8"])
@pytest.mark.parametrize("activations", ["int8", "int8-group", "bf16", "exact"])
def test_tree_rows_equal_plain_decoding(folders, weights, activations):
    """Law 8 in low bits: a row's logits are those of its own path, decoded token by token, on every ISA level."""
    model = ramify.load(folders["qwen2"], weights=weights, activations=activations)
    rng, before = random.Random(0), native.isa()
    prefix = [rng.randrange(VOCABULARY) for _ in range(70)]
    parents = [-1] + [rng.randrange(max(0, row - 5), row) for row in range(1, 24)]
    tokens = [rng.randrange(VOCABULARY) for _ in parents]
    for level in LEVELS:
        native.set_isa(level)
        try:
            cache = model.new_cache([120])
            model.prefill([prefix], cache)
            rows = model.forward(TokenTree.from_parents([tokens], [parents]), cache.of([0]), logits=True).logits.copy()
            cache.free([0])
            for row in (0, 7, 23):
                path, at = [], row
                while at >= 0:
                    path, at = [at, *path], parents[at]
                cache = model.new_cache([120])
                model.prefill([prefix], cache, chunk=33)
                view = cache.of([0])
                for node in path:
                    alone = model.forward(TokenTree.roots([tokens[node]]), view, logits=True).logits[0].copy()
                    view.commit([np.array([0], np.int32)])
                cache.free([0])
                assert (alone == rows[row]).all(), (level, row)
        finally:
            native.set_isa(before)


def test_head_and_statistics(folders):
    """A head in low bits, tied or not, with its statistics; the embedding table stays as it is."""
    text = list(range(40))
    for family in ("llama", "qwen2"):
        for head in ("int8", "int4-g64", "dense"):
            model = ramify.load(folders[family], dtype="fp32", weights="int8", head=head, activations="exact")
            assert model.weights.embed.dtype == torch.float32
            assert bool(model.weights.lm_head[0].low_bit) == (head != "dense")
            cache = model.new_cache([len(text)])
            out = model.forward(TokenTree.chains([text[0]], [text[1:]]), cache.of([0]), topk=5, logits=True)
            argmax, lse, top = reference.row_stats(torch.from_numpy(out.logits.copy()))
            assert (out.argmax == argmax.numpy()).all() and (out.topk_ids[:, 0] == out.argmax).all()
            assert np.allclose(out.lse, lse.numpy(), atol=1e-4) and np.allclose(out.top, top.numpy())
            cache.free([0])


def test_load_says_what_it_takes(folders):
    for options, told in (
        ({"weights": "int5"}, 'load: weights is "int5"; takes int8, int4-g32'),
        ({"weights": "int4-g128", "head": "int3"}, 'load: head is "int3"'),
        ({"weights": "int8", "activations": "int4"}, 'activations is "int4"; takes "int8"'),
    ):
        with pytest.raises(ValueError, match=told):
            ramify.load(folders["llama"], **options)
    with pytest.raises(ValueError, match=r"K = 192; int4-g128 takes multiples of 128"):
        ramify.load(folders["llama"], weights="int4-g128")


def test_costs_are_kept_apart(folders):
    names = [{}, {"weights": "int8"}, {"weights": "int4-g64"}, {"weights": "int4-g64", "activations": "exact"}]
    assert len({ramify.load(folders["llama"], **options).fingerprint for options in names}) == len(names)
