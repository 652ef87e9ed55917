"""The ways to install: a wheel of the checkout, and a wheel of the source distribution, hold the same files and import alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

QUICK = {"RAMIFY_CUDA": "off", "RAMIFY_CXXFLAGS": "-O0 -Wno-all"}  # what is built is looked at, not run fast

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command, cwd, **environment):
    """Run a command of this interpreter's environment, without a GPU compiler."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **QUICK, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel(source, into):
    """Build a wheel of `source` with the build requirements of this environment."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(into), ".", cwd=source)
    [found] = into.glob("ramify-*.whl")
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that git tracks or would track."""
    place = tmp_path_factory.mktemp("source") / "ramify"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode != 0:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


def test_wheel_of_checkout_and_of_sdist(checkout, tmp_path):
    direct = wheel(checkout, tmp_path / "direct")
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    archive = checkout / "dist" / run(sys.executable, "-c", code, cwd=checkout).splitlines()[-1]
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    through_sdist = wheel(unpacked, tmp_path / "through")

    names = zipfile.ZipFile(direct).namelist()
    assert sorted(names) == sorted(zipfile.ZipFile(through_sdist).namelist())
    packaged = {name for name in names if name.startswith("ramify/")}
    assert {"ramify/__init__.py", "ramify/py.typed", "ramify/kernels/__init__.py", "ramify/cli/__init__.py"} <= packaged
    assert any(name.startswith("ramify/_cpu.") and name.endswith(".so") for name in packaged)
    sources = {f"ramify/{path.relative_to(checkout / 'pyext')}" for path in (checkout / "pyext").rglob("*") if path.is_file()}
    assert sources - {name for name in sources if name.endswith(".so")} <= packaged
    assert not any(name.startswith(("tests/", "csrc/", "kernels/", "pyext/")) for name in names)

    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(direct), cwd=tmp_path)
    code = "import ramify, ramify._cpu, ramify.kernels; print(ramify.__file__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).strip() == str(site / "ramify" / "__init__.py")


def test_a_deleted_file_leaves_the_next_wheel(checkout, tmp_path):
    (checkout / "pyext/gone.py").write_text('"""Soon deleted."""\n')
    assert "ramify/gone.py" in zipfile.ZipFile(wheel(checkout, tmp_path / "first")).namelist()
    (checkout / "pyext/gone.py").unlink()
    assert "ramify/gone.py" not in zipfile.ZipFile(wheel(checkout, tmp_path / "second")).namelist()
