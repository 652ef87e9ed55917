"""One forward pass of M rows of a whole model: `python -m benchmarks.step [--quick] [--json F] [--plot F]`.

What verifying a tree of M rows costs, in milliseconds and in single steps, time(M) / time(1): ramify in bf16 and low-bit weights, and
llama.cpp on the same weights in Q4_0, fed M tokens at once. Models of random weights, 15 M and 160 M parameters, after a context; nothing
is kept of a pass, so every call sees the same context. Logits of every row are computed. Floor: one read of the weights that a
step reads, at the read speed of a block of that size. Texts, and so what is right, are for end_to_end.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import models, plots, probes, report
from benchmarks.linear import no_ramify, ours, ramify_backend
from benchmarks.peers import llama_model
from benchmarks.registry import OPS, Case, Loaded, op, provider, run_cell

LOW_BIT = ("int4-g64", "int8")
ROWS = (1, 4, 8, 16, 32, 64)
MAIN = "ramify int4-g64"
SINGLE = {"15m": 1.3, "160m": 1.0}
"""Model -> most that a single step may take, in steps of llama.cpp in Q4_0."""
STEPS = {("160m", 8): 1.5, ("160m", 32): 3.8, ("160m", 64): 7.0}
"""Model and rows -> most single steps that verifying them may cost. Set for chips with VNNI."""


@op("step", model=("15m", "160m"), context=(256,), M=ROWS, quick={"model": ("tiny",), "context": (64,), "M": (1, 8)})
def case(model: str, context: int, M: int, seed: int) -> Case:
    """A cell; what a step reads is each provider's own."""
    return Case(args=(model, context, M), bytes=0, flops=0)


class Models:
    """What is loaded of the model being measured; another one lets go of it."""

    name = ""
    held: dict[str, Any] = {}

    @classmethod
    def of(cls, name: str, title: str, make: Callable[[Path], Any]) -> Any:
        """`make(folder)`, once a model and title."""
        if name != cls.name:
            cls.name, cls.held = name, {}
        if title not in cls.held:
            cls.held[title] = make(models.random_model(name))
        return cls.held[title]


def tokens(count: int) -> list[int]:
    """Ids that every model here has."""
    return [7 * i % 1000 for i in range(count)]


def ramify_load(format: str) -> Callable[..., Loaded]:
    """A ramify model and a tree of M rows after the context."""

    def load(model: str, context: int, M: int, cold: bool) -> Loaded:
        import ramify
        from ramify.tree import TokenTree

        low_bit = {} if format == "bf16" else {"weights": format}
        held = Models.of(model, format, lambda folder: ramify.load(folder, dtype="bf16", **low_bit))
        cache = held.new_cache([context + max(ROWS)])
        held.prefill([tokens(context)], cache)
        cache.reserve(0, context + M)
        arguments = (held, TokenTree.chains([1], [tokens(M - 1)]), cache.of([0]))
        return Loaded([arguments], bytes=held.weights.step_bytes, arithmetic="bf16" if format == "bf16" else "int8")

    return load


for format in ("bf16", *LOW_BIT):
    provider("step", f"ramify {format}", backend=ramify_backend, needs=no_ramify, load=ramify_load(format), facts={"dtype": format})(
        lambda model, tree, view: model.forward(tree, view)
    )


class Gguf:
    """A model in llama.cpp, and the bytes that its step reads."""

    def __init__(self, folder: Path) -> None:
        with TemporaryDirectory() as temporary:
            file = Path(temporary) / "model.gguf"
            self.bytes = llama_model.convert(folder, file)
            self.engine = llama_model.Engine(file, 1024)


def llama_load(model: str, context: int, M: int, cold: bool) -> Loaded:
    held = Models.of(model, "llama.cpp", Gguf)
    held.engine.clear()
    held.engine.feed(tokens(context))
    return Loaded([(held.engine, tokens(M), context)], bytes=held.bytes, arithmetic="int8")


facts = {"dtype": llama_model.TYPE}


@provider("step", "llama.cpp Q4_0", baseline=True, backend="llama.cpp", needs=llama_model.missing, load=llama_load, facts=facts)
def llama_step(engine: llama_model.Engine, ids: list[int], context: int) -> None:
    engine.feed(ids, every=True)
    engine.clear(context)


def finish(rows: Sequence[dict], limits: probes.Limits, weights: int, read: dict[int, float]) -> None:
    """Ratios and floors of one cell of a model of so many weights; read: bytes -> GB/s at which so many are read again and again."""

    def floor(row: dict) -> float:
        return limits.floor(row["bytes"], 2 * row["shape"]["M"] * weights, row["arithmetic"], read[row["bytes"]])

    report.finish(rows, floor)


def verdict(rows: Sequence[dict]) -> str:
    """Each model in int4: its step against llama.cpp's, and what M rows cost in single steps."""
    clauses = []
    for model in dict.fromkeys(row["shape"]["model"] for row in rows):
        mine = [r for r in rows if r["provider"] == MAIN and r["shape"]["model"] == model and r["status"] == "ok"]
        if not mine:
            clauses.append(f"{model}: {MAIN} was not measured")
            continue
        ratio = "".join(f", {1 / row['ratio']:.2f} of llama.cpp Q4_0's" for row in mine if row["shape"]["M"] == 1 and "ratio" in row)
        first = next((f" {row['us']['median'] / 1e3:.2f} ms" for row in mine if row["shape"]["M"] == 1), "")
        steps = ", ".join(f"{row['shape']['M']} rows {row['single_steps']:.2f}" for row in mine if row.get("single_steps", 1) != 1)
        clauses.append(f"{model}: int4-g64 step{first}{ratio}; in single steps: {steps}")
    wrong = sum(row["status"] in ("wrong", "failed") for row in rows)
    return ". ".join(filter(None, [*clauses, gates(rows), f"{wrong} wrong or failed"]))


def gates(rows: Sequence[dict]) -> str:
    """What of SINGLE and STEPS a run holds."""
    mine = {(row["shape"]["model"], row["shape"]["M"]): row for row in rows if row["provider"] == MAIN and row["status"] == "ok"}
    found = []
    for model, most in SINGLE.items():
        if "ratio" in (row := mine.get((model, 1), {})):
            found.append((1 / row["ratio"] <= most, f"{model} {1 / row['ratio']:.2f} of llama.cpp Q4_0's step, to be {most}"))
    for (model, M), most in STEPS.items():
        if "single_steps" in (row := mine.get((model, M), {})):
            found.append((row["single_steps"] <= most, f"{model} M={M} {row['single_steps']:.2f} steps, to be {most}"))
    return report.gates(found)


def show(rows: Sequence[dict]) -> None:
    """For each model: milliseconds and share of the floor, then the curve in single steps."""
    for model in dict.fromkeys(row["shape"]["model"] for row in rows):
        here = [row for row in rows if row["shape"]["model"] == model]
        print(f"\n{models.SHAPES[model].title}, context {here[0]['shape']['context']}: ms per pass, share of the floor\n")
        report.matrix(here, "M", lambda row: f"{row['us']['median'] / 1e3:.2f} {report.share(row)}")
        print("\nM rows in single steps: time(M) / time(1)\n")
        report.matrix([row for row in here if "single_steps" in row], "M", lambda row: f"{row['single_steps']:.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    options = report.arguments(__doc__.splitlines()[0]).parse_args(arguments)
    plan = report.start(options)
    only, named = report.chosen(options)
    target = OPS["step"]
    cells = list(target.cells(options.quick, only))
    probe = probes.Probe.of(options.quick)
    limits = probes.limits(probe, quick=options.quick)
    print(f"{report.isa()}; {limits}")
    rows: list[dict] = []
    for number, cell in enumerate(cells):
        report.progress(f"{number + 1}/{len(cells)} {' '.join(f'{k}={v}' for k, v in cell.items())}")
        rows += (found := run_cell(target, cell, plan, seed=options.seed, named=named)[0])
        sizes = {row["bytes"] for row in found if "bytes" in row}
        weights = models.weights_read(models.random_model(cell["model"]))
        finish(found, limits, weights, {size: max(probe.read(size, limits.threads), limits.read) for size in sizes})
    Models.name, Models.held = "", {}
    report.progress("")
    report.single_steps(rows)
    show(rows)
    text = verdict(rows)
    print(f"\nratio: llama.cpp over this row. verdict: {text}")
    return report.last(report.document("step", options, plan, limits, rows, text), options, plots.step, ours)


if __name__ == "__main__":
    report.run_main(main)
