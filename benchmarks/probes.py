"""What this machine can do at most, measured in the run whose numbers it judges: bytes and operations a second.

The probes are native (csrc/cpu/probe.cpp, in the instructions of the ISA level in use). Without the extension they fall back
to torch: a sum over a block of memory and a square matrix product, which is what torch reaches, not what the machine could.
"""

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.harness import Entry, Machine, Plan, last_level_cache, measure

KINDS = {"fp32": 1, "bf16": 2, "int8": 3}
"""Arithmetic -> its number in csrc/common/args.h; reading memory is 0."""

TARGET = 0.015  # seconds of one sample


@dataclass
class Limits:
    """GB/s and Gop/s (a product and a sum are two) of this run. `peak` lacks what the ISA level has no instruction for."""

    source: str
    threads: int
    read: float  # memory, all threads
    read_one: float  # memory, one thread
    cache: dict[str, float] = field(default_factory=dict)  # bytes in use, all threads -> GB/s
    peak: dict[str, float] = field(default_factory=dict)
    peak_one: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def floor(self, size: int, flops: int = 0, arithmetic: str = "fp32", read: float | None = None) -> float:
        """Seconds that a call cannot go below: its bytes at read speed or its operations at peak.

        A number of 16 bits may always be widened: where fp32 is the faster arithmetic, or the only one, it sets the floor.
        """
        peak = max(self.peak.get(arithmetic, 0.0), self.peak.get("fp32", 0.0))
        return max(size / (1e9 * (read or self.read)), flops / (1e9 * peak) if peak else 0.0)

    def json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return {key: _rounded(value) for key, value in asdict(self).items()}

    def __str__(self) -> str:
        peaks = ", ".join(f"{kind} {value:.0f} Gop/s" for kind, value in self.peak.items())
        return f"read {self.read:.1f} GB/s ({self.read_one:.1f} on one thread), {peaks}; {self.source}, {self.threads} threads"


class Probe:
    """Read speed and arithmetic peaks of this process's CPU. `samples` each, the best counts: only neighbours make one worse."""

    def __init__(self, machine: Machine | None = None, samples: int = 5, block: int | None = None) -> None:
        self.machine = machine or Machine()
        self.samples = samples
        size = block or min(512 << 20, max(128 << 20, 4 * last_level_cache()))
        self.memory = torch.ones(size // 4 + 16, dtype=torch.float32)
        self.native = _native()
        if self.native and not self._run(KINDS["fp32"], 1, 1):
            self.native = None  # the sources have the kernel, the built module does not yet
        self.source = f"native {self.native.isa()}" if self.native else "torch (no native probe in this build)"

    @classmethod
    def of(cls, quick: bool) -> "Probe":
        """A probe for a measurement, or a hasty one."""
        return cls(samples=1, block=16 << 20) if quick else cls()

    def read(self, size: int, threads: int) -> float:
        """GB/s of reading the same `size` bytes again and again, whatever cache they end up in. The better of 1 and 2 streams."""
        size = min(size, 4 * (self.memory.numel() - 16)) // 4096 * 4096
        guess = 30e9 if size > last_level_cache() else 200e9
        if not self.native:
            flat = self.memory[: size // 4]
            return self._rate(lambda repeat: [flat.sum() for _ in range(repeat)] and repeat * size, threads, guess)

        def stream(streams: int) -> Callable[[int], int]:
            return lambda repeat: self._run(0, repeat, threads, size, streams)

        return max(self._rate(stream(streams), threads, guess) for streams in (1, 2))

    def peak(self, kind: str, threads: int) -> float:
        """Gop/s of an arithmetic of KINDS, 0 where this ISA level has no instruction for it."""
        if self.native:
            if self._run(KINDS[kind], 1, threads) == 0:
                return 0.0
            return self._rate(lambda repeat: self._run(KINDS[kind], 1000 * repeat, threads), threads, 200e9)
        if kind == "int8":
            return 0.0
        a = torch.randn(512, 512).to(torch.bfloat16 if kind == "bf16" else torch.float32)
        return self._rate(lambda repeat: [a @ a for _ in range(repeat)] and repeat * 2 * 512**3, threads, 20e9)

    def _run(self, kind: int, repeat: int, threads: int, size: int = 0, streams: int = 1) -> int:
        done, sink = ctypes.c_int64(), ctypes.c_double()
        address = (self.memory.data_ptr() + 63) // 64 * 64
        args = self.native.ProbeArgs(
            kind=kind,
            data=address,
            bytes=size,
            streams=streams,
            repeat=repeat,
            done=ctypes.addressof(done),
            sink=ctypes.addressof(sink),
        )
        self.native._cpu.run(args.kernel, ctypes.addressof(args), threads)
        return done.value * threads

    def _rate(self, work: Callable[[int], int], threads: int, guess: float) -> float:
        """1e9 a second of what `work(repeat)` says it did; `guess` a second sets how much a sample of TARGET seconds holds."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            repeat = max(1, int(TARGET * guess / max(1, work(1))))
            amount = work(repeat)  # warms up, too
            plan = Plan(rounds=self.samples, calls=(1, 1), enough=min(3, self.samples), quiet=0.05, patience=0.5, warm=False)
            [timing] = measure([Entry("probe", work, [(repeat,)])], plan, self.machine)
            return amount / timing.quantile(0.0) / 1e9
        finally:
            torch.set_num_threads(before)


def limits(probe: Probe | None = None, threads: int | None = None, quick: bool = False) -> Limits:
    """Probe this machine: about two seconds, a fraction with `quick`."""
    probe = probe or Probe.of(quick)
    threads = threads or torch.get_num_threads()
    start = time.perf_counter()
    whole = 4 * probe.memory.numel()
    found = Limits(probe.source, threads, read=probe.read(whole, threads), read_one=probe.read(whole, 1))
    if not quick:
        found.cache = {str(size): probe.read(size * threads, threads) for size in (24 << 10, 256 << 10)}
        found.cache |= {str(size): probe.read(size, threads) for size in (4 << 20, 16 << 20) if size < whole}
    for kind in KINDS:
        if peak := probe.peak(kind, threads):
            found.peak[kind] = peak
            found.peak_one[kind] = probe.peak(kind, 1) if threads > 1 and not quick else peak
    found.seconds = time.perf_counter() - start
    return found


def _native() -> Any:
    """ramify.native when this build has the probe kernel, else None."""
    if os.environ.get("RAMIFY_BACKEND") == "reference":
        return None
    try:
        from ramify import native
    except ImportError:
        return None
    return native if hasattr(native, "ProbeArgs") else None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
