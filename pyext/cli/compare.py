"""Methods beside plain decoding of the same model: interleaved runs, medians, and whether the text is the same."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ramify.cli.table import table

PHASES = ("draft", "forward", "verify", "commit")


@dataclass
class Measured:
    """Every run of one method on one prompt. Figures are medians over the runs; a size policy that learns takes other steps in each."""

    name: str
    lossless: bool
    outs: list[Any] = field(default_factory=list)

    @property
    def last(self) -> Any:
        """The newest output; its text is that of every other run, since the seed is."""
        return self.outs[-1]

    @property
    def tokens_per_second(self) -> float:
        """Tokens emitted a second of decoding."""
        return statistics.median(out.stats.tokens_per_second for out in self.outs)

    @property
    def tokens_per_step(self) -> float:
        """Tokens emitted a step."""
        return statistics.median(float(out.stats.tokens_per_step) for out in self.outs)

    @property
    def steps(self) -> int:
        """Steps of the target."""
        return statistics.median_low(int(out.stats.steps) for out in self.outs)

    def beats(self, other: "Measured") -> bool:
        """Whether its slowest run is faster than the other's fastest."""
        mine, theirs = ([out.stats.tokens_per_second for out in each.outs] for each in (self, other))
        return min(mine) > max(theirs)

    @property
    def spread(self) -> float:
        """Fastest less slowest run, as a share of the median."""
        rates = [out.stats.tokens_per_second for out in self.outs]
        return (max(rates) - min(rates)) / self.tokens_per_second if self.tokens_per_second else 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase."""
        return {phase: statistics.median(out.stats.seconds[phase] for out in self.outs) for phase in PHASES}

    def parts_from(self, other: "Measured") -> int | None:
        """Index of the first token that differs from the other's text, or None where the texts are the same."""
        mine, theirs = list(self.last.token_ids), list(other.last.token_ids)
        if mine == theirs:
            return None
        return next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))

    def record(self) -> dict[str, Any]:
        """What was measured of the method alone, as JSON values."""
        return {
            "name": self.name,
            "lossless": self.lossless,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_step": self.tokens_per_step,
            "steps": self.steps,
            "seconds": self.seconds,
            "text": self.last.text,
        }


def measure(run: Callable[[str], Any], methods: Sequence[tuple[str, bool]], repeat: int, progress: Callable[[str], None]) -> list[Measured]:
    """`repeat` rounds of `run(name)` over the (name, lossless) pairs: A B C A B C, so that a slow moment of the machine meets them all."""
    found = [Measured(name, lossless) for name, lossless in methods]
    for index in range(repeat):
        for each in found:
            progress(f"run {index + 1} of {repeat}: {each.name}")
            each.outs.append(run(each.name))
    progress("")
    return found


def records(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """The `methods` of the JSON object; the first one is what the others are compared with."""
    plain = found[0]
    compared = []
    for each in found:
        record = each.record()
        record["identical"] = each.parts_from(plain) is None
        record["speedup"] = _ratio(each.tokens_per_second, plain.tokens_per_second)
        compared.append(record)
    return compared


def wrong(found: Sequence[Measured], temperature: float) -> list[str]:
    """Names of methods that claim to be lossless, decode greedily, and gave another text."""
    return [each.name for each in found if temperature == 0 and each.lossless and each.parts_from(found[0]) is not None]


def describe(found: Sequence[Measured], temperature: float) -> str:
    """The table that a person reads, the first difference where there is one, and a verdict as the last line."""
    plain = found[0]
    heading = ["method", "lossless", "identical", "tok/s", "speedup", "spread", "tok/step", "steps", "ms/step"]
    heading += [f"{phase} %" for phase in PHASES]
    rows = []
    for each in found:
        total = sum(each.seconds.values())
        parted = each.parts_from(plain)
        rows.append(
            [
                each.name,
                "yes" if each.lossless else "no",
                "-" if each is plain else "yes" if parted is None else f"no @ {parted}",
                f"{each.tokens_per_second:.1f}",
                f"{_ratio(each.tokens_per_second, plain.tokens_per_second):.2f}x",
                f"{each.spread:.0%}",
                f"{each.tokens_per_step:.2f}",
                str(each.steps),
                f"{1e3 * _ratio(total, each.steps):.2f}",
                *(f"{100 * _ratio(each.seconds[phase], total):.1f}" for phase in PHASES),
            ]
        )
    return "\n".join([table(heading, rows), "", *_remarks(found, temperature)])


def _restless(*runs: Measured) -> str:
    """Why no verdict stands on runs that lie this far apart: the machine was too busy."""
    return next((f"the runs of {each.name} lie {each.spread:.0%} apart" for each in runs if each.spread > 0.5), "")


def _doubt(best: Measured, plain: Measured, times: float) -> str:
    """Why it is not known that `best` is so many times as fast as plain; "" when it is."""
    if not best.beats(plain):
        return "their runs overlap"
    if times > 1.2 * _ratio(best.tokens_per_step, plain.tokens_per_step):
        return "that is more than its tokens a step can bring: other work held plain up"
    return _restless(plain, best)


def _remarks(found: Sequence[Measured], temperature: float) -> list[str]:
    plain = found[0]
    parted = [each for each in found if each.parts_from(plain) is not None]
    lines = []
    if temperature > 0 and any(each.lossless for each in parted):
        lines.append("Sampled: a lossless method keeps the distribution of the text; only some keep the text of a seed as well.")
    if bad := wrong(found, temperature):
        lines.append(f"check failed: {', '.join(bad)} should have given the text of plain decoding.")
    idle = [each.name for each in found[1:] if each.tokens_per_step <= 1]
    if idle:
        lines.append(f"{', '.join(idle)}: no step brought more than a token; guessing did not pay here, and so was given up.")
    best = max((each for each in found if each is plain or each.name not in idle), key=lambda each: each.tokens_per_second)
    same = "same text" if best.parts_from(plain) is None else "another text"
    times = _ratio(best.tokens_per_second, plain.tokens_per_second)
    if best is plain:
        doubt = _restless(plain)
        lines.append(f"verdict: open; plain has the best median, and {doubt}" if doubt else "verdict: plain is the fastest here")
    elif doubt := _doubt(best, plain, times):
        lines.append(f"verdict: open; the median of {best.name} is {times:.2f}x that of plain, {same}, and {doubt}")
    else:
        lines.append(f"verdict: {best.name}, {times:.2f}x plain, {same}")
    return lines


def _ratio(value: float, base: float) -> float:
    return value / base if base else 0.0
