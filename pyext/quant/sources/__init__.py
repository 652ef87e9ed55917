"""Low-bit checkpoints of others and our own, by their quant_method: one small file per source, all of the same shape."""

from collections.abc import Mapping
from typing import Any

from ramify.fields import Fields
from ramify.quant.sources.awq import Awq
from ramify.quant.sources.base import Names, Source, choice
from ramify.quant.sources.compressed_tensors import CompressedTensors
from ramify.quant.sources.fp8 import Fp8
from ramify.quant.sources.gptq import Gptq
from ramify.quant.sources.ramify import Ramify
from ramify.quant.sources.torchao import Torchao

__all__ = ["SOURCES", "Names", "Source", "source_of"]

SOURCES: dict[str, type[Source]] = {
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "gptq": Gptq,
    "ramify_w4": Ramify,
    "ramify_w8": Ramify,
    "torchao": Torchao,
}


def source_of(config: Mapping[str, Any]) -> Source:
    """The source of a checkpoint's quantization_config.

    Raises UnsupportedModelError for a method or a variant that is not read, CheckpointError for a field of another kind, naming the field.
    """
    fields = Fields(config, inside="quantization_config")
    return SOURCES[choice(fields, "quant_method", tuple(SOURCES))](fields)
