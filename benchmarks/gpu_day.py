"""Ten minutes on a GPU: `python -m benchmarks.gpu_day --out benchmarks/results/ [--stages a,b] [--again] [--minutes 9.5] [--rehearse]`.

Builds the CUDA kernels, runs the tests of the ops on them and on Triton, lets the sanitizers watch, probes the chip, steps a whole model,
times our kernels beside their peers and sweeps the configurations of Triton's attention. Correctness before speed. Every stage is a process
of its own under a limit; the document is whole after each, so what is cut short has still said what it knew, and the next run begins where
this one ended. Exit code 1: a test or a check of ours is red, or a stage did not end. Nothing here changes a setting of the GPU.
"""

import argparse
import hashlib
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import gpu_run, gpu_table, report
from benchmarks.gpu_run import ROOT

SCHEMA = "ramify-gpu-day-1"


@dataclass(frozen=True)
class Stage:
    """One step of the day. Its minutes are of ten; what it does not use is left to those behind it."""

    name: str
    minutes: float
    work: str  # module:function of a gpu_run.Day
    fills: tuple[str, ...]  # keys of the document
    needs: tuple[str, ...] = ()  # stages that belong to the same run


STAGES = (
    Stage("identify", 1.0, "benchmarks.gpu_stages:identify", ("environment", "sources")),
    Stage("build", 1.5, "benchmarks.gpu_stages:build", ("build",)),
    Stage("tests", 2.25, "benchmarks.gpu_tests:tests", ("tests", "tested")),
    Stage("sanitize", 1.25, "benchmarks.gpu_stages:sanitize", ("sanitize",)),
    Stage("probes", 0.25, "benchmarks.gpu_stages:probes", ("limits",)),
    Stage("model", 1.5, "benchmarks.gpu_model:model", ("model",)),
    Stage("speed", 1.75, "benchmarks.gpu_speed:speed", ("rows",), needs=("probes",)),
    Stage("tune", 0.5, "benchmarks.gpu_speed:tune", ("tune",)),
)
EMPTY: dict[str, Any] = {
    **{"environment": {}, "sources": {}, "build": {}, "tests": [], "tested": {}},
    **{"sanitize": [], "limits": {}, "model": {}, "rows": [], "tune": []},
}
KEYS = ("schema", "benchmark", "options", "stages", *EMPTY, "verdict")
READ = ("csrc", "kernels", "pyext/ops", "pyext/testing", "pyext/reference", "tests/ops", "tests/gates", "benchmarks", "pyext/backends.py")
READ += ("pyext/model", "pyext/cache", "tests/model/test_device_model.py", "tests/model/conftest.py")
"""What a stage's result depends on: another state of these files, and the stage is not finished."""


def tree() -> str:
    """12 hex digits of the sources that decide a result."""
    paths = sorted(path for place in READ for path in ([ROOT / place] if (ROOT / place).is_file() else (ROOT / place).rglob("*")))
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix in {".py", ".h", ".cuh", ".cu", ".cpp"}:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def validate(doc: dict[str, Any]) -> None:
    """ValueError when `doc` is not a document of this schema, or a row claims a time that it has no right to."""
    if missing := [key for key in KEYS if key not in doc]:
        raise ValueError(f"validate: document lacks {', '.join(missing)}; takes schema {SCHEMA}. Move the file away, and run again.")
    if doc["schema"] != SCHEMA:
        raise ValueError(f"validate: schema is {doc['schema']!r}; takes {SCHEMA!r}. Move the file away, and run again.")
    for row in doc["rows"]:
        if row["status"] not in report.STATUS or ("us" in row) != (row["status"] == "ok"):
            raise ValueError(f"validate: a row of {row['op']} is {row['status']!r} and {'has' if 'us' in row else 'lacks'} a time.")


class GpuDay:
    """One run: the document, the file it lives in, and what is left of the time."""

    def __init__(self, options: argparse.Namespace, stages: Sequence[Stage] = STAGES) -> None:
        self.options, self.stages, self.tree = options, stages, tree()
        self.begun = time.monotonic()
        settings = {"rehearsal": options.rehearse, "quick": options.rehearse, "minutes": options.minutes, "seed": options.seed}
        self.doc: dict[str, Any] = {"schema": SCHEMA, "benchmark": "gpu_day", "options": settings, "stages": {}, **EMPTY, "verdict": ""}
        self.path: Path | None = None

    def run(self) -> dict[str, Any]:
        """Every stage that was asked for and is not finished. The document."""
        with tempfile.TemporaryDirectory(prefix="gpu_day-") as folder:
            first, *others = self.stages
            self._stage(first, Path(folder))  # who the machine is says which document this is
            if self.doc["stages"][first.name]["status"] == "ok":
                self._open()
                due = self._due()
                for stage in others:
                    if stage.name in due:
                        self._stage(stage, Path(folder))
                    elif stage.name in self.doc["stages"]:
                        print(f"{stage.name:<9} kept: {self.doc['stages'][stage.name]['status']}")
        return self.doc

    def _open(self) -> None:
        """Go on with the document of this GPU where there is one."""
        chip = "rehearsal" if self.options.rehearse else re.sub(r"[^a-z0-9]+", "-", self.doc["environment"]["gpu"].lower()).strip("-")
        self.path = self.options.out / f"gpu_day-{chip}.json"
        if self.path.is_file():
            try:
                before = json.loads(self.path.read_text())
            except ValueError as problem:
                raise ValueError(
                    f"gpu_day: {self.path} is damaged ({problem}); takes what a day wrote. Move it away to begin anew."
                ) from None
            validate(before)
            kept = {key: before[key] for key in EMPTY if key not in self.stages[0].fills}
            self.doc = {**self.doc, **kept, "stages": {**before["stages"], **self.doc["stages"]}}
        self._save()

    def _due(self) -> set[str]:
        """Names of the stages to run: those asked for that have not ended well on these sources, and what they need."""
        asked = self.options.stages or [stage.name for stage in self.stages]

        def finished(name: str) -> bool:
            held = self.doc["stages"].get(name, {})
            return not self.options.again and held.get("status") == "ok" and held.get("tree") == self.tree

        due = {name for name in asked if not finished(name)}
        return due | {need for stage in self.stages if stage.name in due for need in stage.needs}

    def _stage(self, stage: Stage, folder: Path) -> None:
        """Run one, keep its part, write the document."""
        scale = 60 * self.options.minutes / 10
        ends = scale * sum(each.minutes for each in self.stages[: self.stages.index(stage) + 1])
        seconds = ends - (time.monotonic() - self.begun)
        for key in stage.fills:
            self.doc[key] = type(EMPTY[key])()
        start = time.monotonic()
        if seconds > 1:
            print(f"{stage.name:<9} ", end="", flush=True)
            status, reason, part = gpu_run.run(stage.work, folder, self.doc, seconds, self.options.rehearse, self.options.seed)
            status, reason = self._take({key: value for key, value in part.items() if key in stage.fills}) or (status, reason)
        else:
            status, reason = "not run", "the time was over"
            print(f"{stage.name:<9} ", end="")
        if stage.name == self.stages[0].name and self.doc["environment"]:
            self.doc["environment"]["commit"] = self.doc["environment"].get("commit") or self.options.commit
            self.doc["environment"]["command"] = " ".join(["python -m benchmarks.gpu_day", *map(gpu_run.bare, sys.argv[1:])])
        held = {"status": status, "seconds": round(time.monotonic() - start, 1), "limit": round(max(seconds, 0), 1), "tree": self.tree}
        held |= {"commit": self.doc["environment"].get("commit", ""), "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")}
        self.doc["stages"][stage.name] = held | ({"reason": reason} if reason else {})
        print(f"{status} in {held['seconds']:.1f} s{': ' + reason if reason else ''}")
        if self.path:
            self._save()

    def _take(self, part: dict[str, Any]) -> tuple[str, str] | None:
        """Put a stage's part into the document; its status and the reason where it does not fit there."""
        try:
            validate(self.doc | part)
        except (ValueError, KeyError, TypeError) as error:
            return "failed", str(error)
        self.doc |= part
        return None

    def _save(self) -> None:
        assert self.path is not None
        self.doc["verdict"] = gpu_table.verdict(self.doc)
        validate(self.doc)
        gpu_run.write(self.path, self.doc)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. ValueError for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where gpu_day-<gpu>.json and its table are written")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=[], metavar="A,B", help="these alone (default: all)")
    parser.add_argument("--again", action="store_true", help="run finished stages once more")
    parser.add_argument("--minutes", type=float, default=9.5, help="for the whole day, shared out between its stages")
    parser.add_argument("--rehearse", action="store_true", help="every stage on the CPU, tiny: shows that it runs, measures nothing")
    parser.add_argument("--commit", default="", help="what is noted as the commit where the checkout has no git")
    parser.add_argument("--seed", type=int, default=0, help="of every random input")
    options = parser.parse_args(arguments)
    names = [stage.name for stage in STAGES]
    for name in options.stages:
        if name not in names:
            raise ValueError(f"gpu_day: --stages has {name!r}; takes some of {', '.join(names)}.")
    if not options.minutes > 0:
        raise ValueError(f"gpu_day: --minutes is {options.minutes}; takes a number above 0.")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"gpu_day: --out {options.out} is no folder and cannot be made one ({error.strerror}). Name another.") from None
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the day, print its table and write it beside the document. Returns the exit code."""
    options = parsed(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the stage that is running, see gpu_run.run
    sys.stdout.reconfigure(line_buffering=True)
    day = GpuDay(options)
    doc = day.run()
    if day.path is None:
        return 1
    text = gpu_table.text(doc)
    day.path.with_suffix(".txt").write_text(text)
    print(f"\n{text}\nwritten to {day.path}")
    return 1 if gpu_table.red(doc) else 0


if __name__ == "__main__":
    report.run_main(main)
