"""The pages say what the registries and the benchmarks say."""

import json
from pathlib import Path

import pytest

from ramify import backends, docs
from ramify.registry import drafter

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "benchmarks/results/README.md"])
def test_pages_are_current(page):
    assert docs.main([str(ROOT / page), "--check"]) == 0, "run make docs"


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
    assert (
        "| ramify broken | failed |" in text
        and "ramify broken" not in docs.headline(tmp_path)
        and "Some CPU (avx2), 2 threads" in text
        and "2026-01-02, commit abc" in text
    )
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
    assert "| tree attention on plain bf16 tensors (median of 1 shapes) | - | 1.50x | - |" in docs.headline(tmp_path)


def test_results_of_linear(tmp_path):
    rows = [
        {
            "provider": "ramify int4-g64",
            "status": "ok",
            "over_int4": 1.5,
            "ratio": 1.2,
            "single_steps": 1.1,
            "share_of_floor": 0.656,
            "shape": {"layer": "64x256", "M": 8},
        },
        {"provider": "ramify int4-g64", "status": "ok", "ratio": 1.2, "shape": {"layer": "64x256", "M": 1}},
        {"provider": "torch", "status": "ok", "ratio": 1.2, "shape": {"layer": "64x256", "M": 8}},
    ]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/linear-here.json").write_text(json.dumps(document(benchmark="linear", rows=rows)))
    text = docs.results(tmp_path)
    assert "| 64x256 | ramify int4-g64 | - / 1.20x / - / - | 1.50x / 1.20x / 1.10 / 66% |" in text and "torch |" not in text
    assert "(linear-here.json)" in text and "/ share of the floor (avx2)" in text
    assert "| int4-g64 linear layers, over int4 kernels (median of 64x256) | - | 1.50x | - |" in docs.headline(tmp_path)


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


def test_headline(tmp_path):
    """The fastest of each kind, per cell; a format of weights is a kind of its own."""
    assert docs.headline(tmp_path) == "Not measured yet."
    speeds = {
        "transformers a": 10.0,
        "transformers b": 12.0,
        "ramify plain": 50.0,
        "ramify one": 60.4,
        "ramify two": 55.0,
        "ramify three": 61.0,
        "ramify one, int8": 70.0,
    }
    steps = {"ramify plain": 1.0, "ramify three": 1.001}  # three never guessed right: plain decoding by another name
    row = document()["rows"][0]
    rows = [
        {**row, "provider": name, "tokens_per_second": speed, "over_plain": speed / 50, "tokens_per_step": steps.get(name, 1.4)}
        for name, speed in speeds.items()
    ]
    rows.append({**row, "provider": "ramify plain, int8", "tokens_per_second": 65.0, "shape": {"model": "zoo", "temperature": 0.8}})
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/end_to_end.json").write_text(json.dumps(document(rows=rows)))
    text = docs.headline(tmp_path)
    assert "| transformers, its fastest way | 12 | - |" in text and "| ramify plain | 50 | - |" in text
    assert "| ramify, its fastest method that guesses | 60 (1.21x, one) | - |" in text and "| ramify auto, the default | - | - |" in text
    assert "| ramify plain, int8 | - | 65 |" in text and "| ramify, its fastest method that guesses, int8 | 70 (1.40x, one) | - |" in text
    older = document(environment={**document()["environment"], "isa": "avx512_vnni", "date": "2025-12-31T00:00:00Z"})
    (tmp_path / "benchmarks/results/end_to_end-older.json").write_text(json.dumps(older))
    assert docs.headline(tmp_path) == text and docs.results(tmp_path).count("tokens a step (avx") == 2
