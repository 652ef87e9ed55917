"""Low-bit checkpoints in the model layer: logits equal those of the dense model of the dequantised weights bit for bit; damage is named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ramify
from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.model.checkpoint import INDEX, SINGLE, Checkpoint, expected
from ramify.model.config import ModelConfig
from ramify.quant import Format, QuantizedWeight
from ramify.quant.packing import packed
from ramify.quant.sources.ramify import config_of, stored
from ramify.testing.tiny_models import GROUPED
from ramify.tree import TokenTree

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 50,
    **GROUPED,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def low_bit(name, N, K, perm=False):
    form = Format.parse(name)
    if form.kind == "int4":
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    else:
        codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        codes = codes.float().to(torch.float8_e4m3fn) if form.kind == "fp8" else codes
    groups = form.scale_shape(N, K)
    scale = (torch.rand(groups) + 0.5) * {"int4": 0.02, "int8": 0.002, "fp8": 0.002}[form.kind]
    zero = torch.randint(4, 12, groups).half() if form.zero_point else None
    return QuantizedWeight(form, codes, scale, zero, torch.randperm(K).int() if perm else None)


def make(folder, quantization, weight_of, config=CONFIG, write=stored):
    """A low-bit folder and beside it the dense one of its dequantised weights. weight_of(name, N, K): a QuantizedWeight or None (dense)."""
    torch.manual_seed(0)
    dense, theirs = {}, {}
    table = dict(expected(ModelConfig.from_dict(config)))
    if config["tie_word_embeddings"]:
        table["lm_head"] = ("lm_head.weight", (config["vocab_size"], config["hidden_size"]))
    for ours, (name, shape) in table.items():
        prefix = name.removesuffix(".weight")
        weight = weight_of(ours, *shape) if len(shape) == 2 and ours != "embed" else None
        if weight is not None:
            theirs |= write(prefix, weight)
            dense[name] = weight.dequantize()
        elif ours != "lm_head" or not config["tie_word_embeddings"]:
            dense[name] = theirs[name] = (1.0 if "norm" in ours else 0.0) + 0.1 * torch.randn(shape)
    untied = {**config, "tie_word_embeddings": config["tie_word_embeddings"] and "lm_head.weight" not in dense}
    for place, values, tensors in ((folder, {**config, "quantization_config": quantization}, theirs), (folder / "dense", untied, dense)):
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / SINGLE)
        (place / "config.json").write_text(json.dumps(values))
    return folder


def logits(folder):
    model = ramify.load(folder, dtype="fp32", activations="exact")
    cache = model.new_cache([32])
    view, rows = cache.of([0]), []
    for token in range(0, 40, 7):
        rows.append(model.forward(TokenTree.roots([token]), view, logits=True).logits[0].copy())
        view.commit([np.array([0], np.int32)])
    return np.stack(rows)


def same(folder):
    """Exact layers of float32 sum the same products as dense ones, an order of inputs aside: 1e-4 of logits of order 1."""
    ours, dense = logits(folder), logits(folder / "dense")
    assert np.abs(ours - dense).max() < 1e-4 * max(1.0, np.abs(dense).max()) and ours.std() > 0.05


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64-zp", "int8", "fp8", "fp8-b128"])
def test_own_formats(tmp_path, name):
    folder = make(tmp_path, config_of(Format.parse(name)), lambda ours, N, K: None if ours == "lm_head" else low_bit(name, N, K))
    same(folder)
    layer = Checkpoint(folder).layer(1)
    assert {key for key, tensor in layer.items() if isinstance(tensor, QuantizedWeight)} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert Checkpoint(folder).config.quantization["format"] == name


def test_parts_of_a_fused_layer_may_differ_in_order(tmp_path):
    """q, k and v with orders of inputs of their own."""
    same(
        make(
            tmp_path, config_of(Format.parse("int4-g64")), lambda ours, N, K: None if ours == "lm_head" else low_bit("int4-g64", N, K, True)
        )
    )


@pytest.mark.parametrize("tied", [False, True])
def test_head(tmp_path, tied):
    """A head with a format of its own, beside embeddings that are tied or not."""
    quantization = config_of(Format.parse("int4-g64"), head=Format("int8"), dense=())
    config = {**CONFIG, "tie_word_embeddings": tied}
    folder = make(tmp_path, quantization, lambda ours, N, K: low_bit("int8" if ours == "lm_head" else "int4-g64", N, K), config)
    head = Checkpoint(folder).tensor("lm_head")
    assert head.format.name == "int8"
    same(folder)
    [loaded] = ramify.load(folder).weights.lm_head
    assert torch.equal(loaded.panels, packed(head))


def test_tied_head_that_is_not_low_bit(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": True}
    folder = make(tmp_path, config_of(Format("int8")), lambda ours, N, K: None if ours == "lm_head" else low_bit("int8", N, K), config)
    assert "lm_head" not in Checkpoint(folder).names
    same(folder)


# ---- other people's files -------------------------------------------------------------------------------------------


def gptq(prefix, weight):
    """A symmetric int4 weight as GPTQ writes it."""
    perm = torch.arange(weight.shape[1]) if weight.perm is None else weight.perm.long()
    group = weight.format.group
    g_idx = torch.empty_like(perm).index_copy_(0, perm, torch.arange(len(perm)) // group)
    low, high = weight.codes & 15, weight.codes >> 4
    codes = torch.empty(weight.shape, dtype=torch.uint8).index_copy_(1, perm, torch.stack([low, high], -1).flatten(1))
    words = (codes.view(len(codes), -1, 8).long() << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words < 2**31, words, words - 2**32).int().T.contiguous()
    zeros = torch.full((weight.scale.shape[1], -(-len(codes) // 8)), 0x77777777, dtype=torch.int32)
    named = {"qweight": words, "qzeros": zeros, "scales": weight.scale.T.half().contiguous(), "g_idx": g_idx.int()}
    return {f"{prefix}.{name}": tensor for name, tensor in named.items()}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": True}


def half_scales(ours, N, K, perm=False):
    """int4-g64 with scales that float16 holds."""
    if ours == "lm_head":
        return None
    weight = low_bit("int4-g64", N, K, perm)
    return QuantizedWeight(weight.format, weight.codes, weight.scale.half().float(), None, weight.perm)


@pytest.mark.parametrize("perm", [False, True])
def test_gptq(tmp_path, perm):
    folder = make(tmp_path, GPTQ, lambda ours, N, K: half_scales(ours, N, K, perm), write=gptq)
    same(folder)
    assert (Checkpoint(folder).tensor("layers.0.q").perm is not None) == perm


def test_fp8_blocks(tmp_path):
    """As DeepSeek and Qwen ship them, one layer ragged in both directions; the head beside them is dense."""

    def write(prefix, weight):
        return {f"{prefix}.weight": weight.codes, f"{prefix}.weight_scale_inv": weight.scale}

    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder = make(tmp_path, fp8, lambda ours, N, K: None if ours == "lm_head" else low_bit("fp8-b128", N, K), write=write)
    same(folder)
    assert Checkpoint(folder).tensor("layers.1.down").format.name == "fp8-b128"


def test_layers_that_lie_dense_stay_dense(tmp_path):
    """The config covers them all; the file has some dense."""

    def weight_of(ours, N, K):
        return None if ours.startswith("layers.0.") else half_scales(ours, N, K)

    folder = make(tmp_path, GPTQ, weight_of, write=gptq)
    same(folder)
    assert isinstance(Checkpoint(folder).tensor("layers.0.q"), torch.Tensor)


# ---- damage ---------------------------------------------------------------------------------------------------------


def damaged(folder, says, change, **options):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=says) as caught:
        list(Checkpoint(folder, **options).tensors())
    assert "\n" not in str(caught.value)


UP = "model.layers.1.mlp.up_proj"


def test_damaged_gptq(tmp_path):
    def folder(name):
        return make(tmp_path / name, GPTQ, half_scales, write=gptq)

    damaged(folder("a"), rf"{UP}\.scales.*missing", lambda t: t.pop(f"{UP}.scales"))
    damaged(folder("b"), rf"model\.safetensors, tensor \"{UP}\.scales\" is \[1, 192\]; takes \[2, 192\]", cut(f"{UP}.scales", 1))
    damaged(folder("c"), rf"{UP}\.qweight.*makes a weight \[192, 64\]; config.json makes it \[192, 128\]", cut(f"{UP}.qweight", 8))
    damaged(folder("d"), rf"{UP}\.qweight.*missing", lambda t: t.pop(f"{UP}.qweight"))

    def poison(tensors):
        tensors[f"{UP}.scales"][0, 0] = float("nan")

    damaged(folder("e"), rf"{UP}\.scales.*NaN", poison, finite=True)


def cut(name, rows):
    return lambda tensors: tensors.update({name: tensors[name][:rows].contiguous()})


def test_damaged_own_files(tmp_path):
    def folder(name):
        return make(tmp_path / name, config_of(Format("int8")), lambda ours, N, K: None if ours == "lm_head" else low_bit("int8", N, K))

    damaged(folder("a"), rf"{UP}\.weight_scale.*missing", lambda t: t.pop(f"{UP}.weight_scale"))
    damaged(folder("b"), rf"{UP}\.weight\".*float32; takes int8", lambda t: t.update({f"{UP}.weight": torch.zeros(192, 128)}))
    truncated = folder("c") / SINGLE
    truncated.write_bytes(truncated.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cut short"):
        Checkpoint(truncated.parent)


def test_a_shard_without_its_scales(tmp_path):
    folder = make(tmp_path, GPTQ, half_scales, write=gptq)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    index = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in tensors}
    for file in set(index.values()):
        kept = {n: t for n, t in tensors.items() if index[n] == file and n not in (f"{UP}.scales", f"{UP}.g_idx")}
        save_file(kept, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=rf"model-2\.safetensors, tensor \"{UP}\.scales\" is missing"):
        Checkpoint(folder)


def test_pickled_torchao(tmp_path):
    folder = make(tmp_path, {"quant_method": "torchao"}, lambda *_: None)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read: save it again with safe_serialization"):
        Checkpoint(folder)


def test_unknown_method(tmp_path):
    folder = make(tmp_path, {"quant_method": "gptq", "bits": 4}, lambda *_: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(UnsupportedModelError, match="quip.*gptq"):
        ramify.load(folder)
