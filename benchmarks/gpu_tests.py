"""The stage `tests` of benchmarks.gpu_day, and the pytest plugin that it loads: the ops' tests on GPU backends, told op by op.

The plugin keeps the cases of the backends asked for, notes which op really ran on which backend in each test, and appends a line of
JSON per test to a file, so that a run that is cut short has still said what it found. A test after which the device answers with an
error is the last one of its process: nothing that ran behind it would mean anything.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_clock
from benchmarks.gpu_run import ROOT, Day
from ramify import backends, native_cuda
from ramify.testing import evidence

FOLDERS = ("tests/ops", "tests/gates")
LOG, BACKENDS, FEW = "RAMIFY_GPU_DAY_TESTS", "RAMIFY_GPU_DAY_BACKENDS", "RAMIFY_GPU_DAY_FEW"
WORKERS = 12
_worker = False


def tests(day: Day) -> None:
    """Run them, and keep the document's rows up to date while they run."""
    log = day.folder / "tests.jsonl"
    log.write_text("")
    wanted = ("cpu",) if day.rehearsal else evidence.GPU
    paths = ["tests/ops/test_glue.py", "-k", "silu_mul"] if day.rehearsal else list(FOLDERS)
    plugin = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_tests", "--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, *paths]
    if importlib.util.find_spec("xdist") and not day.rehearsal:  # the kernels compile side by side
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    settings = {LOG: str(log), BACKENDS: ",".join(wanted), "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])}
    with (day.folder / "tests.txt").open("w") as words:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=words, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            day.part |= {"tests": summary(log), "tested": total(log)}
            day.save()
    day.part |= {"tests": summary(log), "tested": total(log)}
    day.save()
    if process.returncode not in (0, 1):
        said = [line for line in (day.folder / "tests.txt").read_text(errors="replace").splitlines() if line.strip()]
        raise SystemExit(f"gpu_day: pytest ended with {process.returncode}: {said[-1][:200] if said else ''}")


def summary(log: Path) -> list[dict[str, Any]]:
    """A row per op and backend: tests passed, failed, skipped; each failure with its first line; the digests of the kernel files."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in log.read_text().splitlines():
        test = json.loads(line)
        for op, backend in test["ran"]:
            empty = {"op": op, "backend": backend, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": [], "skips": []}
            row = rows.setdefault((op, backend), empty)
            row[test["outcome"]] += 1
            row["seconds"] = round(row["seconds"] + test["seconds"], 3)
            if test["outcome"] == "failed":
                row["failures"].append({"test": test["test"], "said": test["said"]})
            elif test["outcome"] == "skipped" and test["said"] not in row["skips"] and len(row["skips"]) < 5:
                row["skips"].append(test["said"])
    for (op, backend), row in rows.items():
        row["sources"] = evidence.digests(ROOT, op, backend) if op in backends.OPS and backend in evidence.GPU else {}
    return [rows[key] for key in sorted(rows)]


def total(log: Path) -> dict[str, int]:
    """Tests passed, failed and skipped, each once whatever it ran, and failed where anything of it did."""
    worst: dict[str, str] = {}
    for test in map(json.loads, log.read_text().splitlines()):
        worst[test["test"]] = max(test["outcome"], worst.get(test["test"], ""), key=("", "skipped", "passed", "failed").index)
    return {outcome: sum(each == outcome for each in worst.values()) for outcome in ("passed", "failed", "skipped")}


# ---- the plugin


def pytest_configure(config: pytest.Config) -> None:
    """Workers of a distributed run tell their results to the process that started them; that one writes."""
    global _worker
    _worker = hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the cases on the backends asked for, or the first of every test with RAMIFY_GPU_DAY_FEW."""
    kept, seen = [], set()
    for item in items:
        backend = backend_of(item)
        key = item.nodeid.partition("[")[0], backend
        if backend and not (os.environ.get(FEW) and key in seen):
            kept.append(item)
        seen.add(key)
    ids = set(map(id, kept))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in ids])
    items[:] = kept


def backend_of(item: pytest.Item) -> str:
    """The backend of a test's case, "" when it is none of those asked for."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    given = [params.get(key) for key in ("backend", "place")]
    names = ["cuda" if value == "gpu" else getattr(value, "name", value) for value in given]
    wanted = os.environ.get(BACKENDS, ",".join(evidence.GPU)).split(",")
    return next((name for name in names if name in wanted), "")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note which op ran on which backend while the test ran."""
    ran: set[tuple[str, str]] = set()
    launched: set[tuple[str, str]] = set()
    choose, run, backend = backends.choose, native_cuda.run, backend_of(item)

    def noted(op: str, *args: Any, **sizes: Any) -> str:
        try:
            chosen = choose(op, *args, **sizes)
        except ValueError:
            ran.add((op, backend))  # it has no kernel for such a call, and the test is skipped
            raise
        if chosen == backend:
            ran.add((op, backend))
        return chosen

    def launch(args: Any, *tensors: Any) -> None:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(args).__name__.removesuffix("Args")).lower()
        launched.add((name, "cuda"))
        run(args, *tensors)

    backends.choose, native_cuda.run = noted, launch
    try:
        yield
    finally:
        backends.choose, native_cuda.run = choose, run
        item.user_properties.append(("ran", sorted(ran or launched)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """After a test that lost the device, end the process: an error of a launch stays with its context."""
    yield
    if why := gpu_clock.lost():
        if _worker:
            os._exit(3)  # the next worker takes over
        pytest.exit(f"the device is lost after {item.nodeid}: {why}", returncode=3)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line per test, and one more for what fails outside it."""
    if _worker or LOG not in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    ran = dict(report.user_properties).get("ran")
    name = report.nodeid.rpartition("::")[2]
    if not ran:  # skipped before it began, or its process died
        backend = next((b for b in os.environ.get(BACKENDS, "").split(",") if b in name.partition("[")[2]), "cuda")
        ran = [(name.partition("[")[0].removeprefix("test_"), backend)]
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "said": first_line(report), "ran": ran}
    with Path(os.environ[LOG]).open("a") as log:
        log.write(json.dumps(line) + "\n")


def first_line(report: pytest.TestReport) -> str:
    """What a failure or a skip says first."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:300]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
