"""Where a model may run, what is refused there, and what it does without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ramify
from ramify import backends
from ramify.size import _store
from ramify.testing.device_model import device_model
from ramify.tree import TokenTree


def test_what_cannot_run_is_refused(folders):
    model = device_model(folders["llama"])
    cache = model.new_cache([20])
    with backends.backend("cuda"), pytest.raises(ValueError, match='backend "cuda" was forced and cannot run this call'):
        model.forward(TokenTree.roots([1]), cache.of([0]))
    with pytest.raises(ValueError, match="chunk is 0"):
        model.prefill([[1, 2]], cache, chunk=0)
    told = '"cpu" is forced and the model is on cuda:0; takes triton, cuda or reference'
    with backends.backend("cpu"), pytest.raises(ValueError, match=told):
        backends.check_model_backend("cuda:0")


def test_costs_are_filed_by_device(folders):
    """What a step costs on one device says nothing about another."""
    model = device_model(folders["llama"])
    assert model.device == "cpu" and " on cpu" in model.fingerprint
    if not backends.missing("cpu"):
        captured = ramify.load(folders["llama"], dtype="fp32")
        assert captured.fingerprint != model.fingerprint
        assert _store.path_of("step-cost", captured) != _store.path_of("step-cost", model)
        assert _store.path_of("step-cost", captured, _store.built()) == _store.path_of("step-cost", captured, _store.built())
        assert _store.path_of("step-cost", captured, _store.built()) != _store.path_of("step-cost", captured, (0, 0))  # another build


def test_a_build_without_cpu_kernels_runs_models(folders, tmp_path):
    """On a GPU nothing of a model needs the CPU's kernels; without them the reference stands in for them here."""
    package = tmp_path / "ramify"
    package.mkdir()
    for entry in Path(ramify.__file__).parent.iterdir():
        if not entry.name.startswith("_c"):
            (package / entry.name).symlink_to(entry)
    program = f"""
import sys
class Hiding:  # an editable install looks beside the package as well
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest): return None if name == "ramify._cpu" else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Hiding(finder) if "ditable" in getattr(finder, "__name__", "") else finder for finder in sys.meta_path]
from ramify import backends, generate
from ramify.testing.device_model import device_model
assert backends.missing("cpu") == "ramify._cpu is not built"
[out] = generate(device_model({str(folders["qwen2"])!r}), [[1, 2, 3]], method="token_recycling", max_new_tokens=5, size="fixed:rows_each=4")
print(out.token_ids)
"""
    paths = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **paths}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [out] = ramify.generate(device_model(folders["qwen2"]), [[1, 2, 3]], method="plain", max_new_tokens=5)
    assert done.stdout.strip() == str(out.token_ids)
