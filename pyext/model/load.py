"""ramify.load: a Hugging Face folder, or the embedded zoo, as a Model."""

import os
from pathlib import Path
from typing import Any

import torch

from ramify.backends import ROUNDED
from ramify.checks import listed, one_of, show
from ramify.errors import CheckpointError
from ramify.model.checkpoint import Checkpoint
from ramify.model.model import Model
from ramify.model.tokenizer import Tokenizer
from ramify.model.weights import Settings, Weights
from ramify.quant import Format

DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
ZOO = {"zoo": "target", "zoo-drafter": "drafter"}


def load(
    model: str | Path,
    dtype: str = "bf16",
    weights: str | None = None,
    device: str = "cpu",
    head: str | None = None,
    activations: str = "int8",
) -> Model:
    """Load a checkpoint folder (config.json + safetensors, sharded too), or "zoo" / "zoo-drafter", the models that ship with ramify.

    dtype: "bf16" or "fp32", of dense weights and of the cache; activations between layers are always f32 on the CPU and in dtype on a GPU.
    weights: a low-bit format ("int8", "int4-g64", "fp8", ...) into which dense layers are quantised while they are read; None takes them
    as they are stored, low-bit ones of `ramify convert`, GPTQ, AWQ, compressed-tensors, torchao and fp8 blocks included. device: "cpu",
    or "cuda", "cuda:1", ... for a GPU (not yet run on hardware). head: the format of a dense lm_head (a tied one leaves the embedding
    table as it is); None is what the checkpoint says, else "int8" beside low-bit `weights`, else dtype; "dense" is dtype. activations:
    how low-bit layers take their input on the CPU: "int8", "int8-group", "bf16" or "exact" (see ops.linear); on a GPU as it is.

    Raises UnsupportedModelError for another architecture, CheckpointError for a broken file, ValueError for the rest.
    """
    place = _device(device)
    return build(model, dtype, weights, place, head, activations)


def build(
    model: str | Path, dtype: str, weights: str | None, place: torch.device | None, head: str | None = None, activations: str = "int8"
) -> Model:
    """`load` on a device that is known to be there; None is the CPU and its captured steps."""
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f'load: model is {show(model)}; takes a path, "zoo" or "zoo-drafter".')
    if not str(model):
        raise CheckpointError('load: model is ""; takes a folder with config.json and safetensors, "zoo" or "zoo-drafter".')
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"load: dtype is {show(dtype)}; takes bf16 or fp32.")
    one_of("activations", activations, ROUNDED, "load")
    layers = None if weights is None else Format.parse(weights, "load: weights")
    folder = folder_of(model)
    checkpoint = Checkpoint(folder, name=str(model) if str(model) in ZOO else None)
    stored = checkpoint.config.quantization
    if stored and layers:
        raise ValueError(f"load: weights is {layers.name} and {folder} is quantised already; takes None: it is read as it is stored.")
    if head is None:
        head = stored.get("head") if stored else "int8" if layers else None
    head_format = None if head in (None, "dense") else Format.parse(head, "load: head", ", dense")
    checkpoint.check_groups(layers, head_format)
    settings = Settings(DTYPES[str(dtype).removeprefix("torch.")], layers, head_format, activations, place)
    return Model(checkpoint.config, Weights.load(checkpoint, settings), Tokenizer.from_folder(folder))


def _device(device: Any) -> torch.device | None:
    """Where a model's tensors go; None for the CPU, whose steps are captured over tensors of their own layout."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f'load: device is {show(device)}; takes "cpu", "cuda" or "cuda:0" and so on.')
    if place.type == "cpu":
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (place.index or 0) >= count:
        takes = listed(f'"{name}"' for name in ["cpu", *(f"cuda:{i}" for i in range(count))])
        finds = "" if count else ", since torch finds no GPU"
        raise ValueError(f"load: device is {show(str(device))}; takes {takes} here{finds}.")
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


def folder_of(model: str | Path) -> Path:
    """Where a checkpoint lies: the path itself, or the folder of "zoo" and "zoo-drafter"."""
    return Path(__file__).parent.parent / "zoo" / "weights" / ZOO[str(model)] if str(model) in ZOO else Path(model)
