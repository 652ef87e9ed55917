"""Low-bit folders through transformers' own from_pretrained and save_pretrained."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, Qwen2Config

import ramify
from ramify.convert import convert
from ramify.hf import LowBitLinear, RamifyConfig
from ramify.quant import Format, QuantizedWeight, quantize
from ramify.testing.tiny_models import GROUPED

SIZES = {"vocab_size": 61, **GROUPED}
FORMATS = ["int4-g32", "int4-g64-zp", "int8", "fp8", "fp8-b128"]
TOKENS = torch.arange(7)[None] * 5


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders of tiny models, by dtype: Qwen2 has biases, Llama here ties its embeddings."""
    made = {}
    for name, config in {"qwen2": Qwen2Config(**SIZES), "llama": LlamaConfig(**SIZES, tie_word_embeddings=True)}.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(made[name])
    return made


def load(folder, **options):
    """The model, with every complaint of the loader an error."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def low_bit(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("form", FORMATS)
def test_quantised_saved_and_loaded_alike(dense, tmp_path, family, form):
    model = load(dense[family], quantization_config=RamifyConfig(form))
    layers = low_bit(model)
    assert len(layers) == 14 and {layer.format.name for layer in layers.values()} == {form}
    assert type(model.lm_head) is torch.nn.Linear
    plain = load(dense[family], dtype=torch.bfloat16)
    for name, layer in layers.items():
        w = plain.get_submodule(name).weight.detach().float()
        error = (layer.quantized.dequantize() - w).norm() / w.norm()
        assert error < {"int4": 0.2, "int8": 0.01, "fp8": 1 / 16}[layer.format.kind]  # e4m3 rounds by 1/16 at most; the others by a step
        plain.get_submodule(name).weight.data = layer.quantized.dequantize().bfloat16()
    with torch.no_grad():
        logits = model(TOKENS).logits
        want = plain.eval()(TOKENS).logits.float()
        assert (logits.float() - want).std() < 0.1 * want.std()  # the inputs of these layers are rounded to int8, all sums to bfloat16
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert torch.equal(again(TOKENS).logits, logits)
    assert low_bit(again).keys() == layers.keys()
    stored = load_file(tmp_path / "model.safetensors")
    for name, layer in layers.items():
        for key, tensor in layer.named_buffers():
            theirs = stored[f"{name}.{key}"]
            assert theirs.dtype == tensor.dtype and torch.equal(theirs.view(torch.uint8), tensor.view(torch.uint8))
    assert again.config.quantization_config.format == form


def test_ramify_loads_what_transformers_saved(dense, tmp_path):
    model = load(dense["llama"], quantization_config=RamifyConfig("int4-g64"), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    ours = ramify.load(tmp_path, dtype="fp32")
    cache = ours.new_cache([16])
    rows = []
    ours.prefill([TOKENS[0].tolist()], cache, rows_out=lambda slot, tokens, out: rows.append(torch.tensor(out.logits)))
    with torch.no_grad():
        theirs = model(TOKENS).logits[0]
    assert (rows[0] - theirs).abs().max() < 1e-4  # float32, sums in other orders


def test_a_file_with_an_order_of_inputs(dense, tmp_path):
    model = load(dense["llama"], quantization_config=RamifyConfig("int4-g64"))
    layer = model.model.layers[1].mlp.down_proj
    perm = torch.randperm(192).int()
    layer.weight_perm = perm
    layer._buffers["weight_scale"] = layer.weight_scale.half()
    with torch.no_grad():
        logits = model(TOKENS).logits
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert torch.equal(again.model.layers[1].mlp.down_proj.weight_perm, perm)
        assert again.model.layers[1].mlp.down_proj.weight_scale.dtype == torch.float16
        assert torch.equal(again(TOKENS).logits, logits)


def test_a_lost_order_of_inputs_is_noticed(dense, tmp_path):
    """A folder that says which layers have one: by load, and by from_pretrained."""
    model = load(dense["llama"], quantization_config=RamifyConfig("int4-g64", act_order=["layers.1.mlp.down_proj"]))
    model.model.layers[1].mlp.down_proj.weight_perm = torch.randperm(192).int()
    model.save_pretrained(tmp_path)
    assert ramify.load(tmp_path) and load(tmp_path)
    changed(tmp_path, lambda tensors: tensors.pop(f"{LAYER}.weight_perm"))
    for read in (ramify.load, load):
        with pytest.raises(ramify.CheckpointError, match=rf'"{LAYER}\.weight_perm" is missing; act_order names the layer'):
            read(tmp_path)


@pytest.mark.parametrize("low_bit", [False, True])
def test_a_file_that_is_cut_off(dense, tmp_path, low_bit):
    """The tensor whose end is lost is named, whether codes are read or weights rounded; by load too."""
    load(dense["llama"], **({"quantization_config": RamifyConfig("int8")} if low_bit else {})).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    [*_, last] = (json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])).items()
    config = {} if low_bit else {"quantization_config": RamifyConfig("int8")}
    says = rf'model\.safetensors in .*is cut short: tensor "{re.escape(last[0])}" lies beyond its end'
    with pytest.raises(ramify.CheckpointError, match=f"^from_pretrained: {says}"):
        load(tmp_path, **config)
    with pytest.raises(ramify.CheckpointError, match=f"^load: {says}"):
        ramify.load(tmp_path)


def test_layers_left_dense(dense, tmp_path):
    with pytest.warns(UserWarning, match=r"\(40%\).*named in modules_to_not_convert"):
        model = load(dense["qwen2"], quantization_config=RamifyConfig("int8", modules_to_not_convert=["layers.0", "down_proj"]))
    assert all(name.startswith("model.layers.1.") and "down_proj" not in name for name in low_bit(model)) and len(low_bit(model)) == 6
    model.save_pretrained(tmp_path)
    assert low_bit(load(tmp_path)).keys() == low_bit(model).keys()


def test_refusals(dense):
    with pytest.raises(ramify.UnsupportedModelError, match='2 for "version".*newer'):
        RamifyConfig("int8", version=2)
    with pytest.raises(ValueError, match='^RamifyConfig: format is "int5".*int4-g64'):
        RamifyConfig("int5")
    for given, says in (
        ({"head": "int5"}, '"int5" for "head"; takes int8, .*fp8-b128 or null, which leaves it dense'),
        ({"formats": {"mlp": "x"}}, '"x" for "mlp" in formats'),
        ({"modules_to_not_convert": 3}, '3 for "modules_to_not_convert"'),
        ({"quant_method": "ramify_w8"}, '"ramify_w8" for "quant_method"'),
    ):
        with pytest.raises(ValueError, match=f"^RamifyConfig: quantization_config has {says}"):
            RamifyConfig("int4-g64", **given)
    with pytest.raises(ValueError, match=r'down_proj" has 192 inputs; int4-g128 takes multiples of 128'):
        load(dense["llama"], quantization_config=RamifyConfig("int4-g128"))


@pytest.mark.parametrize(("key", "value"), [("head", "int5"), ("head", ["int8"]), ("format", "int9"), ("version", 7)])
def test_a_folder_that_says_what_is_not_known(dense, tmp_path, key, value):
    """Each reader is named by its own name."""
    folder = tmp_path / "folder"
    load(dense["llama"], quantization_config=RamifyConfig("int8")).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    readers = {"RamifyConfig": load, "load": ramify.load, "convert": lambda folder: convert(folder, tmp_path / "out")}
    for name, read in readers.items():
        with pytest.raises(ValueError, match=rf'^{name}: .* for "{key}"'):
            read(folder)


LAYER = "model.layers.1.mlp.down_proj"


def changed(folder, change):
    """The folder after `change` of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def poison(part):
    """Something that makes no weight into the last number of a tensor."""

    def change(tensors):
        tensors[f"{LAYER}.{part}"].view(-1)[-1] = torch.nan

    return change


@pytest.mark.parametrize(
    ("form", "change", "says"),
    [
        ("int8", lambda t: t.pop(f"{LAYER}.weight_scale"), rf'tensor "{LAYER}\.weight_scale" is missing; the layer is int8'),
        ("int4-g64-zp", lambda t: t.pop(f"{LAYER}.weight_zero"), rf'"{LAYER}\.weight_zero" is missing'),
        ("fp8", lambda t: t.pop(f"{LAYER}.weight"), rf'"{LAYER}\.weight" is missing'),
        (
            "int8",
            lambda t: t.update({f"{LAYER}.weight": torch.ones(128, 192)}),
            rf'"{LAYER}\.weight" is F32; the layer is int8, which takes I8',
        ),
        ("fp8", lambda t: t.update({f"{LAYER}.weight": torch.ones(128, 192).half()}), rf'"{LAYER}\.weight" is F16'),
        ("int8", lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(128, 1).int()}), rf'"{LAYER}\.weight_scale" is I32'),
        ("int8", poison("weight_scale"), rf'"{LAYER}\.weight_scale" holds NaN or infinity'),
        ("int4-g64-zp", poison("weight_zero"), rf'"{LAYER}\.weight_zero" holds NaN or infinity'),
        ("int8", lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:, :96].clone()}), r"is \[128, 96\]; .* takes \[128, 192\]"),
        ("int8", lambda t: t.update({f"{LAYER}.weight_perm": torch.zeros(192).int()}), rf'layer "{LAYER}": .*perm is not a permutation'),
    ],
)
def test_damage_is_named(dense, tmp_path, form, change, says):
    """Nothing is made up for what is missing, and nothing cast to codes."""
    load(dense["llama"], quantization_config=RamifyConfig(form)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        load(changed(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_the_base_model_of_a_folder(dense, tmp_path):
    """Its names lack the prefix of the folder's, and the other way round."""
    model = load(dense["llama"], quantization_config=RamifyConfig("int8"))
    model.save_pretrained(tmp_path / "whole")
    want = model.model(TOKENS).last_hidden_state
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(base(TOKENS).last_hidden_state, want)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "base").model(TOKENS).last_hidden_state, want)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight_scale"):
        AutoModel.from_pretrained(changed(tmp_path / "whole", lambda t: t.pop(f"{LAYER}.weight_scale")))


@pytest.mark.parametrize("inference", [False, True])
def test_a_layer_computes_with_what_it_holds(inference):
    """After a state is loaded into it, after a change in place and after `.data =`; with tensors of inference mode as well."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 128, generator=g)

    def made():
        return LowBitLinear.of(quantize(torch.randn(64, 128, generator=g), Format("int4", 64)))

    with torch.inference_mode(inference):
        layer, other = made(), made()
        first = layer(x)
        assert not torch.equal(first, other(x)) and layer.quantized is layer.quantized
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        layer.weight_scale.mul_(2)
        assert torch.equal(layer(x), 2 * other(x))
        layer.weight_scale.data = layer.weight_scale * 2
        assert torch.equal(layer(x), 4 * other(x))
        layer.weight_scale = other.weight_scale.clone()
        assert torch.equal(layer(x), other(x))
        layer.weight_scale.mul_(2)
        assert torch.equal(layer(x), 2 * other(x))


def test_casts_leave_codes_and_scales(dense):
    layer = LowBitLinear.of(load(dense["qwen2"], quantization_config=RamifyConfig("fp8")).model.layers[0].mlp.up_proj.quantized)
    before = layer.quantized
    layer.bfloat16()
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert torch.equal(layer.quantized.dequantize(), before.dequantize())
    assert isinstance(layer.quantized, QuantizedWeight) and layer.quantized is layer.quantized


ORDERS = ["import ramify, transformers.modeling_utils", "import transformers.quantizers.auto, ramify"]
"""In the first, transformers' quantizers are imported by a module that is not whole yet."""


@pytest.mark.parametrize("order", ORDERS)
def test_import_ramify_is_enough(order):
    code = f"""if True:
        {order}
        import sys
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        print("ramify_w4" in AUTO_QUANTIZER_MAPPING, "ramify_w8" in AUTO_QUANTIZER_MAPPING)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr
