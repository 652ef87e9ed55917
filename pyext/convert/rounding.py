"""Float weights into low-bit ones, one layer in memory at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ramify.convert import calibrate
from ramify.convert.conversion import Conversion, Progress
from ramify.convert.folder import NewFolder
from ramify.model.checkpoint import Checkpoint
from ramify.quant import Format, QuantizedWeight, quantize
from ramify.quant.sources.ramify import stored


def write_rounded(
    checkpoint: Checkpoint, new: NewFolder, made: Conversion, format: Format, texts: Sequence[Sequence[int]], progress: Progress
) -> list[str]:
    """Every tensor into the new folder, in order of use; sizes and errors into `made`. texts: what gptq calibrates on.

    Returns the layers that have an order of inputs.
    """
    ordered = []
    stream = calibrate.Stream(checkpoint, texts) if texts else None
    layer_bytes, total_bytes = [0, 0], [0, 0]

    def keep(name: str) -> None:
        tensor = checkpoint.stored(name)
        total_bytes[0] += tensor.nbytes
        total_bytes[1] += tensor.nbytes
        new.add(checkpoint.source_name(name), tensor)

    keep("embed")
    for i in progress(range(checkpoint.config.num_layers), "layers"):
        low_bit = {f"layers.{i}.{name}" for stage in calibrate.STAGES for name in stage}
        for name in checkpoint.names:
            if name.startswith(f"layers.{i}.") and name not in low_bit:
                keep(name)
        for name, weight, size in _rounded_layer(checkpoint, i, stream, made, format):
            layer_bytes[0] += size
            layer_bytes[1] += weight.nbytes
            if weight.perm is not None:
                ordered.append(name.removesuffix(".weight"))
            for theirs, tensor in stored(name.removesuffix(".weight"), weight).items():
                new.add(theirs, tensor)
    keep("final_norm")
    if not checkpoint.config.tied_embeddings:
        keep("lm_head")
    made.formats = {format.name: len(made.errors)}
    made.layer_bytes = (layer_bytes[0], layer_bytes[1])
    made.total_bytes = (total_bytes[0] + layer_bytes[0], total_bytes[1] + layer_bytes[1])
    return ordered


def _rounded_layer(
    checkpoint: Checkpoint, i: int, stream: calibrate.Stream | None, made: Conversion, format: Format
) -> list[tuple[str, QuantizedWeight, int]]:
    """(Hugging Face name, low-bit weight, dense bytes) of a layer's linear layers; moves the calibration text through the layer."""
    prefix, found = f"layers.{i}.", []
    stored = {name.removeprefix(prefix): checkpoint.stored(name) for name in checkpoint.names if name.startswith(prefix)}
    w = {name: tensor.float() for name, tensor in stored.items()}
    for stage in calibrate.STAGES:
        hessian = stream.hessian(i, stage, w) if stream else None
        for name in stage:
            theirs = checkpoint.source_name(prefix + name)
            try:
                weight = quantize(w[name], format, made.method, hessian)
            except ValueError as problem:
                raise ValueError(f'convert: tensor "{theirs}": {str(problem).removeprefix("quantize_weight: ")}') from None
            low_bit = weight.dequantize()
            made.errors[theirs] = _share(low_bit - w[name], w[name])
            if hessian is not None:
                made.output_errors[theirs] = _share(low_bit - w[name], w[name], hessian)
            w[name] = low_bit
            found.append((theirs, weight, stored[name].nbytes))
        if stream:
            stream.advance(i, stage, w)
    return found


def _share(error: Tensor, w: Tensor, hessian: Tensor | None = None) -> float:
    """|error| / |w|, in the norm of the Hessian where there is one."""
    squares = [float((t if hessian is None else t @ hessian).mul(t).sum(dtype=torch.float64)) for t in (error, w)]
    return (max(squares[0], 0.0) / squares[1]) ** 0.5 if squares[1] > 0 else 0.0
