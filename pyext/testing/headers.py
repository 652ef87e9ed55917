"""Run a few lines of C++ over the headers that Python has a twin of: both have to say the same."""

import shutil
import subprocess
from pathlib import Path


def run_cpp(source: str, given: str, include: Path, folder: Path) -> str:
    """Standard output of a C++17 program that reads `given`. include: where its headers lie; folder: for the program itself.

    Every warning is an error. Skips the test where no compiler is; raises CalledProcessError for what does not compile or run.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        import pytest

        pytest.skip("no C++ compiler on this machine")
    main, program = folder / "main.cpp", folder / "main"
    main.write_text(source)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, f"-I{include}", str(main), "-o", str(program)], check=True)
    return subprocess.run([str(program)], input=given, capture_output=True, text=True, check=True).stdout
