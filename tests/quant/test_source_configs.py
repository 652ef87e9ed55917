"""quantization_config: variants that are not read are refused by name, damage is told of its field, and nothing is read wrongly."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.quant.sources import source_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quant"
FILES = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
LAYER = "model.layers.0.mlp.up_proj"


def opened(name):
    """quantization_config, the tensors of LAYER, and what the package that wrote them makes of them."""
    with safe_open(str(FIXTURES / f"{name}.safetensors"), framework="pt") as file:
        tensors = {key.replace("proj.", f"{LAYER}.", 1): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["quantization_config"]), tensors, tensors.pop("expected")


def read(config, tensors, shape=None):
    source = source_of(config)
    assert source.covers(LAYER)
    return source.read(tensors.get, LAYER, shape, lambda name: "model.safetensors")


def refused(config, says, tensors=None, kind=UnsupportedModelError):
    with pytest.raises(kind, match=says) as caught:
        source_of(config) if tensors is None else read(config, tensors)
    assert "\n" not in str(caught.value)


def placed(config, path, value):
    """A copy with the field at `path` set; ... removes it."""
    config = copy.deepcopy(config)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return config


def fields(value, path=()):
    """Paths of all fields, those of objects and lists inside included."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from fields(inner, (*path, key))


CT, GPTQ, AWQ, AO, FP8 = (
    opened(name)[0] for name in ("compressed_tensors-int4-sym-g128", "gptq-v1-sym-g64", "awq-g64", "torchao-int8", "fp8-block")
)
WEIGHTS = ("config_groups", "group_0", "weights")


def ct(**weights):
    return placed(CT, WEIGHTS, {**CT["config_groups"]["group_0"]["weights"], **weights})


def torchao(name, **data):
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_data": data}}}


def by_layer(**layers):
    return torchao("FqnToConfig", fqn_to_config=layers)


INT4 = "Int4WeightOnlyConfig"
ENUM = {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "bitsandbytes"}, '"bitsandbytes" for "quant_method".*takes awq, compressed-tensors, fp8, gptq, .* or torchao'),
        ({}, 'config.json has no "quant_method" in quantization_config; takes awq'),
        ({**GPTQ, "bits": 3}, 'config.json has 3 for "bits" in quantization_config; takes 4 or 8'),
        ({**GPTQ, "bits": 5}, '5 for "bits"'),
        ({**GPTQ, "checkpoint_format": "marlin"}, '"marlin" for "checkpoint_format".*takes gptq or gptq_v2'),
        ({**GPTQ, "group_size": 0}, '0 for "group_size".*takes a whole number above 0, or -1 for a whole row'),
        ({**GPTQ, "dynamic": {"+:.*up.*": {"bits": 8}}}, r'"\+:\.\*up\.\*" in quantization_config.dynamic; takes rules that begin'),
        ({**AWQ, "bits": 8}, '8 for "bits".*takes 4'),
        ({**AWQ, "version": "GEMV"}, '"GEMV" for "version".*takes gemm'),
        (ct(num_bits=3), '3 for "num_bits" in quantization_config.config_groups.group_0.weights; takes 4 or 8'),
        (ct(type="float"), '"float" for "type".*takes int'),
        (ct(strategy="tensor_group"), '"tensor_group" for "strategy".*takes group, channel or tensor'),
        (ct(group_size=None), 'no "group_size".*takes a whole number above 0 where "strategy" is "group"'),
        (ct(actorder="random"), '"random" for "actorder".*takes group, dynamic, weight or static'),
        (
            placed(CT, ("config_groups", "group_0", "format"), "nvfp4-pack-quantized"),
            '"nvfp4-pack-quantized" for "format".*takes pack-quant',
        ),
        (
            {**CT, "sparsity_config": {"format": "sparse-24-bitmask"}},
            '"sparse-24-bitmask" for "format" in quantization_config.sparsity_config',
        ),
        ({**CT, "transform_config": {"config_groups": {"a": 1}}}, '"config_groups" in quantization_config.transform_config; takes none'),
        (
            torchao("NVFP4WeightOnlyConfig"),
            '"NVFP4WeightOnlyConfig" for "_type" in quantization_config.quant_type.default; takes Int4WeightOnlyC',
        ),
        (
            by_layer(q=torchao(INT4)["quant_type"]["default"], k={"_type": "Int5"}),
            '"Int5" for "_type" in .*default._data.fqn_to_config.k; takes',
        ),
        ({"quant_method": "torchao", "quant_type": "autoquant"}, '"autoquant" for "quant_type".*takes int4_weight_only, '),
        (
            torchao(INT4, int4_packing_format="tile_packed_to_4d"),
            '"tile_packed_to_4d" for "int4_packing_format".*takes plain.*another quant',
        ),
        (torchao(INT4, int4_packing_format=ENUM), "TILE_PACKED_TO_4D.* for .int4_packing_format.*takes plain"),
        (
            torchao("IntxWeightOnlyConfig", weight_dtype={"_type": "torch.dtype", "_data": "int5"}),
            "int5.* for .weight_dtype.*int3, int8 or",
        ),
        ({**FP8, "fmt": "e5m2"}, '"e5m2" for "fmt".*takes e4m3'),
        ({**FP8, "weight_block_size": [64, 64]}, r'\[64, 64\] for "weight_block_size".*takes \[128, 128\], or null'),
        ({"quant_method": "ramify_w4", "format": "int5"}, '"int5" for "format".*takes int8, int4-g32'),
        ({"quant_method": "ramify_w4", "format": "int8"}, "ramify_w8 for the format int8"),
        ({"quant_method": "ramify_w8", "format": "int8", "version": 2}, '2 for "version"'),
        (
            {"quant_method": "ramify_w8", "format": "int8", "formats": {"layers.1": "int5"}},
            '"int5" for "layers.1" in quantization_config.formats; takes int8, int4-g32',
        ),
    ],
)
def test_variants_that_are_refused(config, says):
    refused(config, says)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {**CT, "config_groups": {}},
            '"config_groups" in quantization_config; takes an object of groups, each with "targets" and "weights"',
        ),
        (placed(CT, ("config_groups",), ...), 'config.json has no "config_groups" in quantization_config'),
        (placed(CT, WEIGHTS, ...), 'no "weights" in quantization_config.config_groups.group_0'),
        (placed(CT, (*WEIGHTS[:2], "targets"), []), '"targets" in quantization_config.config_groups.group_0; takes names'),
        ({**CT, "ignore": ["re:("]}, 'regular expressions behind "re:", and "re:\\(" is none'),
        ({"quant_method": "ramify_w4"}, 'no "format"'),
        ({"quant_method": "torchao", "quant_type": {}}, 'no "_type" in quantization_config.quant_type.default; takes'),
    ],
)
def test_fields_that_are_missing_or_empty(config, says):
    refused(config, says, kind=ValueError)


JUNK = (..., None, [], {}, "x", "", 3, 5, -1, 0, 48, 1.5, True, False, [1], ["x"], {"a": 1}, "re:(")


@pytest.mark.parametrize("name", FILES)
def test_damaged_fields(name):
    """Each field of each config replaced: the layer reads as before, or one line says which field, tensor or layer it is."""
    config, tensors, expected = opened(name)
    outcomes = {"same": 0, "told": 0}
    for path in fields(config):
        for value in JUNK:
            if name == "gptq-v2-asym-g32" and path == ("checkpoint_format",) and value in (..., None):
                continue  # nothing else in the file tells the two versions apart
            try:
                source = source_of(placed(config, path, value))
                weight = source.read(tensors.get, LAYER, tuple(expected.shape), lambda name: "model.safetensors")
                source.covers("lm_head")
            except (CheckpointError, UnsupportedModelError) as problem:
                outcomes["told"] += 1
                named = [str(key) for key in path if isinstance(key, str)] + [f'"{LAYER}']
                assert "\n" not in str(problem) and any(each in str(problem) for each in named), (path, value, problem)
            else:
                outcomes["same"] += 1
                assert torch.equal(weight.dequantize().to(expected.dtype), expected), (path, value)
    assert outcomes["told"] > 10


# ---- configs that contradict their tensors ---------------------------------------------------------------------------


def test_groups_that_the_tensors_do_not_have():
    for name, scales in (("gptq-v1-sym-g64", "scales"), ("awq-g64", "qzeros")):
        config, tensors, _ = opened(name)
        refused(
            {**config, "group_size": -1},
            rf'"{LAYER}.{scales}" is \[4, .*takes \[1, .*, since config.json says one group a row',
            tensors,
            CheckpointError,
        )
        refused({**config, "group_size": 48}, f'layer "{LAYER}" has 256 inputs and groups of 48; takes whole groups', tensors)
    refused(placed(GPTQ, ("group_size",), ...), 'no "group_size"')
    assert read({**AWQ, "group_size": None}, opened("awq-g128")[1]).format.group == 128


def test_act_order_needs_the_groups_of_the_inputs():
    """Without them inputs would be taken in their own order, and the weight would be another."""
    for name, part, says in (
        ("gptq-v1-asym-g32-actorder", "g_idx", "desc_act is true"),
        ("compressed_tensors-int4-sym-actorder", "weight_g_idx", "actorder says"),
    ):
        config, tensors, _ = opened(name)
        fewer = {key: tensor for key, tensor in tensors.items() if not key.endswith(part)}
        refused(config, rf'model\.safetensors, tensor "{LAYER}\.{part}" is missing; {says}', fewer, CheckpointError)
    config, tensors, expected = opened("gptq-v1-sym-row")  # one group: whatever the order, all inputs are in it
    del tensors[f"{LAYER}.g_idx"]
    assert torch.equal(read({**config, "desc_act": True}, tensors).dequantize().to(expected.dtype), expected)


def test_symmetric_layers_have_no_zeros():
    config, tensors, _ = opened("compressed_tensors-int4-asym-g32")
    refused(placed(config, (*WEIGHTS, "symmetric"), ...), 'weight_zero_point" is not 0; .* symmetric', tensors, CheckpointError)
    config, tensors, expected = opened("compressed_tensors-int8-channel")
    zero = torch.zeros(16, 1, dtype=torch.int8)
    assert torch.equal(read(config, {**tensors, f"{LAYER}.weight_zero_point": zero}).dequantize().to(expected.dtype), expected)
    refused(config, "is not 0", {**tensors, f"{LAYER}.weight_zero_point": zero + 1}, CheckpointError)


def test_numbers_beyond_their_bits():
    """Where a cast would wrap them around."""
    config, tensors, _ = opened("compressed_tensors-int8-channel")
    refused(placed(config, (*WEIGHTS, "num_bits"), 4), r"holds -12\d to 12\d; takes 4-bit codes, -8 to 7", tensors, CheckpointError)
    config, tensors, _ = opened("torchao-int4-asym-g64")
    zero = tensors[f"{LAYER}._weight_zero_point"].int()
    zero[0, 0] = 65540
    says = r'_weight_zero_point" holds -\d to 65540; takes -128 to 127'
    refused(config, says, {**tensors, f"{LAYER}._weight_zero_point": zero}, CheckpointError)


def test_a_checkpoint_whose_weights_are_dense():
    """Nothing but the cache is quantised."""
    for config in ({**CT, "config_groups": {}, "format": "dense"}, {**CT, "config_groups": None, "kv_cache_scheme": {"num_bits": 8}}):
        assert not source_of(config).covers(LAYER)


def test_layers_of_a_torchao_config_that_names_them():
    plain = torchao(INT4, int4_packing_format={"_data": "PLAIN"})["quant_type"]["default"]
    assert source_of(by_layer(_default=plain, lm_head=None)).covers(LAYER)
    assert source_of({"quant_method": "torchao", "quant_type": "int8_weight_only"}).covers(LAYER)
    assert source_of({"quant_method": "torchao"}).covers(LAYER)  # dtypes and shapes say it all
