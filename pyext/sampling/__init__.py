"""From a row of logits to a token: processing with transformers' meaning, and counter-based random numbers."""

from ramify.sampling.pipeline import Sampling, SamplingParams

__all__ = ["Sampling", "SamplingParams"]
