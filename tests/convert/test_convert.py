"""convert: the folder it writes, calibration through the layers, failures that leave nothing behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ramify
from ramify import native
from ramify.convert import calibrate, convert, folder
from ramify.errors import CheckpointError
from ramify.model.checkpoint import INDEX, SINGLE, Checkpoint, expected
from ramify.model.config import ModelConfig
from ramify.model.load import folder_of
from ramify.quant import Format, QuantizedWeight, quantize
from ramify.quant.formats import ALL
from ramify.quant.packing import packed
from ramify.reference.model import forward

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TEXT = "def add(a, b):\n    return a + b\n\n\nfor name in sorted(os.listdir(path)):\n    print(name)\n" * 12
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write(path, config=CONFIG, change=None, dtype=torch.bfloat16, seed=0):
    """A whole checkpoint of random weights, with the zoo's tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for theirs, shape in expected(ModelConfig.from_dict(config)).values():
        gain = 1.0 if "norm" in theirs else 0.0
        tensors[theirs] = (gain + torch.randn(shape, generator=g) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)).to(dtype)
    if change:
        change(tensors)
    save_file(tensors, path / SINGLE)
    (path / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder_of("zoo") / file, path)
    return path


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in" / "model")


def listing(path):
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


@pytest.mark.parametrize("format", ALL, ids=lambda format: format.name)
def test_the_folder(source, tmp_path, format):
    """Names, dtypes, codes and scales; everything else as it was, bit for bit."""
    made = convert(source, tmp_path / "out", to=format.name, method="rtn")
    before, after = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    sizes = [0, 0]
    for name, tensor in before.items():
        if not any(linear in name for linear in LINEARS):
            assert after[name].dtype == tensor.dtype and torch.equal(after.pop(name), tensor)
            continue
        wanted = quantize(tensor, format)
        sizes[0], sizes[1] = sizes[0] + tensor.nbytes, sizes[1] + wanted.nbytes
        for part, tensor in wanted.state_dict().items():
            ending = {"codes": "", "scale": "_scale", "zero": "_zero"}[part]
            stored = after.pop(f"{name}{ending}")
            assert stored.dtype == tensor.dtype and torch.equal(stored.view(torch.uint8), tensor.view(torch.uint8))
    assert not after and made.layer_bytes == tuple(sizes)
    assert made.total_bytes[1] == sum(t.nbytes for t in load_file(tmp_path / "out" / SINGLE).values())
    assert len(made.errors) == 14 and all(0 < error < 0.2 for error in made.errors.values())
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings.pop("quantization_config") == {
        "quant_method": "ramify_w4" if format.kind == "int4" else "ramify_w8",
        "format": format.name,
        "method": "rtn",
        "head": "int8",
        "modules_to_not_convert": ["lm_head"],
        "version": 1,
    }
    assert settings == CONFIG
    assert set(listing(source)) < set(listing(tmp_path / "out")) and listing(tmp_path) == sorted(
        ["in", "in/model", "out", *(f"in/model/{name}" for name in listing(source)), *(f"out/{name}" for name in listing(tmp_path / "out"))]
    )


def test_every_file_can_be_read_by_others(source, tmp_path):
    convert(source, tmp_path / "out", method="rtn")
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {oct((tmp_path / "out").stat().st_mode & 0o666)}


@pytest.mark.parametrize("tied", [False, True])
def test_float16_and_heads(tmp_path, tied):
    """Kept tensors stay float16; the loaded model has the head that the folder names."""
    config = {**CONFIG, "tie_word_embeddings": tied, "torch_dtype": "float16"}
    source = write(tmp_path / "in", config, dtype=torch.float16)
    for head in ("int8", "dense", "int4-g32"):
        convert(source, tmp_path / "out", method="rtn", head=head, force=True)
        stored = load_file(tmp_path / "out" / SINGLE)
        assert stored["model.embed_tokens.weight"].dtype == torch.float16 and ("lm_head.weight" in stored) is not tied
        [loaded] = ramify.load(tmp_path / "out").weights.lm_head
        table = load_file(source / SINGLE)["model.embed_tokens.weight" if tied else "lm_head.weight"].float()
        wanted = native.pack_weight(table.bfloat16()) if head == "dense" else packed(quantize(table, Format.parse(head)))
        assert torch.equal(loaded.panels, wanted)


def test_the_default_method(source, tmp_path):
    assert convert(source, tmp_path / "a").method == "rtn"
    assert convert(source, tmp_path / "b", to="int8").method == "rtn"
    assert convert(source, tmp_path / "c", calibration=TEXT).method == "gptq"


def test_the_card(source, tmp_path):
    made = convert(source, tmp_path / "out", calibration=TEXT, evaluate=TEXT[:400])
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nbase_model: model\nbase_model_relation: quantized\nlibrary_name: transformers\ntags: [ramify, ")
    for part in (
        f"GPTQ, calibrated on {made.calibration_tokens:,} tokens",
        f"in act-order, with {torch.get_num_threads()} of torch's threads.",
        f"| perplexity | {made.before.perplexity:.3f} | {made.after.perplexity:.3f} |",
        "ramify convert model OUT --to int4-g64 --method gptq --calibration FILE --calibration-tokens ",
        f" --calibration-tokens {made.calibration_tokens} --head int8`",
    ):
        assert part in text
    assert str(tmp_path) not in text
    convert(write(tmp_path / "named", {**CONFIG, "_name_or_path": "someone/model-7b"}), tmp_path / "b", evaluate=False)
    assert "base_model: someone/model-7b" in (tmp_path / "b" / "README.md").read_text()
    assert "was not measured: it was not asked for" in (tmp_path / "b" / "README.md").read_text()


def test_the_card_of_a_zoo_model(tmp_path):
    """Its own text needs no word; somebody's own does, and so does a number of tokens."""
    for calibration, says in ((TEXT, "--calibration FILE --calibration-tokens 300"), (None, "--calibration-tokens 300")):
        made = convert("zoo-drafter", tmp_path / "out", calibration=calibration, calibration_tokens=300, evaluate=TEXT[:99], force=True)
        assert made.calibration_tokens == 300
        command = f"convert zoo-drafter OUT --to int4-g64 --method gptq {says} --head int8`"
        assert command in (tmp_path / "out" / "README.md").read_text()


def dense(folder):
    """A converted folder as canonical dense tensors: low-bit ones by what their codes stand for, the head as the folder names it."""
    checkpoint = Checkpoint(folder)
    tensors = {name: t.dequantize() if isinstance(t, QuantizedWeight) else t for name, t in checkpoint.tensors()}
    tensors["lm_head"] = quantize(tensors["lm_head"], Format.parse(checkpoint.config.quantization["head"])).dequantize()
    return tensors


def test_perplexity_is_that_of_the_written_weights(source, tmp_path):
    made = convert(source, tmp_path / "out", to="int4-g32", evaluate=TEXT)
    tokenizer = calibrate.Tokenizer.from_folder(source)
    ids = torch.tensor(tokenizer.encode(TEXT)[:256])  # the model has 256 positions, so the first window ends here
    config = Checkpoint(source).config
    for tensors, told in ((dict(Checkpoint(source).tensors()), made.before), (dense(tmp_path / "out"), made.after)):
        logits = forward(tensors, config, ids[:-1]).logits
        first = float(torch.nn.functional.cross_entropy(logits, ids[1:]))
        assert told.nats_per_token == pytest.approx(first, rel=0.05)  # the other windows hold the same text
    assert made.before.nats_per_token != made.after.nats_per_token


# ---- calibration ---------------------------------------------------------------------------------------------------


FAMILIES = {
    "llama_biased": {"attention_bias": True, "mlp_bias": True},
    "mistral_window": {"architectures": ["MistralForCausalLM"], "sliding_window": 9},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_layer_sees(tmp_path, family):
    """Hessians against the inputs that transformers' own modules get, every family, every stage of every layer."""
    transformers = pytest.importorskip("transformers")
    config = {**CONFIG, **FAMILIES[family]}
    model_type = config["architectures"][0].removesuffix("ForCausalLM").lower()
    source = write(tmp_path / "in", {**config, "model_type": model_type}, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    seen = {}
    for name, module in theirs.named_modules():
        if name.endswith(LINEARS):
            module.register_forward_hook(lambda m, x, y, name=name: seen.setdefault(name, []).append(x[0][0]))
    g = torch.Generator().manual_seed(5)
    texts = [torch.randint(4096, (n,), generator=g).tolist() for n in (40, 1, 17)]
    with torch.no_grad():
        for ids in texts:
            theirs(torch.tensor([ids]))
        checkpoint = Checkpoint(source)
        stream = calibrate.Stream(checkpoint, texts)
        for i in range(2):
            w = checkpoint.layer(i)
            for stage in calibrate.STAGES:
                mine = stream.hessian(i, stage, w)
                for name in stage:
                    X = torch.cat(seen[checkpoint.source_name(f"layers.{i}.{name}").removesuffix(".weight")])
                    torch.testing.assert_close(mine, 2 * X.T @ X / 58, atol=2e-4, rtol=2e-4)
                stream.advance(i, stage, w)


def test_later_layers_see_the_low_bit_earlier_ones(source, tmp_path):
    """With all layers before it taken from the result, a layer's Hessian gives the codes that were written."""
    convert(source, tmp_path / "out", method="gptq", calibration=TEXT)
    written, checkpoint = Checkpoint(tmp_path / "out"), Checkpoint(source)
    assert written.config.quantization["act_order"] == ["layers"]  # a lost weight_perm would be noticed
    texts = calibrate.windows(calibrate.Tokenizer.from_folder(source), TEXT, False, 16384)
    stream = calibrate.Stream(checkpoint, texts)
    with torch.no_grad():
        for i in range(2):
            w = {name: tensor.float() for name, tensor in checkpoint.layer(i).items()}
            low_bit = written.layer(i)
            for stage in calibrate.STAGES:
                hessian = stream.hessian(i, stage, w)
                perms = []
                for name in stage:
                    stored = low_bit[name]
                    wanted = quantize(w[name], Format("int4", 64), "gptq", hessian)
                    assert torch.equal(stored.codes, wanted.codes) and torch.equal(stored.scale, wanted.scale)
                    perms.append(stored.perm)
                assert all(torch.equal(perm, perms[0]) for perm in perms)  # q, k, v share one, so they can be one layer
                w.update({name: low_bit[name].dequantize() for name in stage})
                stream.advance(i, stage, w)


def test_a_warning_where_tokens_are_fewer_than_inputs(source, tmp_path, caplog):
    """256 inputs of down; 384 tokens of text. The warning says what came, what is taken, of which layer, and what to do."""
    convert(source, tmp_path / "a", calibration=TEXT)
    convert(source, tmp_path / "b", calibration=TEXT, calibration_tokens=256)
    assert not caplog.records
    for calibration, tokens, advice in ((TEXT, 255, "Raise calibration_tokens."), (TEXT[: len(TEXT) // 2], 16384, "Give a longer text.")):
        made = convert(source, tmp_path / "c", calibration=calibration, calibration_tokens=tokens, force=True)
        [said] = [record.getMessage() for record in caplog.records]
        assert f"calibration has {made.calibration_tokens} tokens; " in said and "takes 256 or more here" in said
        assert "model.layers.0.mlp.down_proj.weight" in said and said.endswith(advice) and "\n" not in said
        caplog.clear()


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_nothing(source, tmp_path, monkeypatch, error, force):
    if force:
        convert(source, tmp_path / "out", to="int8")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in listing(tmp_path)}
    calls = []

    def layers(numbers, stage):
        for number in numbers:
            if stage == "layers" and number:
                calls.append(listing(tmp_path))
                raise error("enough")
            yield number

    with pytest.raises(error):
        convert(source, tmp_path / "out", force=force, progress=layers)
    assert any(".part" in name for name in calls[0])  # it had begun
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in listing(tmp_path)} == before


def test_out_that_exists(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, to="int8")
    with pytest.raises(ValueError, match=r"OUT .*out exists; takes a new folder.*--force"):
        convert(source, out)
    convert(source, out, to="int4-g32", force=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "int4-g32"
    assert listing(tmp_path)[-1].startswith("out/")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    for wrong in (precious, precious / "thesis.tex"):
        with pytest.raises(ValueError, match="no checkpoint folder, so --force does not replace it"):
            convert(source, wrong, force=True)
    for inside in (source, source.parent):
        (source.parent / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="holds the checkpoint that is read"):
            convert(source, inside, force=True)
    with pytest.raises(ValueError, match="lies in the checkpoint that is read"):
        convert(source, source / "low" / "bit")
    assert (source / SINGLE).is_file() and not (source / "low").exists()


def test_shards(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "one", method="rtn")
    monkeypatch.setattr(folder, "SHARD", 200_000)
    convert(source, tmp_path / "many", method="rtn")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    together = {name: tensor for file in files for name, tensor in load_file(tmp_path / "many" / file).items()}
    whole = load_file(tmp_path / "one" / SINGLE)
    assert set(together) == set(whole) == set(index["weight_map"])
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def poison(tensors):
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 5] = float("nan")


@pytest.mark.parametrize(
    ("change", "options", "error", "says"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), {}, CheckpointError, r"layers\.1\.mlp\.up_proj\.weight.*missing"),
        (poison, {}, CheckpointError, r"gate_proj\.weight.*NaN"),
        (None, {"to": "int3"}, ValueError, 'format is "int3"; takes int8, int4-g32'),
        (None, {"head": "int3"}, ValueError, 'head is "int3"; takes int8, .*fp8-b128, dense'),
        (None, {"method": "awq"}, ValueError, 'convert: method is "awq"; takes "rtn" or "hqq" or "gptq"'),
        (None, {"method": "gptq"}, ValueError, "calibration is missing.*--calibration FILE"),
        (None, {"method": "hqq", "to": "int8"}, ValueError, 'convert: method "hqq": to is "int8"; takes "int4"'),
        (None, {"to": "int8", "calibration": TEXT}, ValueError, 'calibration is given; method "rtn" takes none'),
        (None, {"method": "hqq", "calibration": TEXT}, ValueError, 'calibration is given; method "hqq" takes none'),
        (None, {"calibration_tokens": 1, "calibration": TEXT}, ValueError, "calibration_tokens is 1; takes 128 or more"),
        (None, {"evaluate": "", "method": "rtn"}, ValueError, "no token to predict"),
    ],
)
def test_refuses(tmp_path, change, options, error, says):
    source = write(tmp_path / "in", change=change)
    with pytest.raises(error, match=says) as caught:
        convert(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and listing(tmp_path) == ["in", *(f"in/{name}" for name in listing(source))]


def test_refuses_groups_that_do_not_fit(tmp_path):
    source = write(tmp_path / "in", {**CONFIG, "intermediate_size": 224})
    with pytest.raises(ValueError, match=r'tensor "model\.layers\.0\.mlp\.down_proj\.weight" has K = 224; int4-g64 takes multiples of 64'):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", to="int4-g32", method="rtn")
    narrow = write(tmp_path / "narrow", {**CONFIG, "hidden_size": 192, "num_attention_heads": 2, "intermediate_size": 256})
    with pytest.raises(ValueError, match=r'"lm_head\.weight" has K = 192; int4-g128'):
        convert(narrow, tmp_path / "b", to="int8", head="int4-g128")
    with pytest.raises(
        ValueError, match=r'^load: tensor "lm_head\.weight" has K = 192; int4-g128 takes multiples of 128\. Choose a smaller'
    ):
        ramify.load(narrow, weights="int4-g32", head="int4-g128")


def test_refuses_a_truncated_file(source, tmp_path):
    raw = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(raw[: len(raw) // 2])
    says = r'^convert: model\.safetensors in .*is cut short: tensors "model\.embed_tokens\.weight", ".*", ".*" and \d+ more lie beyond'
    with pytest.raises(CheckpointError, match=says):
        convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="absent is no folder"):
        convert(tmp_path / "absent", tmp_path / "out")


def test_refuses_what_is_no_path(source, tmp_path):
    for given, says in (
        ((None, tmp_path / "out"), "convert: IN is None; takes a checkpoint"),
        ((source, 5), "convert: OUT is 5; takes the"),
    ):
        with pytest.raises(TypeError, match=says):
            convert(*given)


def test_a_tokenizer_of_another_model(tmp_path):
    """Nothing is measured unasked with it, and what was asked for is refused by name."""
    source = write(tmp_path / "in", {**CONFIG, "vocab_size": 40})
    made = convert(source, tmp_path / "out")
    assert made.before is None and "and the model takes 0 to 39" in made.unmeasured
    for options, says in (
        ({"evaluate": TEXT}, "evaluate is given to a model with another's"),
        ({"calibration": TEXT}, "calibration has token"),
    ):
        with pytest.raises(ValueError, match=rf"^convert: {says}.* takes 0 to 39"):
            convert(source, tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()
