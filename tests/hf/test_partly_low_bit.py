"""Low-bit folders in models that have more than they hold, and low-bit models made dense again."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import ramify
from ramify.convert import convert
from ramify.hf import LowBitLinear, RamifyConfig

TOKENS = torch.arange(7)[None] * 5
LAYER = "model.layers.1.mlp.down_proj"
FORMATS = ["int4-g64-zp", "int8", "fp8"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a tiny Llama in bfloat16."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 192}
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, pad_token_id=0)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def converted(request, dense, tmp_path_factory):
    """A folder that convert has written, in each format."""
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(dense, out, to=request.param, evaluate=False)
    return out


def low_bit(model):
    return {name for name, module in model.named_modules() if isinstance(module, LowBitLinear)}


def test_a_new_head_of_a_converted_folder(converted, tmp_path):
    """The folder holds nothing of it, so transformers makes it, and says so."""
    torch.manual_seed(1)
    model, info = AutoModelForSequenceClassification.from_pretrained(converted, num_labels=2, output_loading_info=True)
    assert type(model.score) is torch.nn.Linear and len(low_bit(model)) == 14
    assert set(info["missing_keys"]) == {"score.weight"} and model.score.weight.isfinite().all() and model.score.weight.std() > 0
    with torch.no_grad():
        logits = model.eval()(TOKENS).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(again(TOKENS).logits, logits) and low_bit(again) == low_bit(model)


def test_a_layer_of_which_a_tensor_is_lost(converted, tmp_path):
    """Of what is partly there nothing is made up, whatever the class."""
    tensors = load_file(converted / "model.safetensors")
    del tensors[f"{LAYER}.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((converted / "config.json").read_text())
    with pytest.raises(ramify.CheckpointError, match=rf'"{LAYER}\.weight_scale" is missing'):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)


def test_layers_under_other_names_are_no_new_ones(converted, tmp_path):
    """Codes of the same layer under a name that the class does not have would be read by nobody, and the layer made up."""
    tensors = {name.replace("model.layers", "model.blocks"): tensor for name, tensor in load_file(converted / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((converted / "config.json").read_text())
    with pytest.raises(ramify.CheckpointError, match=r'"model\.layers\.0\.self_attn\.q_proj\.weight" is missing'):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_dequantized(dense, tmp_path, form):
    """Each layer becomes a dense one with the values that its codes stand for, and the folder a dense one."""
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=RamifyConfig(form), dtype=torch.float32)
    weights = {name: model.get_submodule(name).quantized.dequantize() for name in low_bit(model)}
    with torch.no_grad():
        before = model(TOKENS).logits
        assert model.dequantize() is model and not low_bit(model) and len(weights) == 14
        logits = model(TOKENS).logits
        assert (logits - before).norm() < 0.1 * before.norm()
        for name, w in weights.items():
            layer = model.get_submodule(name)
            assert type(layer) is torch.nn.Linear and layer.weight.requires_grad and torch.equal(layer.weight, w)
        model.save_pretrained(tmp_path)
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()) and torch.equal(again(TOKENS).logits, logits)
    assert not hasattr(again.config, "quantization_config")


def test_dequantized_in_a_dtype(converted):
    """Its own, as every folder of bfloat16 does, or another, which the rest of the model takes too."""
    for asked in (None, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(converted)
        codes = model.get_submodule(LAYER).quantized
        model.dequantize(dtype=asked)
        dtype = asked or torch.bfloat16
        assert {each.dtype for each in model.parameters()} == {dtype}
        assert torch.equal(model.get_submodule(LAYER).weight, codes.dequantize().to(dtype))
        assert model(TOKENS).logits.dtype == dtype


def test_the_head_is_what_two_readers_differ_in(converted):
    """transformers keeps it dense; load rounds it as the folder notes, to int8, unless it is told not to."""
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()(TOKENS).logits[0]
    apart = []
    for options in ({"head": "dense"}, {}):
        model = ramify.load(converted, dtype="fp32", **options)
        rows = []
        cache = model.new_cache([16])
        model.prefill([TOKENS[0].tolist()], cache, rows_out=lambda slot, tokens, out, rows=rows: rows.append(torch.tensor(out.logits)))
        apart.append(float((rows[0] - theirs).abs().max()))
    assert apart[0] < 1e-4 < 1e-3 < apart[1]
