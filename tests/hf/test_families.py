"""Models of other families than Llama's: what of them is rounded, what stays dense, and that both run and are saved alike."""

import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    T5Config,
)

from ramify.hf import LowBitLinear, RamifyConfig
from ramify.quant import Format, quantize
from ramify.testing.tiny_models import GROUPED

TOKENS = torch.arange(7)[None] * 5
SIZES = {"vocab_size": 64, **GROUPED}
CONFIGS = {
    "t5": T5Config(vocab_size=64, d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "mamba": MambaConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2, state_size=16, intermediate_size=256),
    "gpt2": GPT2Config(vocab_size=64, n_embd=128, n_layer=2, n_head=2, n_positions=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "llama": LlamaConfig(**SIZES),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """family -> folder of a tiny model, made when it is asked for."""
    made = {}

    def folder(family):
        if family not in made:
            torch.manual_seed(0)
            made[family] = tmp_path_factory.mktemp(family)
            kind(family).from_config(CONFIGS[family]).save_pretrained(made[family])
        return made[family]

    return folder


def kind(family):
    return AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM


def logits(model):
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(TOKENS, **more).logits


def low_bit(model):
    return [name for name, module in model.named_modules() if isinstance(module, LowBitLinear)]


@pytest.mark.parametrize("form", ["int4-g64", "int8", "fp8"])
def test_what_transformers_keeps_in_fp32_stays_dense(dense, tmp_path, form):
    """T5 casts the input of wo to the dtype of its weight: codes have none that a layer could compute in."""
    model = kind("t5").from_pretrained(dense("t5"), quantization_config=RamifyConfig(form))
    assert len(low_bit(model)) == 28 and not any(name.endswith(".wo") for name in low_bit(model))
    want = logits(model)
    assert (want - logits(kind("t5").from_pretrained(dense("t5")))).norm() < 0.2 * want.norm()
    model.save_pretrained(tmp_path)
    again = kind("t5").from_pretrained(tmp_path)
    assert torch.equal(logits(again), want) and low_bit(again) == low_bit(model)


@pytest.mark.parametrize("form", ["int4-g64", "int8"])
def test_transposed_inputs_and_bare_matrices(dense, tmp_path, form):
    """Mamba's x_proj reads what a convolution over tokens has written, and dt_proj is never called: its weight is taken as it is."""
    model = kind("mamba").from_pretrained(dense("mamba"), quantization_config=RamifyConfig(form))
    assert {name.rpartition(".")[2] for name in low_bit(model)} == {"in_proj", "x_proj", "out_proj"}
    want = logits(model)
    assert (want - logits(kind("mamba").from_pretrained(dense("mamba")))).norm() < 0.2 * want.norm()
    model.save_pretrained(tmp_path)
    again = kind("mamba").from_pretrained(tmp_path)
    assert torch.equal(logits(again), want) and low_bit(again) == low_bit(model)


STRIDED = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one number": lambda x: x[..., :1].expand_as(x),
    "one row": lambda x: x[:, :1].expand_as(x),
    "batch inside": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "flat": lambda x: x.mT.contiguous().mT[0, 0],
}


@pytest.mark.parametrize("form", ["int4-g32", "int8", "fp8"])
@pytest.mark.parametrize("view", STRIDED)
def test_a_layer_takes_every_stride(form, view):
    g = torch.Generator().manual_seed(0)
    layer = LowBitLinear.of(quantize(torch.randn(48, 64, generator=g), Format.parse(form)))
    x = STRIDED[view](torch.randn(2, 3, 64, generator=g))
    assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))


def test_an_input_cast_to_codes_is_named():
    layer = LowBitLinear.of(quantize(torch.randn(48, 64), Format("fp8")))
    with pytest.raises(TypeError, match=r"LowBitLinear: x is float8_e4m3fn; takes floats.*modules_to_not_convert"):
        layer(torch.randn(3, 64).to(layer.weight.dtype))


def said(family, dense, **options):
    """What loading it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = kind(family).from_pretrained(dense(family), quantization_config=RamifyConfig("int4-g64", **options))
    return model, [str(each.message) for each in caught if each.category is UserWarning and "RamifyConfig" in str(each.message)]


def test_a_model_of_which_nothing_is_rounded_is_told(dense):
    """GPT-2's layers are Conv1D, which keeps its weight the other way round."""
    model, [warning] = said("gpt2", dense)
    assert not low_bit(model)
    assert warning.startswith("RamifyConfig: int4-g64 rounds 0 of 393,216 weights (0%) of GPT2LMHeadModel outside embeddings and head")
    assert "Conv1D (393,216, no nn.Linear)" in warning and "\n" not in warning


def test_a_model_of_which_little_is_rounded_is_told(dense):
    """The experts of Mixtral are one parameter, in no layer of torch."""
    model, [warning] = said("mixtral", dense)
    assert len(low_bit(model)) == 8
    share = 2 * (2 * 128 * 128 + 2 * 64 * 128), 2 * (3 * 4 * 128 * 192)
    assert f"rounds {share[0]:,} of" in warning and f"MixtralExperts ({share[1]:,}, no nn.Linear)" in warning and "(14%)" in warning


def test_a_model_that_is_told_to_stay_dense_is_told_so(dense):
    _, [warning] = said("llama", dense, modules_to_not_convert=["mlp"])
    assert "Linear (147,456, named in modules_to_not_convert" in warning
    assert said("llama", dense)[1] == said("mamba", dense)[1] == []
