"""A dense checkpoint folder becomes a low-bit one: layer by layer, measured, and whole or not at all."""

from ramify.convert.convert import Conversion, convert

__all__ = ["Conversion", "convert"]
