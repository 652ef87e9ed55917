"""Rules that every file of the repository keeps."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE = 400  # lines
LARGEST_TREE = 44e6  # bytes
TEXT = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".json", ".txt", ""}
FOREIGN = re.compile(r"/(?:root|work)/\w|/home/(?!me/)\w|pypi\.org|pythonhosted|download\.pytorch")


@pytest.fixture(scope="module")
def files():
    """Every file that git tracks or would track."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_size(files):
    assert sum(path.stat().st_size for path in files) < LARGEST_TREE


def test_nothing_compiled_is_kept(files):
    made = {".cubin", ".ptx", ".fatbin", ".o", ".so", ".a", ".pyc", ".whl", ".gz"}
    assert [str(path.relative_to(ROOT)) for path in files if path.suffix in made] == []


def test_sources_are_short(files):
    sources = [path for path in files if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}]
    long = {str(path.relative_to(ROOT)): n for path in sources if (n := len(path.read_text().splitlines())) > LONGEST_FILE}
    assert long == {}


def test_no_machine_and_no_host_is_named(files):
    def names_one(path):
        return (
            path.suffix in TEXT and path.stat().st_size < 1e6 and path != Path(__file__) and FOREIGN.search(path.read_text(errors="ignore"))
        )

    assert [str(path.relative_to(ROOT)) for path in files if names_one(path)] == []


def test_every_package_is_installed(files):
    """A folder of modules without __init__.py would be missing from the wheel."""
    folders = {path.parent for path in files if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in {"pyext", "kernels"}}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []
