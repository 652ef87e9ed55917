"""The thin model layer: a Hugging Face checkpoint folder becomes one captured step over ops."""

from ramify.model.load import load
from ramify.model.model import Model, StepOut

__all__ = ["Model", "StepOut", "load"]
