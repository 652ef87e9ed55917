"""ramify.load: a Hugging Face folder, or the embedded zoo, as a Model."""

from pathlib import Path

import torch

from ramify.model.checkpoint import Checkpoint
from ramify.model.model import Model
from ramify.model.tokenizer import Tokenizer
from ramify.model.weights import Weights

DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
ZOO = {"zoo": "target", "zoo-drafter": "drafter"}


def load(model: str | Path, dtype: str = "bf16", weights: str | None = None, device: str = "cpu") -> Model:
    """Load a checkpoint folder (config.json + safetensors, sharded too), or "zoo" / "zoo-drafter", the models that ship with ramify.

    dtype: "bf16" or "fp32", for weights and cache; activations are always f32. weights: None; low-bit formats are not built yet.
    Raises UnsupportedModelError for another architecture, CheckpointError for a broken file, ValueError for the rest.
    """
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f'load: dtype is "{dtype}"; takes bf16 or fp32.')
    if weights is not None:
        raise ValueError(f'load: weights is "{weights}"; takes None: low-bit weights are not built yet. Use dtype="bf16".')
    if str(device) != "cpu":
        raise ValueError(f'load: device is "{device}"; takes "cpu": the GPU backends are not built yet.')
    folder = folder_of(model)
    checkpoint = Checkpoint(folder, name=str(model) if str(model) in ZOO else None)
    loaded = Weights.load(checkpoint, DTYPES[str(dtype).removeprefix("torch.")])
    return Model(checkpoint.config, loaded, Tokenizer.from_folder(folder))


def folder_of(model: str | Path) -> Path:
    """Where a checkpoint lies: the path itself, or the folder of "zoo" and "zoo-drafter"."""
    return Path(__file__).parent.parent / "zoo" / "weights" / ZOO[str(model)] if str(model) in ZOO else Path(model)
