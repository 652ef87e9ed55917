"""The runner of the day on a GPU: stages in order, each in its limit, a document that is whole after every one, and a day that goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_day, gpu_run, gpu_table
from benchmarks.gpu_day import GpuDay, Stage

ROOT = Path(__file__).parents[2]
STEPS = """
import json, os, time
from pathlib import Path
from benchmarks.gpu_run import DeviceLost

HERE = Path(__file__).parent
def count(name):
    with (HERE / "calls").open("a") as file:
        file.write(name + "\\n")

def identify(day):
    count("identify")
    day.part |= {"environment": {"gpu": "Toy 1", "commit": "abc"}, "sources": {"kernels/x.py": "1"}}

def tests(day):
    count("tests")
    assert day.document["environment"]["gpu"] == "Toy 1"
    row = {"op": "rope", "backend": "cuda", "passed": 3, "failed": 0, "skipped": 0, "failures": [], "sources": {}}
    day.part["tests"] = [row]

def slow(day):
    count("slow")
    (HERE / "pid").write_text(str(os.getpid()))
    day.part["sanitize"] = [{"tool": "memcheck", "status": "ok", "reason": ""}]
    day.save()
    time.sleep(0 if (HERE / "fast").exists() else 60)

def crash(day):
    count("crash")
    day.part["limits"] = {"copy": {}, "peak": {"bf16": 1.0}, "launch_us": 1.0}
    day.save()
    if not (HERE / "whole").exists():
        raise RuntimeError(f"no luck in {HERE}/steps.py\\nmore")

def loses(day):
    count("loses")
    rows = day.part.setdefault("rows", [])
    rows.append({"op": "rope", "provider": "p", "baseline": False, "shape": {"n": len(rows)}, "status": "failed", "reason": "lost"})
    if len(rows) < 3:
        raise DeviceLost("an illegal address")

def claims(day):
    day.part["tune"] = []
    day.part["rows"] = [{"op": "rope", "provider": "p", "shape": {}, "status": "wrong", "us": {}, "reason": ""}]

def never(day):
    count("never")
"""
STAGES = (
    Stage("identify", 5, "steps:identify", ("environment", "sources")),
    Stage("tests", 5, "steps:tests", ("tests",)),
    Stage("sanitize", 5, "steps:slow", ("sanitize",)),
    Stage("probes", 5, "steps:crash", ("limits",)),
    Stage("speed", 5, "steps:loses", ("rows",), needs=("probes",)),
)


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """A folder of stages that need no torch, and the calls that were made of them."""
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def day_of(steps, *words, stages=STAGES):
    return GpuDay(gpu_day.parsed(["--out", str(steps / "out"), "--minutes", "30", *words]), stages)


def calls(steps):
    """What ran since the last question."""
    path = steps / "calls"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def on_disk(steps):
    doc = json.loads((steps / "out/gpu_day-toy-1.json").read_text())
    gpu_day.validate(doc)
    return doc


def statuses(doc):
    return {name: held["status"] for name, held in doc["stages"].items()}


def hurry(day, monkeypatch, name, seconds):
    """Leave a stage so many seconds; those behind it have their own again."""
    run, names = day._stage, [stage.name for stage in day.stages]
    ends = 180 * sum(stage.minutes for stage in day.stages[: names.index(name) + 1])

    def stage(each, folder):
        if each.name == name:
            day.begun = time.monotonic() - ends + seconds
        run(each, folder)

    monkeypatch.setattr(day, "_stage", stage)


def test_a_stage_that_hangs_crashes_or_loses_the_device_leaves_the_others(steps, monkeypatch, capsys):
    """In order, the document whole after each; what a cut stage had written is kept."""
    seen, save = [], GpuDay._save
    monkeypatch.setattr(GpuDay, "_save", lambda day: (save(day), seen.append(statuses(on_disk(steps)))))
    begun, day = time.monotonic(), day_of(steps)
    hurry(day, monkeypatch, "sanitize", 2.5)
    doc = day.run()
    assert calls(steps) == ["identify", "tests", "slow", "crash", "loses", "loses", "loses"]
    assert statuses(doc) == {"identify": "ok", "tests": "ok", "sanitize": "timed out", "probes": "failed", "speed": "ok"}
    assert [len(each) for each in seen] == [1, 2, 3, 4, 5] and on_disk(steps) == json.loads(json.dumps(doc))
    assert doc["sanitize"][0]["tool"] == "memcheck" and len(doc["rows"]) == 3 and doc["tests"][0]["passed"] == 3
    assert doc["stages"]["probes"]["reason"] == "ended with 1: more"
    assert time.monotonic() - begun < 50 and not alive(int((steps / "pid").read_text()))
    assert gpu_table.red(doc) == ["sanitize timed out", "probes failed"]
    assert "sanitize  timed out" in capsys.readouterr().out and str(steps) not in (steps / "out/gpu_day-toy-1.json").read_text()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_day_goes_on_where_the_last_one_ended(steps, monkeypatch):
    (steps / "fast").touch()
    assert statuses(day_of(steps, "--stages", "identify,tests,sanitize,probes").run())["probes"] == "failed"
    assert calls(steps) == ["identify", "tests", "slow", "crash"]
    (steps / "whole").touch()
    doc = day_of(steps).run()
    assert calls(steps) == ["identify", "crash", "loses", "loses", "loses"]
    assert set(statuses(doc).values()) == {"ok"} and gpu_table.red(doc) == [] and doc["tests"][0]["op"] == "rope"
    day_of(steps).run()
    assert calls(steps) == ["identify"]
    day_of(steps, "--stages", "tests", "--again").run()
    assert calls(steps) == ["identify", "tests"]
    day_of(steps, "--stages", "speed", "--again").run()
    assert calls(steps)[:3] == ["identify", "crash", "loses"]  # a floor is of its own run
    monkeypatch.setattr(gpu_day, "tree", lambda: "another")
    assert day_of(steps, "--stages", "tests").run()["stages"]["tests"]["tree"] == "another"
    assert calls(steps) == ["identify", "tests"]
    doc = day_of(steps, "--stages", "sanitize").run()
    assert doc["stages"]["probes"]["tree"] not in ("another", "") and doc["limits"]  # not asked for: still that of the older sources


def test_a_killed_day_ends_its_stage_and_can_go_on(steps):
    places = [str(ROOT), str(Path(__file__).parent)]
    program = f"import sys; sys.path += {places}\nimport test_gpu_day as t\nt.day_of(t.Path({str(steps)!r})).run()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (steps / "pid").exists() or not (steps / "pid").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    assert statuses(on_disk(steps)) == {"identify": "ok", "tests": "ok"}
    pid, deadline = int((steps / "pid").read_text()), time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < deadline, "the stage outlived the day"
        time.sleep(0.1)
    (steps / "fast").touch()
    (steps / "whole").touch()
    calls(steps)
    assert set(statuses(day_of(steps).run()).values()) == {"ok"}
    assert calls(steps)[:3] == ["identify", "slow", "crash"]


def test_time_that_is_over_and_a_part_that_does_not_fit(steps, monkeypatch):
    stages = (STAGES[0], Stage("tune", 1, "steps:claims", ("tune", "rows")), Stage("build", 0.001, "steps:never", ("build",)))
    day = day_of(steps, stages=stages)
    hurry(day, monkeypatch, "build", 0.5)
    doc = day.run()
    assert statuses(doc) == {"identify": "ok", "tune": "failed", "build": "not run"}
    assert doc["stages"]["tune"]["reason"].startswith("validate: a row of rope is 'wrong' and has a time")
    assert doc["stages"]["build"]["reason"] == "the time was over" and calls(steps) == ["identify"]


def test_usage(tmp_path):
    (tmp_path / "file").write_text("")
    for words, said in (
        (["--out", str(tmp_path / "file")], "is no folder and cannot be made one"),
        (["--out", str(tmp_path), "--stages", "tests,nap"], "--stages has 'nap'; takes some of identify, build"),
        (["--out", str(tmp_path), "--minutes", "0"], "--minutes is 0.0; takes a number above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            gpu_day.parsed(words)
    assert sum(stage.minutes for stage in gpu_day.STAGES) == 10
    assert {key for stage in gpu_day.STAGES for key in stage.fills} == set(gpu_day.EMPTY)


def test_a_rehearsal_of_the_whole_day(tmp_path, capsys):
    assert gpu_day.main(["--out", str(tmp_path), "--rehearse"]) == 0
    doc = json.loads((tmp_path / "gpu_day-rehearsal.json").read_text())
    gpu_day.validate(doc)
    assert list(doc["stages"]) == [stage.name for stage in gpu_day.STAGES] and set(statuses(doc).values()) == {"ok"}
    [tested] = doc["tests"]
    assert (tested["op"], tested["backend"]) == ("silu_mul", "cpu") and tested["passed"] >= 10 and not tested["failures"]
    assert {row["status"] for row in doc["sanitize"]} == {"not run"}
    assert all(int(re.search(r"(\d+) tests are there", row["reason"])[1]) > 20 for row in doc["sanitize"])
    assert doc["limits"]["read"] > 0 and set(doc["sources"]) >= {"csrc/cuda/glue.cu", "kernels/attention.py"}
    ours = {row["op"]: row for row in doc["rows"] if row["provider"] == "ramify cpu"}
    assert {op for op, row in ours.items() if row["status"] != "ok"} <= {"interval_attention"} and len(ours) >= 12
    assert all(row["us"]["p10"] <= row["us"]["median"] <= row["us"]["p90"] for row in doc["rows"] if row["status"] == "ok")
    assert "ratio" in ours["tree_attention"] and ours["tree_attention"]["share_of_floor"] > 0
    stepped = doc["model"]
    assert stepped["tests"]["passed"] == 1 and [row["rows"] for row in stepped["steps"]] == [1, 2] and stepped["identical"] == 1
    assert all(row["graph_us"]["median"] > 0 and not row["captured"] for row in stepped["steps"])
    ways = [("plain", True), ("plain", False), ("token_recycling", True), ("token_recycling", False)]
    assert [(row["method"], row["turns"]) for row in stepped["generate"]] == ways and "zoo model, rows" in gpu_table.text(doc)
    assert all(len(row["tried"]) == 4 and row["best"] for row in doc["tune"])
    text = (tmp_path / "gpu_day-rehearsal.txt").read_text()
    assert "NO NUMBER HERE MEANS ANYTHING" in text and "verdict: " in text and text in capsys.readouterr().out
    assert gpu_run.FOLDER.search((tmp_path / "gpu_day-rehearsal.json").read_text()) is None
    assert gpu_day.main(["--out", str(tmp_path), "--rehearse", "--stages", "tests,tune"]) == 0
    assert "tune      kept: ok" in capsys.readouterr().out
