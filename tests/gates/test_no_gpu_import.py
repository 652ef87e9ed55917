"""Without a GPU, and with the module or without it: import touches no driver, the probe answers, the CPU path works, nothing is printed."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

PROGRAM = """
import sys
import ramify
from ramify import backends, native_cuda
assert "ramify._cuda" not in sys.modules and "ramify.native" not in sys.modules
why = backends.missing("cuda")
assert why == "ramify._cuda is not built" or why.startswith("no GPU here ("), why
import torch
x = torch.arange(6.0).view(1, 6)
assert ramify.ops.silu_mul(x).shape == (1, 3)
assert ramify.explain("silu_mul", (1, 6)).others["cuda"].startswith("tensors are on cpu")
assert why in str(backends.reasons("silu_mul", "cuda", torch.float32, {}))
try:
    ramify.backend("cuda")
    ramify.ops.silu_mul(x)
except ValueError as error:
    assert "tensors are on cpu" in str(error), error
else:
    raise AssertionError("a forced backend that cannot run was not refused")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_import_probe_and_cpu_path_without_a_gpu():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(torch.cuda.is_available() or find_spec("ramify._cuda") is None, reason="there is a GPU, or ramify._cuda is not built")
def test_the_probe_answers_and_a_launch_is_refused():
    """35, a driver that is too old, is what the runtime says where there is none; a launch says the same and does not abort."""
    program = """
import ctypes
from ramify import _cuda, native_cuda
answer = _cuda.probe()
assert answer["error"] in native_cuda.NO_GPU and answer["devices"] == 0 and answer["runtime"] >= 12000, answer
cell = (ctypes.c_uint32 * 4)()
args = native_cuda.FillArgs(out=ctypes.addressof(cell), count=4, value=1)
error = _cuda.run(args.kernel, ctypes.addressof(args), 0)
assert error == answer["error"] and _cuda.message(error) == answer["message"], error
assert all(_cuda.size(s.kernel) == ctypes.sizeof(s) for s in native_cuda.STRUCTS)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
