"""The models that whole-model benchmarks run, and what decoding one of them once came to."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

Generate = Callable[[list[int], int, float, int], "Run"]
"""(prompt ids, new tokens, temperature, seed) -> Run."""


@dataclass
class Run:
    """One generation, without its prompt."""

    tokens: list[int]
    steps: int  # forward passes of the target
    decode_seconds: float  # all but the prompt's forward pass
    decode_steps: int  # steps inside decode_seconds
    phases: dict[str, float] = field(default_factory=dict)  # ramify's own account


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights."""

    title: str
    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int


SHAPES = {
    "160m": Shape("160 M parameter Llama, random weights", hidden=768, layers=12, heads=12, inner=3072, vocabulary=32000),
    "15m": Shape("15 M parameter Llama, random weights", hidden=256, layers=8, heads=4, inner=768, vocabulary=16384),
    "tiny": Shape("tiny Llama, random weights", hidden=128, layers=2, heads=2, inner=256, vocabulary=4096),
}


def zoo_folder(folder: Path | None, part: str) -> Path:
    """Folder of the zoo's "target" or "drafter". ValueError when the weights are not there."""
    import ramify.zoo

    found = (folder or Path(ramify.zoo.__file__).parent / "weights") / part
    if not (found / "config.json").exists():
        raise ValueError(f"end_to_end: the zoo {part} is not there; python -m ramify.zoo.train makes one, --zoo names its folder.")
    return found


def random_model(name: str) -> Path:
    """Folder of a random-weight model in bf16, built once under the user's cache folder."""
    shape = SHAPES[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramify" / "benchmarks"
    folder = cache / f"llama-{name}-{shape.hidden}x{shape.layers}"
    if (folder / "config.json").exists():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="bfloat16",
    )
    part = cache / f".{folder.name}.{os.getpid()}"
    try:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(part)
        part.rename(folder)  # whole or not at all
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def quiet() -> None:
    """No progress bars and no advice of transformers between our tables."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def weights_read(folder: Path) -> int:
    """Weights that a step reads: every parameter but an input embedding of its own, of which it reads single rows."""
    from safetensors import safe_open

    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, safe_open is no dict
                size = tensors.get_slice(name).get_shape()
                if tied or "embed_tokens" not in name:
                    total += torch.Size(size).numel()
    return total
