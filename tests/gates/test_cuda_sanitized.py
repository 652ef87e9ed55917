"""Recorded launches of every kernel, run again where a sanitizer watches: no read or write outside a buffer, no race, the same bits."""

import importlib.util
import struct
import subprocess
from pathlib import Path

import pytest

from ramify import native_cuda
from ramify.testing import emulator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def recorded(emulated, tmp_path_factory):
    """mode -> files of launches: those in order for the address sanitizer, those in random order for the thread sanitizer."""
    spec = importlib.util.spec_from_file_location("cuda_calls", Path(__file__).with_name("test_cuda_emulated.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = {}
    for mode, schedule in (("asan", (0, 0, 1)), ("tsan", (2, 7, 0))):
        folder = tmp_path_factory.mktemp(mode)
        emulated.schedule(*schedule)
        with emulator.emulating(emulated), emulated.recording(folder):
            module.calls()
        files[mode] = sorted(folder.glob("*.call"))
    emulated.schedule()
    return files


def replay(built, mode, files):
    return subprocess.run([built(mode, ROOT / "csrc/emulate/replay.cpp"), *files], capture_output=True, text=True, timeout=580)


def test_every_kernel_is_recorded(recorded):
    seen = [{path.stem.partition("-")[2] for path in files} for files in recorded.values()]
    assert seen[0] == seen[1] == {args.__name__ for args in native_cuda.STRUCTS} - {"FillArgs"}


@pytest.mark.timeout(600)  # half a minute of work, but a loaded machine is slow at mapping a thousand stacks
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_clean(built, recorded, mode):
    done = replay(built, mode, recorded[mode])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[:3000]


def test_a_difference_and_an_overflow_are_seen(built, recorded, tmp_path):
    """Cut the last 8 bytes off the first input of a call: the kernel reads behind it."""
    path = next(path for path in recorded["asan"] if "SiluMul" in path.name)
    words = path.read_bytes()
    (size,) = struct.unpack_from("<q", words, 32)
    at = 40 + size + 8  # the first buffer: offset, bytes, alignment
    offset, bytes_, aligned = struct.unpack_from("<qqq", words, at)
    before = words[at + 24 : at + 24 + bytes_]
    after = words[at + 24 + bytes_ : at + 24 + 2 * bytes_]
    rest = words[at + 24 + 2 * bytes_ :]
    cut = words[:at] + struct.pack("<qqq", offset, bytes_ - 8, aligned) + before[:-8] + after[:-8] + rest
    (tmp_path / "cut.call").write_bytes(cut)
    changed = words[:-1] + bytes([words[-1] ^ 1])
    (tmp_path / "changed.call").write_bytes(changed)
    done = replay(built, "asan", [tmp_path / "cut.call"])
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "glue.cu" in done.stderr, done.stderr[:2000]
    done = replay(built, "asan", [tmp_path / "changed.call"])
    assert done.returncode == 1 and "differs" in done.stderr
