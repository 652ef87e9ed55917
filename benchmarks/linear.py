"""Linear layers of 1 to 64 rows, dense and low-bit: `python -m benchmarks.linear [--quick] [--json F] [--plot F]`.

What a verified tree costs is what its M rows cost, so the figure that matters is not the time of one row but the curve over M: every
provider's time in single steps, time(M) / time(1). ramify's formats, dense and low-bit, with inputs rounded to int8, to bf16 or exact,
against torch, onnxruntime and llama.cpp in the same run. Layers of ramify, onnxruntime and llama.cpp are nodes of graphs, as in a
model's step; torch's, and the row "ops.linear", are calls from Python. Cold: each layer's weight is another copy. Every provider
multiplies its own rounding of one weight and is checked against that. The floor of a row is the larger of its own weights' bytes over
this run's read speed and 2 * M * N * K operations over this run's peak of the instruction that its arithmetic has here.
"""

import argparse
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module

import torch

from benchmarks import layers, plots, probes, report
from benchmarks.layers import FLOAT, HALF, INT7, INT8, TOP, Hold, Layer
from benchmarks.peers import llama_cpp, onnxruntime, pytorch
from benchmarks.registry import OPS, Case, op, provider, run_cell

SHAPES = ("1024x1024", "4096x4096", "14336x4096")  # N x K
ROWS = (1, 4, 8, 16, 32, 64)
MAIN = "ramify int4-g64"
GATES = (
    (1, "llama.cpp Q4_0", 0.97),
    (8, "int4", 1.4),
    (16, "torch dynamic int8", 1.25),
    (32, "torch dynamic int8", 1.1),
    (64, "torch dynamic int8", 1.0),
)
"""M, the peer (or the best of its weights), and how many times as fast MAIN should be at least, on layers of 16 M weights and more."""
SHARES = ((1, 0.85), (4, 0.75), (16, 0.55), (32, 0.62), (64, 0.70))
"""M, and the share of its floor that MAIN should reach there: of one read of its weights, from 16 rows on of the peak."""
STEPS = (8, 1.3)  # M, and how many of its own single steps at most
OLD = ("ramify avx2", "ramify portable")
AVX2 = (8, 0.7)
"""M from which on a level without VNNI is held to this share of its int8 peak, and not to what VNNI makes of further rows."""


@lru_cache(maxsize=1)
def layer_of(N: int, K: int, seed: int) -> Layer:
    """The layer being measured: another one lets go of it and of all that was made of it."""
    return Layer(N, K, seed)


@op("linear", layer=SHAPES, M=ROWS, quick={"layer": ("256x256",), "M": (1, 8)})
def case(layer: str, M: int, seed: int) -> Case:
    """A cell; what it reads and what it must compute is each provider's own."""
    N, K = size_of(layer)
    return Case(args=(layer_of(N, K, seed), M), bytes=0, flops=2 * M * N * K)


def size_of(layer: str) -> tuple[int, int]:
    """N and K of a name. ValueError for what is none."""
    N, times, K = layer.partition("x")
    if not (times and N.isdecimal() and K.isdecimal() and int(N) % 32 == 0 and int(K) % 256 == 0 and int(N) and int(K)):
        raise ValueError(f"linear: --shapes has {layer!r}; takes NxK, N a multiple of 32 and K of 256, which every format here divides.")
    return int(N), int(K)


# ---- providers


def no_ramify() -> str:
    try:
        import_module("ramify.native")
        return ""
    except ImportError as error:
        return str(error)


def ramify_backend() -> str:
    return f"ramify {report.isa()}"


def ours_as(title: str, dtype: str, hold: Hold, limit: float, arithmetic: str, call=layers.replay) -> None:
    load = layers.loader(title, hold, limit, arithmetic)
    provider("linear", title, backend=ramify_backend, needs=no_ramify, load=load, facts={"dtype": dtype})(call)


for format in ("int4-g64", "int4-g128", "int8"):
    ours_as(f"ramify {format}", format, layers.low_bit(format, "int8"), INT8, "int8")
    if format == "int4-g64":
        ours_as(f"ramify {format}, scale a group", format, layers.low_bit(format, "int8-group"), INT8, "int8")
        ours_as(f"ramify {format}, bf16 inputs", format, layers.low_bit(format, "bf16"), HALF, "bf16")
    ours_as(f"ramify {format}, exact", format, layers.low_bit(format, "exact"), FLOAT, "fp32")
ours_as("ramify fp8, exact", "fp8", layers.low_bit("fp8", "exact"), FLOAT, "fp32")
ours_as("ramify bf16", "bf16", layers.dense, HALF, "bf16")
ours_as("ramify int4-g64, ops.linear", "int4-g64", layers.eager("int4-g64", "int8"), INT8, "int8", layers.op)


def peer(title: str, dtype: str, hold: Hold, limit: float, arithmetic: str, call, **facts) -> None:
    load = layers.loader(title, hold, limit, arithmetic)
    provider("linear", title, baseline=True, load=load, facts={"dtype": dtype}, **facts)(call)


peer("torch bf16 F.linear", "bf16", pytorch.dense(torch.bfloat16), HALF, "bf16", pytorch.linear)
peer("torch fp32 F.linear", "fp32", pytorch.dense(torch.float32), FLOAT, "fp32", pytorch.linear)
peer("torch dynamic int8", "int8", pytorch.dynamic, INT7, "int8", pytorch.linear_dynamic)
peer("torch int8pack_mm", "int8", pytorch.int8, HALF, "bf16", pytorch.int8_mm)
for format in ("int4-g64", "int4-g128"):
    peer(f"torch int4pack_mm g{format[6:]}", format, pytorch.int4(format), HALF, "fp32", pytorch.int4_mm)
for format in ("int4-g32", "int4-g128"):
    facts = {"needs": onnxruntime.missing, "backend": "onnxruntime"}
    peer(f"onnxruntime int4 b{format[6:]}", format, onnxruntime.int4(format), INT8, "int8", onnxruntime.run, **facts)
for kind, dtype in (("Q4_0", "int4-g32"), ("Q4_K", "int4-g32-zp"), ("Q8_0", "int8-g32")):
    facts = {"needs": llama_cpp.missing, "backend": "llama.cpp"}
    peer(f"llama.cpp {kind}", dtype, llama_cpp.quantized(kind), INT8, "int8", llama_cpp.run, **facts)


# ---- figures


def finish(rows: Sequence[dict], limits: probes.Limits, read: dict[int, float]) -> None:
    """Floors and ratios of the rows of one cell; read: GB/s at which so many bytes are read, where not those of memory."""

    def floor(row: dict) -> float:
        N, K = size_of(row["shape"]["layer"])
        return limits.floor(row["bytes"], 2 * row["shape"]["M"] * N * K, row["arithmetic"], read.get(row["bytes"]))

    report.finish(rows, floor)
    good = [row for row in rows if row["status"] == "ok"]
    int4 = min((row["us"]["median"] for row in good if row["baseline"] and row["dtype"].startswith("int4")), default=None)
    for row in good if int4 else ():
        row["over_int4"] = round(int4 / row["us"]["median"], 4)
    if dense := [row for row in good if row["provider"].endswith("F.linear")]:
        min(dense, key=lambda row: row["us"]["median"])["faster_dense"] = True


def ours(row: dict) -> bool:
    """Rows whose failure or slowing down is ours to mend."""
    return row["provider"].startswith("ramify")


def verdict(rows: Sequence[dict]) -> str:
    """int4-g64 on each layer: speed over the best int4 peer and over the best of any kind, and what M rows cost in single steps."""
    clauses = []
    for layer in dict.fromkeys(row["shape"]["layer"] for row in rows):
        mine = [row for row in rows if row["shape"]["layer"] == layer and row["provider"] == MAIN and "ratio" in row]
        if not mine:
            clauses.append(f"{layer}: {MAIN} was not measured against peers")
            continue
        parts = []
        for row in mine:
            int4 = f"{row['over_int4']:.2f}x int4, " if "over_int4" in row else ""
            steps = f", {row['single_steps']:.2f} steps" if row.get("single_steps", 1) != 1 else ""
            parts.append(f"M={row['shape']['M']} {int4}{row['ratio']:.2f}x any{steps}")
        clauses.append(f"{layer}: {MAIN} " + "; ".join(parts))
    wrong = sum(row["status"] in ("wrong", "failed") for row in rows)
    return ". ".join(filter(None, [*clauses, gates(rows), f"{wrong} wrong or failed"]))


def gates(rows: Sequence[dict]) -> str:
    """What the large layers of `rows` hold: GATES, SHARES and STEPS, or on a level without VNNI its own share of the peak."""
    found: list[tuple[bool, str]] = []
    for layer in dict.fromkeys(row["shape"]["layer"] for row in rows):
        N, K = size_of(layer)
        times = {(row["provider"], row["shape"]["M"]): row for row in rows if row["shape"]["layer"] == layer and row["status"] == "ok"}
        if N * K < 1 << 24:
            continue
        shares = {
            M: row["share_of_floor"] for (name, M), row in times.items() if name == MAIN and M >= AVX2[0] and row.get("backend") in OLD
        }
        found += [(share >= AVX2[1], f"{layer} M={M} {share:.0%} of the int8 peak, to be {AVX2[1]:.0%}") for M, share in shares.items()]
        for M, rival, least in GATES:
            if M in shares and rival != "int4":
                continue
            mine, other = times.get((MAIN, M)), times.get((rival, M))
            speed = mine and (mine.get("over_int4") if rival == "int4" else other and other["us"]["median"] / mine["us"]["median"])
            if speed:
                found.append((speed >= least, f"{layer} M={M} {speed:.2f}x {rival}, to be {least}"))
        for M, share in SHARES:
            if M not in shares and (reached := times.get((MAIN, M), {}).get("share_of_floor")) is not None:
                found.append((reached >= share, f"{layer} M={M} {reached:.0%} of the floor, to be {share:.0%}"))
        if (mine := times.get((MAIN, STEPS[0]))) and STEPS[0] not in shares and "single_steps" in mine:
            found.append((mine["single_steps"] <= STEPS[1], f"{layer} M={STEPS[0]} {mine['single_steps']:.2f} steps, to be {STEPS[1]}"))
    return report.gates(found)


def show(rows: Sequence[dict]) -> None:
    """For each layer: times, the curve in single steps, and ramify's speed over the best peers."""
    for layer in dict.fromkeys(row["shape"]["layer"] for row in rows):
        here = [row for row in rows if row["shape"]["layer"] == layer]
        good = [row for row in here if row["status"] == "ok"]
        print(f"\nlinear N x K = {layer}: us per call, share of the floor; *: the faster F.linear; !: disturbed throughout\n")
        sizes = {row["provider"]: f"{row['bytes'] / 1e6:.2f}" for row in here if "bytes" in row}
        report.matrix(here, "M", _time, ("MB", sizes))
        print("\nM rows in single steps: time(M) / time(1)\n")
        report.matrix(good, "M", lambda row: f"{row['single_steps']:.2f}" if "single_steps" in row else "")
        print("\nspeed over the best int4 peer, over the best peer of any kind\n")
        report.matrix(list(filter(ours, good)), "M", _over)


def _time(row: dict) -> str:
    marks = ("*" if row.get("faster_dense") else "") + ("!" if row["bursts"]["clean"] == 0 else "")
    return f"{row['us']['median']:.0f}{marks} {report.share(row)}"


def _over(row: dict) -> str:
    return " ".join(f"{row[key]:.2f}x" if key in row else "-" for key in ("over_int4", "ratio"))


# ---- main


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The common options and those of this benchmark."""
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="", metavar="NxK,NxK", help=f"layers to measure (default: {','.join(SHAPES)})")
    parser.add_argument("--rows", default="", metavar="M,M", help=f"rows to measure, at most {TOP} (default: {','.join(map(str, ROWS))})")
    parser.add_argument("--list", action="store_true", help="print the providers and what is missing for them, measure nothing")
    options = parser.parse_args(arguments)
    counts = [word for word in options.rows.split(",") if word]
    if bad := [word for word in counts if not word.isdecimal() or not 1 <= int(word) <= TOP]:
        raise ValueError(f"linear: --rows has {bad[0]!r}; takes 1 to {TOP}.")
    axes = {"layer": tuple(word for word in options.shapes.split(",") if word), "M": tuple(map(int, counts))}
    options.axes = {name: values for name, values in axes.items() if values}
    for layer in axes["layer"]:
        size_of(layer)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    options = read_options(arguments)
    target = OPS["linear"]
    if options.list:
        missing = [each.needs() if each.needs else "" for each in target.providers]
        report.table(("provider", ""), [(each.name, why) for each, why in zip(target.providers, missing)])
        return 0
    plan = report.start(options)
    only, named = report.chosen(options)
    cells = list(target.cells(options.quick, only, options.axes))
    probe = probes.Probe.of(options.quick)
    limits = probes.limits(probe, quick=options.quick)
    print(f"{report.isa()}; {limits}")
    results = []
    for number, cell in enumerate(cells):
        report.progress(f"{number + 1}/{len(cells)} {' '.join(f'{k}={v}' for k, v in cell.items())}")
        results.append(run_cell(target, cell, plan, seed=options.seed, cold=report.cold(options), named=named)[0])
    layer_of.cache_clear()
    report.progress("")
    limits.read = max(limits.read, probe.read(1 << 40, limits.threads))  # bandwidth drifts: the better of before and after counts
    rows = [row for found in results for row in found]
    sizes = {row["bytes"] for row in rows if "bytes" in row}
    read = {} if report.cold(options) else {size: max(limits.read, probe.read(size, limits.threads)) for size in sizes}
    for found in results:
        finish(found, limits, read)
    report.single_steps(rows)
    show(rows)
    text = verdict(rows)
    print(f"\nverdict: {text}")
    return report.last(report.document("linear", options, plan, limits, rows, text), options, plots.linear, ours)


if __name__ == "__main__":
    report.run_main(main)
