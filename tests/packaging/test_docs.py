"""The README says what the registries and the benchmarks say."""

import json
from pathlib import Path

import pytest

from ramify import backends, docs
from ramify.registry import drafter

ROOT = Path(__file__).parents[2]


def test_readme_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert docs.generated(text, ROOT) == text, "run make docs"


def test_every_op_and_method_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    methods = [each.name for each in drafter.all() if each.__module__.startswith("ramify.")]
    assert [name for name in [*backends.OPS, *methods] if f"| `{name}`" not in text] == []


def test_check_finds_a_difference(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- generated: ops -->\nold\n<!-- end -->\nafter\n")
    assert docs.main([str(readme), "--check"]) == 1
    assert "make docs" in capsys.readouterr().err and "old" in readme.read_text()
    assert docs.main([str(readme)]) == 0 and docs.main([str(readme), "--check"]) == 0
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("<!-- end -->\nafter\n")


def test_unknown_part(tmp_path):
    with pytest.raises(ValueError, match='part "opps" is not known'):
        docs.generated("<!-- generated: opps -->\n<!-- end -->", tmp_path)


def document(**changes):
    """A benchmark document of one measured and one failed row."""
    ok = {
        **{"op": "generate", "provider": "ramify plain", "dtype": "bf16", "backend": "ramify", "status": "ok", "identical": "6/6"},
        **{
            "shape": {"model": "zoo", "temperature": 0.0},
            "tokens_per_second": 401.25,
            "ratio": 5.5,
            "tokens_per_step": 1.0,
            "share_of_floor": 0.5,
        },
    }
    failed = {**ok, "provider": "ramify broken", "status": "failed", "reason": "no"}
    machine = {
        "cpu": "Some CPU",
        "isa": "avx2",
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "date": "2026-01-02T03:04:05Z",
        "commit": "abc",
    }
    base = {"benchmark": "end_to_end", "environment": machine, "options": {"quick": False}, "rows": [ok, failed], "verdict": "fine"}
    return {**base, **changes}


def test_results(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    assert docs.results(tmp_path) == "Not measured yet."
    (folder / "end_to_end.json").write_text(json.dumps(document()))
    text = docs.results(tmp_path)
    assert "| model, temperature | zoo at 0 |" in text and "| ramify plain | 401 / - / 1.00 |" in text
    assert "| ramify broken | failed |" in text and "Some CPU (avx2), 2 threads" in text and "2026-01-02, commit abc" in text
    (folder / "end_to_end.json").write_text(json.dumps(document(options={"quick": True})))
    assert docs.results(tmp_path) == "Not measured yet."


def test_results_of_tree_attention(tmp_path):
    rows = [
        {"provider": "ramify", "dtype": "bf16", "status": "ok", "ratio": 1.5, "shape": {"size": "8b", "context": 2048, "T": 8}},
        {"provider": "ramify", "dtype": "bf16", "status": "wrong", "shape": {"size": "8b", "context": 2048, "T": 64}},
        {"provider": "torch", "dtype": "bf16", "status": "ok", "shape": {"size": "8b", "context": 2048, "T": 8}},
    ]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/tree_attention.json").write_text(json.dumps(document(benchmark="tree_attention", rows=rows)))
    text = docs.results(tmp_path)
    assert "| heads and cache | context | T = 8 | T = 64 |" in text and "| 8b bf16 | 2048 | 1.50x | wrong |" in text


def test_results_of_linear(tmp_path):
    rows = [
        {
            "provider": "ramify int4-g64",
            "status": "ok",
            "over_int4": 1.5,
            "ratio": 1.2,
            "single_steps": 1.1,
            "shape": {"layer": "64x256", "M": 8},
        },
        {"provider": "ramify int4-g64", "status": "ok", "ratio": 1.2, "shape": {"layer": "64x256", "M": 1}},
        {"provider": "torch", "status": "ok", "ratio": 1.2, "shape": {"layer": "64x256", "M": 8}},
    ]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/linear-here.json").write_text(json.dumps(document(benchmark="linear", rows=rows)))
    text = docs.results(tmp_path)
    assert "| 64x256 | ramify int4-g64 | - / 1.20x / - | 1.50x / 1.20x / 1.10 |" in text and "torch |" not in text
    assert "(benchmarks/results/linear-here.json)" in text


def test_results_of_step(tmp_path):
    shape = {"model": "160m", "context": 256}
    rows = [
        {"provider": "ramify bf16", "status": "ok", "us": {"median": 5000.0}, "single_steps": 1.0, "shape": {**shape, "M": 1}},
        {"provider": "ramify bf16", "status": "ok", "us": {"median": 6000.0}, "single_steps": 1.2, "shape": {**shape, "M": 8}},
        {"provider": "llama.cpp Q4_0", "status": "not installed", "shape": {**shape, "M": 8}},
    ]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/step.json").write_text(json.dumps(document(benchmark="step", rows=rows)))
    text = docs.results(tmp_path)
    assert "| 160m | ramify bf16 | 5.00 / 1.00 | 6.00 / 1.20 |" in text and "llama.cpp |" not in text
