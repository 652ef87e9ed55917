"""The CUDA kernels on a CPU: builds their sources with g++ and the emulator (csrc/emulate), and stands in for ramify._cuda.

    library = Emulator(build(csrc, cache))
    with emulating(library):
        ramify.ops.rms_norm(x, weight)          # x on the CPU, the CUDA kernel under the emulator

A call can be recorded and run again by a program that a sanitizer watches; see csrc/emulate/README.md.
"""

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ramify import backends, native_cuda

SANITIZERS = {
    "plain": ("", ""),
    "asan": ("-fsanitize=address,undefined -fno-sanitize-recover=all -DEMULATE_ASAN",) * 2,
    "tsan": ("-fsanitize=thread -DEMULATE_TSAN", "-DEMULATE_TSAN"),  # the core stays out of the thread sanitizer's sight
}
"""Mode -> flags of the kernels, flags of the emulator's core."""

SCHEDULES = tuple((order, seed, late) for late in (1, 0) for order, seed in ((0, 0), (1, 0), (2, 11), (2, 12)))
"""Order (0 forward, 1 reverse, 2 random), seed, and whether cp.async lands late: four schedules, each both ways."""

FLAGS = "-std=c++17 -O1 -g1 -fPIC -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"


class BuildError(RuntimeError):
    """The compiler's own words about a source."""


def headers() -> Path | None:
    """The folder of the toolkit's cuda_fp16.h: CUDA_HOME, beside nvcc, the usual place, or a wheel of nvidia-cuda-runtime."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    places = [Path(home) / "include" for home in homes if home]
    places += [Path(p) / "nvidia" / name / "include" for p in sys.path for name in ("cu13", "cuda_runtime")]
    return next((place for place in places if (place / "cuda_fp16.h").is_file() and (place / "cuda_runtime_api.h").is_file()), None)


def missing() -> str:
    """Why the emulator cannot be built here; empty when it can."""
    if shutil.which("g++") is None:
        return "no g++"
    return "" if headers() else "no CUDA headers; install the CUDA toolkit, set CUDA_HOME, or pip install nvidia-cuda-runtime"


def build(csrc: Path, cache: Path, mode: str = "plain", program: Path | None = None) -> Path:
    """Build the kernels of csrc/cuda with the emulator; objects are kept in `cache` and made anew when a source changes.

    mode: one of SANITIZERS. program: a source with a main function to link with them, or one .cu that stands alone; without it
    the result is a shared library. Raises BuildError with the compiler's message.
    """
    kernel_flags, core_flags = (f"{FLAGS} {flags}" for flags in SANITIZERS[mode])
    core = [csrc / "emulate" / f"{name}.cpp" for name in ("blocks", "warps", "hopper", "wgmma", "runtime")]
    alone = program is not None and program.suffix == ".cu"
    kernels = [program] if program is not None and alone else sorted((csrc / "cuda").glob("*.cu"))
    sources = [(path, kernel_flags) for path in kernels] + [(path, core_flags.replace("-O1", "-O2")) for path in core]
    if program is not None and not alone:
        sources.append((program, kernel_flags))
    cache.mkdir(parents=True, exist_ok=True)
    objects = _compile([(path, flags) for path, flags in sources if path is not None], csrc, cache)
    made_of = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:12]
    name = f"{program.stem if program else 'libramify_emulated'}-{mode}-{made_of}"
    target = cache / (name if program else f"{name}.so")
    if not target.exists():
        link = "" if program else "-shared -Wl,-Bsymbolic"
        _run(["g++", *kernel_flags.split(), *link.split(), *map(str, objects)], target)
    return target


def _compile(sources: list[tuple[Path, str]], csrc: Path, cache: Path) -> list[Path]:
    include = headers()
    objects, running = [], []
    for path, flags in sources:
        key = hashlib.sha256(f"{_digest(*included(path, csrc))} {flags} {include}".encode()).hexdigest()[:16]
        target = cache / f"{path.stem}-{key}.o"
        objects.append(target)
        if not target.exists():
            running.append(_start(["g++", *flags.split(), f"-I{csrc}", "-isystem", str(include), "-x", "c++", "-c", str(path)], target))
        if len(running) == 2:  # as many at a time as the smallest machine has cores
            _finish(running.pop(0))
    for each in running:
        _finish(each)
    return objects


def included(source: Path, csrc: Path) -> list[Path]:
    """A source and all that it includes from csrc, headers of headers as well."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
            found += [place for place in (csrc / name, path.parent / name) if place.is_file() and place not in found][:1]
    return found


def _start(command: list[str], target: Path) -> tuple[subprocess.Popen, Path, Path]:
    part = target.with_name(f"{target.name}.{os.getpid()}")  # renamed when whole: two sessions may build at once
    return subprocess.Popen([*command, "-o", str(part)], stderr=subprocess.PIPE, text=True), part, target


def _finish(job: tuple[subprocess.Popen, Path, Path]) -> None:
    process, part, target = job
    said = process.communicate()[1]
    if process.returncode:
        raise BuildError(said)
    part.replace(target)


def _run(command: list[str], target: Path) -> None:
    _finish(_start(command, target))


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


class Emulator:
    """The emulated kernels, as native_cuda.Library. `schedule` picks the order of blocks and threads, `record` keeps calls."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.ramify_cuda_message.restype = ctypes.c_char_p
        for function in (
            self._library.ramify_cuda_size,
            self._library.ramify_cuda_stats_scratch,
            self._library.ramify_cuda_attention_scratch,
            self._library.ramify_cuda_attention_variant,
        ):
            function.restype = ctypes.c_int64
        self._schedule = (0, 0, 1)
        self._recorded: Path | None = None
        self._count = 0
        self.schedule()

    def schedule(self, order: int = 0, seed: int = 0, late: int = 1) -> None:
        """Take blocks and threads forward (0), in reverse (1) or at random (2, by `seed`); let copies land late or at once."""
        self._schedule = (order, seed, late)
        self._library.ramify_emulate(order, ctypes.c_uint64(seed), late)

    def run(self, kernel: int, args: int, stream: int) -> int:
        """Run a kernel on the struct at an address; returns a cudaError_t."""
        if self._recorded is None:
            return self._library.ramify_cuda_run(ctypes.c_int64(kernel), ctypes.c_void_p(args), None)
        spans = _spans(kernel, args)
        before = [ctypes.string_at(address, size) for _, address, size in spans]
        words = ctypes.string_at(args, ctypes.sizeof(native_cuda.STRUCTS[kernel]))
        error = self._library.ramify_cuda_run(ctypes.c_int64(kernel), ctypes.c_void_p(args), None)
        out = [struct.pack("<qqQq", kernel, self._schedule[0], self._schedule[1], self._schedule[2]), struct.pack("<q", len(words)), words]
        out.append(struct.pack("<q", len(spans)))
        for (offset, address, size), old in zip(spans, before):
            out += [struct.pack("<qqq", offset, size, address % 256), old, ctypes.string_at(address, size)]
        (self._recorded / f"{self._count:04d}-{native_cuda.STRUCTS[kernel].__name__}.call").write_bytes(b"".join(out))
        self._count += 1
        return error

    def message(self, error: int) -> str:
        """Return what went wrong, in the emulator's words."""
        return self._library.ramify_cuda_message(error).decode()

    def size(self, kernel: int) -> int:
        """Return the bytes of a kernel's struct, or -1."""
        return self._library.ramify_cuda_size(ctypes.c_int64(kernel))

    def stats_scratch(self, rows: int, V: int, topk: int) -> int:
        """Return the bytes of scratch that row_stats needs."""
        return self._library.ramify_cuda_stats_scratch(*map(ctypes.c_int64, (rows, V, topk)))

    def attention_scratch(self, args: int) -> int:
        """Return the bytes of scratch that attention needs for the struct at an address."""
        return self._library.ramify_cuda_attention_scratch(ctypes.c_void_p(args))

    def attention_variant(self, args: int) -> int:
        """Return which kernel attention takes for the struct at an address."""
        return self._library.ramify_cuda_attention_variant(ctypes.c_void_p(args))

    @contextmanager
    def device(self, processors: int = 4, major: int = 8) -> Iterator[None]:
        """Inside the block the device has this many multiprocessors, and this compute capability."""
        self._library.ramify_emulate_device(processors, major)
        try:
            yield
        finally:
            self._library.ramify_emulate_device(4, 8)

    @contextmanager
    def recording(self, folder: Path) -> Iterator[None]:
        """Write every call of the block to a file in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._recorded = folder
        try:
            yield
        finally:
            self._recorded = None


@contextmanager
def emulating(library: Emulator) -> Iterator[None]:
    """Inside the block ops on CPU tensors run on the CUDA kernels, under the emulator; an op without one raises ValueError."""
    device = backends.DEVICE_OF["cuda"]
    with native_cuda.stand_in(library):
        backends.DEVICE_OF["cuda"] = "cpu"
        try:
            with backends.backend("cuda"):
                yield
        finally:
            backends.DEVICE_OF["cuda"] = device
            backends.backend(backends.forced())  # forgets the choices made inside


def _spans(kernel: int, args: int) -> list[tuple[int, int, int]]:
    """Offset in the struct, address and bytes of every tensor that the running call named."""
    held = native_cuda.STRUCTS[kernel].from_address(args)
    tensors: dict[int, int] = {}
    for tensor in native_cuda.running():
        address, size = tensor.data_ptr(), _extent(tensor)
        tensors[address] = max(size, tensors.get(address, 0))
    found = []
    for name, kind in (field[:2] for field in held._fields_):
        address = getattr(held, name)
        if kind is ctypes.c_void_p and address:
            found.append((getattr(type(held), name).offset, address, tensors[address]))
    return found


def _extent(x: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    if x.numel() == 0:
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))) * x.element_size()
