"""Low-bit weights: their formats, the canonical form every source is brought into, and the quantizers that make it."""

from ramify.quant.formats import Format
from ramify.quant.quantize import METHODS, quantize
from ramify.quant.weight import QuantizedWeight

__all__ = ["METHODS", "Format", "QuantizedWeight", "quantize"]
