"""A checkpoint folder becomes a low-bit one: rounded layer by layer or repacked as it is, measured, and whole or not at all."""

from ramify.convert.conversion import Conversion
from ramify.convert.convert import convert

__all__ = ["Conversion", "convert"]
