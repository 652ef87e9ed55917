"""`make demo`: the zoo model continues the beginning of a standard library module that its training never read."""

import sys

from ramify.cli import main
from ramify.zoo.corpus import held_out_texts

MODULE, LINES = "csv", 130
SAMPLED = ("--temperature", "0.6", "--seed", "2")  # at 0 a model this small soon repeats itself, which would flatter every method
METHODS = ("prompt_lookup", "token_recycling", "draft_tree", "draft_chain", "auto")


def prompt(module: str = MODULE, lines: int = LINES) -> str:
    """The first lines of a held-out module."""
    texts = held_out_texts()
    if module not in texts:
        raise ValueError(f"demo: module is {module}; takes one of {', '.join(texts)}.")
    return "".join(texts[module].splitlines(keepends=True)[:lines])


if __name__ == "__main__":
    print(f"The zoo model continues the first {LINES} lines of the standard library's {MODULE}.py, which its training never read:")
    print("first one token a step, then several (shaded where they landed at once), then every method measured.\n")
    sys.exit(main(["generate", "--compare", "--max-new-tokens", "160", *SAMPLED, "--method", *METHODS, "--", prompt()]))
