"""The generated parts of the README: tables of ops and methods, read from the registries, and what was measured.

    python -m ramify.docs README.md             rewrite them
    python -m ramify.docs README.md --check     exit 1 when they are not what the registries say

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    table = _table(["op", "what it computes", "CPU", "GPU"], rows)
    return f"{table}\n\n\\* {' '.join(notes)}" if notes else table


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
    return _table(["method", "what it does", "lossless", "needs", "source"], rows)


def results(root: Path) -> str:
    """What benchmarks/results holds: one section for each document, its machine and commit above its figures."""
    paths = sorted((root / "benchmarks" / "results").glob("*.json"))
    documents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    shown = [_document(name, each) for name, each in documents.items() if each.get("benchmark") in _SHOWN and not each["options"]["quick"]]
    return "\n\n".join(shown) or "Not measured yet."


def _document(file: str, doc: dict[str, Any]) -> str:
    machine, name = doc["environment"], doc["benchmark"]
    where = f"{machine['cpu']} ({machine['isa']}), {machine['threads']} threads, torch {machine['versions']['torch']}"
    when = f"{machine['date'][:10]}, commit {machine['commit'] or 'unknown'}"
    link = f"[benchmarks/results/{file}](benchmarks/results/{file})"
    return f"**{_TITLES[name]}** {where}; {when}; {link}.\n\n{_SHOWN[name](doc['rows'])}\n\nVerdict: {doc['verdict']}."


def _end_to_end(rows: Sequence[dict]) -> str:
    """Tokens a second, over ramify plain, and tokens a step: a line per provider, a column per model and temperature."""
    columns = dict.fromkeys(f"{row['shape']['model']} at {row['shape']['temperature']:g}" for row in rows)
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = row["status"] if row["status"] in ("wrong", "failed") else "-"
        if row["status"] == "ok":
            over = f"{row['over_plain']:.2f}x" if "over_plain" in row else "-"
            cell = f"{row['tokens_per_second']:.0f} / {over} / {row['tokens_per_step']:.2f}"
        column = f"{row['shape']['model']} at {row['shape']['temperature']:g}"
        lines.setdefault(row["provider"], {})[column] = cell
    return _table(["model, temperature", *columns], [[name, *(cells.get(c, "-") for c in columns)] for name, cells in lines.items()])


def _tree_attention(rows: Sequence[dict]) -> str:
    """Ratio over the best torch way: one line per cache and context, one column per number of tree rows."""
    mine = [row for row in rows if row["provider"] == "ramify"]
    counts = sorted({row["shape"]["T"] for row in mine})
    lines: dict[tuple, dict[int, str]] = {}
    for row in mine:
        shape = row["shape"]
        key = (f"{shape['size']} {row['dtype']}", str(shape["context"]))
        lines.setdefault(key, {})[shape["T"]] = f"{row['ratio']:.2f}x" if "ratio" in row else row["status"]
    return _table(
        ["heads and cache", "context", *(f"T = {n}" for n in counts)],
        [[*key, *(c.get(n, "-") for n in counts)] for key, c in lines.items()],
    )


def _linear(rows: Sequence[dict]) -> str:
    """Speed over the best int4 peer and over the best of any kind, and the cost in single steps: a line per layer and format.

    Formats as the model layer runs them; the document also has their variants, named behind a comma.
    """
    mine = [row for row in rows if row["provider"].startswith("ramify") and "," not in row["provider"]]
    counts = sorted({row["shape"]["M"] for row in mine})
    lines: dict[tuple, dict[int, str]] = {}
    for row in mine:
        if row["status"] == "ok":
            parts = [
                f"{row[key]:.2f}{unit}" if key in row else "-" for key, unit in (("over_int4", "x"), ("ratio", "x"), ("single_steps", ""))
            ]
            lines.setdefault((row["shape"]["layer"], row["provider"]), {})[row["shape"]["M"]] = " / ".join(parts)
    return _table(["N x K", "", *(f"M = {n}" for n in counts)], [[*key, *(c.get(n, "-") for n in counts)] for key, c in lines.items()])


def _step(rows: Sequence[dict]) -> str:
    """Milliseconds of a pass and its cost in single steps: a line per model and provider."""
    counts = sorted({row["shape"]["M"] for row in rows})
    lines: dict[tuple, dict[int, str]] = {}
    for row in rows:
        if row["status"] == "ok":
            steps = f" / {row['single_steps']:.2f}" if "single_steps" in row else ""
            lines.setdefault((row["shape"]["model"], row["provider"]), {})[row["shape"]["M"]] = f"{row['us']['median'] / 1e3:.2f}{steps}"
    return _table(["model", "", *(f"M = {n}" for n in counts)], [[*key, *(c.get(n, "-") for n in counts)] for key, c in lines.items()])


_SHOWN: dict[str, Callable[[Sequence[dict]], str]] = {
    "end_to_end": _end_to_end,
    "linear": _linear,
    "step": _step,
    "tree_attention": _tree_attention,
}
_TITLES = {
    "end_to_end": "Whole generations: tokens a second / over ramify plain on the same weights / tokens a step.",
    "linear": "Linear layers of M rows: speed over the best int4 peer / over the best peer of any kind / time in single steps.",
    "step": "One pass of M rows through a model: milliseconds / time in single steps.",
    "tree_attention": "Tree attention: speed over the fastest torch way.",
}

PARTS: dict[str, Callable[[Path], str]] = {"ops": ops_table, "methods": methods_table, "results": results}
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
