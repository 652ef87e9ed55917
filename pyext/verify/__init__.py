"""Verifiers: which guesses the target agrees with, and which token comes next."""

from collections.abc import Sequence

from ramify.sampling.pipeline import SamplingParams
from ramify.verify.base import Verdict, Verifier, Walk, residual

__all__ = ["Verdict", "Verifier", "Walk", "choose_verifier", "residual"]

_FOR_MODE = {"det": "sample_match", "iid": "recursive_rejection", "wor": "recursive_rejection", "greedy_plus_one": "sample_match"}


def choose_verifier(mode: str, params: Sequence[SamplingParams], chain: bool = False) -> str:
    """Return the name of the exact verifier that accepts most for trees of `mode`; `chain`: no row has two children."""
    if all(p.temperature == 0 for p in params):
        return "greedy"
    name = _FOR_MODE[mode]
    return "speculative" if chain and name == "recursive_rejection" else name
