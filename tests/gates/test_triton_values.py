"""Triton kernels in the mended interpreter: values, bounds and races, on a machine without a GPU.

Triton reads TRITON_INTERPRET when it is imported, so a process has one mode: `test_in_the_interpreter` starts pytest again with it
set, on this file, on the properties and on the tests of the ops, whose parameter "triton" is skipped otherwise. By hand:

    TRITON_INTERPRET=1 pytest -k triton tests/ops tests/gates/test_properties*.py tests/gates/test_triton_values.py

Tests marked `interpreted(n)` run n of their cases then, and all of them with -m ''.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed; the interpreter cannot be mended without it")
import triton.language as tl  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]
inside = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it, in a process of its own")

if INTERPRETED:
    from ramify.testing.triton_interpreter import KernelMemoryError, guarded, install, probes

    install()


@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.parametrize("cases", ["not slow", pytest.param("", marks=pytest.mark.slow)], ids=["some", "all"])
def test_in_the_interpreter(cases):
    files = ["tests/gates/test_triton_values.py", "tests/gates/test_properties.py", "tests/gates/test_properties_more.py", "tests/ops"]
    if not cases:
        files.append("tests/model/test_device_model.py")  # a minute; its kernels are those of tests/ops
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton", "-m", cases, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@triton.jit
def _add_one(x, out, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(out + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)
    else:
        tl.store(out + at, tl.load(x + at) + 1, mask=at < n)


@triton.jit
def _add_to_neighbour(x, BLOCK: tl.constexpr):
    at = (tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at - BLOCK) + 1)  # reads what another program stores


@triton.jit
def _sum_into_one(x, total):
    tl.store(total, tl.load(total) + tl.load(x + tl.program_id(0)))  # without an atomic


@triton.jit
def _sum_by_atomics(x, total):
    tl.atomic_add(total, tl.load(x + tl.program_id(0)))


@inside
def test_every_probe_passes():
    assert len(probes()) == 7 and all(probes().values())


@inside
def test_a_probe_that_fails_is_said(monkeypatch):
    """An interpreter that moved its private names is a loud error, not a green gate."""
    from ramify.testing import triton_interpreter

    monkeypatch.setattr(triton_interpreter.Builder, "create_dot", lambda self, a, b, d, *rest: d)
    assert not probes()["dot bf16"]
    install.cache_clear()
    monkeypatch.setattr(triton_interpreter, "_watch_launches", lambda: None)
    monkeypatch.setattr(triton_interpreter, "probes", lambda: {"dot bf16": False, "bf16 add": True})
    with pytest.raises(RuntimeError, match="dot bf16 wrong on triton"):
        before = {name: getattr(triton_interpreter.Builder, name) for name in dir(triton_interpreter.Builder) if "_" in name[1:]}
        try:
            install()
        finally:
            for name, function in before.items():
                if not name.startswith("__"):
                    setattr(triton_interpreter.Builder, name, function)


@inside
def test_a_load_out_of_bounds_is_caught():
    x, out = torch.zeros(100), torch.zeros(100)
    with guarded():
        _add_one[(4,)](x, out, 100, BLOCK=32, MASKED=True)
        with pytest.raises(KernelMemoryError, match="28 of 32 addresses of a load lie outside every argument"):
            _add_one[(4,)](x, out, 100, BLOCK=32, MASKED=False)
    assert (out == 1).all()


@inside
def test_the_end_of_a_view_is_a_bound():
    """The storage goes on behind the view; a kernel must not."""
    storage = torch.zeros(256)
    with guarded(), pytest.raises(KernelMemoryError, match="28 of 32 addresses"):
        _add_one[(4,)](storage[:100], torch.zeros(100), 100, BLOCK=32, MASKED=False)


@inside
def test_a_race_between_programs_is_caught():
    x = torch.ones(64)
    with guarded():
        with pytest.raises(KernelMemoryError, match="another program of this launch"):
            _add_to_neighbour[(3,)](x, BLOCK=8)
        with pytest.raises(KernelMemoryError, match="another program of this launch"):
            _sum_into_one[(3,)](x, torch.zeros(1))


@inside
def test_atomics_are_no_race_and_the_race_half_can_be_left_out():
    x, total = torch.ones(64), torch.zeros(1)
    with guarded():
        _sum_by_atomics[(64,)](x, total)
    with guarded(races=False):
        _sum_into_one[(64,)](x, total)
    assert total.item() == 128
