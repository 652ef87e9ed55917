"""Whole models in llama.cpp, through llama-cpp-python: a Hugging Face Llama folder as a GGUF file of Q4_0, and its decoding.

Every matrix is Q4_0, the embedding and the output's too: the fewest bytes that llama.cpp's files of this type can have.
"""

import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Run

TYPE = "Q4_0"
BENCH = "llama-bench"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def missing() -> str:
    """Why it is not there, or ""."""
    return "" if find_spec("llama_cpp") and find_spec("gguf") else "pip install llama-cpp-python gguf"


def bench_missing() -> str:
    """Why llama.cpp's own benchmark is not there, or ""."""
    return missing() or ("" if shutil.which(BENCH) else f"build {BENCH} from llama.cpp's sources and put it on PATH")


def convert(folder: Path, out: Path) -> int:
    """Write a Llama folder as GGUF, whole or not at all. Returns the bytes of the weights that a step reads."""
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"llama.cpp: model_type is {config['model_type']!r}; this benchmark converts llama.")
    part = out.with_name(f".{out.name}.{os.getpid()}")
    writer, read = gguf.GGUFWriter(part, "llama"), 0
    try:
        _describe(writer, config)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        kind = gguf.GGMLQuantizationType[TYPE]
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, safe_open is no dict
                    w, title = tensors.get_tensor(name).float(), renamed(name)
                    if w.ndim == 1:
                        writer.add_tensor(title, w.numpy())
                        continue
                    w = pairs(w, heads.get(title.split(".")[-2], 0))
                    data = gguf.quants.quantize(w.numpy(), kind)
                    writer.add_tensor(title, data, raw_dtype=kind)
                    read += data.nbytes * (title != "token_embd.weight" or config["tie_word_embeddings"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
    return read


def own_bench(folder: Path, context: int, new_tokens: int, repeat: int) -> tuple[int, list[float]]:
    """llama.cpp's own benchmark on the same file: the bytes that a step reads, and of each repetition the seconds of `new_tokens` tokens
    that follow `context` tokens, which are not counted. RuntimeError when it refuses.
    """
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        read = convert(folder, file)
        words = ["-m", str(file), "-p", "0", "-n", str(new_tokens), "-d", str(context), "-r", str(repeat), "-o", "json"]
        done = subprocess.run([BENCH, *words, "-t", str(torch.get_num_threads())], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{BENCH}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    [found] = json.loads(done.stdout)
    return read, [nanoseconds / 1e9 for nanoseconds in found["samples_ns"]]


def _describe(writer: Any, config: dict[str, Any]) -> None:
    """What llama.cpp must know of a model; it gets ids, so no vocabulary."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"llama.cpp: rope_type is {rope['rope_type']!r}; this benchmark converts the default one.")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def renamed(name: str) -> str:
    """A Hugging Face tensor's name in GGUF."""
    if name in OUTER:
        return OUTER[name]
    _, _, layer, *inner, end = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(inner)]}.{end}"


def pairs(w: Tensor, heads: int) -> Tensor:
    """Rows of a projection whose rotation pairs feature i with i + D/2, as llama.cpp has them: with the next. heads 0: as they are."""
    return w if not heads else w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


class Engine:
    """A GGUF file, decoded token by token or fed several at once."""

    def __init__(self, file: Path, slots: int) -> None:
        self.lib = lib = _library()
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise RuntimeError("llama_model_load_from_file: refused")
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = slots
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama_init_from_model: refused")
        self.memory = lib.llama_get_memory(self.context)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.lib.llama_free(self.context)
        if getattr(self, "model", None):
            self.lib.llama_model_free(self.model)

    def feed(self, tokens: Sequence[int], every: bool = False) -> None:
        """Append tokens; logits of the last, or of each. RuntimeError when llama.cpp refuses."""
        lib, count = self.lib, len(tokens)
        ids = (ctypes.c_int32 * count)(*tokens)
        batch = lib.llama_batch_get_one(ids, count)
        wanted = (ctypes.c_int8 * count)(*[1] * count)
        if every:
            batch.logits = ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))
        if code := lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: status {code}")

    def clear(self, keep: int = 0) -> None:
        """Forget what was fed, but for the first `keep` tokens."""
        self.lib.llama_memory_seq_rm(self.memory, 0, keep, -1)

    def run(self, prompt: list[int], new_tokens: int, temperature: float, seed: int) -> Run:
        """One generation; llama.cpp's own sampler draws."""
        lib, tokens = self.lib, []
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if temperature:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed) if temperature else lib.llama_sampler_init_greedy())
        try:
            self.clear()
            self.feed(prompt)
            begun = time.perf_counter()
            for step in range(new_tokens):
                if step:
                    self.feed(tokens[-1:])
                tokens.append(lib.llama_sampler_sample(chain, self.context, -1))
            return Run(tokens, new_tokens, time.perf_counter() - begun, new_tokens - 1)
        finally:
            lib.llama_sampler_free(chain)


@lru_cache
def _library() -> Any:
    """llama_cpp, silenced."""
    import llama_cpp

    _library.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept alive: the library calls it as long as it runs
    llama_cpp.llama_log_set(_library.quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp
