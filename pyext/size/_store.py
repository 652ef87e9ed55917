"""Small JSON files in the user's cache folder: what was measured on this machine about a model."""

import hashlib
import json
import os
import platform
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ramify


def cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/ramify or ~/.cache/ramify; None for a user without a home, as containers have them."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramify"
    except RuntimeError:
        return None


def path_of(kind: str, model: Any, *more: object) -> Path | None:
    """The file of this model on this machine, at its present ISA level and thread count, and for whatever `more` says.

    A model is known by its `fingerprint` (str), or by its config and dtype; None where it cannot be told apart, or no folder is there.
    """
    fingerprint = getattr(model, "fingerprint", None)
    if not fingerprint and hasattr(model, "dtype"):
        fingerprint = f"{model.config!r} {model.dtype}"
    folder = cache_folder()
    if not fingerprint or folder is None:
        return None
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    forced = [os.environ.get(name, "") for name in ("RAMIFY_ISA", "RAMIFY_BACKEND")]
    machine = [platform.machine(), _cpu_name(), *forced, str(threads), *map(str, more)]
    key = json.dumps([ramify.__version__, str(fingerprint), str(getattr(model, "device", "cpu")), machine])
    return folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


@cache
def built() -> tuple[int, ...]:
    """What tells one build of the CPU kernels from another."""
    found = find_spec("ramify._cpu")
    file = Path(found.origin).stat() if found and found.origin else None
    return (file.st_size, file.st_mtime_ns) if file else ()


def read(path: Path) -> Any:
    """What the file holds; None when it is not there or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, value: Any) -> None:
    """Whole or not at all, so that processes which measure together never read half a file. A folder that refuses is not an error."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            json.dump(value, file)
        os.replace(temporary, path)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
