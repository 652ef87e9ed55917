"""Training text for the zoo: the Python sources that lie on this machine.

The standard library comes first (Python Software Foundation licence); installed packages join by name only, because a licence
is a promise about what was read. Held-out modules are named here, in one place: training never sees them or their tests, and
every prompt of the benchmarks, the demo and the tests comes from them.
"""

import importlib.metadata
import importlib.util
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

HELD_OUT = (
    "argparse",
    "bisect",
    "cmd",
    "configparser",
    "csv",
    "fileinput",
    "fractions",
    "getopt",
    "graphlib",
    "heapq",
    "queue",
    "sched",
    "shlex",
    "statistics",
    "textwrap",
    "zipapp",
)
"""Standard library modules that no training run reads, together with every file named after them (`test_csv.py`, ...)."""

PERMISSIVE = ("mit", "bsd", "apache", "isc", "psf", "python software foundation", "zlib", "unlicense")
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "lib2to3", "idle_test", "encodings", "turtledemo", "bad_syntax"}
LARGEST_FILE = 400_000  # bytes: longer Python files are tables of data


def standard_library() -> Path:
    """The folder that holds this interpreter's standard library sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(path: Path) -> bool:
    """True when `path` belongs to a held-out module: the module, a file of its package, or a test named after it."""
    parts = {part.removesuffix(".py").removeprefix("test_").lstrip("_") for part in path.parts[-3:]}
    return any(module in parts for module in HELD_OUT)


def package_folder(name: str) -> Path:
    """Folder of an installed, permissively licensed package.

    Raises ValueError when the package is not installed or its metadata names no licence of `PERMISSIVE`.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {name!r} is not installed here; install it or leave it out of --package")
    metadata = importlib.metadata.metadata(name)
    texts = [metadata.get("License-Expression"), metadata.get("License"), *(metadata.get_all("Classifier") or [])]
    licence = " ".join(text for text in texts if text).lower()
    if not any(word in licence for word in PERMISSIVE) or "gpl" in licence:
        raise ValueError(f"package {name!r} states no permissive licence (one of {', '.join(PERMISSIVE)}); leave it out of --package")
    return Path(next(iter(spec.submodule_search_locations)))


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(inside.parts) and not is_held_out(inside) and path.stat().st_size <= LARGEST_FILE:
            yield path


def training_texts(packages: Sequence[str] = (), seed: int = 0) -> list[str]:
    """Text of every training file, shuffled with `seed`: standard library first asked, then the named packages."""
    texts = []
    for root in [standard_library(), *map(package_folder, packages)]:
        for path in _files(root):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # the library's own tests hold files that are wrong on purpose
            if len(text) > 200:
                texts.append(text)
    random.Random(seed).shuffle(texts)
    return texts


def held_out_texts() -> dict[str, str]:
    """Module name -> source of every held-out module that this interpreter ships."""
    root = standard_library()
    paths = {name: root / f"{name}.py" for name in HELD_OUT}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.exists()}
