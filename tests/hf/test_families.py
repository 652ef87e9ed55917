"""Models of other families than Llama's: what of them is rounded, what stays dense, and that both run and are saved alike."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    T5Config,
)

from ramify.hf import LowBitLinear, RamifyConfig

TOKENS = torch.arange(7)[None] * 5
CONFIGS = {
    "t5": T5Config(vocab_size=64, d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2, decoder_start_token_id=0),
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
