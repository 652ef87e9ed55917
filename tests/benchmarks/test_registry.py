"""Cells, the correctness gate and the rows that come out of it."""

import pytest
import torch

from benchmarks import report
from benchmarks.harness import Plan
from benchmarks.registry import Case, Op, Provider, error_of, run_cell

PLAN = Plan(rounds=1, burst=0, calls=(1, 2), pause=0, enough=1, quiet=0)


def double(n: int, seed: int) -> Case:
    x = torch.full((n,), 1.0 + seed)
    return Case(args=(x,), bytes=1 << 30, flops=0, want=lambda: 2 * x, limit=1e-6)


def make_op(*providers: Provider) -> Op:
    return Op("double", double, {"n": (3, 5), "kind": ("a",)}, {"n": (2,)}, list(providers))


def rows_of(*providers: Provider, **options) -> dict[str, dict]:
    op = Op("double", double, {"n": (3,)}, {}, list(providers))
    rows, _ = run_cell(op, {"n": 3}, PLAN, **options)
    return {row["provider"]: row for row in rows}


def test_cells_are_the_product_of_the_axes():
    op = make_op()
    assert list(op.cells()) == [{"n": 3, "kind": "a"}, {"n": 5, "kind": "a"}]
    assert list(op.cells(quick=True)) == [{"n": 2, "kind": "a"}]
    assert list(op.cells(only={"n": ["5"]})) == [{"n": 5, "kind": "a"}]
    with pytest.raises(ValueError, match="axis is 'm'; takes one of n, kind"):
        list(op.cells(only={"m": ["5"]}))


def test_a_wrong_or_failing_provider_prints_no_number():
    def fails(x):
        raise RuntimeError("no such thing\nmore")

    nan = torch.nan
    rows = rows_of(
        Provider("right", lambda x: 2 * x, baseline=True),
        Provider("wrong", lambda x: 2 * x + 0.01),
        Provider("nan", lambda x: 2 * x * nan),
        Provider("shape", lambda x: 2 * x[:2]),
        Provider("fails", fails),
        Provider("absent", lambda x: x, needs=lambda: "not here"),
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "nan": "wrong",
        "shape": "wrong",
        "fails": "failed",
        "absent": "not installed",
    }
    assert [name for name, row in rows.items() if "us" in row] == ["right"]
    assert rows["fails"]["reason"] == "RuntimeError: no such thing"
    assert rows["absent"]["reason"] == "not here"


def test_prepare_runs_outside_the_clock_and_only_and_named_select():
    calls = []
    provider = Provider("p", lambda x, y: x + y, prepare=lambda x: (calls.append(0) or x, x))
    rows = rows_of(provider, Provider("q", lambda x: 2 * x, only=lambda cell: cell["n"] > 3))
    assert list(rows) == ["p"] and rows["p"]["status"] == "ok" and len(calls) == 1
    assert list(rows_of(provider, Provider("other", lambda x: 2 * x), named=["oth"])) == ["other"]


def test_error_is_relative_to_the_size_of_the_result():
    want = torch.full((100,), 1e-3)
    got = want.clone()
    got[7] += 1e-5
    assert error_of(got, want) == pytest.approx(0.005, rel=1e-3)
    assert error_of((got, None), want) == error_of(got, want)
    assert error_of(torch.full((100,), torch.nan), want) == float("inf")


def test_ratio_is_against_the_fastest_baseline():
    def row(us, baseline):
        return {"status": "ok", "baseline": baseline, "us": {"median": us, "p20": us, "p80": us}}

    rows = [row(10.0, True), row(8.0, True), row(2.0, False), {"status": "failed", "baseline": True}]
    report.finish(rows, floor=1e-6)
    assert [r.get("ratio") for r in rows] == [0.8, 1.0, 4.0, None]
    assert rows[2]["share_of_floor"] == 0.5 and rows[2]["floor_us"] == 1.0
