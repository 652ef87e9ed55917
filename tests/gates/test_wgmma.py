"""rt_hopper.cuh piece by piece: wgmma.cu under the emulator in every schedule, and the same program on a Hopper GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ramify.testing import emulator

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("wgmma.cu")


@pytest.mark.parametrize("schedule", emulator.SCHEDULES, ids=str)
def test_emulated(built, schedule):
    done = subprocess.run([built("plain", SOURCE), *map(str, schedule)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitized(built, mode):
    done = subprocess.run([built(mode, SOURCE), "2", "3", "1"], capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[:2000]


def test_on_a_gpu(tmp_path):
    """What the emulator takes from the manual is what the chip does."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or nvcc is None:
        pytest.skip("takes a Hopper GPU and nvcc")
    flags = ["-std=c++17", "-O2", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_90a,code=sm_90a"]
    built = subprocess.run([nvcc, *flags, SOURCE, "-o", tmp_path / "wgmma"], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([tmp_path / "wgmma"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
