"""Whole generations, against transformers: `python -m benchmarks.end_to_end [--quick] [--json F] [--plot F]`.

Every way to decode continues the same held-out Python sources, in turns and in one process: transformers `generate` in bf16
and fp32 (the faster counts), its prompt lookup, its assistant model; llama.cpp on the same weights in Q4_0; ramify plain and with
each method, in bf16 and in low-bit weights. Two models: the zoo's, and a 160 M Llama of random weights, whose text is noise and
whose step is bound by the bytes of its weights. A lossless ramify method whose greedy text is not that of plain decoding of the
same weights, token for token, prints no speed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import engines, models, plots, probes, report
from benchmarks.harness import Entry, Plan, Timing, measure
from ramify.results import HOPELESS

AXES = {"model": ("zoo", "160m"), "temperature": ("0", "0.8")}
QUICK = {"model": ("zoo", "tiny"), "temperature": ("0",)}


def prompts(folder: Path | None, count: int, length: int) -> dict[str, list[int]]:
    """Module name -> `length` ids from the middle of its source, spread over the held-out modules.

    Encoded by the tokenizer of `folder`; None takes the source's bytes as ids, for models that know no tokenizer.
    """
    from ramify.zoo.corpus import held_out_texts

    if folder:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = {}
    for name, text in held_out_texts().items():
        ids = tokenizer.encode(text).ids if folder else list(text.encode())
        if len(ids) >= 2 * length:
            middle = len(ids) // 2
            found[name] = ids[middle - length : middle]
    names = list(found)
    step = max(1, len(names) // count)
    return {name: found[name] for name in names[::step][:count]}


class Contest:
    """All providers on one model: their runs, prompt by prompt."""

    def __init__(self, model: str, options: argparse.Namespace, limits: probes.Limits, probe: probes.Probe) -> None:
        self.model, self.options, self.probe, self.threads = model, options, probe, limits.threads
        if model == "zoo":
            self.folder, drafter = (models.zoo_folder(options.zoo, part) for part in ("target", "drafter"))
            self.title = "ramify zoo, trained on Python sources"
        else:
            self.folder, drafter, self.title = models.random_model(model), None, models.SHAPES[model].title
        try:
            tokenizer = models.zoo_folder(options.zoo, "target")
        except ValueError:
            tokenizer = None
        self.prompts = prompts(tokenizer, options.prompts, options.prompt_tokens)
        entries = engines.transformers_entries(self.folder, drafter, ("bf16", "f32"))
        entries |= engines.llama_cpp_entries(self.folder, options.prompt_tokens + options.new_tokens)
        entries |= engines.ramify_entries(self.folder, drafter, options.methods, options.weights)
        self.words = report.chosen(options)[1]
        self.entries = {name: entry for name, entry in entries.items() if self._wanted(name)}
        sizes = {facts["bytes"] for call, facts in self.entries.values() if call}
        self.read = {size: probe.read(size, limits.threads) for size in sizes}  # bytes that a step reads -> GB/s

    def run(self, temperature: float, plan: Plan) -> list[dict]:
        """Rows of every provider at one temperature."""
        rows, live = {}, {}
        for name, (call, facts) in self.entries.items():
            row = {"op": "generate", "provider": name, "model_title": self.title, "shape": self._shape(temperature), **facts}
            rows[name] = {**row, "status": facts.get("status", "not run" if call is None else "ok")}
            if call and (reason := self._fails(call, temperature)):
                rows[name] |= {"status": "failed", "reason": reason}
            elif call:
                live[name] = call
        times: dict[str, list[Timing]] = {name: [] for name in live}
        runs: dict[str, list[models.Run]] = {name: [] for name in live}
        for prompt in self.prompts.values():
            last: dict[str, models.Run] = {}
            entries = [Entry(name, self._keep(call, name, last), [(prompt, temperature)]) for name, call in live.items()]
            for name, timing in zip(live, measure(entries, plan)):
                times[name].append(timing)
                runs[name].append(last[name])
        for name in live:
            self._figures(rows[name], times[name], runs[name])
        self._identity(rows, runs, temperature)
        if temperature == 0 and self._wanted("llama-bench"):
            rows |= self._own_bench(temperature, plan.rounds)
        return list(rows.values())

    def _wanted(self, name: str) -> bool:
        """Whether --providers names this one, or none."""
        return not self.words or any(word in name for word in self.words)

    def _own_bench(self, temperature: float, repeat: int) -> dict[str, dict]:
        """The row of llama.cpp's own benchmark, which decodes after a context as long as the prompts and counts the new tokens alone."""
        new = self.options.new_tokens
        name, seconds, facts = engines.llama_bench_entry(self.folder, self.options.prompt_tokens, new, repeat)
        row = {"op": "generate", "provider": name, "model_title": self.title, "shape": self._shape(temperature), **facts}
        if seconds:
            self.read.setdefault(row["bytes"], self.probe.read(row["bytes"], self.threads))
            timing = Timing(clean=[[each] for each in seconds])
            self._figures(row, [timing], [models.Run([0] * new, new, timing.median, new)])
        return {name: row}

    def _shape(self, temperature: float) -> dict[str, Any]:
        counts = {"prompts": len(self.prompts), "prompt_tokens": self.options.prompt_tokens, "new_tokens": self.options.new_tokens}
        return {"model": self.model, "temperature": temperature, **counts}

    def _fails(self, call: models.Generate, temperature: float) -> str:
        """A short run that warms everything up: why this provider cannot run here, or ""."""
        try:
            call(next(iter(self.prompts.values())), 4, temperature, self.options.seed)
        except Exception as error:  # a peer that cannot run is a row with its reason
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return ""

    def _keep(self, call: models.Generate, name: str, last: dict[str, models.Run]) -> Any:
        def once(prompt: list[int], temperature: float) -> None:
            last[name] = call(prompt, self.options.new_tokens, temperature, self.options.seed)

        return once

    def _figures(self, row: dict, times: Sequence[Timing], runs: Sequence[models.Run]) -> None:
        """Sums over prompts of each prompt's medians; `us` is per new token, the prompt's forward pass included."""
        tokens, steps = sum(len(run.tokens) for run in runs), sum(run.steps for run in runs)
        step = sum(run.decode_seconds for run in runs) / max(1, sum(run.decode_steps for run in runs))
        forward = sum(run.phases.get("forward", 0.0) for run in runs) / max(1, steps) or step
        floor = row["bytes"] / self.read[row["bytes"]] / 1e9
        parts = {"median": [t.median for t in times], "p20": [t.quantile(0.2) for t in times], "p80": [t.quantile(0.8) for t in times]}
        row["us"] = {name: round(1e6 * sum(values) / tokens, 2) for name, values in parts.items()}
        row["bursts"] = {"clean": sum(len(t.clean) for t in times), "disturbed": sum(len(t.disturbed) for t in times)}
        row |= {
            "tokens": tokens,
            "steps": steps,
            "tokens_per_second": round(1e6 / row["us"]["median"], 2),
            "decode_tokens_per_second": round(tokens / steps / step, 2),
            "tokens_per_step": round(tokens / steps, 3),
            "ms_per_step": round(1e3 * step, 4),
        }
        if row["backend"] != "transformers" or row["baseline"]:  # a step of its assisted modes holds the second model's work too
            row |= {"floor_us": round(1e6 * floor, 2), "share_of_floor": round(floor / forward, 4)}
        if runs[0].phases:
            row["seconds"] = {phase: round(sum(run.phases[phase] for run in runs), 6) for phase in runs[0].phases}

    def _identity(self, rows: dict[str, dict], runs: dict[str, list[models.Run]], temperature: float) -> None:
        """Whether each text is that of ramify plain on the same weights; lossless methods must agree where nothing is drawn at random."""
        for name in runs:
            if (plain := runs.get(plain_of(name))) is None:
                continue
            pairs = list(zip(self.prompts, plain, runs[name]))
            parts = [(at, module) for module, a, b in pairs if (at := parting(a.tokens, b.tokens)) is not None]
            rows[name]["identical"] = f"{len(pairs) - len(parts)}/{len(pairs)}"
            if parts and temperature == 0 and name.startswith("ramify"):
                for key in ("us", "tokens_per_second", "decode_tokens_per_second", "ms_per_step", "share_of_floor", "seconds"):
                    rows[name].pop(key, None)
                rows[name] |= {"status": "wrong", "reason": f"parts from plain at token {parts[0][0]} after {parts[0][1]}"}


def parting(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first difference of two token lists; None when they are the same."""
    if list(a) == list(b):
        return None
    return next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def plain_of(name: str) -> str:
    """The provider that decodes plainly with the weights of ramify's provider `name`; of another's, ramify plain in bf16."""
    ramify, comma, weights = name.partition(", ")
    return f"ramify plain{comma}{weights}" if ramify.startswith("ramify") else "ramify plain"


def finish(rows: Sequence[dict]) -> None:
    """Ratios: against the fastest plain transformers of the same model and temperature, and against ramify plain on the same weights."""
    report.finish(rows, None)
    good = {row["provider"]: row for row in rows if row["status"] == "ok"}
    for name, row in good.items():
        if not row.get("prompt_counted", True):
            row.pop("ratio", None)  # the others read a prompt
        elif plain := good.get(plain_of(name)):
            row["over_plain"] = round(plain["us"]["median"] / row["us"]["median"], 4)


def show(rows: Sequence[dict]) -> None:
    """The table of one model and temperature."""
    shape = rows[0]["shape"]
    counts = f"{shape['prompts']} prompts of {shape['prompt_tokens']} tokens, {shape['new_tokens']} new"
    print(f"\n{rows[0]['model_title']}; temperature {shape['temperature']:g}; {counts}\n")
    lines = []
    for row in rows:
        figures = [""] * 8
        if row["status"] == "ok":
            ratios = (f"{row[key]:.2f}x" if key in row else "" for key in ("ratio", "over_plain"))
            figures = [f"{row['tokens_per_second']:.1f}", *ratios]
            figures += [f"{report.spread(row):.0%}", f"{row['tokens_per_step']:.2f}", f"{row['ms_per_step']:.2f}", report.share(row)]
            figures += [row.get("identical", "")]
        lines.append((row["provider"], row["dtype"], *figures, report.notes(row)))
    report.table(("", "dtype", "tok/s", "ratio", "over plain", "spread", "tok/step", "ms/step", "of floor", "same text", ""), lines, left=2)


def verdict(rows: Sequence[dict]) -> str:
    """One clause per model and temperature."""
    clauses = []
    for key in dict.fromkeys(map(_part, rows)):
        here = {row["provider"]: row for row in rows if _part(row) == key and row["status"] == "ok"}
        plain = here.get("ramify plain")
        if plain is None:
            clauses.append(f"{key[0]} at {key[1]:g}: ramify was not measured")
            continue
        ratio = f"{plain['ratio']:.2f}x transformers, " if "ratio" in plain else ""
        clause = f"{key[0]} at {key[1]:g}: plain {ratio}{report.share(plain)} of the weight-read floor{_best(here, 'ramify plain')}"
        for name, row in here.items():
            if name.startswith("ramify plain, "):
                clause += f"; {row['dtype']} {plain['us']['median'] / row['us']['median']:.2f}x plain in bf16"
                if other := here.get("llama.cpp Q4_0"):
                    clause += f", step {row['ms_per_step'] / other['ms_per_step']:.2f} of llama.cpp Q4_0's"
                clause += _best(here, name)
        clauses.append(clause)
    wrong = sum(row["status"] in ("wrong", "failed") for row in rows)
    return "; ".join([*clauses, f"{wrong} wrong or failed"])


def _best(rows: dict[str, dict], plain: str) -> str:
    """The fastest method on the weights of provider `plain` that guessed right now and then; "" where no method was run."""
    from ramify.results import GUESSED

    others = [row for name, row in rows.items() if plain_of(name) == plain != name and ours(row) and HOPELESS not in name]
    best = max((row for row in others if row["tokens_per_step"] >= GUESSED), key=lambda row: row["over_plain"], default=None)
    if best is None:
        return ", no method guessed right" if others else ""
    return f", best {best['provider'].removeprefix('ramify ')} {best['over_plain']:.2f}x that"


def _part(row: dict) -> tuple[str, float]:
    return row["shape"]["model"], row["shape"]["temperature"]


def ours(row: dict) -> bool:
    """Rows whose failure or slowing down is ours to mend."""
    return row["backend"].startswith("ramify")


def missing(model: str, reason: str, options: argparse.Namespace, temperature: float) -> dict:
    """The row of a model that is not there."""
    counts = {"prompts": 0, "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
    facts = {"op": "generate", "provider": "all", "backend": "", "dtype": "", "baseline": False, "model_title": model}
    return {**facts, "shape": {"model": model, "temperature": temperature, **counts}, "status": "not run", "reason": reason}


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The common options and those of this benchmark."""
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, metavar="FOLDER", help="folder of target/ and drafter/ (default: the one in the package)")
    parser.add_argument("--methods", default="", metavar="NAME,NAME", help="ramify methods (default: plain and what `auto` picks among)")
    parser.add_argument("--weights", default="int4-g64", metavar="FORMAT,FORMAT", help="low-bit weights of ramify beside bf16")
    parser.add_argument("--prompts", type=int, help="how many held-out sources (default: 6, quick 2)")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of each (default: 256, quick 32)")
    parser.add_argument("--new-tokens", type=int, help="tokens to generate (default: 128, quick 12)")
    options = parser.parse_args(arguments)
    options.methods = [name for name in options.methods.split(",") if name]
    options.weights = [name for name in options.weights.split(",") if name]
    for name, full, quick in (("prompts", 6, 2), ("prompt_tokens", 256, 32), ("new_tokens", 128, 12)):
        value = getattr(options, name)
        setattr(options, name, (quick if options.quick else full) if value is None else value)
        if getattr(options, name) < 1:
            raise ValueError(f"end_to_end: --{name.replace('_', '-')} is {value}; takes 1 or more.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    options = read_options(arguments)
    plan = replace(report.start(options), calls=(1, 1), warm=False)
    if not (options.rounds or options.quick):
        plan = replace(plan, rounds=3, enough=2)  # a generation is long: three say as much as five short bursts
    only = report.chosen(options)[0]
    axes = QUICK if options.quick else AXES
    if unknown := set(only) - set(axes):
        raise ValueError(f"end_to_end: axis is {sorted(unknown)[0]!r}; takes model or temperature.")
    probe = probes.Probe.of(options.quick)
    limits = probes.limits(probe, quick=options.quick)
    print(f"{report.isa()}; {limits}")
    rows: list[dict] = []
    for model in only.get("model", axes["model"]):
        temperatures = [float(value) for value in only.get("temperature", axes["temperature"])]
        try:
            contest = Contest(model, options, limits, probe)
        except (ValueError, ImportError) as error:
            rows.append(missing(model, str(error), options, temperatures[0]))
            print(f"\n{model}: not run ({error})")
            continue
        for temperature in temperatures:
            found = contest.run(temperature, plan)
            finish(found)
            show(found)
            rows += found
    text = verdict([row for row in rows if row["provider"] != "all"])
    print("\nratio: over the fastest plain transformers. floor: one read of the weights a step.")
    print("over plain, same text: of ramify plain on the same weights.")
    print(f"verdict: {text}")
    return report.last(report.document("end_to_end", options, plan, limits, rows, text), options, plots.end_to_end, ours)


if __name__ == "__main__":
    report.run_main(main)
