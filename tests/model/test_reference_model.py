"""The oracle against transformers: four families, their options, trees, windows, shards."""

import copy

import pytest
import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ramify.model.checkpoint import Checkpoint
from ramify.model.config import ModelConfig, RopeConfig
from ramify.model.rope import RopeTable, rope_tables
from ramify.reference.model import forward

SMALL = {
    "vocab_size": 131,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied_biased": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama_llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama_linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}),
    "mistral_window": MistralConfig(**SMALL, sliding_window=9),
    "mistral_full": MistralConfig(**SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**{**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2_window": Qwen2Config(
        **{**SMALL, "num_hidden_layers": 3, "num_attention_heads": 2}, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SMALL),
    "qwen3_biased": Qwen3Config(**{**SMALL, "hidden_size": 192, "num_key_value_heads": 1}, attention_bias=True),
}


def build(config, seed=0):
    """A random model whose norms and biases are random too: the ones and zeros of the initialiser would hide mistakes."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # a model writes its dtype into its config
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    model = build(CASES[case])
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    weights = dict(checkpoint.tensors())
    ids = torch.randint(131, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids, output_hidden_states=True)
    for row, tokens in enumerate(ids):
        ours = forward(weights, checkpoint.config, tokens, taps=(0, 1))
        torch.testing.assert_close(ours.logits, theirs.logits[row], atol=1e-4, rtol=1e-4)
        for i in (0, 1):
            torch.testing.assert_close(ours.taps[i], theirs.hidden_states[i][row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["llama", "mistral_window", "qwen3"])
def test_tree_rows_equal_their_path(case, tmp_path):
    """A row of a tree, seen through the mask, has the logits of the plain text that leads to it."""
    model = build(CASES[case])
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    weights = dict(checkpoint.tensors())
    rng = torch.Generator().manual_seed(2)
    prefix, rows = 12, 10
    tokens = torch.randint(131, (prefix + rows,), generator=rng)
    parents = list(range(-1, prefix - 1)) + [int(torch.randint(prefix - 1, prefix + i, (1,), generator=rng)) for i in range(rows)]
    paths = []
    for i, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), i])
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, path in enumerate(paths):
        mask[i, path] = True
    logits = forward(weights, checkpoint.config, tokens, [len(p) - 1 for p in paths], mask).logits
    for i in range(prefix, prefix + rows):
        with torch.no_grad():
            plain = model(tokens[paths[i]][None]).logits[0, -1]
        torch.testing.assert_close(logits[i], plain, atol=1e-4, rtol=1e-4)


def test_shards_and_half_precision(tmp_path):
    """Sharding changes no bit; float16 comes back as float32 and bfloat16 as it is stored."""
    model = build(CASES["llama"])
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    whole, shards = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert whole.names == shards.names
    for (name, a), (_, b) in zip(whole.tensors(), shards.tensors(), strict=True):
        assert torch.equal(a, b), name
    for kind, seen in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        folder = tmp_path / str(kind)
        build(CASES["llama"]).to(kind).save_pretrained(folder)
        tensor = Checkpoint(folder).tensor("layers.1.q")
        assert tensor.dtype == seen
        assert torch.equal(tensor, whole.tensor("layers.1.q").to(kind).to(seen))


@pytest.mark.parametrize("case", ["llama", "llama_llama3", "llama_linear"])
def test_rope_tables_are_those_of_transformers_bitwise(case):
    config = CASES[case]
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(256)[None])
    ours = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **config.to_dict()}).rope
    mine = rope_tables(ours, 64, 256)
    assert torch.equal(mine[0], cos[0, :, :32]) and torch.equal(mine[1], sin[0, :, :32])
    assert mine[0].shape == (256, 32) and mine[0].is_contiguous()


def test_rope_default_is_the_formula():
    cos, sin = rope_tables(RopeConfig(theta=10000.0), 64, 50)
    angle = 49 * 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(cos[49].double(), angle.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[49].double(), angle.sin(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("positions", "asked"), [(5, [1, 5]), (5000, [3, 1024, 1025, 4999, 5000]), (40_001, [1, 40_000, 40_001])])
def test_rope_table_grows_to_the_same_bits(positions, asked):
    rope = RopeConfig(theta=10000.0)
    table, (cos, sin) = RopeTable(rope, 96, positions), rope_tables(rope, 96, positions)
    address = table.cos.data_ptr()
    for count in asked:
        table.reach(count)
        assert table.ready >= count and torch.equal(table.cos[:count], cos[:count]) and torch.equal(table.sin[:count], sin[:count])
    assert table.cos.data_ptr() == address and table.ready == positions
