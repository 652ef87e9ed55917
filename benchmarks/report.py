"""From rows to what a person reads: ratios and floors, the JSON document and its schema, tables, comparison with an older run."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.harness import Plan, last_level_cache

SCHEMA = "ramify-benchmark-1"
STATUS = ("ok", "wrong", "failed", "not installed", "not run")
NOISE = 0.05  # a change below this, or below the spread of either run, is not one
FLAGS = re.compile(r"avx2|fma|f16c|avx_vnni|avx512(f|bw|vl|_vnni|_bf16|_fp16)|amx_\w+")
VARIABLES = re.compile(r"(RAMIFY|OMP|GOMP|MKL|KMP)_\w+")
PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "safetensors")
ROOT = Path(__file__).resolve().parent.parent


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few small cells, few rounds: shows that it runs, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document, schema in benchmarks/README.md")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (needs matplotlib)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an older --json; exit 1 when a ramify row became slower than noise")
    parser.add_argument("--only", action="append", default=[], metavar="AXIS=VALUE,VALUE", help="keep these values of an axis; repeatable")
    parser.add_argument("--providers", default="", metavar="WORD,WORD", help="keep providers whose name holds one of these words")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 5, quick 2)")
    parser.add_argument("--threads", type=int, help="torch and kernel threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of every random input")
    parser.add_argument("--hot", action="store_true", help="one copy of the arguments, cache-resident, instead of cold ones")
    return parser


def start(options: argparse.Namespace) -> Plan:
    """Set threads, look at the paths, and return the plan. ValueError for what cannot be."""
    import torch

    demote_root()
    sys.stdout.reconfigure(line_buffering=True)  # a long run shows its tables as they come, in a pipe as well
    for path in (options.json, options.plot):
        if path and not path.resolve().parent.is_dir():
            raise ValueError(f"benchmark: folder {path.parent} is not there; name an existing one, or make it.")
    if options.compare and not options.compare.is_file():
        raise ValueError(f"benchmark: --compare {options.compare} is not there; takes a file that --json wrote.")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"benchmark: --threads is {options.threads}; takes 1 or more.")
        torch.set_num_threads(options.threads)
    plan = Plan.quick() if options.quick else Plan()
    if options.rounds is not None:
        if options.rounds < 1:
            raise ValueError(f"benchmark: --rounds is {options.rounds}; takes 1 or more.")
        plan = Plan(**{**plan.__dict__, "rounds": options.rounds, "enough": min(plan.enough, options.rounds)})
    return plan


def demote_root() -> None:
    """Move the repository to the end of the path: its folder `kernels/` must not hide the `kernels` package of Hugging Face."""
    here = [entry for entry in sys.path if Path(entry or ".").resolve() == ROOT]
    sys.path[:] = [entry for entry in sys.path if entry not in here] + here


def cold(options: argparse.Namespace) -> bool:
    """Whether calls read memory rather than caches: a quick run makes no gigabyte of copies."""
    return not (options.hot or options.quick)


def chosen(options: argparse.Namespace) -> tuple[dict[str, list[str]], list[str]]:
    """--only as axis -> values, --providers as words."""
    only = {}
    for text in options.only:
        axis, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"benchmark: --only is {text!r}; takes axis=value or axis=value,value.")
        only[axis] = values.split(",")
    return only, [word for word in options.providers.split(",") if word]


def environment(seed: int) -> dict[str, Any]:
    """Where and when a document was made. Holds no path of the machine."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    flags = set((re.search(r"^flags\s*:\s*(.+)$", info, re.M) or ["", ""])[1].split())
    family = re.search(r"^cpu family\s*:\s*(\d+)$", info, re.M)
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "family": int(family[1]) if family else 0,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "last_level_cache": last_level_cache(),
        "flags": sorted(flag for flag in flags if FLAGS.fullmatch(flag)),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in ("ramify", *PACKAGES) if (found := version(name))},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seed": seed,
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *map(_no_folder, sys.argv[1:])]),
        "variables": {name: _no_folder(value) for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
    }


def isa() -> str:
    """The ISA level of ramify's kernels, or why there are none."""
    try:
        from ramify import native

        return native.isa()
    except Exception as error:  # a broken build is a fact to print, not a reason to stop measuring the peers
        return f"none ({error})".splitlines()[0]


def _no_folder(word: str) -> str:
    return word.rpartition("/")[2]


def version(name: str) -> str:
    """The version of an installed package, or of ramify; "" where there is none."""
    try:
        return __import__("ramify").__version__ if name == "ramify" else metadata.version(name)
    except Exception:
        return ""


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
    except OSError:
        return ""


def finish(rows: Sequence[dict], floor: float | Callable[[dict], float] | None) -> None:
    """Add ratio (fastest baseline over this row), floor and share of it to the rows of one cell.

    floor: seconds of every row, or a row's own; None for none.
    """
    measured = [row for row in rows if row["status"] == "ok"]
    best = min((row["us"]["median"] for row in measured if row["baseline"]), default=None)
    for row in measured:
        if best is not None:
            row["ratio"] = round(best / row["us"]["median"], 4)
        if floor is not None:
            row["floor_us"] = round(1e6 * (floor(row) if callable(floor) else floor), 3)
            row["share_of_floor"] = round(row["floor_us"] / row["us"]["median"], 4)


def single_steps(rows: Sequence[dict]) -> None:
    """Add time(M) / time(1) of the same provider in the same cell but for M, where M = 1 was measured."""

    def line(row: dict) -> str:
        return json.dumps([row["provider"], {**row["shape"], "M": 1}])

    ones = {line(row): row["us"]["median"] for row in rows if row["status"] == "ok" and row["shape"]["M"] == 1}
    for row in rows:
        if row["status"] == "ok" and line(row) in ones:
            row["single_steps"] = round(row["us"]["median"] / ones[line(row)], 3)


def gates(found: Sequence[tuple[bool, str]]) -> str:
    """How many targets held, and of the others what they are; "" where none was measured."""
    held, missed = sum(good for good, _ in found), [text for good, text in found if not good]
    return f"{held} of {len(found)} gates held" + (f" (missed: {'; '.join(missed)})" if missed else "") if found else ""


def document(name: str, options: argparse.Namespace, plan: Plan, limits: Any, rows: Sequence[dict], verdict: str) -> dict[str, Any]:
    """The whole run as plain values: what --json writes."""
    return {
        "schema": SCHEMA,
        "benchmark": name,
        "environment": environment(options.seed),
        "options": {"quick": options.quick, "cold": cold(options), **plan.__dict__, "calls": list(plan.calls)},
        "limits": limits.json(),
        "rows": list(rows),
        "verdict": verdict,
    }


def validate(doc: dict[str, Any]) -> None:
    """ValueError when `doc` is not a document of this schema: what is missing, or a row that claims what it did not measure."""

    def need(holder: dict, keys: Iterable[str], where: str) -> None:
        if missing := [key for key in keys if key not in holder]:
            raise ValueError(f"validate: {where} lacks {', '.join(missing)}; takes schema {SCHEMA}. Write it with --json of this version.")

    need(doc, ("schema", "benchmark", "environment", "options", "limits", "rows", "verdict"), "document")
    if doc["schema"] != SCHEMA:
        raise ValueError(f"validate: schema is {doc['schema']!r}; takes {SCHEMA!r}. Write it with --json of this version.")
    need(doc["environment"], ("cpu", "flags", "isa", "threads", "versions", "commit", "date", "seed", "command"), "environment")
    need(doc["limits"], ("source", "threads", "read", "peak"), "limits")
    for number, row in enumerate(doc["rows"]):
        where = f"row {number}"
        need(row, ("op", "provider", "backend", "dtype", "shape", "status"), where)
        if row["status"] not in STATUS:
            raise ValueError(f"validate: {where} has status {row['status']!r}; takes one of {', '.join(STATUS)}.")
        if row["status"] == "ok":
            need(row, ("us", "bursts"), where)
            need(row["us"], ("median", "p20", "p80"), where)
        else:
            need(row, ("reason",), where)
            if "us" in row:
                raise ValueError(f"validate: {where} is {row['status']!r} and has a time; a failed provider prints no number.")


def write(doc: dict[str, Any], path: Path) -> None:
    """Validate and write."""
    validate(doc)
    path.write_text(json.dumps(doc, indent=1) + "\n")


def progress(text: str) -> None:
    """Rewrite one line of a terminal; "" clears it. A pipe or a file sees nothing."""
    if sys.stderr.isatty():
        print(f"\r{text:<70}" if text else "\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print aligned columns: the first `left` flush left, and the last when it has no title (notes).

    With rich on a terminal, else as plain text; the same words in both.
    """
    flush = [number < left or (number == len(heading) - 1 and not title) for number, title in enumerate(heading)]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table

            pretty = Table(box=None, pad_edge=False)
            for title, is_left in zip(heading, flush):
                pretty.add_column(title, justify="left" if is_left else "right", no_wrap=True)
            for row in rows:
                pretty.add_row(*row)
            return Console(highlight=False, markup=False).print(pretty)
        except ImportError:
            pass
    lines = [list(heading), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    for line in lines:
        cells = [cell.ljust(width) if is_left else cell.rjust(width) for cell, width, is_left in zip(line, widths, flush)]
        print("  ".join(cells).rstrip())


def matrix(rows: Sequence[dict], axis: str, cell: Callable[[dict], str], more: tuple[str, dict[str, str]] | None = None) -> None:
    """Print a line per provider and a column per value of an axis; `more` is a further column: its title, and provider -> text."""
    values = sorted({row["shape"][axis] for row in rows})
    found: dict[str, dict[Any, dict]] = {}
    for row in rows:
        found.setdefault(row["provider"], {})[row["shape"][axis]] = row
    lines = []
    for name, line in found.items():
        bad = [row for row in line.values() if row["status"] != "ok"]
        cells = ["" if (row := line.get(value)) is None or row["status"] != "ok" else cell(row) for value in values]
        cells = [row["status"] if (row := line.get(value)) in bad and len(bad) < len(line) else text for value, text in zip(values, cells)]
        lines.append((name, *([more[1].get(name, "")] if more else []), *cells, notes(bad[0]) if bad else ""))
    table(("provider", *([more[0]] if more else []), *(f"{axis}={value}" for value in values), ""), lines)


def spread(row: dict) -> float:
    """Half the distance of p20 and p80 over the median."""
    return (row["us"]["p80"] - row["us"]["p20"]) / 2 / row["us"]["median"]


def share(row: dict) -> str:
    """Share of the floor in percent, "" where a row has none."""
    return f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else ""


def notes(row: dict) -> str:
    """What a reader must know about a row beside its figures; a long reason stands whole in the JSON."""
    if row["status"] != "ok":
        return f"{row['status']} ({textwrap.shorten(row['reason'], 80, placeholder=' ...')})"
    return "disturbed throughout" if row["bursts"]["clean"] == 0 else ""


def compare(doc: dict[str, Any], old: dict[str, Any], ours: Callable[[dict], bool]) -> int:
    """Print what changed against an older document, row by row; returns how many rows of ours became slower than noise.

    Ratios against the baseline are compared where both runs have them: they survive another clock speed or another machine.
    """
    validate(old)
    before = {_key(row): row for row in old["rows"] if row["status"] == "ok"}
    lines, slower = [], 0
    for row in doc["rows"]:
        other = before.get(_key(row))
        if row["status"] != "ok" or other is None:
            continue
        by_ratio = "ratio" in row and "ratio" in other and not row.get("baseline")
        change = row["ratio"] / other["ratio"] if by_ratio else other["us"]["median"] / row["us"]["median"]
        noise = max(NOISE, spread(row) + spread(other))
        word = "same" if abs(change - 1) <= noise else "faster" if change > 1 else "slower"
        slower += word == "slower" and ours(row)
        shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        times = (f"{other['us']['median']:.1f}", f"{row['us']['median']:.1f}")
        lines.append((row["provider"], shape, *times, f"{change:.2f}x", "ratio" if by_ratio else "us", f"{noise:.0%}", word))
    if old["environment"]["cpu"] != doc["environment"]["cpu"]:
        print(f"The older run is of another machine ({old['environment']['cpu']}): microseconds do not compare, ratios do.")
    table(("provider", "cell", "old us", "new us", "speed", "judged by", "noise", "verdict"), lines, left=2)
    print(f"verdict: {slower} of ours slower than {old['environment']['date']}, {len(lines)} rows compared")
    return slower


def _key(row: dict) -> tuple:
    return (row["op"], row["provider"], row["dtype"], json.dumps(row["shape"], sort_keys=True))


def run_main(main: Callable[[Sequence[str] | None], int]) -> None:
    """Exit with main's code; a wrong input is one line on stderr and code 2."""
    try:
        sys.exit(main(None))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def last(doc: dict[str, Any], options: argparse.Namespace, draw: Callable[[dict, Path], None], ours: Callable[[dict], bool]) -> int:
    """Write, draw and compare as the options ask; the exit code: 1 when a row of ours is wrong, failed or slower than before."""
    if options.json:
        write(doc, options.json)
    if options.plot:
        try:
            draw(doc, options.plot)
        except ImportError as error:
            print(f"no plot: {error}; pip install matplotlib", file=sys.stderr)
    bad = sum(row["status"] in ("wrong", "failed") and ours(row) for row in doc["rows"])
    if options.compare:
        bad += compare(doc, json.loads(options.compare.read_text()), ours)
    return 1 if bad else 0
