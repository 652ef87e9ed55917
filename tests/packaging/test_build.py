"""What the compiler made: one object per instruction set level, nothing shared between levels, no torch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = ("portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16")

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")


def built():
    """Object files of the newest build of this checkout, from its build.ninja."""
    files = sorted((ROOT / "build").glob("ninja-*/build.ninja"), key=lambda path: path.stat().st_mtime)
    if not files:
        pytest.skip("ramify was not built in this checkout: python setup.py build_ext --inplace")
    objects = [Path(found) for found in re.findall(r"^build (\S+\.o): cxx ", files[-1].read_text(), re.M)]
    return files[-1].read_text(), [path for path in objects if path.exists()]


def level_of(path):
    """The instruction set level in an object's name, or None for one built once."""
    suffix = Path(path.stem).suffix[1:]
    return suffix if suffix in LEVELS else None


def symbols(path):
    """(type letter, demangled name) of every symbol of an object file."""
    lines = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
    return [(line[17], line[19:]) for line in lines if len(line) > 19]


def leaking(path, level):
    """Defined symbols that another level's object could be given instead: weak ones, and globals outside the level's namespace."""
    found = symbols(path)
    weak = [name for kind, name in found if kind in "WVu"]
    foreign = [name for kind, name in found if kind in "TDRBSG" and f"ramify::{level}::" not in name]
    return weak + foreign


def test_no_symbol_of_a_level_can_replace_another_levels():
    _, objects = built()
    checked = [(path, leaking(path, level_of(path))) for path in objects if level_of(path)]
    assert checked
    assert [(path.name, names) for path, names in checked if names] == []


@pytest.mark.parametrize(
    "source",
    [
        "template <class T> T twice(T x) { return x + x; }\nnamespace ramify::avx2 { int f(int x) { return twice(x); } }",
        "inline float g(float x) { return x * x; }\nnamespace ramify::avx2 { float f(float x) { return g(x); } }",
        "float f(float x) { return x * x; }",
    ],
)
def test_the_check_sees_a_leak(tmp_path, source):
    (tmp_path / "leak.cpp").write_text(source)
    compiler = shutil.which("g++") or pytest.skip("no g++")
    subprocess.run([compiler, "-std=c++17", "-O0", "-mavx2", "-c", "leak.cpp", "-o", "leak.avx2.o"], cwd=tmp_path, check=True)
    assert leaking(tmp_path / "leak.avx2.o", "avx2")


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_ninja_is_quiet_where_setup_is(tmp_path, flags):
    """A ninja that fails and tells what it was asked for; what it says is seen either way."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc/cpu", "pyext", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "pyext/__init__.py", tmp_path / "pyext")  # the version is read from it
    (tmp_path / "ninja.py").write_text(f"BIN_DIR = {str(tmp_path)!r}\n")
    ninja = tmp_path / "ninja"
    ninja.write_text('#!/bin/sh\necho "asked for $*"\nexit 1\n')
    ninja.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "RAMIFY_CUDA": "off", "CXX": "true", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "setup.py", *flags, "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "compilation failed" in done.stderr, done.stderr
    [asked] = [line for line in done.stdout.splitlines() if line.startswith("asked for")]
    assert ("--quiet" in asked) == bool(flags) and (done.stdout == asked + "\n" or not flags)


def test_every_kernel_source_has_every_level():
    text, objects = built()
    levels = {}
    for path in objects:
        if level := level_of(path):
            levels.setdefault(path.name.partition(".")[0], set()).add(level)
    assert levels and len(set(map(frozenset, levels.values()))) == 1
    sources = {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")} - {"dispatch", "replay"}
    assert set(levels) == sources
    assert "-march=native" not in text


@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_modules_need_no_torch(module):
    found = sorted((ROOT / "pyext").glob(f"{module}.*.so"))
    if not found:
        pytest.skip(f"{module} was not built in this checkout")
    dynamic = subprocess.run(["nm", "-DC", found[-1]], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(c10|at|torch|aoti_torch)(::|_)", dynamic)
    needed = subprocess.run(["readelf", "-d", found[-1]], capture_output=True, text=True, check=True).stdout
    common = {"libstdc++", "libm", "libgcc_s", "libgomp", "libc", "libpthread", "libdl", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert set(re.findall(r"NEEDED.*\[([\w+-]+)\.so", needed)) <= common


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_what_it_will_build(tmp_path):
    """nvcc on the path is a CUDA build, but where RAMIFY_CUDA=off: a build that says it takes six minutes had better take them."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "RAMIFY_CUDA"}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    said = {None: "with CUDA kernels", "auto": "with CUDA kernels", "on": "with CUDA kernels", "off": "a minute or two"}
    for wanted, words in said.items():
        more = {} if wanted is None else {"RAMIFY_CUDA": wanted}
        command = ["make", "-n", "demo", f"VENV={tmp_path / 'none'}"]
        done = subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True)
        assert re.search(rf"instruction set level \(.*{words}", done.stdout), done.stdout + done.stderr
