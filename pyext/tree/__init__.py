"""TokenTree: the rows of one step, their parents and who sees whom."""

from ramify.tree.static_tree import StaticTree
from ramify.tree.token_tree import CANDIDATE, MAX_ROWS, MODES, PAD, PROBE, TokenTree

__all__ = ["CANDIDATE", "MAX_ROWS", "MODES", "PAD", "PROBE", "StaticTree", "TokenTree"]
