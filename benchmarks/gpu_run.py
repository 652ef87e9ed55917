"""How a stage of benchmarks.gpu_day runs: in a process of its own, under a limit, its result in a file that is whole after every step."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = re.compile(r"(?<![\w.:/])/(?:[\w.+@-]+/)+")


AGAIN = 75
"""Exit code of a stage that lost the device and has more to do."""


class DeviceLost(RuntimeError):
    """A launch failed in a way that stays with this process: another one may go on."""


@dataclass
class Day:
    """What a stage is given, and where its result goes: `part` holds keys of the document, `save` writes them."""

    folder: Path
    document: dict[str, Any]
    ends: float  # of time.monotonic
    rehearsal: bool = False
    seed: int = 0
    part: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where tensors live."""
        return "cpu" if self.rehearsal else "cuda"

    def left(self) -> float:
        """Seconds until the stage is ended."""
        return self.ends - time.monotonic()

    def save(self) -> None:
        """Write what is there."""
        write(self.folder / "part.json", self.part)


def write(path: Path, value: Any) -> None:
    """A JSON file that is the old one or the new one, never a half; no folder of the machine is in it."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")
    fresh.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)  # JSON has no such number
    return bare(value) if isinstance(value, str) else value


def bare(text: str) -> str:
    """Text with files in place of their whole paths."""
    return FOLDER.sub("", text)


def environment() -> dict[str, str]:
    """The variables of a stage's process: `import ramify` finds this checkout, installed or not."""
    folder = ROOT / "build" / "gpu_day"
    package = folder / "ramify"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "pyext").iterdir() if path.name != "__pycache__"} | {"kernels": ROOT / "kernels"}
    for link in package.iterdir():
        if link.is_symlink() and (link.name not in wanted or link.resolve() != wanted[link.name]):
            link.unlink()
    for name, path in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(path)
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}


def run(
    work: str, folder: Path, document: Mapping[str, Any], seconds: float, rehearsal: bool = False, seed: int = 0
) -> tuple[str, str, dict[str, Any]]:
    """Run `work`, "module:function" of one Day, and end it after `seconds`. Returns its status, a reason, and its part of the document.

    A stage that lost the device is started again with what it has written so far, for as long as there is time.
    """
    write(folder / "document.json", document)
    (folder / "part.json").unlink(missing_ok=True)
    log, ends = folder / "log.txt", time.monotonic() + seconds
    told = ["--work", work, "--folder", str(folder), "--seed", str(seed), *(["--rehearse"] if rehearsal else [])]
    settings = environment() | ({"OMP_NUM_THREADS": "1"} if rehearsal else {})
    code = AGAIN
    while code == AGAIN and (left := ends - time.monotonic()) > 1:
        with log.open("w") as words:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_run", *told, "--seconds", str(left)],
                cwd=ROOT, env=settings, stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                return "timed out", f"took longer than {seconds:.0f} s", read(folder / "part.json")
            finally:
                _end(process)
    reason = "" if code == 0 else f"ended with {code}: {_last_line(log)}"
    return "failed" if code else "ok", reason, read(folder / "part.json")


def _end(process: subprocess.Popen) -> None:
    """End a stage and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own group, see start_new_session
    process.wait()


def read(path: Path) -> dict[str, Any]:
    """A JSON object, empty when it is not there."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def output(*command: str, timeout: float = 20) -> str:
    """Standard output of a command, "" where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _watch(parent: int) -> None:
    """End this stage when the process that started it is gone: nobody would read its result."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run one stage: what `run` starts."""
    import argparse

    from benchmarks.report import demote_root

    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("work", str), ("folder", Path), ("seconds", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    demote_root()
    module, _, function = options.work.partition(":")
    ends = time.monotonic() + options.seconds
    part = read(options.folder / "part.json")  # of a process before this one
    day = Day(options.folder, read(options.folder / "document.json"), ends, options.rehearse, options.seed, part)
    try:
        getattr(import_module(module), function)(day)
    except DeviceLost as error:
        print(error)
        day.save()
        sys.exit(AGAIN)
    day.save()


def counted(text: str) -> dict[str, int]:
    """Tests passed, failed and skipped, as the last line in which pytest sums up says; a fixture's error is a failure."""
    sums = [line for line in text.splitlines() if re.search(r"\b\d+ (passed|failed|errors?|skipped|deselected)\b.* in [\d.:]+", line)]
    of = {word: int(n) for n, word in re.findall(r"\b(\d+) (passed|failed|error|skipped)", sums[-1] if sums else "")}
    return {"passed": of.get("passed", 0), "failed": of.get("failed", 0) + of.get("error", 0), "skipped": of.get("skipped", 0)}


if __name__ == "__main__":
    import_module("benchmarks.gpu_run").main()  # whose DeviceLost is the one that stages raise
