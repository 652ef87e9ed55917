"""Low-bit checkpoints of others and our own, by their quant_method: one small file per source, all of the same shape."""

from collections.abc import Mapping
from typing import Any

from ramify.errors import UnsupportedModelError
from ramify.quant.sources.awq import Awq
from ramify.quant.sources.base import Names, Source
from ramify.quant.sources.compressed_tensors import CompressedTensors
from ramify.quant.sources.gptq import Gptq
from ramify.quant.sources.ramify import Ramify
from ramify.quant.sources.torchao import Torchao

__all__ = ["SOURCES", "Names", "Source", "source_of"]

SOURCES: dict[str, type[Source]] = {
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "ramify_w4": Ramify,
    "ramify_w8": Ramify,
    "torchao": Torchao,
}


def source_of(config: Mapping[str, Any]) -> Source:
    """The source of a checkpoint's quantization_config. Raises UnsupportedModelError for a method or a variant that is not read."""
    method = config.get("quant_method", "unnamed") if isinstance(config, Mapping) else repr(config)
    if method not in SOURCES:
        raise UnsupportedModelError(
            f"load: config.json has a quantization_config of method {method}; takes {', '.join(SOURCES)}. "
            "Fetch another quantisation or the unquantised checkpoint."
        )
    return SOURCES[str(method)](config)
