"""What low bits cost: the rows, their standard error, and a short run of the whole."""

import json
import math

import numpy as np
import pytest

from benchmarks import accuracy, report
from ramify.results import _accuracy


def test_rows_are_different_and_the_first_is_dense():
    every = accuracy.ways(quick=False)
    assert len(set(every)) == len(every) and every[0] == accuracy.Way("dense")
    titles = {way.title for way in every}
    assert {"int4-g64 gptq", "int4-g64-zp hqq", "int4-g64 gptq head int8", "fp8-b128 rtn", "dense"} <= titles


def test_standard_error_is_that_of_many_draws():
    """Texts of unlike lengths: the spread of the ratio over a thousand sets of texts, within a tenth."""
    rng = np.random.default_rng(0)
    counts = rng.integers(200, 800, 24)
    sets = rng.standard_normal((1000, 24)) * 0.3 * np.sqrt(counts) + 0.02 * counts
    means = sets.sum(axis=1) / counts.sum()
    found = np.median([accuracy.standard_error(each, counts) for each in sets])
    assert math.isclose(found, means.std(), rel_tol=0.1)


def test_a_short_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = accuracy.main(["--quick", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    doc = json.loads((tmp_path / "a.json").read_text())
    report.validate(doc)
    dense, exact, rounded = doc["rows"]
    assert code == 0 and dense["above_dense"] == 0 and 0 < exact["above_dense"] < 0.1 and rounded["shape"]["activations"] == "int8"
    assert rounded["nats_per_token"] != exact["nats_per_token"] and 0 < exact["standard_error"] < 0.05
    assert "with inputs rounded by one scale a token" in capsys.readouterr().out and (tmp_path / "a.png").stat().st_size > 1000
    assert "| int4-g64 | " in _accuracy(doc["rows"]) and "rtn, int8 inputs" in _accuracy(doc["rows"])
