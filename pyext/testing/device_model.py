"""A model on tensors of the CPU whose steps are recorded as a GPU's are: every part of that path but the CUDA graph, on any machine."""

from pathlib import Path

import torch

from ramify.model.load import build
from ramify.model.model import Model


def device_model(model: str | Path, dtype: str = "fp32", device: str = "cpu", weights: str | None = None) -> Model:
    """`ramify.load`, but on the CPU too the model runs on ops as it would on a GPU. Which kernels they are, the table of backends says."""
    return build(model, dtype, weights, torch.device(device))
