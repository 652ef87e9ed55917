"""The generated parts of a page: tables of ops and methods, read from the registries, and what was measured.

    python -m ramify.docs README.md             rewrite them
    python -m ramify.docs README.md --check     exit 1 when they are not what the registries say

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. Several pages may be given.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ramify.results import headline, results, table

PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


LABELS = {"cuda": "CUDA", "triton": "Triton"}


def ops_table(root: Path) -> str:
    """Every public op: what it computes and where it runs. A star: a kernel that no GPU has proven in its present form."""
    from ramify import backends, ops
    from ramify.testing import evidence

    rows, unproven = [], evidence.unproven(root)
    for name in sorted(backends.OPS):
        kernels = {row.backend for row in backends.TABLE if row.op == name}
        gpu = [label + "*" * ((name, each) in unproven) for each, label in LABELS.items() if each in kernels]
        rows.append([f"`{name}`", _summary(getattr(ops, name)), "C++" if "cpu" in kernels else "torch", ", ".join(gpu) or "torch"])
    said = sorted({(LABELS[backend], reason) for (_, backend), reason in unproven.items()})
    notes = [f"{label}: {reason}." for label, reason in said]
    ops_by_name = table(["op", "what it computes", "CPU", "GPU"], rows)
    return f"{ops_by_name}\n\n\\* {' '.join(notes)}" if notes else ops_by_name


def methods_table(root: Path) -> str:
    """Every decoding method that `ramify.generate` takes."""
    from ramify.registry import drafter

    rows = []
    for each in drafter.all():
        if not each.__module__.startswith("ramify."):
            continue  # a plugin's
        lossless = "yes" if each.lossless else "**no**"
        needs = {"yes": "a second model", "maybe": "may use a second model"}.get(getattr(each, "takes_model", "no"), "nothing")
        name = f"`{each.name}`" + (" (for tests)" if getattr(each, "testing", False) else "")
        rows.append([name, each.summary.rstrip("."), lossless, "trained weights" if each.trained else needs, each.source])
    return table(["method", "what it does", "lossless", "needs", "source"], rows)


PARTS: dict[str, Callable[[Path], str]] = {"ops": ops_table, "methods": methods_table, "headline": headline, "results": results}
"""Name of a generated part -> what makes it; each is given the folder of the repository."""


def generated(text: str, root: Path) -> str:
    """`text` with every generated part made anew. ValueError for a part that nobody makes."""

    def part(found: re.Match) -> str:
        if found[2] not in PARTS:
            raise ValueError(f'docs: part "{found[2]}" is not known; takes {", ".join(PARTS)}.')
        return f"{found[1]}{PARTS[found[2]](root)}\n{found[3]}"

    return PART.sub(part, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check pages; the exit code is 1 when `--check` finds a difference."""
    parser = argparse.ArgumentParser("python -m ramify.docs", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    different = False
    for file in args.file:
        before = file.read_text(encoding="utf-8")
        after = generated(before, _root(file))
        if args.check and after != before:
            print(f"{file} is not what the registries say; run make docs", file=sys.stderr)
            different = True
        elif after != before:
            file.write_text(after, encoding="utf-8")
    return int(different)


def _root(file: Path) -> Path:
    """The repository that a page lies in; its own folder where there is none."""
    folder = file.resolve().parent
    return next((each for each in (folder, *folder.parents) if (each / "pyproject.toml").exists()), folder)


def _summary(function: object) -> str:
    """First paragraph of a docstring, on one line, ready for a table cell."""
    first = (function.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(first.split()).rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
