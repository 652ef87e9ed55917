"""The Triton kernels on the oldest release that they must compile on; the gate beside this one asks the release that is installed.

`make test-slow` puts that release into build/triton36, apart from everything else.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / "build" / "triton36"
GATE = "tests/gates/test_triton_compile.py"


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_kernels_compile_on_the_oldest_release():
    """The whole gate in a process of its own, whose `import triton` finds that folder first: nothing of it may be skipped."""
    if not (OLDEST / "triton").is_dir():
        pytest.skip(f"no triton in {OLDEST.relative_to(ROOT)}; `make {OLDEST.relative_to(ROOT)}/.made` installs it")
    found = os.pathsep.join(filter(None, [str(OLDEST), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": found}

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)

    version, path = python("-c", "import triton; print(triton.__version__, triton.__file__)").stdout.split(maxsplit=1)
    assert version.startswith("3.6.") and Path(path.strip()).is_relative_to(OLDEST)
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", GATE)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed in", done.stdout, re.M), done.stdout[-300:]
