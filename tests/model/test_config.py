"""config.json in all its dialects, and what is refused."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.model.config import FAMILIES, ModelConfig

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def parse(**changes):
    values = {**BASE, **changes}
    return ModelConfig.from_dict({k: v for k, v in values.items() if v is not ...}, name="m")


def test_fields():
    c = parse(torch_dtype="bfloat16")
    assert (c.vocab_size, c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim) == (100, 192, 3, 3, 1, 64)
    assert (c.inner_size, c.norm_eps, c.max_positions, c.tied_embeddings, c.eos_token_ids) == (320, 1e-5, 512, True, (7,))
    assert (c.dtype, c.name, c.sliding_windows) == ("bfloat16", "m", (None,) * 3)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert c.quantization is None and parse(quantization_config=quantization).quantization == quantization
    assert not (c.qkv_bias or c.o_bias or c.mlp_bias or c.qk_norm)
    assert parse(num_key_value_heads=None).num_kv_heads == 3
    assert parse(eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    assert parse(eos_token_id=None).eos_token_ids == ()
    assert parse(head_dim=128).head_dim == 128
    assert parse(pretraining_tp=2).num_layers == 3


def test_biases_follow_family_and_config():
    llama = parse(attention_bias=True, mlp_bias=True)
    assert llama.qkv_bias and llama.o_bias and llama.mlp_bias
    qwen2 = parse(architectures=["Qwen2ForCausalLM"])
    assert qwen2.qkv_bias and not qwen2.o_bias and not qwen2.qk_norm
    qwen3 = parse(architectures=["Qwen3ForCausalLM"])
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 128


def test_rope_dialects():
    assert parse(rope_theta=5e5).rope.theta == 5e5
    assert parse(rope_parameters={"rope_type": "default", "rope_theta": 3e4}).rope.theta == 3e4
    old = parse(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}).rope
    new = parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}).rope
    assert old == new and (new.kind, new.factor, new.original_max_positions) == ("llama3", 8.0, 128)
    assert parse(rope_scaling={"type": "linear", "factor": 4}).rope.factor == 4.0
    for kind in ("yarn", "dynamic", "longrope"):
        with pytest.raises(UnsupportedModelError, match=f"{kind}.*default, linear or llama3"):
            parse(rope_scaling={"type": kind, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        parse(partial_rotary_factor=0.5)
    with pytest.raises(CheckpointError, match="factor"):
        parse(rope_scaling={"type": "linear"})


def test_sliding_windows():
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert parse(**mistral, sliding_window=16).sliding_windows == (16,) * 3
    assert parse(**mistral, sliding_window=None).sliding_windows == (None,) * 3
    assert parse(**mistral).sliding_windows == (4096,) * 3  # what transformers assumes
    for architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        qwen = {"architectures": [architecture], "sliding_window": 16, "max_window_layers": 1}
        assert parse(**qwen).sliding_windows == (None,) * 3
        assert parse(**qwen, use_sliding_window=True).sliding_windows == (None, 16, 16)
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        assert parse(**qwen, use_sliding_window=True, layer_types=types).sliding_windows == (16, None, 16)
        assert parse(**qwen, use_sliding_window=False, layer_types=types).sliding_windows == (None,) * 3
        with pytest.raises(UnsupportedModelError, match="chunked_attention"):
            parse(**qwen, layer_types=["chunked_attention"] * 3)
    assert parse(sliding_window=16).sliding_windows == (None,) * 3  # Llama never slides


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"architectures": ["MambaForCausalLM"]}, UnsupportedModelError, "MambaForCausalLM.*LlamaForCausalLM"),
        ({"model_type": "gemma2"}, UnsupportedModelError, "LlamaForCausalLM and model_type .gemma2.; takes .llama. with it"),
        ({"architectures": ...}, UnsupportedModelError, "no architectures"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "gelu.*silu"),
        ({"head_dim": 32}, UnsupportedModelError, "32.*64, 96, 128 or 256"),
        ({"quantization_config": {"quant_method": "exl2"}}, UnsupportedModelError, "exl2.*awq, compressed-tensors, fp8, gptq, ramify_w4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, UnsupportedModelError, "3 for .bits.*4 or 8"),
        ({"quantization_config": "awq"}, CheckpointError, '"awq" for "quantization_config".*an object'),
        ({"dtype": "float64"}, UnsupportedModelError, "float64"),
        ({"hidden_size": ...}, CheckpointError, "hidden_size"),
        ({"num_hidden_layers": 0}, CheckpointError, "num_hidden_layers"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, CheckpointError, "multiple"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, CheckpointError, "sliding_window"),
    ],
)
def test_refusals(changes, error, says):
    with pytest.raises(error, match=says) as caught:
        parse(**changes)
    assert "\n" not in str(caught.value)


def test_from_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (1, 2)
    assert ModelConfig.from_folder(tmp_path).name == tmp_path.name
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path / "absent")


def test_model_type_stands_in_for_architectures():
    for name, family in FAMILIES.items():
        assert parse(architectures=..., model_type=family.model_type).architecture == name


VALUES = [
    None, True, False, 0, 1, -1, 3, 64, 2.5, -0.0, 1e-5, 1e300, float("nan"), float("inf"), 10**12, 10**400, "", "64", "x\ny", "default",
    [], [1], ["a"], [None], [[1]], [True], {}, {"a": 1}, {"rope_type": 5}, {"rope_type": "llama3"}, {"type": "linear", "factor": "8"},
    {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, {"rope_type": "linear", "factor": 10**400}, {"rope_theta": -1},
    {"partial_rotary_factor": []}, {"quant_method": [1]},
]  # fmt: skip
FIELDS = [
    *BASE, "model_type", "head_dim", "hidden_act", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "dtype",
    "torch_dtype", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types", "max_window_layers",
    "bos_token_id", "quantization_config",
]  # fmt: skip


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    architecture=st.sampled_from(list(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from([*VALUES, ...]), min_size=1, max_size=3),
)
def test_any_value_in_any_field(architecture, changes):
    """A config is read or refused in one line that names a field of it; nothing else ever happens."""
    values = {"use_sliding_window": True, "architectures": [architecture], **changes}
    try:
        config = parse(**values)
    except (CheckpointError, UnsupportedModelError) as error:
        said = str(error)
        assert said.startswith("load: config.json ") and "; takes " in said and "\n" not in said and len(said) < 300, said
        named = [key for key in [*FIELDS, "rope type", "layer type", "names"] if key in said]
        assert named, said
        return
    counts = [config.vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.max_positions]
    assert all(type(n) is int and n > 0 for n in counts) and type(config.norm_eps) is float and 0 <= config.norm_eps < math.inf
    assert len(config.sliding_windows) == config.num_layers and 0 < config.rope.theta < math.inf
    flags = [config.tied_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm]
    assert all(type(flag) is bool for flag in flags) and all(type(i) is int for i in config.eos_token_ids)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rms_norm_eps": "1e-5"}, '"1e-5" for "rms_norm_eps"; takes a finite number of 0 or more'),
        ({"rms_norm_eps": float("nan")}, 'nan for "rms_norm_eps"'),
        ({"architectures": 5}, '5 for "architectures"; takes a list of strings'),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": 3}, '3 for "layer_types"; takes a list of strings'),
        ({"rope_parameters": [1]}, '[1] for "rope_parameters"; takes an object'),
        ({"rope_parameters": {"rope_type": "linear", "factor": "8"}}, '"8" for "factor" in rope_parameters; takes a finite number above 0'),
        ({"hidden_size": "64"}, '"64" for "hidden_size"; takes a whole number from 1 to 2147483647'),
        ({"num_attention_heads": -3}, '-3 for "num_attention_heads"'),
        ({"max_position_embeddings": 10**12}, '1000000000000 for "max_position_embeddings"; takes a whole number from 1 to 16777216'),
        ({"num_hidden_layers": 10**9}, '1000000000 for "num_hidden_layers"; takes a whole number from 1 to 4096'),
        ({"vocab_size": ...}, 'no "vocab_size"; takes'),
        ({"torch_dtype": 16}, '16 for "torch_dtype"; takes a string'),
        ({"torch_dtype": "int3"}, 'dtype "int3"; takes float32, bfloat16 or float16'),
        ({"tie_word_embeddings": "false"}, '"false" for "tie_word_embeddings"; takes true or false'),
        ({"eos_token_id": [7, "8"]}, """[7, '8'] for "eos_token_id"; takes a token id or a list of them"""),
    ],
)
def test_what_came_is_named(changes, says):
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        parse(**changes)
    assert says in str(caught.value)
    assert parse(rms_norm_eps=None).norm_eps == 1e-6  # null is what transformers takes for absent


def test_files_that_are_no_config(tmp_path):
    for text in ("[" * 100_000, "1" * 5000, "\x00", "[1]", '"a"', "null", '{"hidden_size": ' + "9" * 5000 + "}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json") as caught:
            ModelConfig.from_folder(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match='generation_config.json has "x" for "eos_token_id"'):
        ModelConfig.from_folder(tmp_path)
