"""convert of a quantised checkpoint: the same weights in ramify's form, the same logits bit for bit, and nothing rounded a second time."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ramify
from ramify.convert import convert
from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.model.checkpoint import SINGLE, Checkpoint, expected
from ramify.model.config import ModelConfig
from ramify.model.load import folder_of
from ramify.quant import Format, QuantizedWeight, quantize
from ramify.quant.sources.ramify import config_of, stored
from ramify.quant.weight import pack_nibbles
from ramify.tree import TokenTree

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quant"
FILES = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
DENSE = ["self_attn", "down_proj", "lm_head"]


def make(folder, quantization, write, config=CONFIG):
    """A checkpoint. write(canonical name, prefix, shape): the tensors of a matrix, or None for a dense one."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    tensors = {}
    table = {"lm_head": ("lm_head.weight", (64, 256)), **expected(ModelConfig.from_dict(config))}
    for name, (theirs, shape) in table.items():
        matrix = len(shape) == 2 and name != "embed"
        low_bit = write(name, theirs.removesuffix(".weight"), shape) if matrix else None
        if low_bit is not None:
            tensors |= low_bit
        elif name != "lm_head" or not config["tie_word_embeddings"]:
            tensors[theirs] = ((0.0 if matrix else 1.0) + 0.1 * torch.randn(shape, generator=g)).bfloat16()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def from_package(name, folder):
    """A model whose gate and up are what a package wrote, and all else dense."""
    with safe_open(str(FIXTURES / f"{name}.safetensors"), framework="pt") as file:
        quantization = json.loads(file.metadata()["quantization_config"])
        layer = {key.removeprefix("proj."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    shape = layer.pop("expected").shape
    left = {"ignore": [f"re:.*{part}.*" for part in DENSE]} if name.startswith("compressed") else {"modules_to_not_convert": DENSE}

    def write(name, prefix, wanted):
        return {f"{prefix}.{key}": tensor.clone() for key, tensor in layer.items()} if wanted == shape else None

    return make(folder, {**quantization, **left}, write, {**CONFIG, "intermediate_size": shape[0]})


def logits(folder, activations="int8"):
    model = ramify.load(folder, activations=activations)
    rows = []
    model.prefill([list(range(0, 63, 3))], model.new_cache([32]), rows_out=lambda slot, tokens, out: rows.append(torch.tensor(out.logits)))
    return torch.cat(rows)


def same_bits(a, b):
    if isinstance(a, QuantizedWeight):
        assert a.format == b.format and a.state_dict().keys() == b.state_dict().keys()
        return all(same_bits(tensor, b.state_dict()[part]) for part, tensor in a.state_dict().items())
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def repacked(source, out, **options):
    """The conversion; checked: every tensor and all logits are those of the source, bit for bit."""
    made = convert(source, out, **options)
    before, after = Checkpoint(source), Checkpoint(out)
    assert before.names == after.names and set(before.low_bit_names) == set(after.low_bit_names) and made.method == "repack"
    assert after.config.quantization["quant_method"].startswith("ramify_w")
    for name in before.names:
        assert same_bits(before.tensor(name), after.tensor(name)), name
    for activations in ("int8", "int8-group", "exact"):
        want = logits(source, activations)
        assert want.std() > 0.01 and torch.equal(logits(out, activations), want)
    sizes = [sum(tensor.nbytes for tensor in load_file(folder / SINGLE).values()) for folder in (source, out)]
    assert made.total_bytes == tuple(sizes)
    return made


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_packages(tmp_path, name):
    source = from_package(name, tmp_path / "in")
    made = repacked(source, tmp_path / "out")
    assert made.formats == {made.format: 4, "dense": 10} and made.head is None
    assert made.source_method.replace("-", "_") == name.partition("-")[0]
    assert convert(source, tmp_path / "same", to=made.format).format == made.format
    assert not made.errors and made.unmeasured == "the model has no tokenizer.json"


# ---- whole models, every matrix low-bit ----------------------------------------------------------------------------


WIDE = {**CONFIG, "intermediate_size": 128}


def int4(shape, seed=0, perm=False, zero=False, scale_dtype=torch.float16):
    """A random int4 weight with groups of 32 and whole zeros."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    (N, K), form = shape, Format("int4", 32, zero)
    codes = torch.randint(0, 256, (N, K // 2), generator=g, dtype=torch.uint8)
    scale = (torch.rand(N, K // 32, generator=g) / 30 + 0.01).to(scale_dtype)
    zeros = torch.randint(1, 15, (N, K // 32), generator=g).half() if zero else None
    return QuantizedWeight(form, codes, scale, zeros, torch.randperm(K, generator=g).int() if perm else None)


def nibbles(weight):
    """Codes [N, K] in the order of the groups."""
    return torch.stack([weight.codes & 15, weight.codes >> 4], -1).flatten(1)


def words(q):
    """Nibbles uint8 [..., C] -> int32 [..., C / 8], lowest first."""
    return pack_nibbles(q.contiguous()).view(torch.int32)


def as_gptq(name, prefix, shape):
    """Every input order is its own; version 1 keeps zeros less one."""
    weight = int4(shape, perm=True, zero=True)
    perm = weight.perm.long()
    q = torch.empty_like(nibbles(weight)).index_copy_(1, perm, nibbles(weight))
    g_idx = torch.empty_like(weight.perm).index_copy_(0, perm, (torch.arange(shape[1]) // 32).int())
    zeros = words((weight.zero.T - 1).to(torch.uint8))
    return {
        f"{prefix}.qweight": words(q.T.contiguous().T).T,
        f"{prefix}.qzeros": zeros,
        f"{prefix}.scales": weight.scale.T,
        f"{prefix}.g_idx": g_idx,
    }


def as_awq(name, prefix, shape):
    if name == "lm_head":
        return None
    weight = int4(shape, zero=True)

    def outputs(q):  # [R, N] -> [R, N / 8], eight outputs a word in AWQ's order
        return words(q.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1))

    named = {"qweight": outputs(nibbles(weight).T), "qzeros": outputs(weight.zero.T.to(torch.uint8)), "scales": weight.scale.T}
    return {f"{prefix}.{key}": tensor for key, tensor in named.items()}


def as_compressed(name, prefix, shape):
    """down is int8 with one scale a row, the rest int4, layer 1 with zero points; the head is int8 too."""
    if name == "lm_head" or name.endswith("down"):
        weight = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 10, Format("int8"))
        return {f"{prefix}.weight": weight.codes, f"{prefix}.weight_scale": weight.scale.bfloat16()}
    weight = int4(shape, zero="layers.1" in name, scale_dtype=torch.bfloat16)
    zero = torch.full_like(weight.scale, 8) if weight.zero is None else weight.zero
    named = {"weight_packed": words(nibbles(weight)), "weight_scale": weight.scale, "weight_shape": torch.tensor(shape)}
    return {f"{prefix}.{key}": t for key, t in {**named, "weight_zero_point": words(zero.T.to(torch.uint8)).T}.items()}


def as_torchao(name, prefix, shape):
    weight = int4(shape, zero=True, scale_dtype=torch.float32)
    named = {"qdata": nibbles(weight).char() - 8, "scale": weight.scale, "zero_point": weight.zero.char() - 8}
    return {f"{prefix}._weight_{key}": tensor for key, tensor in named.items()}


def as_fp8(name, prefix, shape):
    weight = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(2)) / 10, Format("fp8", 128))
    return None if name == "lm_head" else {f"{prefix}.weight": weight.codes, f"{prefix}.weight_scale_inv": weight.scale}


def scheme(targets, **weights):
    return {"targets": targets, "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **weights}}


MIXED = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "a": {**scheme(["Linear"], num_bits=4, strategy="group", group_size=32, symmetric=False), "format": "pack-quantized"},
        "b": {**scheme(["re:.*down_proj", "lm_head"]), "format": "int-quantized"},
    },
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "lm_head": True}
WHOLE = {
    "gptq": (GPTQ, as_gptq, {"int4-g32-zp": 14}, "int4-g32-zp"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, as_awq, {"int4-g32-zp": 14}, None),
    "compressed-tensors": (MIXED, as_compressed, {"int4-g32": 6, "int8": 2, "int4-g32-zp": 6}, "int8"),
    "torchao": ({"quant_method": "torchao"}, as_torchao, {"int4-g32-zp": 14}, "int4-g32-zp"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, as_fp8, {"fp8-b128": 14}, None),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(tmp_path, name, tied):
    """Tied embeddings too: beside them a low-bit head lies in the file all the same."""
    quantization, write, formats, head = WHOLE[name]
    source = make(tmp_path / "in", quantization, write, {**WIDE, "tie_word_embeddings": tied})
    made = repacked(source, tmp_path / "out")
    assert (made.formats, made.head) == (formats, head)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is (tied and head is None)
    assert ("lm_head" in settings["quantization_config"]["modules_to_not_convert"]) is (head is None)


@pytest.mark.parametrize("name", WHOLE)
def test_transformers_loads_it(tmp_path, name):
    """from_pretrained finds every tensor and no other; layers of several formats keep their own."""
    transformers = pytest.importorskip("transformers")
    quantization, write, *_ = WHOLE[name]
    source = make(tmp_path / "in", quantization, write, WIDE)
    convert(source, tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    checkpoint = Checkpoint(source)
    for ours in checkpoint.low_bit_names:
        layer = model.get_submodule(checkpoint.source_name(ours).removesuffix(".weight"))
        assert same_bits(layer.quantized, checkpoint.tensor(ours)), ours
    with torch.no_grad():
        theirs = model.eval()(torch.arange(0, 63, 3)[None]).logits[0]
    ours = ramify.load(tmp_path / "out", dtype="fp32")
    rows = []
    ours.prefill([list(range(0, 63, 3))], ours.new_cache([32]), rows_out=lambda slot, tokens, out: rows.append(torch.tensor(out.logits)))
    assert (torch.cat(rows) - theirs).abs().max() < 1e-3 * theirs.abs().max()  # float32, sums in other orders
    model.save_pretrained(tmp_path / "again")
    assert all(same_bits(Checkpoint(tmp_path / "again").tensor(name), checkpoint.tensor(name)) for name in checkpoint.low_bit_names)
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")  # its layers lack the prefix "model."
    assert same_bits(base.layers[0].mlp.down_proj.quantized, checkpoint.tensor("layers.0.down"))


def test_own_files_again(tmp_path):
    """A folder of ramify's own keeps its quantizer, and its word on the head."""
    convert("zoo-drafter", tmp_path / "a", to="int8", evaluate=False)
    made = convert(tmp_path / "a", tmp_path / "b")
    assert (made.head, made.before) == ("int8", made.after) and made.source_method == "ramify_w8"
    files = [load_file(tmp_path / each / SINGLE) for each in "ab"]
    assert files[0].keys() == files[1].keys() and all(same_bits(files[0][name], files[1][name]) for name in files[0])
    assert convert(tmp_path / "a", tmp_path / "c", head="dense", evaluate=False).head is None
    assert convert(tmp_path / "a", tmp_path / "d", head="int4-g32", evaluate=False).head == "int4-g32"
    said = [json.loads((tmp_path / each / "config.json").read_text())["quantization_config"] for each in "abcd"]
    assert [each["head"] for each in said] == ["int8", "int8", None, "int4-g32"] and {each["method"] for each in said} == {"rtn"}
    tree, rows = TokenTree.roots([5]), []
    for each in "abcd":
        model = ramify.load(tmp_path / each)
        rows.append(model.forward(tree, model.new_cache([8]).of([0]), logits=True).logits[0].copy())
    assert np.array_equal(rows[0], rows[1]) and all(not np.array_equal(rows[0], row) for row in rows[2:])


def test_the_card_says_where_the_codes_are_from(tmp_path):
    quantization, write, *_ = WHOLE["compressed-tensors"]
    source = make(tmp_path / "in", quantization, write, {**WIDE, "vocab_size": 4096})
    for file in folder_of("zoo").glob("tokenizer*"):
        shutil.copy(file, source)
    made = convert(source, tmp_path / "out")
    assert made.before == made.after and made.evaluated_on == "the zoo's held-out modules"
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "ramify's int4-g32 (2 in int8, 6 in int4-g32-zp).\nTheir codes, scales, zeros and order of inputs are those of its compressed-t",
        f"| perplexity | {made.before.perplexity:.3f} | {made.before.perplexity:.3f} |",
        "`ramify convert in OUT --head int8`.",
    ):
        assert part in text
    assert "error" not in text and "\n\n\n" not in text
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["method"], settings["head"]) == ("ramify_w4", "compressed-tensors", "int8")


def test_an_older_name_of_the_config(tmp_path):
    """compression_config: read as well, and not left beside the new one."""
    source = from_package("compressed_tensors-int8-channel", tmp_path / "in")
    file = source / "config.json"
    file.write_text(file.read_text().replace("quantization_config", "compression_config"))
    repacked(source, tmp_path / "out")
    assert "compression_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_dense_checkpoint_whose_cache_is_quantised(tmp_path):
    """Its weights are floats, so they are rounded as others are."""
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}
    made = convert(make(tmp_path / "in", config, lambda *_: None, WIDE), tmp_path / "out", to="int8")
    assert (made.method, made.source_method, len(made.errors)) == ("rtn", None, 14)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"to": "int8"},
            "convert: in is int4-g32 already; rounding it again to int8 would lose twice. Leave out --to, or start from the float",
        ),
        ({"to": "int4-g32"}, '"model.layers.0.mlp.down_proj" is int8 already; rounding it again to int4-g32 would lose twice'),
        (
            {"method": "rtn"},
            "convert: method is given and in is int4-g32 already; .* Leave out --method, or start from the float checkpoint",
        ),
        ({"calibration": "x"}, "convert: calibration is given and in is int4-g32 already"),
        ({"head": "int4-g32"}, 'convert: head is "int4-g32" and that of in is int8 already; takes no other. Leave out --head'),
        ({"head": "dense"}, 'head is "dense" and that of in is int8 already'),
    ],
)
def test_nothing_is_rounded_again(tmp_path, options, says):
    source = make(tmp_path / "in", *WHOLE["compressed-tensors"][:2], WIDE)
    with pytest.raises(ValueError, match=says) as caught:
        convert(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and [each.name for each in tmp_path.iterdir()] == ["in"]


def test_damage_is_told_of_convert(tmp_path):
    quantization, write, *_ = WHOLE["gptq"]
    source = make(tmp_path / "in", quantization, write, WIDE)
    tensors, up = load_file(source / SINGLE), "model.layers.1.mlp.up_proj"
    for change, says in (
        ({f"{up}.scales": None}, rf'convert: .*in, tensor "{up}\.scales" is missing'),
        ({f"{up}.scales": tensors[f"{up}.scales"] * torch.nan}, rf'convert: model\.safetensors, tensor "{up}\.scales" holds NaN'),
        (
            {f"{up}.qweight": tensors[f"{up}.qweight"].float()},
            rf'convert: model\.safetensors, tensor "{up}\.qweight" is float32; takes int32',
        ),
        ({f"{up}.g_idx": tensors[f"{up}.g_idx"] * 0}, rf'convert: model\.safetensors, tensor "{up}\.g_idx" does not name each of 8 groups'),
    ):
        damaged = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(damaged, source / SINGLE)
        with pytest.raises(CheckpointError, match=f"^{says}"):
            convert(source, tmp_path / "out")
        assert [each.name for each in tmp_path.iterdir()] == ["in"]
    (source / "config.json").write_text(json.dumps({**WIDE, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UnsupportedModelError, match='^convert: config.json has "bitsandbytes" for "quant_method"'):
        convert(source, tmp_path / "out")


def test_formats_by_layer_are_read_by_parts_of_names():
    source = ramify.quant.sources.source_of(
        config_of(Format("int4", 64), others={"layers.1.mlp": Format("int8"), "layers.2.mlp.up_proj": Format("fp8")})
    )
    names = ("model.layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head")
    assert [source.format_of(name).name for name in names] == ["int8", "int8", "fp8", "int4-g64", "int4-g64"]
    weight = quantize(torch.randn(8, 64), Format("int8"))
    assert same_bits(source.read(stored("layers.1.mlp.up_proj", weight).get, "layers.1.mlp.up_proj"), weight)


def test_older_folders_are_told_what_they_lack(tmp_path):
    """AutoGPTQ wrote its config into a file of its own, and the weights under names of their own."""
    source = make(tmp_path / "in", *WHOLE["gptq"][:2], WIDE)
    settings = json.loads((source / "config.json").read_text())
    (source / "quantize_config.json").write_text(json.dumps(settings.pop("quantization_config")))
    (source / "config.json").write_text(json.dumps(settings))
    says = (
        '^convert: .*in, layer "model.layers.0.self_attn.q_proj" is quantised and config.json does not say how. Put quantize_config.json or'
    )
    with pytest.raises(CheckpointError, match=says):
        convert(source, tmp_path / "out")
    (source / SINGLE).rename(source / "gptq_model-4bit-32g.safetensors")
    with pytest.raises(
        CheckpointError, match="^convert: .*in has neither .*. Rename gptq_model-4bit-32g.safetensors to model.safetensors.$"
    ):
        convert(source, tmp_path / "out")
