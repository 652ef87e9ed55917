"""Ops and their providers: shapes, bytes, arithmetic and the correctness limit are said once per op, a provider is a function.

@op("row_stats", R=(1, 8, 64), V=(32000,), dtype=("f32", "bf16"))
def case(R, V, dtype, seed): ...                    # -> Case

provider("row_stats", "ramify")(ops.row_stats)
provider("row_stats", "torch", baseline=True)(lambda x: (x.argmax(-1), x.logsumexp(-1)))
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Entry, Machine, Plan, copies_needed, measure

Cell = dict[str, Any]


@dataclass
class Case:
    """One copy of an op's arguments, what a call costs at least, and what it must compute."""

    args: tuple
    bytes: int  # read or written by any implementation
    flops: int
    arithmetic: str = "fp32"  # which peak bounds the flops: fp32, bf16 or int8
    want: Callable[[], Tensor] | None = None  # the result, from the reference; asked once
    limit: float = 0.0  # largest error that passes, see `error_of`


@dataclass
class Loaded:
    """A provider's own form of a cell, where what it reads and what it must compute is its own: weights of some format, a graph."""

    copies: Sequence[tuple]
    bytes: int  # that one call reads
    arithmetic: str
    want: Tensor | None = None  # of what its weights stand for: their rounding is no error of the kernel
    limit: float = 0.0
    parts: int = 1  # see Entry


@dataclass
class Op:
    """An op under test: its axes and the function that makes a Case of one cell."""

    name: str
    make: Callable[..., Case]
    axes: Mapping[str, Sequence]
    quick: Mapping[str, Sequence]
    providers: list["Provider"] = field(default_factory=list)

    def cells(
        self, quick: bool = False, only: Mapping[str, Sequence[str]] | None = None, other: Mapping[str, Sequence] | None = None
    ) -> Iterator[Cell]:
        """Every combination of the axes, or those whose values are named in `only`. ValueError for an axis that is not there.

        other: values that stand in for an axis's own.
        """
        axes = {**self.axes, **(self.quick if quick else {}), **(other or {})}
        for name in only or {}:
            if name not in axes:
                raise ValueError(f"benchmark: axis is {name!r}; takes one of {', '.join(axes)}. Write --only axis=value,value.")
        for values in itertools.product(*axes.values()):
            cell = dict(zip(axes, values))
            if all(str(cell[name]) in allowed for name, allowed in (only or {}).items()):
                yield cell


@dataclass
class Provider:
    """One way to compute an op. Outside the clock, `prepare` turns the case's arguments into the provider's own, copy by copy, or
    `load(*args, cold)` makes all that is measured from the first copy.
    """

    name: str
    call: Callable[..., Any]
    baseline: bool = False  # the fastest of the baselines is what ratios are against
    backend: str | Callable[[], str] = "torch"
    needs: Callable[[], str] | None = None  # why this provider is not there, or ""
    only: Callable[[Cell], bool] | None = None  # the cells it takes part in
    prepare: Callable[..., tuple] | None = None
    load: Callable[..., Loaded] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # further keys of its rows


OPS: dict[str, Op] = {}


def op(name: str, quick: Mapping[str, Sequence] | None = None, **axes: Sequence) -> Callable:
    """Register the function that makes the cases of `name`; `quick` replaces axes for a short run."""

    def register(make: Callable[..., Case]) -> Callable[..., Case]:
        OPS[name] = Op(name, make, axes, quick or {})
        return make

    return register


def provider(name: str, title: str, **facts: Any) -> Callable:
    """Register a way to compute op `name` under `title`; `facts` are fields of Provider."""

    def register(call: Callable) -> Callable:
        OPS[name].providers.append(Provider(title, call, **facts))
        return call

    return register


def error_of(got: Any, want: Tensor) -> float:
    """Largest |got - want| / (|want| + rms(want)); infinite when a value is not finite or the shape differs."""
    got = got[0] if isinstance(got, tuple) else got
    if got.shape != want.shape:
        return float("inf")
    want = want.double()
    worst = float(((got.double() - want).abs() / (want.abs() + want.pow(2).mean().sqrt())).max())
    return worst if worst == worst else float("inf")


def run_cell(
    op: Op,
    cell: Cell,
    plan: Plan,
    *,
    seed: int = 0,
    cold: bool = True,
    check: bool = True,
    named: Sequence[str] = (),
    machine: Machine | None = None,
) -> tuple[list[dict], Case]:
    """Check and time every provider of `op` in one cell. Rows without floors and ratios yet (report.finish), and the case."""
    first = op.make(**cell, seed=seed)
    chosen = [
        provider
        for provider in op.providers
        if not (provider.only and not provider.only(cell)) and not (named and not any(word in provider.name for word in named))
    ]
    cases = [first]
    if not all(provider.load for provider in chosen):
        cases += [op.make(**cell, seed=seed + i) for i in range(1, copies_needed(first.bytes, cold))]
    want = first.want() if check and first.want else None
    rows, entries, timed = [], [], []
    for provider in chosen:
        row = {"op": op.name, "provider": provider.name, "backend": "", "baseline": provider.baseline, "shape": cell, **provider.facts}
        rows.append(row | {"status": "ok"})
        entry = _entry(provider, cases, want, cold, rows[-1])
        if entry:
            entries.append(entry)
            timed.append(rows[-1])
    for row, timing in zip(timed, measure(entries, plan, machine)):
        microseconds = {"median": timing.median, "p20": timing.quantile(0.2), "p80": timing.quantile(0.8)}
        row["us"] = {name: round(1e6 * value, 3) for name, value in microseconds.items()}
        row["bursts"] = {"clean": len(timing.clean), "disturbed": len(timing.disturbed)}
    return rows, first


def _entry(provider: Provider, cases: Sequence[Case], want: Tensor | None, cold: bool, row: dict) -> Entry | None:
    """The provider ready to be timed, or None with the reason in `row`: a red check prints no speed."""
    reason = provider.needs() if provider.needs else ""
    if reason:
        row.update(status="not installed", reason=reason)
        return None
    row["backend"] = provider.backend if isinstance(provider.backend, str) else provider.backend()
    limit, parts = cases[0].limit, 1
    try:
        if provider.load:
            own = provider.load(*cases[0].args, cold)
            copies, want, limit, parts = own.copies, own.want, own.limit, own.parts
            row |= {"bytes": own.bytes, "arithmetic": own.arithmetic}
        else:
            copies = [provider.prepare(*case.args) if provider.prepare else case.args for case in cases]
        with torch.inference_mode():
            got = provider.call(*copies[0])
    except Exception as error:  # a peer that cannot run here is a row with its reason, never the end of the run
        row.update(status="failed", reason=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        return None
    if want is not None:
        row["max_error"] = error_of(got, want)
        if not row["max_error"] <= limit:
            row.update(status="wrong", reason=f"error {row['max_error']:.3g} is above {limit:.3g}")
            return None
    return Entry(provider.name, torch.inference_mode()(provider.call), copies, parts)
