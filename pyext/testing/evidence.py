"""Which GPU kernels hardware has proven: the newest results of benchmarks.gpu_day against the sources as they are now.

An op is proven on a backend when the newest results hold tests of it that all passed, made with the digests that its kernel files have
today. A digest covers what the file includes or imports too, so a change of a shared header makes all that stands on it unproven again.
"""

import hashlib
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from ramify import backends

GPU = ("cuda", "triton")
"""The backends whose kernels need a GPU to be proven."""

FOLDERS = {"cuda": ("csrc/cuda", ".cu"), "triton": ("kernels", ".py")}
"""Backend -> the folder of its kernels and what their names end in."""

ELSEWHERE = {
    ("interval_attention", "triton"): ("interval",),
    ("merge_states", "triton"): ("interval",),
    ("merge_states", "cuda"): ("merge",),
    ("verify_sample", "cuda"): ("sample", "verify"),
}
"""Op and backend -> names of its kernel files, where that is not the name of the op's file in ramify.ops alone."""


def kernel_files(root: Path, backend: str) -> list[str]:
    """Every file of kernels of a backend, as paths from the repository's root."""
    folder, ending = FOLDERS[backend]
    return sorted(str(path.relative_to(root)) for path in (root / folder).glob(f"*{ending}") if not path.name.startswith("_"))


def files_of(root: Path, op: str, backend: str) -> list[str]:
    """The kernel files of an op: those named after its file in ramify.ops; all of the backend when none is, which proves less, not more."""
    home = getattr(import_module("ramify.ops"), op, None)
    names = ELSEWHERE.get((op, backend)) or (getattr(home, "__module__", "").rpartition(".")[2],)
    every = kernel_files(root, backend)
    named = [path for path in every if any(name and re.fullmatch(rf"{re.escape(name)}(_\w+)?", Path(path).stem) for name in names)]
    return named or every


def digest(root: Path, path: str) -> str:
    """16 hex digits of a kernel file and of all that it includes or imports from this repository."""
    found: dict[str, bytes] = {}
    _collect(root, path, found)
    return hashlib.sha256(b"".join(name.encode() + text for name, text in sorted(found.items()))).hexdigest()[:16]


def digests(root: Path, op: str, backend: str) -> dict[str, str]:
    """Kernel file -> digest, of an op on a backend."""
    return {path: digest(root, path) for path in files_of(root, op, backend)}


def _collect(root: Path, path: str, found: dict[str, bytes]) -> None:
    if path in found or not (root / path).is_file():
        return
    found[path] = (root / path).read_bytes()
    text = found[path].decode()
    for name in re.findall(r'^#include "([^"]+)"', text, re.M):
        _collect(root, f"csrc/{name}", found)
    for name, several in re.findall(r"^from ramify\.kernels(?:\.(\w+))? import ([\w, ]+)", text, re.M):
        for each in [name] if name else several.split(","):
            _collect(root, f"kernels/{each.strip()}.py", found)


def newest(root: Path) -> dict[str, Any] | None:
    """The newest document of benchmarks.gpu_day that a GPU made, or None."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((root / "benchmarks/results").glob("gpu_day-*.json"))]
    real = [each for each in documents if not each["options"]["rehearsal"] and each["stages"].get("tests")]
    return max(real, key=lambda each: each["stages"]["tests"]["date"], default=None)


def unproven(root: Path) -> dict[tuple[str, str], str]:
    """(op, backend) -> why no GPU has proven it; one that is proven is not there."""
    doc = newest(root)
    rows = {} if doc is None else {(row["op"], row["backend"]): row for row in doc["tests"]}
    whole = doc is not None and doc["stages"]["tests"]["status"] == "ok"
    found: dict[tuple[str, str], str] = {}
    for op, backend in dict.fromkeys((row.op, row.backend) for row in backends.TABLE if row.backend in GPU):
        row = rows.get((op, backend))
        if row is None:
            found[op, backend] = backends.UNPROVEN.get(backend, "not yet run on hardware")
        elif row["failed"]:
            found[op, backend] = f"{row['failed']} of its tests failed on hardware"
        elif not row["passed"]:
            found[op, backend] = "none of its tests ran on hardware"
        elif not whole:
            found[op, backend] = "its tests did not end on hardware"
        elif row["sources"] != digests(root, op, backend):
            found[op, backend] = "changed since it ran on hardware"
    return found


def standing(root: Path) -> dict[str, str]:
    """Kernel file -> "" when every op that it serves is proven in its present form, else the first reason why not."""
    missing = unproven(root)
    found: dict[str, str] = {}
    for op, backend in dict.fromkeys((row.op, row.backend) for row in backends.TABLE if row.backend in GPU):
        for path in files_of(root, op, backend):
            found[path] = found.get(path) or (f"{op}: {missing[op, backend]}" if (op, backend) in missing else "")
    return found
