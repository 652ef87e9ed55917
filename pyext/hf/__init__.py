"""ramify inside Hugging Face transformers. With `ramify.cli` the only room that knows anything outside; imported on first use."""

from ramify.hf.custom_generate import CustomGenerate

__all__ = ["CustomGenerate"]
