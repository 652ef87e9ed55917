"""Compile Triton kernels for GPUs that are not here, and look at what came out: registers, spills, shared memory, instructions.

A stand-in driver names the chip and the launch path does the rest, so a kernel is specialised exactly as a user's launch
specialises it (pointers divisible by 16, integers equal to 1) and is never launched. Tensors may live on the "meta" device.

    with compiling(90) as kernels:
        glue.silu_mul(torch.empty(4, 2048, device="meta"), torch.empty(4, 1024, device="meta"))
    print(inspect(kernels[0]))
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""sm -> bytes of shared memory that one block may ask for."""

_SHARED_SM = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
_WARPS_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_REGISTERS_SM = 65536

WORDS = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDG.E.128", "STG.E.128", "STL", "LDL", "BAR.SYNC", "SHFL")
"""Instructions that are counted; one counts with all its suffixes."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs. local: bytes of stack a thread, which is where spills go; blocks: that fit one SM. narrow: products
    with a stride that are made in 32 bits, and wrap where a caller's tensor is large.
    """

    name: str
    arch: int
    warps: int
    registers: int
    local: int
    shared: int
    blocks: int
    words: dict[str, int]
    narrow: list[str]

    def faults(self, registers: int = 255, need: Sequence[str] = (), forbid: Sequence[str] = ()) -> list[str]:
        """Why this kernel must not be shipped, one line each; empty when it may. registers: the most it may use a thread."""
        found = []
        if self.registers > registers:
            found.append(f"{self.registers} registers a thread; takes {registers}")
        if self.local > 0:
            found.append(f"spills {self.local} bytes a thread; takes none")
        if self.shared > SHARED[self.arch]:
            found.append(f"{self.shared} bytes of shared memory; takes {SHARED[self.arch]}")
        found += [f"no {word} instruction" for word in need if not self.words.get(word)]
        found += [f"{self.words[word]} {word} instructions; takes none" for word in forbid if self.words.get(word)]
        found += [f"{product} in 32 bits; takes 64" for product in self.narrow]
        return [f"{self.name} on sm_{self.arch}: {each}." for each in found]


class _Driver:
    """Says that a GPU of this architecture is there; nothing can be launched on it."""

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.arch], "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # one cache of compiled kernels per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")


@contextmanager
def compiling(arch: int) -> Iterator[list]:
    """Inside, launches compile for sm_<arch> instead of running; yields the list of compiled kernels, which grows with each launch.

    RuntimeError in the interpreter: that is another process's mode.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("triton_compile: TRITON_INTERPRET=1 is set, and the interpreter compiles nothing; takes a process without it.")
    active, run, compiled = driver._active, JITFunction.run, []

    def warmup(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    driver.set_active(_Driver(arch))
    JITFunction.run = warmup
    try:
        yield compiled
    finally:
        JITFunction.run, driver._active = run, active


def inspect(kernel: Any) -> Report:
    """Read a compiled kernel's cubin with the tools of the triton wheel. The driver is not asked: n_regs needs a GPU."""
    meta = kernel.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, listing = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", "-ndf", file.name)

    def number(key: str) -> int:
        return int(re.findall(rf"\b{key}:(\d+)", usage)[0])

    arch, registers = meta.target.arch, number("REG")
    words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", listing, re.M)
    per_warp = -(-registers * 32 // 256) * 256
    fits = (_REGISTERS_SM // per_warp // meta.num_warps, _SHARED_SM[arch] // (meta.shared + 1024), _WARPS_SM[arch] // meta.num_warps)
    return Report(
        name=meta.name, arch=arch, warps=meta.num_warps, registers=registers, local=max(number("STACK"), number("LOCAL")),
        shared=meta.shared, blocks=min(fits),
        words={word: n for word in WORDS if (n := sum(w == word or w.startswith(word + ".") for w in words))},
        narrow=_narrow_products(kernel.asm["ttir"]),
    )  # fmt: skip


def _narrow_products(ttir: str) -> list[str]:
    """Multiplications of an argument called stride, or of a tensor of copies of it, that give 32 bits."""
    found, strides = [], set(re.findall(r"%\w*stride\w*", ttir))
    for result, op, operands, kind in re.findall(r"^\s*(%\w+) = ([\w.]+) ([^:\n]*) : ([^\n]*)", ttir, re.M):
        of = strides.intersection(re.findall(r"%\w+", operands))
        if of and op in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            strides.add(result)
        elif of and op == "arith.muli" and "i32" in kind:
            found.append(operands.strip())
    return found


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"triton_compile: {name} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr
