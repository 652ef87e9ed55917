"""Checkpoints of tiny random models, one of each family, written without transformers."""

import json
from pathlib import Path
from typing import Any

import torch

from ramify.model.checkpoint import SINGLE, expected
from ramify.model.config import ModelConfig

VOCABULARY = 199
GROUPED: dict[str, int] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 192,
    "max_position_embeddings": 64,
}
"""Sizes of a tiny model whose every layer has whole groups of inputs, in any low-bit format but int4-g128."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": 37},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 1, "head_dim": 64},
}
"""Name -> what its config.json has beside the sizes: tied heads, windows, biases, norms of heads, grouped heads."""


def write_tiny_model(folder: Path, family: str, layers: int = 2, hidden: int = 128, positions: int = 1000) -> Path:
    """Write config.json and random float32 tensors of one of FAMILIES into `folder`, two heads of 64; returns the folder.

    Matrices are large enough, and biases and norms far enough from 0 and 1, that a wrong row, mask or slot shows in the logits.
    """
    values = {
        **{"vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 192, "num_hidden_layers": layers},
        **{"num_attention_heads": 2, "max_position_embeddings": positions, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
        **{"model_type": family, "torch_dtype": "float32", "tie_word_embeddings": False, "head_dim": 64, **FAMILIES[family]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    g = torch.Generator().manual_seed(len(family))
    tensors = {}
    for name, (theirs, shape) in expected(ModelConfig.from_dict(values)).items():
        x = torch.randn(shape, generator=g)
        tensors[theirs] = 1 + 0.3 * x if name.endswith("norm") else 0.3 * x if name.endswith("bias") else 0.06 * x
    from safetensors.torch import save_file

    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder
