"""Damaged checkpoints and tokenizers: each a CheckpointError that names file, tensor and remedy."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.model.checkpoint import INDEX, SINGLE, Checkpoint, expected
from ramify.model.config import ModelConfig
from ramify.model.tokenizer import Tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 20,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
}


def write(folder, config=CONFIG, change=None):
    """A whole checkpoint of random weights; `change` edits the tensors before they are saved."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tensors = {theirs: torch.randn(shape) for theirs, shape in expected(ModelConfig.from_dict(config)).values()}
    if change:
        change(tensors)
    save_file(tensors, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shard(folder):
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, place in weight_map.items() if place == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refused(folder, says, **options):
    with pytest.raises(CheckpointError, match=says) as caught:
        list(Checkpoint(folder, **options).tensors())
    assert "\n" not in str(caught.value)


def test_reads_layer_by_layer(tmp_path):
    checkpoint = Checkpoint(write(tmp_path / "m"))
    assert checkpoint.names[0] == "embed" and checkpoint.names[-2:] == ("final_norm", "lm_head")
    layer = checkpoint.layer(1)
    assert set(layer) == {"attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"}
    assert layer["down"].shape == (64, 96)
    assert torch.equal(layer["up"], load_file(tmp_path / "m" / SINGLE)["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(KeyError, match=r"layers\.9\.q"):
        checkpoint.tensor("layers.9.q")
    tied = Checkpoint(write(tmp_path / "tied", {**CONFIG, "tie_word_embeddings": True}))
    assert "lm_head" not in tied.names


def test_layer_one_is_not_layer_ten(tmp_path):
    checkpoint = Checkpoint(write(tmp_path / "deep", {**CONFIG, "num_hidden_layers": 11}))
    assert len(checkpoint.layer(1)) == len(checkpoint.layer(10)) == 9


def test_missing_things(tmp_path):
    refused(tmp_path / "absent", "absent is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no config\.json")
    folder = write(tmp_path / "m")
    (folder / SINGLE).unlink()
    refused(folder, r"neither model\.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "safe_serialization")
    gap = write(tmp_path / "gap", change=lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(gap, r"layers\.1\.mlp\.up_proj\.weight.*missing")
    refused(write(tmp_path / "head", change=lambda t: t.pop("lm_head.weight")), r"lm_head\.weight.*missing")


def test_wrong_shape_and_dtype(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    refused(write(tmp_path / "a", change=lambda t: t.update({name: torch.zeros(64, 60)})), r"q_proj.weight\" is \[64, 60\].*\[64, 64\]")
    refused(write(tmp_path / "b", change=lambda t: t.update({name: torch.zeros(64, 64, dtype=torch.int8)})), "q_proj.*I8.*F32")


@pytest.mark.parametrize("keep", [0, 4, 500, 0.5, 0.999])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated(tmp_path, keep, sharded):
    folder = write(tmp_path / "m")
    if sharded:
        shard(folder)
    file = folder / ("model-2.safetensors" if sharded else SINGLE)
    raw = file.read_bytes()
    file.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
    whole = header_of(raw)
    start = len(raw) - max(end for _, end in whole.values())
    lacking = sorted((name for name, (_, end) in whole.items() if start + end > file.stat().st_size), key=lambda name: whole[name][1])
    if file.stat().st_size < start:
        refused(folder, rf"{file.name}.*cut short or damaged.*Fetch it again")
    else:
        named = ", ".join(f'"{re.escape(name)}"' for name in lacking[:3]) if len(lacking) > 3 else rf'"{re.escape(lacking[0])}"'
        refused(folder, rf"{file.name}.* is cut short: tensors? {named}.* beyond its end.*Fetch it again")


def header_of(raw):
    """name -> data_offsets of a file's bytes."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 3}', b'{"a": {"data_offsets": [0]}}', b'{"a": {"data_offsets": "x"}}', b"\xff"])
def test_a_header_that_is_none(tmp_path, header):
    folder = write(tmp_path / "m")
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, rf"{SINGLE}.*cut short or damaged.*Fetch it again")


def test_lfs_pointer(tmp_path):
    folder = write(tmp_path / "m")
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "git lfs pull")


def test_shards(tmp_path):
    folder = shard(write(tmp_path / "m"))
    assert len(list(Checkpoint(folder).tensors())) == 21
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-1.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-2.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "missing; .*index.json says it is there")
    shard(write(folder))
    (folder / "model-2.safetensors").unlink()
    refused(folder, r"model-2\.safetensors.*missing")
    index["weight_map"]["lm_head.weight"] = "../../elsewhere/passwd"
    (folder / INDEX).write_text(json.dumps(index))
    shard_of = folder / "model-2.safetensors"
    shard_of.touch()
    refused(folder, r"load: \.\./\.\./elsewhere/passwd, tensor \"lm_head\.weight\" is missing")
    (folder / INDEX).write_text("{}")
    refused(folder, "weight_map")


def test_not_finite(tmp_path):
    def poison(tensors):
        tensors["model.layers.1.mlp.gate_proj.weight"][3, 5] = float("nan")

    folder = write(tmp_path / "m", change=poison)
    list(Checkpoint(folder).tensors())
    refused(folder, r"gate_proj.*NaN", finite=True)


def test_extra_tensors_are_named_once(tmp_path, caplog):
    def extend(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(32)
        tensors["model.vision.weight"] = torch.zeros(2)

    with caplog.at_level(logging.WARNING, "ramify"):
        list(Checkpoint(write(tmp_path / "m", change=extend)).tensors())
    assert len(caplog.records) == 1 and "1 tensors" in caplog.text and "model.vision.weight" in caplog.text


def test_other_family(tmp_path):
    folder = write(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel.*Qwen3ForCausalLM"):
        Checkpoint(folder)


# ---- tokenizer ----------------------------------------------------------------------------------------------------


def make_tokenizer(folder, settings=None, template=False, seed=0):
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    words = ["def f(x):\n    return x", "größe 日本語 🙂🙃 e\u0301", str(seed) * 9]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(words * 3, trainer)
    if template:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


def test_tokenizer_round_trip(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None
    tokenizer = make_tokenizer(tmp_path)
    text = "größe 🙂 def"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, *tokenizer.encode(text), 1]) == text
    assert tokenizer.vocab_size == tokenizer.fast.get_vocab_size()


def test_first_token(tmp_path):
    plain = make_tokenizer(tmp_path / "a").encode("def")
    assert make_tokenizer(tmp_path / "b", {"add_bos_token": True, "bos_token": "<s>"}).encode("def") == [0, *plain]
    assert make_tokenizer(tmp_path / "c", {"add_bos_token": True, "bos_token": {"content": "<s>"}}).encode("def") == [0, *plain]
    assert make_tokenizer(tmp_path / "d", {"bos_token": "<s>"}).encode("def") == plain
    assert make_tokenizer(tmp_path / "e", {}, template=True).encode("def") == [0, *plain]  # and no </s> behind it
    assert make_tokenizer(tmp_path / "f", {"add_bos_token": False}, template=True).encode("def") == plain
    with pytest.raises(CheckpointError, match="bos_token"):
        make_tokenizer(tmp_path / "g", {"add_bos_token": True, "bos_token": "<bos>"})


def test_fingerprint(tmp_path):
    same = [make_tokenizer(tmp_path / name) for name in "ab"]
    assert same[0].fingerprint == same[1].fingerprint
    assert make_tokenizer(tmp_path / "c", seed=7).fingerprint != same[0].fingerprint


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
