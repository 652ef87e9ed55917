"""The generated parts of the README: tables of ops and methods, read from the registries.

    python -m ramify.docs README.md             rewrite them
    python -m ramify.docs README.md --check     exit 1 when they are not what the registries say

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def ops_table(root: Path) -> str:
    """Every public op: what it computes and where it runs."""
    from ramify import backends, ops

    rows = []
    for name in sorted(backends.OPS):
        kernels = {row.backend for row in backends.TABLE if row.op == name}
        cells = ["C++" if "cpu" in kernels else "torch", "yes" if "cuda" in kernels else "not yet"]
        rows.append([f"`{name}`", _summary(getattr(ops, name)), *cells])
    return _table(["op", "what it computes", "CPU", "GPU"], rows)


def methods_table(root: Path) -> str:
    """Every decoding method that `ramify.generate` takes."""
    from ramify.registry import drafter

    rows = []
    for each in drafter.all():
        lossless = "yes" if each.lossless else "**no**"
        needs = {"yes": "a second model", "maybe": "may use a second model"}.get(getattr(each, "takes_model", "no"), "nothing")
        rows.append([f"`{each.name}`", each.summary.rstrip("."), lossless, "trained weights" if each.trained else needs, each.source])
    return _table(["method", "what it does", "lossless", "needs", "source"], rows)


PARTS: dict[str, Callable[[Path], str]] = {"ops": ops_table, "methods": methods_table}
"""Name of a generated part -> what makes it; each is given the folder of the README."""


def generated(text: str, root: Path) -> str:
    """`text` with every generated part made anew. ValueError for a part that nobody makes."""

    def part(found: re.Match) -> str:
        if found[2] not in PARTS:
            raise ValueError(f'docs: part "{found[2]}" is not known; takes {", ".join(PARTS)}.')
        return f"{found[1]}{PARTS[found[2]](root)}\n{found[3]}"

    return PART.sub(part, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check a file; the exit code is 1 when `--check` finds a difference."""
    parser = argparse.ArgumentParser("python -m ramify.docs", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    before = args.file.read_text(encoding="utf-8")
    after = generated(before, args.file.resolve().parent)
    if args.check and after != before:
        print(f"{args.file} is not what the registries say; run make docs", file=sys.stderr)
        return 1
    if after != before:
        args.file.write_text(after, encoding="utf-8")
    return 0


def _summary(function: object) -> str:
    """First paragraph of a docstring, on one line, ready for a table cell."""
    first = (function.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(first.split()).rstrip(".").replace("|", "\\|")


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
