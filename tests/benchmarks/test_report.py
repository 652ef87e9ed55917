"""The JSON schema, comparison of two runs, and the tables."""

import argparse
import copy
import json
import sys

import pytest

from benchmarks import report
from benchmarks.harness import Plan
from benchmarks.probes import Limits

OPTIONS = argparse.Namespace(seed=3, quick=True, hot=False)


def row(provider="ramify", us=10.0, ratio=2.0, **more):
    shape = {"T": 8}
    times = {"median": us, "p20": us, "p80": us}
    facts = {"op": "o", "provider": provider, "backend": "cpu", "dtype": "f32", "shape": shape, "status": "ok", "baseline": False}
    return {**facts, "us": times, "bursts": {"clean": 3, "disturbed": 0}, "ratio": ratio, **more}


def make_document(*rows):
    limits = Limits("native avx2", 2, 20.0, 15.0, {}, {"fp32": 200.0})
    return report.document("o", OPTIONS, Plan.quick(), limits, rows, "fine")


def is_ours(row):
    return row["provider"] == "ramify"


def test_document_survives_the_file(tmp_path):
    doc = make_document(row(), {**row("peer"), "baseline": True})
    report.write(doc, tmp_path / "out.json")
    again = json.loads((tmp_path / "out.json").read_text())
    assert again == doc
    where = again["environment"]
    assert where["seed"] == 3 and where["threads"] >= 1 and where["versions"]["torch"] and where["date"].endswith("Z")


def test_environment_names_no_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/tree_attention.py", "--json", "/home/me/out.json", "--quick"])
    monkeypatch.setenv("RAMIFY_X", "/home/me/libx.so")
    where = report.environment(0)
    assert where["command"] == "python -m benchmarks.tree_attention --json out.json --quick"
    assert "/home" not in json.dumps(where)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("limits"), "document lacks limits"),
        (lambda d: d.update(schema="other"), "schema is 'other'"),
        (lambda d: d["environment"].pop("commit"), "environment lacks commit"),
        (lambda d: d["rows"][0].pop("shape"), "row 0 lacks shape"),
        (lambda d: d["rows"][0].update(status="great"), "status 'great'"),
        (lambda d: d["rows"][0]["us"].pop("p20"), "row 0 lacks p20"),
        (lambda d: d["rows"][0].update(status="wrong"), "row 0 lacks reason"),
        (lambda d: d["rows"][0].update(status="wrong", reason="x"), "has a time"),
    ],
)
def test_schema_refuses(spoil, message):
    doc = make_document(row())
    report.validate(doc)
    spoil(doc)
    with pytest.raises(ValueError, match=message):
        report.validate(doc)


def test_compare_judges_ratios_and_only_ours(capsys):
    old = make_document(row(), row("peer", us=10, ratio=1.0))
    same = make_document(row(us=20.0, ratio=2.0), row("peer", us=20))  # everything twice as slow: the machine, not us
    assert report.compare(same, old, is_ours) == 0
    assert report.compare(make_document(row(us=10, ratio=1.5)), old, is_ours) == 1
    assert report.compare(make_document(row("peer", ratio=0.2)), old, is_ours) == 0
    assert report.compare(make_document(row(ratio=1.96)), old, is_ours) == 0  # within the noise
    other = copy.deepcopy(old)
    other["environment"]["cpu"] = "another"
    report.compare(same, other, is_ours)
    assert "of another machine" in capsys.readouterr().out


def test_compare_falls_back_to_microseconds():
    def bare(us):
        return {key: value for key, value in row(us=us).items() if key != "ratio"}

    assert report.compare(make_document(bare(20.0)), make_document(bare(10.0)), is_ours) == 1
    assert report.compare(make_document(bare(10.0)), make_document(bare(20.0)), is_ours) == 0


def test_exit_code(tmp_path):
    options = argparse.Namespace(json=None, plot=None, compare=None)
    wrong = {key: value for key, value in row().items() if key != "us"} | {"status": "wrong", "reason": "x"}
    assert report.last(make_document(row()), options, None, is_ours) == 0
    assert report.last(make_document(wrong), options, None, is_ours) == 1
    assert report.last(make_document({**wrong, "provider": "peer"}), options, None, is_ours) == 0


def test_table_is_plain_when_not_a_terminal(capsys):
    report.table(("name", "us", ""), [("a", "1.0", "note"), ("longer", "10.0", "")])
    assert capsys.readouterr().out.splitlines() == ["name      us", "a        1.0  note", "longer  10.0"]


def test_the_repository_goes_last_on_the_path(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", str(report.ROOT), "/elsewhere"])
    monkeypatch.chdir(report.ROOT)
    report.demote_root()
    assert sys.path == ["/elsewhere", "", str(report.ROOT)]


def test_options_refuse(tmp_path):
    parser = report.arguments("x")
    for words, message in (
        (["--threads", "0"], "--threads is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--json", str(tmp_path / "no" / "x.json")], "is not there"),
        (["--compare", str(tmp_path / "x.json")], "is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            report.start(parser.parse_args(words))
    with pytest.raises(ValueError, match="--only is 'T'"):
        report.chosen(parser.parse_args(["--only", "T"]))
    assert report.chosen(parser.parse_args(["--only", "T=1,8", "--providers", "a,b"])) == ({"T": ["1", "8"]}, ["a", "b"])
