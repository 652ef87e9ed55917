"""What a document of benchmarks.gpu_day says to a person: one line, and its tables as plain text."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.report import notes, share


def red(doc: dict[str, Any]) -> list[str]:
    """What is wrong: stages that did not end well, failed tests, sanitizer findings, rows of ours that are off."""
    found = [f"{name} {held['status']}" for name, held in doc["stages"].items() if held["status"] != "ok"]
    found += [f"{row['op']} {row['backend']}: {row['failed']} tests failed" for row in doc["tests"] if row["failed"]]
    found += [f"{row['tool']}: {row['reason']}" for row in doc["sanitize"] if row["status"] == "failed"]
    tested = doc["model"].get("tests", {})
    found += [f"model: {tested['failed']} tests failed"] if tested.get("failed") else []
    bad = [row for row in doc["rows"] if row["status"] in ("wrong", "failed") and row["provider"].startswith("ramify")]
    return found + [f"{row['op']} {row['backend']} {_shape(row)}: {row['status']}" for row in bad]


def verdict(doc: dict[str, Any]) -> str:
    """Tests, sanitizers and speed in one line."""
    passed, failed = (doc["tested"].get(key, 0) for key in ("passed", "failed"))  # a test that runs three ops stands in three rows
    clean = [row["tool"] for row in doc["sanitize"] if row["status"] == "ok"]
    parts = [f"{passed} tests passed, {failed} failed", f"clean under {', '.join(clean)}" if clean else "no sanitizer ran"]
    for name in dict.fromkeys(row["provider"] for row in doc["rows"] if row["provider"].startswith("ramify")):
        trees = [row for row in doc["rows"] if row["provider"] == name and row["op"] == "tree_attention" and "ratio" in row]
        if trees:
            over, floor = (median(row[key] for row in trees) for key in ("ratio", "share_of_floor"))
            parts.append(f"tree_attention {name.removeprefix('ramify ')} {over:.2f}x the best peer, {floor:.0%} of floor")
    return "; ".join(parts)


def text(doc: dict[str, Any]) -> str:
    """Every section, in the order of the stages."""
    where, limits = doc["environment"], doc["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in where.get("versions", {}).items())
    lines = [f"{where.get('gpu', 'no GPU')}; CUDA {where.get('cuda') or '-'}, nvcc {where.get('nvcc') or '-'}, {versions}"]
    lines += [f"commit {where.get('commit') or 'unknown'}, {where.get('date', '')}", ""]
    if doc["options"]["rehearsal"]:
        lines += ["A REHEARSAL ON A CPU: NO NUMBER HERE MEANS ANYTHING", ""]
    stages = [(name, held["status"], f"{held['seconds']:.1f}", held.get("reason", "")) for name, held in doc["stages"].items()]
    lines += table(("stage", "", "seconds", ""), stages)
    if doc["build"]:
        spilled = [row["kernel"] for row in doc["build"]["kernels"] if row["local"] or row["stack"]]
        most = max((row["registers"] for row in doc["build"]["kernels"]), default=0)
        count = len(doc["build"]["kernels"])
        lines += [f"build for sm_{doc['build']['arch']}: {doc['build']['seconds']} s, {count} kernels, at most {most} registers"]
        lines += [f"  local memory: {', '.join(spilled)}"] if spilled else []
        lines += [f"  {line}" for line in doc["build"]["said"] if line] + [""]
    tests = [(r["op"], r["backend"], *(str(r[k]) for k in ("passed", "failed", "skipped")), _first(r)) for r in doc["tests"]]
    lines += table(("tests of", "backend", "passed", "failed", "skipped", ""), tests)
    lines += table(("sanitizer", "", ""), [(row["tool"], row["status"], row["reason"] or row.get("said", "")) for row in doc["sanitize"]])
    if limits:
        copies = ", ".join(f"{int(size) >> 20} MiB {rate:.0f}" for size, rate in limits["copy"].items())
        node = f", {limits['node_us']} us a node of a graph" if "node_us" in limits else ""
        lines += [f"copy, GB/s read and written: {copies}; bf16 product {limits['peak']['bf16'] / 1e3:.1f} TFLOP/s"]
        lines += [f"a launch from Python {limits['launch_us']} us{node}", ""]
    lines += _model(doc["model"])
    speeds, before = [], None
    for row in sorted(doc["rows"], key=lambda row: (_order(doc, row), not row["provider"].startswith("ramify"))):
        cell = (row["op"], _shape(row))
        figures = ("", "", "", "", "")
        if row["status"] == "ok":
            us, ratio = row["us"], f"{row['ratio']:.2f}x" if "ratio" in row else ""
            figures = (f"{us['median']:.1f}", f"{us['p10']:.1f}-{us['p90']:.1f}", f"{row['host_us']:.0f}", ratio, share(row))
        speeds.append((*(cell if cell != before else ("", "")), row["provider"], *figures, notes(row)))
        before = cell
    lines += table(("op", "shape", "provider", "us", "p10-p90", "host us", "ratio", "of floor", ""), speeds, left=3)
    tuned = []
    for row in (row for row in doc["tune"] if "best" in row):
        us = {tuple(each["config"]): each["us"]["median"] for each in row["tried"] if "us" in each}
        first, best = us.get(tuple(row["shipped"])), us[tuple(row["best"])]
        gain, timed = f"{first / best:.2f}x" if first else "", f"{len(us)} of {len(row['tried'])}"
        tuned.append((_shape(row), str(row["packed_rows"]), _words(row["shipped"]), _words(row["best"]), gain, timed))
    lines += table(("tree_attention, Triton", "rows", "shipped", "best", "gain", "timed"), tuned)
    return "\n".join([*lines, f"verdict: {doc['verdict']}", ""])


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Lines of aligned columns and an empty one; nothing for no rows. The first `left` and an untitled last column stand flush left."""
    if not rows:
        return []
    lines = [list(heading), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    flush = [number < left or (number == len(heading) - 1 and not title) for number, title in enumerate(heading)]
    cells = ([cell.ljust(w) if is_left else cell.rjust(w) for cell, w, is_left in zip(line, widths, flush)] for line in lines)
    return [*("  ".join(line).rstrip() for line in cells), ""]


def _model(found: dict[str, Any]) -> list[str]:
    """Tests, steps and generations of the model layer."""
    if not found:
        return []
    tests = found["tests"]
    lines = [f"model: {tests['passed']} tests passed, {tests['failed']} failed", *(f"  {line}" for line in tests["said"])]
    steps = []
    for row in found["steps"]:
        graph, calls = row["graph_us"], row["calls_us"]
        spread = f"{graph['p10']:.0f}-{graph['p90']:.0f}"
        how = f"{row['calls']} calls, {', '.join(row['backends'])}"
        gain = f"{calls['median'] / graph['median']:.2f}x"
        figures = (f"{graph['median']:.0f}", spread, f"{calls['median']:.0f}", gain if row["captured"] else "no graph")
        steps.append((str(row["rows"]), *figures, how))
    lines += table(("zoo model, rows", "us", "p10-p90", "call by call", "graph gains", ""), steps, left=0)
    made = []
    for row in found["generate"]:
        by, speed = "device" if row["turns"] else "host", f"{row['tokens_per_second']:.0f}"
        made.append((row["method"], by, str(row["tokens"]), f"{row['tokens_per_step']:.2f}", speed))
    return lines + table(("generate", "steps by", "tokens", "a step", "a second"), made)


def _first(row: dict[str, Any]) -> str:
    return f"{row['failures'][0]['test'].rpartition('/')[2]}: {row['failures'][0]['said']}" if row["failures"] else ""


def _shape(row: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in row["shape"].items())


def _order(doc: dict[str, Any], row: dict[str, Any]) -> int:
    """Place of the row's cell: the rows of slow peers came later."""
    return next(i for i, other in enumerate(doc["rows"]) if (other["op"], other["shape"]) == (row["op"], row["shape"]))


def _words(config: Sequence[int]) -> str:
    return "/".join(map(str, config))
