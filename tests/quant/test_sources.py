"""Every source against files that the original packages wrote (fixtures/quant/make.py says how), and against the packages where installed.

No tolerance: the dequantised weight, rounded to the dtype in which the package dequantises, equals the package's own bit for bit. In
float32 the product of a code and a scale is exact (8 bits times 11) or rounded once, so both round the same number.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.quant import Format, QuantizedWeight
from ramify.quant.sources import SOURCES, source_of
from ramify.quant.sources.ramify import act_order, config_of, stored
from ramify.quant.weight import pack_nibbles

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quant"
FILES = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))


def opened(name, folder=FIXTURES):
    """quantization_config, tensors, and what the package makes of them."""
    with safe_open(str(folder / f"{name}.safetensors"), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["quantization_config"]), tensors, tensors.pop("expected")


def read(config, tensors, shape=None):
    return source_of(config).read(tensors.get, "proj", shape, lambda name: "model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_equals_the_package_bit_for_bit(name):
    config, tensors, expected = opened(name)
    weight = read(config, tensors, tuple(expected.shape))
    assert torch.equal(weight.dequantize().to(expected.dtype), expected)
    assert len(expected.unique()) > 50  # not a weight of zeros
    source = source_of(config)
    assert source.covers("model.layers.0.mlp.up_proj")
    needed, optional = source.tensors("proj")
    assert set(needed) <= set(tensors) <= {*needed, *optional}
    assert ("actorder" in name) == (weight.perm is not None)


def test_there_are_files_of_every_source():
    assert {name.partition("-")[0] for name in FILES} == {"awq", "compressed_tensors", "fp8", "gptq", "torchao"} and len(FILES) > 20


def test_formats():
    """Groups beyond 128 become groups of 128; zeros that are all 8 go."""
    names = {name: read(*opened(name)[:2]).format.name for name in FILES}
    assert names["gptq-v1-sym-row"] == names["torchao-int4-row"] == names["compressed_tensors-int4-sym-channel"] == "int4-g128"
    assert names["awq-row"] == names["gptq-v1-asym-g128"] == "int4-g128-zp"
    assert names["gptq-v1-sym-g64"] == "int4-g64" and names["gptq-v1-8bit-row"] == names["torchao-int8"] == "int8"
    assert names["compressed_tensors-fp8-block"] == names["fp8-block"] == "fp8-b128" and names["fp8-tensor"] == "fp8"
    assert set(names.values()) >= {"int4-g32", "int4-g32-zp", "int4-g64-zp", "fp8"}


PACKAGES = {"gptq": "gptqmodel", "awq": "awq", "torchao": "torchao", "fp8": "transformers"}
PACKAGES |= dict.fromkeys(("compressed_tensors", "compressed_tensors_old"), "compressed_tensors")


@pytest.mark.parametrize("source", PACKAGES)
def test_live(source, tmp_path):
    """Where the package is installed, it writes the files anew, and they read as bit-exactly."""
    if importlib.util.find_spec(PACKAGES[source]) is None:
        pytest.skip(f"{PACKAGES[source]} is not installed; its files in fixtures/quant were read instead")
    done = subprocess.run([sys.executable, FIXTURES / "make.py", "--out", tmp_path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [path.stem for path in tmp_path.iterdir()]
    if not written:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    for name in written:
        config, tensors, expected = opened(name, tmp_path)
        assert torch.equal(read(config, tensors).dequantize().to(expected.dtype), expected), name


# ---- our own files ------------------------------------------------------------------------------------------------


def made(form, N=136, K=256, perm=False, seed=0):
    """A random weight in a format."""
    torch.manual_seed(seed)
    if form.kind == "int4":
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    else:
        codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        codes = codes.float().to(torch.float8_e4m3fn) if form.kind == "fp8" else codes
    groups = form.scale_shape(N, K)
    zero = torch.randint(0, 16, groups).half() + 0.25 if form.zero_point else None
    return QuantizedWeight(form, codes, torch.rand(groups) + 0.1, zero, torch.randperm(K).int() if perm else None)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g64-zp", "fp8", "fp8-b128"])
@pytest.mark.parametrize("perm", [False, True])
def test_own_files(name, perm):
    if perm and name == "fp8-b128":
        pytest.skip("blocks have no order of inputs")
    form = Format.parse(name)
    weight = made(form, perm=perm)
    config = config_of(form)
    assert config["quant_method"] == ("ramify_w4" if form.bits == 4 else "ramify_w8")
    again = read(config, stored("proj", weight), (136, 256))
    assert again.format == form and again.state_dict().keys() == weight.state_dict().keys()
    assert all(same_bits(a, weight.state_dict()[part]) for part, a in again.state_dict().items())
    assert source_of(config).covers("model.layers.3.mlp.up_proj") and not source_of(config).covers("lm_head")


def test_own_head_has_a_format_of_its_own():
    source = source_of(config_of(Format.parse("int4-g64"), head=Format("int8"), dense=()))
    weight = made(Format("int8"))
    tensors = stored("lm_head", weight)
    assert source.covers("lm_head") and source.read(tensors.get, "lm_head").format.name == "int8"


# ---- what has no exact form, by name; for whole configs see test_source_configs.py --------------------------------------

CT = opened("compressed_tensors-int4-sym-g128")[0]


def refused(config, tensors, says, kind=UnsupportedModelError, shape=None):
    with pytest.raises(kind, match=says) as caught:
        read(config, tensors, shape)
    assert "\n" not in str(caught.value)


def test_layers_that_are_refused():
    config, tensors, _ = opened("gptq-v1-sym-g64")
    scales = tensors["proj.scales"].repeat_interleave(4, 0)
    qzeros = tensors["proj.qzeros"].repeat_interleave(4, 0)
    fine = {**tensors, "proj.scales": scales, "proj.qzeros": qzeros, "proj.g_idx": (torch.arange(256) // 16).int()}
    refused({**config, "group_size": 16}, fine, '"proj" has 16 groups for 256 inputs; takes groups of 32, 64, 128')
    refused({**config, "group_size": 48}, tensors, "256 inputs and groups of 48")
    config, tensors, _ = opened("gptq-v1-8bit-row")
    refused(config, {**tensors, "proj.qzeros": tensors["proj.qzeros"] + 1}, "8-bit codes with zero points")
    config, tensors, _ = opened("torchao-int8")
    refused(config, {**tensors, "proj._weight_zero_point": torch.ones(16, 1, dtype=torch.int8)}, "8-bit codes with zero points")
    refused(config, {**tensors, "proj._weight_act_pre_scale": torch.ones(256)}, "act_pre_scale")
    tiles = {"proj._weight_qdata": torch.ones(2, 2, 32, 4, dtype=torch.int32), "proj._weight_scale_and_zero": torch.ones(4, 16, 2)}
    refused(config, tiles, "codes packed in words .tile_packed_to_4d.*Fetch another quantisation")
    config, tensors, _ = opened("torchao-fp8")
    refused(config, {**tensors, "proj._weight_scale": torch.ones(16, 2)}, "2 float8 scales a row")


def test_wide_groups_keep_their_scales_and_zeros():
    """Two groups of 256 become four of 128, each pair with one scale and one zero."""
    torch.manual_seed(0)
    q, scale, zero = torch.randint(0, 16, (8, 512)), torch.rand(8, 2), torch.randint(0, 16, (8, 2))
    words = pack_nibbles(zero.T.contiguous()).view(torch.int32).T.contiguous()
    tensors = {"proj.weight_packed": pack_nibbles(q).view(torch.int32), "proj.weight_scale": scale, "proj.weight_zero_point": words}
    group = CT["config_groups"]["group_0"]
    config = {**CT, "config_groups": {"group_0": {**group, "weights": {**group["weights"], "group_size": 256, "symmetric": False}}}}
    weight = read(config, tensors, (8, 512))
    assert weight.format.name == "int4-g128-zp"
    assert torch.equal(weight.dequantize(), (q - zero.repeat_interleave(256, 1)) * scale.repeat_interleave(256, 1))


def test_torchao_plain_int4():
    """Int4Tensor: signed nibbles, lowest first, scales and float zeros [K / G, N]; exact where its zeros are 0."""
    torch.manual_seed(0)
    q = torch.randint(-8, 8, (16, 256))
    scale = (torch.rand(4, 16) + 0.1).bfloat16()
    bytes_ = pack_nibbles(q & 15).view(torch.int8)
    tensors = {"proj._weight_qdata": bytes_, "proj._weight_scale": scale, "proj._weight_zero_point": torch.zeros_like(scale)}
    config = {"quant_method": "torchao"}
    weight = read(config, tensors, (16, 256))
    assert weight.format.name == "int4-g64"
    assert torch.equal(weight.dequantize(), q * scale.float().T.repeat_interleave(64, 1))
    refused(config, {**tensors, "proj._weight_zero_point": scale}, "float zeros")


def test_block_scales_of_a_ragged_weight():
    """More rows than one block, neither side a multiple of 128: by hand, since a file of that size is none for a repository."""
    torch.manual_seed(0)
    codes, scale = torch.randn(200, 300).to(torch.float8_e4m3fn), torch.rand(2, 3)
    for name, ending in (("compressed_tensors-fp8-block", "weight_scale"), ("fp8-block", "weight_scale_inv")):
        weight = read(opened(name)[0], {"proj.weight": codes, f"proj.{ending}": scale})
        assert torch.equal(weight.dequantize()[150, 290], codes[150, 290].float() * scale[1, 2])


def test_fp8_with_one_scale_a_matrix():
    """As transformers names it, and as older files do, which say nothing of blocks and bring a scale of the inputs."""
    _, tensors, expected = opened("fp8-tensor")
    scale = tensors.pop("proj.weight_scale_inv")
    older = {**tensors, "proj.weight_scale": scale.reshape(()), "proj.input_scale": torch.tensor(0.5)}
    config = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", "model.layers.1"]}
    assert torch.equal(read(config, older).dequantize(), expected)
    source = source_of(config)
    assert source.covers("model.layers.0.mlp.up_proj") and not source.covers("model.layers.1.mlp.up_proj")
    assert not source_of({"quant_method": "fp8"}).covers("lm_head")
    refused(config, tensors, 'tensor "proj.weight_scale_inv" is missing', CheckpointError)
    refused(
        config, {**tensors, "proj.weight_scale": torch.ones(1, 2)}, r'"proj.weight_scale" is \[1, 2\]; takes one number', CheckpointError
    )
    refused(config, {**older, "proj.weight": torch.ones(16, 256)}, '"proj.weight" is float32; takes float8_e4m3fn', CheckpointError)


# ---- damaged files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(name):
    """Each needed tensor missing, cut, or of another kind: a CheckpointError that names file and tensor, for every source."""
    config, tensors, expected = opened(name)
    for key in source_of(config).tensors("proj").needed:
        tensor = tensors[key]
        refused(config, {k: v for k, v in tensors.items() if k != key}, rf'model.safetensors, tensor "{key}" is missing', CheckpointError)
        refused(config, {**tensors, key: tensor.double()}, rf'"{key}" is float64', CheckpointError)
        if tensor.ndim == 2 and tensor.shape[0] > 1:
            refused(config, {**tensors, key: tensor[1:]}, r"proj\.", CheckpointError, tuple(expected.shape))
        wrong = tensor[None, None] if tensor.numel() > 1 else tensor.expand(3)
        refused(config, {**tensors, key: wrong}, key, CheckpointError)
    N, K = expected.shape
    refused(config, tensors, rf"makes a weight \[{N}, {K}\]; config.json makes it \[{N + 8}, {K}\]", CheckpointError, (N + 8, K))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scales_are_finite(name, bad):
    config, tensors, _ = opened(name)
    [key] = [key for key in tensors if "scale" in key]
    poisoned = tensors[key].clone()
    poisoned.view(-1)[-1] = bad
    refused(config, {**tensors, key: poisoned}, f'tensor "{key}" holds NaN or infinity', CheckpointError)


@pytest.mark.parametrize("part", ["scale", "zero"])
def test_own_scales_and_zeros_are_finite(part):
    weight = made(Format("int4", 32, zero_point=True))
    getattr(weight, part)[3, 1] = torch.inf
    refused(config_of(weight.format), stored("proj", weight), f'"proj.weight_{part}" holds NaN or infinity', CheckpointError)


def test_an_order_that_is_named_has_to_be_there():
    weight = made(Format("int8"), perm=True)
    tensors = stored("proj", weight)
    config = config_of(weight.format, ordered=["proj"])
    assert torch.equal(read(config, tensors).perm, weight.perm)
    lost = {name: tensor for name, tensor in tensors.items() if not name.endswith("perm")}
    refused(config, lost, '"proj.weight_perm" is missing; act_order names the layer', CheckpointError)
    assert read(config_of(weight.format, ordered=["other"]), lost).perm is None


def test_orders_are_named_in_short():
    every = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    assert act_order(every, 3) == ["layers"] and act_order([*every, "lm_head"], 3) == ["layers", "lm_head"]
    assert act_order(every[:2], 3) == ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"] and act_order([], 0) == []


def test_orders_that_make_no_sense():
    config, tensors, _ = opened("gptq-v1-asym-g32-actorder")
    uneven = tensors["proj.g_idx"].clone()
    uneven[0] = (uneven[0] + 1) % 8
    refused(config, {**tensors, "proj.g_idx": uneven}, 'proj.g_idx" does not name each of 8 groups 32 times', CheckpointError)
    weight = made(Format("int8"), perm=True)
    weight.perm[0] = weight.perm[1]
    refused(config_of(weight.format), stored("proj", weight), "perm is not a permutation", CheckpointError)
    out = tensors["proj.g_idx"].clone()
    out[3] = 1000
    refused(config, {**tensors, "proj.g_idx": out}, 'proj.g_idx" does not name each of 8 groups 32 times', CheckpointError)
    config, tensors, _ = opened("compressed_tensors-int4-sym-actorder")
    never_set = {**tensors, "proj.weight_g_idx": torch.full((256,), -1, dtype=torch.int32)}
    assert read(config, never_set).perm is None


# ---- which layers ---------------------------------------------------------------------------------------------------


def test_layers_that_the_config_leaves_out():
    awq = source_of({"quant_method": "awq", "modules_to_not_convert": ["layers.1", "down_proj"]})
    covered = {name: awq.covers(f"model.layers.{name}") for name in ("0.mlp.up_proj", "1.mlp.up_proj", "10.mlp.up_proj", "0.mlp.down_proj")}
    assert covered == {"0.mlp.up_proj": True, "1.mlp.up_proj": False, "10.mlp.up_proj": True, "0.mlp.down_proj": False}
    assert not awq.covers("lm_head")
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert not source_of(gptq).covers("lm_head") and source_of({**gptq, "lm_head": True}).covers("lm_head")
    ct = source_of({**CT, "ignore": ["lm_head", r"re:.*layers\.0\..*", "model.layers.1.mlp.up_proj"]})
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj", "lm_head")
    assert [ct.covers(name) for name in names] == [False, False, True, False]


def test_schemes_by_target():
    """Names win over patterns, patterns over classes."""
    packed, plain = CT["config_groups"]["group_0"], opened("compressed_tensors-int8-channel")[0]["config_groups"]["group_0"]
    groups = {"a": packed, "b": {**plain, "targets": ["re:.*down_proj"]}}
    source = source_of({**CT, "config_groups": groups})
    assert source.tensors("model.layers.0.mlp.down_proj").needed[0].endswith("down_proj.weight")
    assert source.tensors("model.layers.0.mlp.up_proj").needed[0].endswith("up_proj.weight_packed")
    only = source_of({**CT, "config_groups": {"a": {**packed, "targets": ["re:.*mlp.*"]}}})
    assert only.covers("model.layers.0.mlp.up_proj") and not only.covers("model.layers.0.self_attn.q_proj")


def test_every_source_is_known_by_its_method():
    assert sorted(SOURCES) == list(SOURCES) == ["awq", "compressed-tensors", "fp8", "gptq", "ramify_w4", "ramify_w8", "torchao"]
