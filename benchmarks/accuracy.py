"""What low-bit weights and rounded inputs cost: `python -m benchmarks.accuracy [--quick] [--json F] [--plot F]`.

The loss of the zoo's target model on its held-out modules, in nats a token above that of its own weights, computed in float32: for every
format and quantizer of `ramify convert` with inputs as they are, and for some of them with inputs rounded to int8, one scale a token
("int8") or one a group of inputs ("int8-group"), or to bf16. The default quantizer, its act-order and the default of
`ramify.load(activations=)` follow from these figures. Every row sees the same texts, so the standard error is that of the differences,
text by text.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import plots, probes, report

INT4 = tuple(f"int4-g{group}{zeros}" for zeros in ("", "-zp") for group in (32, 64, 128))
BYTES = ("int8", "fp8", "fp8-b128")
DENSE = "dense"


@dataclass(frozen=True)
class Way:
    """A row: how the weights were made, and how their layers take their input."""

    weights: str
    method: str = "rtn"
    activations: str = "exact"
    head: str | None = None

    @property
    def title(self) -> str:
        """What a table calls the weights."""
        return " ".join([self.weights, *([self.method] if self.weights != DENSE else []), *([f"head {self.head}"] if self.head else [])])


def ways(quick: bool) -> list[Way]:
    """All rows, the dense one first."""
    if quick:
        return [Way(DENSE), Way("int4-g64"), Way("int4-g64", activations="int8")]
    found = [Way(DENSE), *(Way(format, method) for method in ("rtn", "hqq", "gptq") for format in INT4)]
    found += [Way(format) for format in BYTES]
    found += [Way("int4-g64", "gptq", head=head) for head in ("int8", "int4-g64")]
    for weights, method in (("int8", "rtn"), ("int4-g64", "gptq"), ("int4-g32", "gptq"), ("int4-g128", "gptq")):
        found += [Way(weights, method, rounded) for rounded in ("int8", "int8-group", "bf16")]
    return found


class Contest:
    """The texts, and models made one after another."""

    def __init__(self, quick: bool) -> None:
        import ramify
        from ramify.convert.evaluate import held_out

        self.texts = [text[:600] for text in held_out()[:3]] if quick else held_out()
        self.load = ramify.load
        self.dense: list[float] = []  # nats of each text

    def row(self, way: Way) -> dict[str, Any]:
        """Measure one way."""
        shape = {"weights": way.weights, "method": way.method, "activations": way.activations, "head": way.head or DENSE}
        facts = {"op": "perplexity", "provider": way.title, "backend": f"ramify {report.isa()}", "baseline": way.weights == DENSE}
        with TemporaryDirectory() as temporary:
            model = self._model(way, Path(temporary) / "low-bit")
        nats, counts, seconds = [], [], []
        for text in self.texts:
            begun = time.perf_counter()
            found = self._perplexity(model, text)
            seconds.append((time.perf_counter() - begun) / found.tokens)
            nats.append(found.nats_per_token * found.tokens)
            counts.append(found.tokens)
        self.dense = self.dense or nats
        low, _, _, high = quantiles(seconds, n=5)
        spread = {"median": median(seconds), "p20": low, "p80": high}
        return {
            **facts,
            "dtype": way.weights,
            "shape": shape,
            "status": "ok",
            "us": {name: round(1e6 * value, 3) for name, value in spread.items()},  # a token
            "bursts": {"clean": len(seconds), "disturbed": 0},
            "tokens": sum(counts),
            "nats_per_token": round(sum(nats) / sum(counts), 5),
            "above_dense": round((sum(nats) - sum(self.dense)) / sum(counts), 5),
            "standard_error": round(standard_error([a - b for a, b in zip(nats, self.dense)], counts), 5),
        }

    def _model(self, way: Way, folder: Path) -> Any:
        from ramify.convert import convert

        if way.weights == DENSE:
            return self.load("zoo", dtype="fp32")
        convert("zoo", folder, to=way.weights, method=way.method, head=way.head or "dense", evaluate=False)
        return self.load(folder, dtype="fp32", activations=way.activations)

    @staticmethod
    def _perplexity(model: Any, text: str) -> Any:
        from ramify.model.perplexity import perplexity

        return perplexity(model, text, window=min(1024, model.config.max_positions - 1))


def standard_error(differences: Sequence[float], counts: Sequence[int]) -> float:
    """Of the mean difference a token, when texts of so many tokens differ by so much each: texts are the independent draws."""
    mean = sum(differences) / sum(counts)
    return math.sqrt(sum((d - mean * n) ** 2 for d, n in zip(differences, counts)) * len(counts) / max(1, len(counts) - 1)) / sum(counts)


def show(rows: Sequence[dict]) -> None:
    """A line per row."""
    lines = [
        (
            row["provider"],
            row["shape"]["activations"],
            f"{row['nats_per_token']:.4f}",
            f"{row['above_dense']:+.4f}",
            f"{row['standard_error']:.4f}",
        )
        for row in rows
    ]
    report.table(("weights", "inputs", "nats a token", "above dense", "standard error"), lines, left=2)


def verdict(rows: Sequence[dict]) -> str:
    """The default beside dense weights, and what rounding its inputs adds."""
    at = {(row["provider"], row["shape"]["activations"]): row for row in rows}
    clauses = [f"dense {rows[0]['nats_per_token']:.3f} nats a token on {rows[0]['tokens']} tokens"]
    for name in dict.fromkeys(row["provider"] for row in rows):
        exact, whole, grouped = (at.get((name, how)) for how in ("exact", "int8", "int8-group"))
        if exact and whole:
            more = f", {grouped['above_dense'] - exact['above_dense']:+.4f} with one a group" if grouped else ""
            added = f"{whole['above_dense'] - exact['above_dense']:+.4f} with inputs rounded by one scale a token"
            clauses.append(f"{name} {exact['above_dense']:+.4f}, {added}{more}")
    return "; ".join(clauses)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    options = report.arguments(__doc__.splitlines()[0]).parse_args(arguments)
    plan = report.start(options)
    limits = probes.limits(probes.Probe.of(True), quick=True)
    contest, rows = Contest(options.quick), []
    every = ways(options.quick)
    for number, way in enumerate(every):
        report.progress(f"{number + 1}/{len(every)} {way.title}, inputs {way.activations}")
        rows.append(contest.row(way))
    report.progress("")
    show(rows)
    text = verdict(rows)
    print(f"\nverdict: {text}")
    return report.last(report.document("accuracy", options, plan, limits, rows, text), options, plots.accuracy, lambda row: True)


if __name__ == "__main__":
    report.run_main(main)
