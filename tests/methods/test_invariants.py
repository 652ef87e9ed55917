"""The nine invariants of token-parallel decoding, and that each has a test of its name at batch 1, 2 and 5.

A test carries the name of its invariant in its docstring. Lossless is a claim with these tests.
"""

import ast
from pathlib import Path

import pytest

INVARIANTS = {
    "I1": "greedy identity: the ids of plain greedy decoding, whatever the drafter",
    "I2": "low precision: in bf16 and low bits a text may part from plain decoding at a near tie at most; here, nowhere",
    "I3": "distribution: at a temperature, emitted tokens follow the target's own law",
    "I4": "acceptance rate: guesses pass as often as the formula of their verifier says",
    "I5": "cache equality: what was committed is what a fresh prefill of the same ids writes",
    "I6": "mask: a row of a tree has the logits of a plain forward on its prefix and its path",
    "I7": "never slower in steps: target steps are no more than the emitted ids",
    "I8": "state purity: what a drafter has learned changes speed, never text",
    "I9": "stop handling: a text ends inside an accepted path as it ends in plain decoding, cache included",
}
TESTS = Path(__file__).resolve().parents[1]
BATCHES = [1, 2, 5]


def batches(function):
    """The batch sizes that a test function is parametrized with, or None."""
    for mark in function.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parametrize":
            name, values = (ast.unparse(part) for part in mark.args[:2])
            if name in ("'batch'", "'B'"):
                return ast.literal_eval(values)
    return None


def named():
    """Every test of a batch size: (its place, its docstring, its batch sizes)."""
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield f"{file.relative_to(TESTS)}::{node.name}", ast.get_docstring(node) or "", batches(node)


@pytest.mark.parametrize("name", INVARIANTS)
def test_every_invariant_is_a_test_at_every_batch(name):
    found = [place for place, told, sizes in named() if name in told.replace(":", " ").split() and sizes == BATCHES]
    assert found, f"no test carries {name} ({INVARIANTS[name]}) at batch {BATCHES}"
