"""Which kernel runs an op: one table of (op, device, dtype, sizes) -> cpu | triton | cuda | reference.

The table is asked at call time and answers with a reason for every row that does not fit. Nothing is chosen silently:
`ramify.backend` and RAMIFY_BACKEND force a choice, `ramify.explain` prints it, and an op that falls back to the reference
says so once through `logging`.
"""

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any

import torch

from ramify.checks import flag, listed, one_of

BACKENDS = ("cpu", "triton", "cuda", "reference")
"""In order of preference."""

DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
"""The device whose tensors a backend takes; the reference takes any."""

HEAD_SIZES = (64, 96, 128, 256)
MAX_TOPK = 32
MAX_COLUMNS = 1 << 20
"""Columns of a row of logits that the CUDA kernels join."""

log = logging.getLogger("ramify")

_F32_BF16 = (torch.float32, torch.bfloat16)
_GPU = (torch.float32, torch.bfloat16, torch.float16)

LOW_BIT = {
    "int8": 8,
    **{f"int4-g{group}": 4 + 16 / group for group in (32, 64, 128)},
    **{f"int4-g{group}-zp": 4 + 32 / group for group in (32, 64, 128)},
    "fp8": 8,
    "fp8-b128": 8,
}
"""Low-bit weight formats, and the bits that a weight takes: code, float16 scale and zero of a group; scales of whole rows or
blocks are not counted."""

ROUNDED = ("int8", "int8-group", "bf16", "exact")
"""How a low-bit weight may take its input: rounded to int8 with a scale a row or a scale a group, rounded to bfloat16, or as it is."""

UNPROVEN = {
    "triton": "interpreted and compiled, not yet run on hardware",
    "cuda": "compiled and emulated, not yet run on hardware",
}
"""Backend -> what its kernels have not been through yet; said wherever they are listed (law 7)."""


NOT_INVARIANT = "it is not row-invariant"
"""Why a kernel does not run under `ramify.row_invariant(True)`."""


@dataclass(frozen=True)
class Kernel:
    """A row of the table: what one kernel takes."""

    op: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    limits: Mapping[str, Collection] = field(default_factory=dict)
    row_invariant: bool = False
    """On a GPU: the bits of a row of the result depend on that row alone. Every CPU kernel has this; nothing reads it there."""

    def why_not(self, device: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> str:
        """Why this kernel does not take the call; empty when it does."""
        if device != DEVICE_OF[self.backend] and not (self.backend == "triton" and interpreted() and forced() == "triton"):
            return f"tensors are on {device}"
        if dtype not in self.dtypes:
            return f"dtype is {short(dtype)}, takes {listed(map(short, self.dtypes))}"
        for name, taken in self.limits.items():
            if name in sizes and sizes[name] not in taken:
                values = f"{taken[0]} to {taken[-1]}" if isinstance(taken, range) else listed(map(short, taken))
                return f"{name} is {short(sizes[name])}, takes {values}"
        if invariant() and self.backend != "cpu" and not self.row_invariant:
            return NOT_INVARIANT
        return missing(self.backend)


TABLE = (
    Kernel("tree_attention", "cpu", _F32_BF16, {"D": HEAD_SIZES, "kv": _F32_BF16}),
    Kernel("attention_colsum", "cpu", _F32_BF16, {"D": HEAD_SIZES, "kv": _F32_BF16}),
    Kernel("linear", "cpu", _F32_BF16, {"weight": (*_F32_BF16, *LOW_BIT), "activations": ROUNDED}),
    Kernel("rms_norm", "cpu", _F32_BF16),
    Kernel("rope", "cpu", _F32_BF16, {"rotary": ("whole head",)}),
    Kernel("rope_append", "cpu", _F32_BF16, {"cache": _F32_BF16, "rotary": ("whole head",)}),
    Kernel("silu_mul", "cpu", _F32_BF16),
    Kernel("embed", "cpu", _F32_BF16, {"out": _F32_BF16}),
    Kernel("row_stats", "cpu", _F32_BF16),
    Kernel("topk_logits", "cpu", _F32_BF16, {"k": range(1, MAX_TOPK + 1)}),
    Kernel("interval_attention", "cpu", _F32_BF16, {"D": HEAD_SIZES, "kv": _F32_BF16}),
    Kernel("merge_states", "cpu", _F32_BF16),
    Kernel("kv_append", "cpu", _F32_BF16, {"cache": _F32_BF16}),
    Kernel("kv_commit", "cpu", _F32_BF16, {"cache": _F32_BF16}),
    Kernel("verify_greedy", "cpu", (torch.int32, torch.int64)),
    Kernel("verify_sample", "cpu", _F32_BF16),
    Kernel("residual_sample", "cpu", (torch.float32, torch.bfloat16, torch.float64)),
    Kernel("tree_attention", "cuda", (torch.bfloat16,), {"D": HEAD_SIZES, "kv": (torch.bfloat16,)}, row_invariant=True),
    Kernel("tree_attention", "cuda", (torch.float16,), {"D": HEAD_SIZES, "kv": (torch.float16,)}, row_invariant=True),
    Kernel("interval_attention", "cuda", (torch.bfloat16,), {"D": HEAD_SIZES, "kv": (torch.bfloat16,)}, row_invariant=True),
    Kernel("interval_attention", "cuda", (torch.float16,), {"D": HEAD_SIZES, "kv": (torch.float16,)}, row_invariant=True),
    Kernel("attention_colsum", "cuda", (torch.bfloat16,), {"D": HEAD_SIZES, "kv": (torch.bfloat16,)}),
    Kernel("attention_colsum", "cuda", (torch.float16,), {"D": HEAD_SIZES, "kv": (torch.float16,)}),
    Kernel("merge_states", "cuda", _GPU, row_invariant=True),
    Kernel("linear", "cuda", (torch.bfloat16,), {"weight": (torch.bfloat16, *LOW_BIT), "activations": ("exact",)}, row_invariant=True),
    Kernel("linear", "cuda", (torch.float16,), {"weight": (torch.float16, *LOW_BIT), "activations": ("exact",)}, row_invariant=True),
    Kernel("rms_norm", "cuda", _GPU, {"weight": _GPU}, row_invariant=True),
    Kernel("rope", "cuda", _GPU, row_invariant=True),
    Kernel("rope_append", "cuda", _GPU, {"cache": _GPU, "weight": _GPU, "D": range(1, 257)}, row_invariant=True),
    Kernel("silu_mul", "cuda", _GPU, row_invariant=True),
    Kernel("embed", "cuda", _GPU, {"out": _GPU}, row_invariant=True),
    Kernel("row_stats", "cuda", _GPU, {"V": range(1, MAX_COLUMNS + 1)}, row_invariant=True),
    Kernel("topk_logits", "cuda", _GPU, {"V": range(1, MAX_COLUMNS + 1), "k": range(1, MAX_TOPK + 1)}, row_invariant=True),
    Kernel("verify_greedy", "cuda", (torch.int32, torch.int64), row_invariant=True),
    Kernel("verify_sample", "cuda", _GPU, {"T": range(1, 257), "V": range(1, MAX_COLUMNS + 1)}, row_invariant=True),
    Kernel("residual_sample", "cuda", (*_GPU, torch.float64), {"V": range(1, MAX_COLUMNS + 1)}, row_invariant=True),
    Kernel("kv_append", "cuda", _GPU, {"cache": _GPU}, row_invariant=True),
    Kernel("kv_commit", "cuda", _GPU, {"cache": _GPU}, row_invariant=True),
    Kernel("tree_attention", "triton", _GPU, {"D": HEAD_SIZES, "kv": _GPU}),
    Kernel("interval_attention", "triton", _GPU, {"D": HEAD_SIZES, "kv": _GPU}),
    Kernel("attention_colsum", "triton", _GPU, {"D": HEAD_SIZES, "kv": _GPU}),
    Kernel("merge_states", "triton", _GPU, row_invariant=True),
    Kernel("linear", "triton", _GPU, {"weight": tuple(LOW_BIT), "activations": ("exact",)}),
    Kernel("rms_norm", "triton", _GPU, {"H": range(1, 16385)}, row_invariant=True),
    Kernel("rope", "triton", _GPU, row_invariant=True),
    Kernel("rope_append", "triton", _GPU, {"cache": _GPU}, row_invariant=True),
    Kernel("silu_mul", "triton", _GPU, row_invariant=True),
    Kernel("embed", "triton", _GPU, {"out": _GPU}, row_invariant=True),
    Kernel("row_stats", "triton", _GPU, row_invariant=True),
    Kernel("topk_logits", "triton", _GPU, {"k": range(1, MAX_TOPK + 1)}, row_invariant=True),
    Kernel("kv_append", "triton", _GPU, {"cache": _GPU}, row_invariant=True),
    Kernel("kv_commit", "triton", _GPU, {"cache": _GPU}, row_invariant=True),
    Kernel("verify_greedy", "triton", (torch.int32, torch.int64)),
    Kernel("verify_sample", "triton", _GPU),
    Kernel("residual_sample", "triton", (torch.float32, torch.float64)),
    *(Kernel(op, name, (torch.int32,), row_invariant=True) for op in ("table_draft", "table_learn") for name in DEVICE_OF),
)
"""Everything that runs on a kernel; a call that no row takes runs in plain torch."""

MODEL_BACKEND = "cpu"
"""What a captured step of a model on the CPU is made of, and so all that `generate` runs on there; a model on a GPU runs on ops, and
those have a choice."""

OPS = tuple(dict.fromkeys(row.op for row in TABLE))

_native: ModuleType | None = None
_forced: str | None = None
_on = {"row_invariant": False, "debug": os.environ.get("RAMIFY_DEBUG", "0") not in ("", "0")}
_environment_read = False
_chosen: dict[tuple, str] = {}
_said: set[tuple] = set()


class backend:
    """Force a backend for the whole process: `ramify.backend("reference")`, or until a `with` block ends.

    name: "cpu", "triton", "cuda" or "reference"; None lets the table choose again. An op that the forced backend cannot run
    raises ValueError with the reason, and so does a model of `ramify.load` on the CPU under anything but "cpu": its captured steps are made
    of CPU kernels. RAMIFY_BACKEND does the same from outside.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            one_of("name", name, BACKENDS, "backend")
        self._before = forced()
        _force(name)

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _force(self._before)


class _Switch:
    """A setting of the process that is on or off, for good or until a `with` block ends."""

    def __init__(self, on: bool) -> None:
        self._name = type(self).__name__
        self._before, _on[self._name] = _on[self._name], flag("on", on, self._name)

    def __enter__(self) -> "_Switch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _on[self._name] = self._before


class row_invariant(_Switch):
    """On a GPU run only kernels in which a row's bits are its own: `ramify.row_invariant(True)`, or until a `with` block ends.

    A token then has the same bits alone as in a tree, a batch or a longer step: the order of every sum is fixed by the row and by the shape
    of weight or cache, and tree attention adds keys by their positions, whether they lie in the cache or in the tree. What it needs of the
    chip, that a row or column of a matrix instruction does not depend on the others, tests/gates/test_row_invariant.py asks of the chip.
    An op that has no such kernel, the reference included, raises ValueError. Off by default. The CPU's kernels are row-invariant always,
    on one ISA level: nothing changes there.
    """


class debug(_Switch):
    """Look at what is in a GPU's tensors as well: `ramify.debug(True)`, or until a `with` block ends. RAMIFY_DEBUG=1 does it from outside.

    Lengths, page tables, parents, ancestor bits, ids, positions: a call of an op with a bad one raises the ValueError that it raises on
    the CPU, where values are always looked at. It costs every call a copy to the host and a wait. Without it our kernels take what points
    outside a tensor as not there. Recorded steps of a model make their own values and are never looked at.
    """


def invariant() -> bool:
    """Whether `ramify.row_invariant` is on."""
    return _on["row_invariant"]


def looks(device: str) -> bool:
    """Whether ops look at what is in tensors of this device."""
    return device == "cpu" or _on["debug"]


def forced() -> str | None:
    """The backend that `ramify.backend` or RAMIFY_BACKEND forces, or None."""
    global _environment_read, _forced
    if not _environment_read:
        name = os.environ.get("RAMIFY_BACKEND") or None
        if name is not None:
            one_of("RAMIFY_BACKEND", name, BACKENDS)
        _forced, _environment_read = name, True
    return _forced


def choose(op: str, device: str, dtype: torch.dtype, **sizes: Any) -> str:
    """The backend that runs `op` on tensors of this device, dtype and sizes.

    Raises ValueError when a forced backend cannot. The first fallback of an op and dtype to the reference is logged.
    """
    key = (op, device, dtype, invariant(), *sizes.items())
    name = _chosen.get(key)
    if name is None:
        name = _chosen[key] = _decide(op, device, dtype, sizes)
    return name


def reasons(op: str, device: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> dict[str, str]:
    """Backend -> why it cannot run this call, empty if it can; in order of preference, the reference last."""
    rows: dict[str, str] = {}
    for row in TABLE:
        nearer = row.backend not in rows or (rows[row.backend] and dtype in row.dtypes)  # one row that takes the call is enough
        if row.op == op and nearer:
            why = row.why_not(device, dtype, sizes)
            rows[row.backend] = NOT_INVARIANT if why and rows.get(row.backend) == NOT_INVARIANT else why  # it would take the call
    plain = NOT_INVARIANT if invariant() and device != "cpu" else ""
    return {name: rows.get(name, "no such kernel") for name in BACKENDS[:-1]} | {"reference": plain}


def taken(op: str, device: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> str | None:
    """The backend that runs such calls, or None where the forced one cannot and the call is refused."""
    why = reasons(op, device, dtype, sizes)
    name = pick(why)
    return None if why[name] else name


def check_model_backend(device: str = "cpu") -> None:
    """Raises ValueError when the forced backend cannot be what a step of a model on this device is made of."""
    name = forced()
    if name is None:
        return
    if device == "cpu" and name != MODEL_BACKEND:
        raise ValueError(
            f'generate: backend "{name}" is forced and on the CPU the model layer runs on "{MODEL_BACKEND}" alone; takes that or none. '
            "Use ramify.backend(None), or unset RAMIFY_BACKEND."
        )
    if device.startswith("cuda") and name == "cpu":
        raise ValueError(
            f'generate: backend "cpu" is forced and the model is on {device}; takes {listed(name for name in BACKENDS if name != "cpu")}. '
            "Use ramify.backend(None), or load it on the CPU."
        )


def params(op: str, **sizes: Any) -> list:
    """pytest parameters, one per backend that takes `op` at these sizes, each with .name and .device; what cannot run is skipped."""
    import pytest

    rows = [row for row in TABLE if row.op == op and all(size in row.limits.get(name, (size,)) for name, size in sizes.items())]
    marks = {row.backend: missing(row.backend) for row in rows} | {"reference": ""}
    return [
        pytest.param(TestBackend(name, "cpu" if interpreted() else DEVICE_OF.get(name, "cpu")), id=name, marks=_skip(why))
        for name, why in marks.items()
    ]


def _skip(why: str) -> list:
    import pytest

    return [pytest.mark.skip(reason=why)] if why else []


@dataclass(frozen=True)
class TestBackend:
    """What a test of an op runs on."""

    __test__ = False  # not a test class, whatever pytest reads into the name

    name: str
    device: str


def pick(why: Mapping[str, str]) -> str:
    """The forced backend, even where it cannot run; else the first that can, or the reference where it may not either."""
    return forced() or next((name for name, reason in why.items() if not reason), "reference")


def refusal(why: Mapping[str, str]) -> str:
    """What is said where the backend that `pick` names cannot run a call."""
    if forced() is None:
        told = "; ".join(f"{name}: {reason}" for name, reason in why.items() if name != "reference" and reason != "no such kernel")
        told = f"row_invariant is on and no such kernel takes this call ({told or 'there is none'}); takes what one does."
        return f"{told} Use ramify.row_invariant(False)."
    told = f'backend "{pick(why)}" was forced and cannot run this call ({why[pick(why)]})'
    can = [name for name, reason in why.items() if not reason]
    if not can:
        return f"{told}; takes what a row-invariant kernel does. Use ramify.row_invariant(False)."
    return f"{told}; takes {listed(can)}. Use ramify.backend(None)."


def _decide(op: str, device: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> str:
    why = reasons(op, device, dtype, sizes)
    name = pick(why)
    if why[name]:
        raise ValueError(f"{op}: {refusal(why)}")
    if name == "reference" and name != forced() and (op, dtype) not in _said:
        _said.add((op, dtype))
        here = {other: reason for other, reason in why.items() if DEVICE_OF.get(other) == device and reason != "no such kernel"}
        told = "; ".join(f"{other}: {reason}" for other, reason in here.items()) or "no kernel"
        log.warning("%s on %s %s runs on the reference (%s).", op, device, short(dtype), told)
    return name


def _force(name: str | None) -> None:
    global _environment_read, _forced
    _forced, _environment_read = name, True
    _chosen.clear()


def missing(name: str) -> str:
    """Why a backend cannot run on this machine at all; empty when it can."""
    if name == "cuda":
        return native_cuda().missing()
    if name == "triton":
        return _missing_triton()
    if name != "cpu":
        return "not part of this build"
    if find_spec("ramify._cpu") is None:
        return "ramify._cpu is not built"
    native()  # a module that is there and does not load is a fault to be seen, not a reason to fall back
    return ""


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1. Slow; taken only when forced."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing_triton() -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"the GPU is sm_{major}{minor}, takes sm_80 or newer"


def native() -> ModuleType:
    """ramify.native, on first use: importing ramify must not load the kernels. RuntimeError in a build without them."""
    global _native
    if _native is None and find_spec("ramify._cpu") is None:
        raise RuntimeError(
            "ramify._cpu is not built, and models on the CPU are made of its kernels; takes a build without RAMIFY_CPU=off. "
            'Build it again, or load the model with device="cuda".'
        )
    _native = _native or import_module("ramify.native")
    return _native


def native_cuda() -> ModuleType:
    """ramify.native_cuda, on first use; it asks the driver when it is asked, never at import."""
    return import_module("ramify.native_cuda")


def short(value: object) -> str:
    """A dtype, or anything else, without torch in front."""
    return str(value).removeprefix("torch.")
