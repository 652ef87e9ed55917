"""Two stages of benchmarks.gpu_day: `speed` times our kernels and their peers, `tune` sweeps the Triton configurations of attention.

Correct first: what is off by more than its dtype's rounding, or belongs to an op whose tests failed in this very run, prints no speed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from benchmarks import gpu_cells
from benchmarks.gpu_clock import Events, Runner, Wall, clock, lost, race
from benchmarks.gpu_run import Day, DeviceLost
from benchmarks.registry import Case, Provider, error_of
from ramify import backends

SPARE = 5.0
"""Seconds that a stage keeps to itself: it ends before it is ended."""

COMPILING = 45.0
"""Seconds without which a slow way does not begin."""


def off_by(got: Any, want: Sequence[torch.Tensor]) -> float:
    """The largest error of several results: see error_of; whole numbers are equal or infinitely far."""
    results = got if isinstance(got, tuple) else (got,)
    worst = 0.0
    for x, right in zip(results, want):
        x, right = x.to("cpu"), right.to("cpu")
        if x.shape != right.shape:
            return float("inf")
        if not x.is_floating_point():
            worst = worst if torch.equal(x.long(), right.long()) else float("inf")
        elif x.numel():
            worst = max(worst, error_of(x, right))
    return worst


def red_ops(document: dict[str, Any]) -> dict[tuple[str, str], str]:
    """(op, backend) -> what failed first in the tests of this run."""
    return {(row["op"], row["backend"]): row["failures"][0]["said"] for row in document["tests"] if row["failures"]}


def _inside(way: Provider) -> AbstractContextManager:
    return backends.backend(str(way.backend)) if way.backend in backends.BACKENDS else nullcontext()


def check(way: Provider, case: Case, want: Sequence[torch.Tensor] | None, row: dict[str, Any]) -> Runner | None:
    """The way, ready to be timed; None with the reason in `row`. DeviceLost when nothing after it would be true."""
    if reason := way.needs() if way.needs else "":
        row.update(status="not installed", reason=reason)
        return None
    try:
        args = way.prepare(*case.args) if way.prepare else case.args
        call = partial(way.call, *args)
        with torch.inference_mode(), _inside(way):
            got = call()
            if want is not None:
                row["max_error"] = off_by(got, want)
    except Exception as error:  # one that cannot run here is a row with its reason, never the end of the run
        said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        row.update(status="not run" if " was forced and cannot run " in said else "failed", reason=said)
        if why := lost():
            raise DeviceLost(why) from error
        return None
    if row.get("max_error", 0.0) > case.limit:
        row.update(status="wrong", reason=f"error {row['max_error']:.3g} is above {case.limit:.3g}")
        return None
    return Runner(way.name, torch.inference_mode()(call), partial(_inside, way))


def run_cell(
    cell: gpu_cells.Cell,
    named: Sequence[Provider],
    with_clock: Events | Wall,
    limits: dict[str, Any],
    red: dict[tuple[str, str], str],
    rows: list[dict[str, Any]],
) -> None:
    """Check and time these ways to compute one cell; a row each is added to `rows`, also where the device is lost on the way."""
    case = cell.make()
    want = case.want() if case.want else None
    floor = max(case.bytes / (1e9 * limits["read"]), case.flops / (1e9 * limits["peak"]["bf16"]) if case.arithmetic == "bf16" else 0.0)
    fresh, runners = [], []
    try:
        for way in named:
            row = {**_facts(cell, way), "status": "ok"}
            fresh.append(row)
            if (cell.op, way.backend) in red:
                row.update(status="wrong", reason=f"its tests failed: {red[cell.op, str(way.backend)]}")
            elif runner := check(way, case, want, row):
                runners.append((row, runner))
    except DeviceLost:
        rows += [row for row in fresh if row["status"] != "ok"]  # the others have their turn in the next process
        raise
    rows += fresh
    try:
        race([runner for _, runner in runners], with_clock)
    except RuntimeError as error:
        for row, _ in runners:
            row.update(status="failed", reason=f"while the cell was timed: {error}".splitlines()[0][:300])
        if why := lost():
            raise DeviceLost(why) from error
        return
    for row, runner in runners:
        row |= {"us": runner.us, "host_us": runner.host_us, "bursts": {"clean": len(runner.samples), "disturbed": 0}}
        row |= {"floor_us": round(1e6 * floor, 3), "share_of_floor": round(1e6 * floor / runner.us["median"], 4)}
        row |= {"bytes": case.bytes, "flops": case.flops}


def _facts(cell: gpu_cells.Cell, way: Provider) -> dict[str, Any]:
    facts = {"op": cell.op, "provider": way.name, "backend": str(way.backend), "dtype": cell.dtype, "shape": cell.shape}
    return {**facts, "baseline": way.baseline}


def ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Fastest baseline of the cell over each row, in place."""
    for row in rows:
        same = [r for r in rows if r["status"] == "ok" and r["baseline"] and (r["op"], r["shape"]) == (row["op"], row["shape"])]
        if row["status"] == "ok" and same:
            row["ratio"] = round(min(r["us"]["median"] for r in same) / row["us"]["median"], 4)


def speed(day: Day) -> None:
    """Every cell with the ways that compile at once, then the slow ones in the cells that they take part in."""
    red, with_clock, rows = red_ops(day.document), clock(day.device), day.part.setdefault("rows", [])
    done = {_key(row) for row in rows}  # by a process that lost the device
    every = [(cell, gpu_cells.ways(cell.op, day.device)) for cell in gpu_cells.cells(day.device, day.rehearsal, day.seed)]
    for slow in (False, True):
        for cell, found in every:
            taking = [way for way in found if way.facts.get("slow", False) == slow and (not way.only or way.only(cell.shape))]
            named = [way for way in taking if _key(_facts(cell, way)) not in done]
            if day.left() < (COMPILING if slow and not day.rehearsal else SPARE):
                rows += [{**_facts(cell, way), "status": "not run", "reason": "the stage's time was over"} for way in named]
            elif named:
                run_cell(cell, named, with_clock, day.document["limits"], red, rows)
                ratios(rows)
                day.save()
            if day.device == "cuda":
                torch.cuda.empty_cache()
    day.save()


def _key(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['shape']} {row['provider']}"


Config = tuple[int, int, int, int]
"""Packed rows of a program, keys of a tile, warps, stages."""


def candidates(rows: int, shipped: Config) -> list[Config]:
    """Configurations for so many packed rows, the shipped one first, then those nearest to it."""
    blocks = [n for n in (16, 32, 64, 128) if n <= max(16, 2 * rows)]
    every = [(block, keys, warps, stages) for block in blocks for keys in (64, 32) for warps in (4, 8) for stages in (3, 2, 4)]

    def apart(config: Config) -> int:
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(config[:3], shipped)) + abs(config[3] - shipped[3])

    return [shipped, *sorted((c for c in every if c != shipped), key=apart)]


@contextmanager
def configured(config: Config | None) -> Iterator[Config]:
    """tree_attention on Triton takes this configuration, or none but the shipped one, inside the block."""
    from ramify.kernels import attention

    before = attention.config
    attention.config = before if config is None else lambda rows, D, itemsize, masked=False: config
    try:
        yield attention.config
    finally:
        attention.config = before


@contextmanager
def _unchanged(config: Config | None) -> Iterator[Callable[..., Config]]:
    """What a rehearsal has in place of `configured`: the CPU kernels have no such table."""
    yield lambda rows, D, itemsize, masked=False: (16, 64, 4, 3)


def tune(day: Day) -> None:
    """The Triton table of tree attention, shape by shape in turns: nearest configurations first, until the time is over."""
    chosen, backend = (_unchanged, "cpu") if day.rehearsal else (configured, "triton")
    with_clock, found = clock(day.device), day.part.setdefault("tune", [])
    if said := red_ops(day.document).get(("tree_attention", backend)):
        found.append({"op": "tree_attention", "status": "wrong", "reason": f"its tests failed: {said}"})
        return
    call, prepare = gpu_cells.CALLS["tree_attention"]
    way, queues = Provider("tune", call, backend=backend, prepare=prepare), []
    wanted = (64,) if day.rehearsal else (8192,)
    cells = gpu_cells.cells(day.device, day.rehearsal, day.seed)
    for number, cell in enumerate(each for each in cells if each.op == "tree_attention" and each.shape["context"] in wanted):
        case = cell.make()
        q, k = case.args[0].q, case.args[0].k
        rows = q.shape[1] * q.shape[2] // k.shape[2]
        with chosen(None) as config:
            shipped = config(rows, q.shape[3], q.element_size())
        if number == len(found):  # else a process before this one began it
            facts = {"op": "tree_attention", "shape": cell.shape, "packed_rows": rows, "shipped": list(shipped)}
            found.append({**facts, "status": "ok", "tried": []})
        tries = candidates(rows, shipped)[: 4 if day.rehearsal else None]
        queues.append((found[number], case, case.want() if case.want else None, tries))
    for number in range(max(len(tries) for *_, tries in queues)):
        for row, case, want, tries in queues:
            if len(row["tried"]) <= number < len(tries) and day.left() > SPARE:
                with chosen(tries[number]):
                    _try(row, way, case, want, tries[number], with_clock)
                day.save()


def _try(row: dict[str, Any], way: Provider, case: Case, want: Any, config: Config, with_clock: Events | Wall) -> None:
    """Check and time one configuration; the best so far is in the row."""
    result: dict[str, Any] = {"config": list(config), "status": "ok"}
    row["tried"].append(result)
    if runner := check(way, case, want, result):
        race([runner], with_clock, rounds=2)
        result["us"] = runner.us
    timed = [each for each in row["tried"] if "us" in each]
    if timed:
        row["best"] = min(timed, key=lambda each: each["us"]["median"])["config"]
