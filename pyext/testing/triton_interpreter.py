"""Triton's interpreter, mended and guarded: a kernel's values, bounds and races proved on a machine without a GPU.

With TRITON_INTERPRET=1 in the environment before the first `import triton`, kernels run on CPU tensors, one program after the
other. As it comes, that interpreter multiplies the bits of bf16 numbers, truncates where a GPU rounds, on numpy 2.4 does not loop up to
a number that was loaded (Triton 3.6), and reads past the end of a tensor without a word. `install` mends the first three and proves it
by seven probes; `guarded` makes a launch fail when a
program touches bytes outside its tensors, or bytes that another program has written. Needs ml_dtypes.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

F8 = {tl.float8e4nv: (ml_dtypes.float8_e4m3fn, 448.0), tl.float8e5: (ml_dtypes.float8_e5m2, 57344.0)}
"""Eight-bit floats: their numpy type and the largest finite value, at which a GPU saturates (sm_89 and newer)."""

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


class KernelMemoryError(RuntimeError):
    """A program touched memory that it must not: outside every argument, or in a race with another program."""


@functools.cache
def install() -> None:
    """Mend bf16 and fp8 in this process, and prove it. RuntimeError outside the interpreter or when a probe fails."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("triton_interpreter: set TRITON_INTERPRET=1 before the first import of triton; one process per mode.")
    for name in ("binary_op", "unary_op", "ternary_op"):
        if hasattr(Builder, name):
            setattr(Builder, name, _in_f32(getattr(Builder, name)))
    round_to_zero, dot = Builder.create_fp_to_fp, Builder.create_dot

    def fp_to_fp(self: Any, source: Any, to: Any, mode: Any) -> Any:
        return round_to_zero(self, source, to, mode) if str(mode).upper().endswith("RTZ") else _cast(self, source, to)

    def wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    Builder.create_fp_to_fp, Builder.create_dot = fp_to_fp, wide_dot
    casts = ["create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui"]
    for name in ["cast_impl", *casts]:
        setattr(Builder, name, _cast)
    _count_by_tensors()
    _watch_launches()
    if failed := [name for name, right in probes().items() if not right]:
        raise RuntimeError(
            f"triton_interpreter: {', '.join(failed)} wrong on triton {triton.__version__}; takes an interpreter whose private names are "
            "those of 3.6 to 3.9. Mend pyext/testing/triton_interpreter.py for this release."
        )


def probes() -> dict[str, bool]:
    """The seven things that an unmended interpreter gets wrong, each compared with torch bit for bit."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 32, 32, generator=g) * 3
    steps = torch.tensor([3])
    x[0, :4] = torch.tensor([1e-3, -7e-4, 500.0, 0.0])  # subnormal and out of range in 8 bits
    a, b = x.bfloat16(), y.bfloat16()
    out = {name: torch.empty(32, 32, dtype=dtype) for name, dtype in _PROBE_OUTPUTS.items()}
    _probe[(1,)](x, a, b, steps, *out.values(), N=32)
    chain = ((a * b).float() + 1.5).bfloat16() - a  # three roundings, each to nearest even
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    want = {
        "dot bf16": ((out["dot bf16"] - exact).abs() <= 1e-6 * terms).all(),  # sums of exact products, in f32
        "f32 -> bf16": out["f32 -> bf16"].equal(x.bfloat16()),
        "f32 -> e4m3": out["f32 -> e4m3"].float().equal(x.clamp(-448, 448).to(torch.float8_e4m3fn).float()),
        "f32 -> e5m2": out["f32 -> e5m2"].float().equal(x.to(torch.float8_e5m2).float()),
        "bf16 add": out["bf16 add"].equal(a + b),
        "bf16 chain": out["bf16 chain"].equal(chain),
        "loaded bound": out["loaded bound"].equal(3 * x),
    }
    return {name: bool(right) for name, right in want.items()}


_PROBE_OUTPUTS = {
    "dot bf16": torch.float32,
    "f32 -> bf16": torch.bfloat16,
    "f32 -> e4m3": torch.float8_e4m3fn,
    "f32 -> e5m2": torch.float8_e5m2,
    "bf16 add": torch.bfloat16,
    "bf16 chain": torch.bfloat16,
    "loaded bound": torch.float32,
}


@triton.jit
def _probe(x, a, b, steps, dot, to_bf16, to_e4m3, to_e5m2, add, chain, sums, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    wide, p, q = tl.load(x + at), tl.load(a + at), tl.load(b + at)
    tl.store(dot + at, tl.dot(p, q))
    tl.store(to_bf16 + at, wide.to(tl.bfloat16))
    tl.store(to_e4m3 + at, wide.to(tl.float8e4nv))
    tl.store(to_e5m2 + at, wide.to(tl.float8e5))
    tl.store(add + at, p + q)
    tl.store(chain + at, ((p * q).to(tl.float32) + 1.5).to(tl.bfloat16) - p)
    total = tl.zeros([N, N], tl.float32)
    for _ in range(0, tl.load(steps)):
        total += wide
    tl.store(sums + at, total)


# ---- values


def _is_bf16(h: Any) -> bool:
    return isinstance(h, Handle) and h.dtype.scalar == tl.bfloat16


def _f32(h: Any) -> np.ndarray:
    kind = h.dtype.scalar
    if kind == tl.bfloat16:
        return (h.data.astype(np.uint32) << 16).view(np.float32)
    return h.data.view(F8[kind][0]).astype(np.float32) if kind in F8 else h.data


def _bf16_bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)  # to nearest, ties to even


def _in_f32(op: Any) -> Any:
    """The same operation on bf16: in f32, rounded once. What a comparison gives is int1, and not its operands' type."""

    @functools.wraps(op)
    def wide(self: Any, *args: Any) -> Any:
        narrow = any(map(_is_bf16, args))
        result = op(self, *[Handle(_f32(h), tl.float32) if _is_bf16(h) else h for h in args])
        if isinstance(result, Handle) and result.data.dtype == np.bool_:
            return Handle(result.data, tl.int1)
        if not narrow:
            return result
        rounded = isinstance(result, Handle) and result.dtype.scalar == tl.float32
        return Handle(_bf16_bits(result.data), tl.bfloat16) if rounded else result

    return wide


def _cast(self: Any, source: Any, to: Any, *_: Any) -> Any:
    have, want = source.dtype.scalar, to.scalar
    if have == want:
        return source
    if have == tl.bfloat16 or have in F8:
        return _cast(self, Handle(_f32(source), tl.float32), to)
    if want == tl.bfloat16:
        return Handle(_bf16_bits(source.data), want)
    if want in F8:
        kind, most = F8[want]
        return Handle(np.clip(source.data.astype(np.float32), -most, most).astype(kind).view(np.uint8), want)
    return Handle(source.data.astype(interpreter._get_np_dtype(to)), want)


def _widened(h: Any) -> Any:
    return Handle(_f32(h), tl.float32) if _is_bf16(h) or h.dtype.scalar in F8 else h


def _count_by_tensors() -> None:
    """A loaded number, which is an array of one element here, may be where a loop ends."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # undone with the rest of the patch when the launch is over

    interpreter._patch_lang_tensor = patched


# ---- memory


class _Launch:
    """The spans of memory that one launch may touch, and per byte which program wrote it and which one read it."""

    def __init__(self, tensors: list[torch.Tensor], races: bool) -> None:
        spans: list[list[int]] = []
        for lo, hi in sorted(map(_span, tensors)):
            if spans and lo <= spans[-1][1]:
                spans[-1][1] = max(hi, spans[-1][1])
            elif hi > lo:
                spans.append([lo, hi])
        self.races = races
        self.lo, self.hi = (np.array([s[i] for s in spans], np.uint64) for i in (0, 1))
        self.wrote, self.read = ([np.full(hi - lo, -1, np.int32) for lo, hi in spans] for _ in "wr")

    def visit(self, builder: Any, pointers: Any, mask: Any, storing: bool) -> None:
        """Check the addresses of one load or store of one program."""
        at = np.asarray(pointers.data)
        at = at[np.broadcast_to(mask.data, at.shape)].ravel().astype(np.uint64)
        if len(at) == 0:
            return
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        span = np.searchsorted(self.lo, at, side="right").astype(np.int64) - 1
        what, (x, y, z) = "store" if storing else "load", builder.grid_idx
        outside = (span < 0) | (at + size > self.hi[np.maximum(span, 0)]) if len(self.lo) else np.ones(len(at), bool)
        if outside.any():
            raise KernelMemoryError(f"program {x, y, z}: {outside.sum()} of {len(at)} addresses of a {what} lie outside every argument.")
        me = (x * 1021 + y) * 1021 + z
        for s in np.unique(span) if self.races else ():
            off = (at[span == s] - self.lo[s]).astype(np.int64)
            wrote, read = self.wrote[s], self.read[s]
            if ((wrote[off] != -1) & (wrote[off] != me)).any():
                raise KernelMemoryError(f"program {x, y, z}: a {what} touches bytes that another program of this launch stored.")
            if not storing:
                read[off] = np.where((read[off] == -1) | (read[off] == me), me, -2)  # -2: several programs
                continue
            if ((read[off] != -1) & (read[off] != me)).any():
                raise KernelMemoryError(f"program {x, y, z}: a store touches bytes that another program of this launch loaded.")
            wrote[off] = me


_guard: list[bool] = []  # innermost last: whether races are looked for
_running: list[_Launch] = []


@contextmanager
def guarded(races: bool = True) -> Iterator[None]:
    """Check every launch inside: KernelMemoryError for an address outside the *views* that were passed, and for races.

    The programs of a launch may run in any order, so what one stores no other may touch. races=False for kernels that publish by
    atomics and read each other's results on purpose. Costs about a quarter of the interpreter's time.
    """
    install()
    _guard.append(races)
    try:
        yield
    finally:
        _guard.pop()


def _watch_launches() -> None:
    call, load, store = interpreter.GridExecutor.__call__, Builder.create_masked_load, Builder.create_masked_store
    patch, patched = interpreter._patch_lang, set[int]()

    def patch_once(fn: Any) -> Any:
        """The interpreter's hold on triton.language, once a launch and not at every call of a helper: that is most of its time."""
        languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if patched >= languages:
            return interpreter._LangPatchScope()
        patched.update(languages)
        return patch(fn)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if _guard:
            _running.append(_Launch(tensors, _guard[-1]))
        try:
            return call(self, *args, **kwargs)
        except BaseException as error:  # without the frames of the rewritten kernel: they have no lines, and pytest stumbles over them
            inner = error.__cause__ if isinstance(error.__cause__, KernelMemoryError) else error
            raise inner.with_traceback(None) from None
        finally:
            _running.clear()

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if _running:
            _running[-1].visit(self, pointers, mask, storing=False)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _running:
            _running[-1].visit(self, pointers, mask, storing=True)
        return store(self, pointers, value, mask, *rest)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch, patch_once
    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store


def _span(x: torch.Tensor) -> tuple[int, int]:
    """First address of a view and the one behind its last element."""
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
