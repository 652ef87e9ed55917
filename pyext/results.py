"""What benchmarks/results holds, as tables: every document whole, and the few figures that a newcomer asks for."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _documents(root: Path) -> dict[str, dict[str, Any]]:
    """File name -> document, without those of a quick run, whose numbers mean nothing."""
    paths = sorted((root / "benchmarks" / "results").glob("*.json"))
    read = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return {name: doc for name, doc in read.items() if doc.get("benchmark") in _SHOWN and not doc["options"]["quick"]}


def headline(root: Path) -> str:
    """Tokens a second of the best ways there are, and each kernel over the fastest other one, each as it was measured last; `results` has
    everything else.
    """
    newest = {doc["benchmark"]: doc for doc in sorted(_documents(root).values(), key=lambda doc: doc["environment"]["date"])}
    parts = [_best_ways(newest["end_to_end"])] if "end_to_end" in newest else []
    kernels = [line for name in _OVER if name in newest for line in _OVER[name](newest[name]["rows"])]
    if kernels:
        counts = [f"{n} {'row' if n == 1 else 'rows'}" for n in _ROWS]
        parts.append(table(["speed over the fastest other way in the same run", *counts], kernels))
    return "\n\n".join(parts) or "Not measured yet."


class _Kind(NamedTuple):
    """A kind of decoding. over_plain: its speed over plain decoding is told; a_choice: of methods that guessed, the fastest is named."""

    title: str
    providers: list[str]
    over_plain: bool = False
    a_choice: bool = False


def _best_ways(doc: dict[str, Any]) -> str:
    """A line for each kind of decoding, its fastest way in each cell; of methods also how they stand to plain decoding.

    A method that brought no tokens beside the plain ones was plain decoding under another name: it is not the fastest method.
    """
    rows = [row for row in doc["rows"] if row["status"] == "ok"]
    columns = list(dict.fromkeys(_column(row) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    kinds = [_Kind("transformers, its fastest way", [name for name in names if name.startswith("transformers")])]
    kinds += [_Kind(name, [name]) for name in names if name.startswith("llama")]
    for plain in (name for name in names if name.startswith("ramify plain")):
        end = plain.removeprefix("ramify plain")
        methods = [name for name in names if name.startswith("ramify ") and name.partition(", ")[2] == plain.partition(", ")[2]]
        auto, hopeless = f"ramify auto{end}", f"ramify {HOPELESS}{end}"
        guessing = [name for name in methods if name not in (plain, hopeless)]
        kinds.append(_Kind(plain, [plain]))
        kinds.append(_Kind(f"ramify auto, the default{end}", [auto], over_plain=True))
        kinds.append(_Kind(f"ramify, its fastest method that guesses{end}", guessing, over_plain=True, a_choice=True))
        if hopeless in names:
            kinds.append(_Kind(f"ramify, guessing at random{end}", [hopeless], over_plain=True))
    lines = []
    for kind in kinds:
        cells = []
        for column in columns:
            found = [row for row in rows if row["provider"] in kind.providers and _column(row) == column]
            if kind.a_choice:
                found = [row for row in found if row["tokens_per_step"] >= GUESSED]
            best = max(found, key=lambda row: row["tokens_per_second"], default=None)
            if best is None:
                cells.append("-")
                continue
            beside = [f"{best['over_plain']:.2f}x"] if kind.over_plain and "over_plain" in best else []
            beside += [best["provider"].removeprefix("ramify ").partition(",")[0]] if kind.a_choice else []
            cells.append(f"{best['tokens_per_second']:.0f}" + (f" ({', '.join(beside)})" if beside else ""))
        lines.append([kind.title, *cells])
    return f"{_where(doc)}\n\n{table(['tokens a second', *columns], lines)}"


GUESSED = 1.02  # tokens a step, below which a method hardly ever guessed right: plain decoding by another name
HOPELESS = "random_draft"  # what a drafter costs that is never right
_ROWS = (1, 8, 64)


def _cells(rows: Iterable[dict], axis: str, key: str, invert: bool = False) -> list[str]:
    """The median of `key` for each number of rows in _ROWS."""
    found = {n: [row[key] for row in rows if row["shape"][axis] == n and key in row] for n in _ROWS}
    return [f"{1 / median(each) if invert else median(each):.2f}x" if each else "-" for each in found.values()]


def _over_linear(rows: Sequence[dict]) -> list[list[str]]:
    mine = [row for row in rows if row["provider"] == "ramify int4-g64"]
    layers = ", ".join(dict.fromkeys(row["shape"]["layer"] for row in mine))
    titles = {"over_int4": "int4 kernels", "ratio": "kernels of any kind"}
    return [[f"int4-g64 linear layers, over {title} (median of {layers})", *_cells(mine, "M", key)] for key, title in titles.items()]


def _over_step(rows: Sequence[dict]) -> list[list[str]]:
    lines = []
    for model in dict.fromkeys(row["shape"]["model"] for row in rows):
        took = {
            who: {
                row["shape"]["M"]: row["us"]["median"]
                for row in rows
                if row["provider"] == who and row["shape"]["model"] == model and "us" in row
            }
            for who in ("ramify int4-g64", "llama.cpp Q4_0")
        }
        ours, theirs = took.values()
        cells = [f"{theirs[n] / ours[n]:.2f}x" if n in ours and n in theirs else "-" for n in _ROWS]
        lines.append([f"a pass through a {model} Llama in int4-g64, over llama.cpp Q4_0", *cells])
    return lines


def _over_attention(rows: Sequence[dict]) -> list[list[str]]:
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["provider"] == "ramify" and row["dtype"] == dtype and "ratio" in row]
        lines.append(
            [
                f"tree attention on plain {dtype} tensors (median of {len(mine) // len({r['shape']['T'] for r in mine} or [1])} shapes)",
                *_cells(mine, "T", "ratio"),
            ]
        )
    return lines


_OVER: dict[str, Callable[[Sequence[dict]], list[list[str]]]] = {
    "linear": _over_linear,
    "step": _over_step,
    "tree_attention": _over_attention,
}


def results(root: Path) -> str:
    """What benchmarks/results holds: one section for each document, its machine and commit above its figures."""
    shown = [_document(root, name, each) for name, each in _documents(root).items()]
    return "\n\n".join(shown) or "Not measured yet."


def _where(doc: dict[str, Any]) -> str:
    machine = doc["environment"]
    cpu = f"{machine['cpu']} ({machine['isa']}), {machine['threads']} threads, torch {machine['versions']['torch']}"
    return f"{cpu}; {machine['date'][:10]}, commit {machine['commit'] or 'unknown'}."


def _document(root: Path, file: str, doc: dict[str, Any]) -> str:
    name, picture = doc["benchmark"], f"{Path(file).stem}.png"
    plot = f"\n\n![{name}]({picture})" if (root / "benchmarks" / "results" / picture).exists() else ""
    heading = f"{_TITLES[name]} ({doc['environment']['isa']})"
    return f"## {heading}\n\n[{file}]({file}): {_where(doc)}\n\n{_SHOWN[name](doc['rows'])}\n\nVerdict: {doc['verdict']}.{plot}"


def _column(row: dict) -> str:
    return f"{row['shape']['model']} at {row['shape']['temperature']:g}"


def _end_to_end(rows: Sequence[dict]) -> str:
    """Tokens a second, over ramify plain, and tokens a step: a line per provider, a column per model and temperature."""
    columns = dict.fromkeys(_column(row) for row in rows)
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = row["status"] if row["status"] in ("wrong", "failed") else "-"
        if row["status"] == "ok":
            over = f"{row['over_plain']:.2f}x" if "over_plain" in row else "-"
            cell = f"{row['tokens_per_second']:.0f} / {over} / {row['tokens_per_step']:.2f}"
        lines.setdefault(row["provider"], {})[_column(row)] = cell
    return table(["model, temperature", *columns], [[name, *(cells.get(c, "-") for c in columns)] for name, cells in lines.items()])


def _tree_attention(rows: Sequence[dict]) -> str:
    """Ratio over the best torch way: one line per cache and context, one column per number of tree rows."""
    mine = [row for row in rows if row["provider"] == "ramify"]
    counts = sorted({row["shape"]["T"] for row in mine})
    lines: dict[tuple, dict[int, str]] = {}
    for row in mine:
        shape = row["shape"]
        key = (f"{shape['size']} {row['dtype']}", str(shape["context"]))
        lines.setdefault(key, {})[shape["T"]] = f"{row['ratio']:.2f}x" if "ratio" in row else row["status"]
    return table(
        ["heads and cache", "context", *(f"T = {n}" for n in counts)],
        [[*key, *(c.get(n, "-") for n in counts)] for key, c in lines.items()],
    )


def _linear(rows: Sequence[dict]) -> str:
    """Speed over the best int4 peer and the best of any kind, cost in single steps, share of the floor: a line per layer and format.

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
            parts.append(f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "-")
            lines.setdefault((row["shape"]["layer"], row["provider"]), {})[row["shape"]["M"]] = " / ".join(parts)
    return table(["N x K", "", *(f"M = {n}" for n in counts)], [[*key, *(c.get(n, "-") for n in counts)] for key, c in lines.items()])


def _step(rows: Sequence[dict]) -> str:
    """Milliseconds of a pass and its cost in single steps: a line per model and provider."""
    counts = sorted({row["shape"]["M"] for row in rows})
    lines: dict[tuple, dict[int, str]] = {}
    for row in rows:
        if row["status"] == "ok":
            steps = f" / {row['single_steps']:.2f}" if "single_steps" in row else ""
            lines.setdefault((row["shape"]["model"], row["provider"]), {})[row["shape"]["M"]] = f"{row['us']['median'] / 1e3:.2f}{steps}"
    return table(["model", "", *(f"M = {n}" for n in counts)], [[*key, *(c.get(n, "-") for n in counts)] for key, c in lines.items()])


def _accuracy(rows: Sequence[dict]) -> str:
    """Nats a token above the dense model: a line per format and head, a column per quantizer and kind of input."""
    low_bit = [row for row in rows if not row["baseline"]]
    columns = dict.fromkeys((row["shape"]["method"], row["shape"]["activations"]) for row in low_bit)
    lines: dict[str, dict[tuple, str]] = {}
    for row in low_bit:
        shape = row["shape"]
        name = shape["weights"] + (f", head {shape['head']}" if shape["head"] != "dense" else "")
        cell = f"{row['above_dense']:.4f} ± {row['standard_error']:.4f}"
        lines.setdefault(name, {})[shape["method"], shape["activations"]] = cell
    heads = [method + (f", {how} inputs" if how != "exact" else "") for method, how in columns]
    return table(["weights", *heads], [[name, *(cells.get(c, "-") for c in columns)] for name, cells in lines.items()])


_SHOWN: dict[str, Callable[[Sequence[dict]], str]] = {
    "accuracy": _accuracy,
    "end_to_end": _end_to_end,
    "linear": _linear,
    "step": _step,
    "tree_attention": _tree_attention,
}
_TITLES = {
    "accuracy": "Low-bit weights and rounded inputs: nats a token above the zoo's own weights on held-out modules",
    "end_to_end": "Whole generations: tokens a second / over ramify plain on the same weights / tokens a step",
    "linear": "Linear layers of M rows: speed over the best int4 peer / the best of any kind / time in single steps / share of the floor",
    "step": "One pass of M rows through a model: milliseconds / time in single steps",
    "tree_attention": "Tree attention: speed over the fastest torch way",
}
