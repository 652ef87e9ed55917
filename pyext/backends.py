"""Which kernel runs an op: one table of (op, device, dtype, sizes) -> cpu | triton | cuda | reference.

The table is asked at call time and answers with a reason for every row that does not fit. Nothing is chosen silently:
`ramify.backend` and RAMIFY_BACKEND force a choice, `ramify.explain` prints it, and an op that falls back to the reference
says so once through `logging`.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from math import prod
from types import ModuleType, TracebackType
from typing import Any

import torch

from ramify.checks import one_of, show

BACKENDS = ("cpu", "triton", "cuda", "reference")
"""In order of preference."""

DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
"""The device whose tensors a backend takes; the reference takes any."""

HEAD_SIZES = (64, 96, 128, 256)
MAX_TOPK = 32

log = logging.getLogger("ramify")

_F32_BF16 = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """A row of the table: what one kernel takes."""

    op: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    limits: Mapping[str, Collection] = field(default_factory=dict)

    def why_not(self, device: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> str:
        """Why this kernel does not take the call; empty when it does."""
        if device != DEVICE_OF[self.backend]:
            return f"tensors are on {device}"
        if dtype not in self.dtypes:
            return f"dtype is {_short(dtype)}, takes {_spell(map(_short, self.dtypes))}"
        for name, taken in self.limits.items():
            if name in sizes and sizes[name] not in taken:
                values = f"{taken[0]} to {taken[-1]}" if isinstance(taken, range) else _spell(map(_short, taken))
                return f"{name} is {_short(sizes[name])}, takes {values}"
        return missing(self.backend)


TABLE = (
    Kernel("tree_attention", "cpu", _F32_BF16, {"D": HEAD_SIZES, "kv": _F32_BF16}),
    Kernel("linear", "cpu", _F32_BF16, {"weight": _F32_BF16}),
    Kernel("rms_norm", "cpu", _F32_BF16),
    Kernel("rope", "cpu", _F32_BF16, {"rotary": ("whole head",)}),
    Kernel("silu_mul", "cpu", _F32_BF16),
    Kernel("embed", "cpu", _F32_BF16, {"out": _F32_BF16}),
    Kernel("row_stats", "cpu", _F32_BF16),
    Kernel("topk_logits", "cpu", _F32_BF16, {"k": range(1, MAX_TOPK + 1)}),
)
"""Everything that runs on a kernel. An op without a row here runs in plain torch on every device."""

PLAIN = ("merge_states", "kv_append", "kv_commit", "verify_greedy")
"""Ops on small or user-owned tensors whose reference is as good as a kernel: they have none yet."""

MODEL_BACKEND = "cpu"
"""What a captured step of the model layer is made of, and so all that `generate` runs on; only ops have a choice."""

OPS = tuple(dict.fromkeys([*(row.op for row in TABLE), *PLAIN]))

_native: ModuleType | None = None
_forced: str | None = None
_environment_read = False
_chosen: dict[tuple, str] = {}
_said: set[tuple] = set()


class backend:
    """Force a backend for the whole process: `ramify.backend("reference")`, or until a `with` block ends.

    name: "cpu", "triton", "cuda" or "reference"; None lets the table choose again. An op that the forced backend cannot run
    raises ValueError with the reason, and so does a model of `ramify.load` under anything but "cpu": its captured steps are made of
    CPU kernels. RAMIFY_BACKEND does the same from outside.
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
    key = (op, device, dtype, *sizes.items())
    name = _chosen.get(key)
    if name is None:
        name = _chosen[key] = _decide(op, device, dtype, sizes)
    return name


def reasons(op: str, device: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> dict[str, str]:
    """Backend -> why it cannot run this call, empty if it can; in order of preference, the reference last."""
    rows = {row.backend: row.why_not(device, dtype, sizes) for row in TABLE if row.op == op}
    return {name: rows.get(name, "no such kernel") for name in BACKENDS[:-1]} | {"reference": ""}


def taken(op: str, device: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> str | None:
    """The backend that runs such calls, or None where the forced one cannot and the call is refused."""
    why = reasons(op, device, dtype, sizes)
    name = _pick(op, why)
    return None if why[name] else name


def check_model_backend() -> None:
    """Raises ValueError when another backend is forced than the one whose kernels a captured step of the model layer is made of."""
    name = forced()
    if name is not None and name != MODEL_BACKEND:
        raise ValueError(
            f'generate: backend "{name}" is forced and the model layer runs on "{MODEL_BACKEND}" alone; takes "{MODEL_BACKEND}" or none. '
            "Use ramify.backend(None), or unset RAMIFY_BACKEND."
        )


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `bytes` and `flops` are the least any kernel can do; None where a shape was not given."""

    op: str
    backend: str
    why: str
    others: dict[str, str]
    bytes: int | None
    flops: int | None

    def __str__(self) -> str:
        lines = [f"{self.op} runs on {self.backend}: {self.why}"]
        lines += [f"  {name} does not: {reason}" for name, reason in self.others.items()]
        if self.bytes is None:
            lines.append(f"  floor: not known; give the shapes of {', '.join(FLOORS[self.op][0])}")
        else:
            lines.append(f"  floor: {self.bytes:,} bytes, {self.flops:,} flops")
        return "\n".join(lines)


def explain(op: str, *shapes: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: Any) -> Explanation:
    """Which kernel would run `op`, why, why no other one, and its floor.

    shapes: of the first tensors of the op, in its own order; `dtype` and `device` are those of its rows. Further facts by
    name: D= of a head, kv= and weight= and out= dtypes, k= of a top-k. Nothing runs. Raises ValueError for an unknown op, a shape
    that it does not take or a fact that plays no part in it; TypeError for kinds.
    """
    one_of("op", op, OPS, "explain")
    device = _check_explain(op, shapes, dtype, device, sizes)
    if op == "tree_attention" and shapes:
        sizes.setdefault("D", shapes[0][-1])
    why = reasons(op, device, dtype, sizes)
    name = _pick(op, why)
    if why[name]:
        takes = _spell(other for other, reason in why.items() if not reason)
        raise ValueError(f'explain: backend "{name}" is forced and cannot run {op} ({why[name]}); takes {takes}.')
    if forced() == name:
        because = "it is forced"
    elif op in PLAIN:
        because = "plain torch is its only form"
    elif name == "reference":
        because = "no kernel takes the call"
    else:
        because = f"first that takes {_short(dtype)} on {device}" + (f", at {_level()}" if name == "cpu" else "")
    needed, floor = FLOORS[op]
    moved, flops = floor(dtype.itemsize, sizes, *shapes) if len(shapes) >= len(needed) else (None, None)
    others = {other: reason or f"{name} comes first" for other, reason in why.items() if other != name}
    return Explanation(op, name, because, others, moved, flops)


def _check_explain(op: str, shapes: tuple, dtype: Any, device: Any, sizes: Mapping[str, Any]) -> str:
    """Raises for what `explain` cannot reason about; returns the kind of device."""
    facts = {name: taken for row in TABLE if row.op == op for name, taken in row.limits.items()}
    for name, value in sizes.items():
        if name not in facts:
            known = f"dtype, device{''.join(f', {fact}' for fact in facts)}"
            raise ValueError(f"explain: {name} is {show(value)}, and {op} asks for no {name}; takes {known}.")
        kind = type(next(iter(facts[name])))
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"explain: {name} is {show(value)}; takes {'a whole number' if kind is int else f'a {kind.__name__}'}.")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"explain: dtype is {show(dtype)}; takes a torch.dtype.")
    letters: dict[str, int] = {}
    for i, shape in enumerate(shapes):
        if not isinstance(shape, (tuple, list)) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise TypeError(f"explain: shape {i} is {show(shape)}; takes a tuple of whole numbers of 1 or more, as x.shape is.")
        name, axes = [*FLOORS[op][0].items(), *[("", "...")] * len(shapes)][i]
        named = axes.removeprefix("...").split()
        fits = len(shape) >= len(named) if axes.startswith("...") else len(shape) == len(named)
        if not fits or any(letters.setdefault(letter, n) != n for letter, n in zip(reversed(named), reversed(shape))):
            known = "".join(f", {letter} = {n}" for letter, n in letters.items() if letter in named and fits)
            raise ValueError(f"explain: {name} is {list(shape)}; takes [{', '.join(axes.split())}]{known}.")
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError):
        raise ValueError(f'explain: device is {show(device)}; takes "cpu" or "cuda".') from None


def _attention_floor(item: int, sizes: Mapping[str, Any], q: Sequence[int], k: Sequence[int], *_: Sequence[int]) -> tuple[int, int]:
    kv = sizes["kv"].itemsize if "kv" in sizes else item
    slots = prod(k) // (q[0] * k[-2] * k[-1])  # of one sequence, paged or not
    return 2 * prod(k) * kv + 2 * prod(q) * item, 4 * prod(q) * slots


def _linear_floor(item: int, sizes: Mapping[str, Any], x: Sequence[int], weight: Sequence[int], *_: Sequence[int]) -> tuple[int, int]:
    stored = sizes["weight"].itemsize if "weight" in sizes else item
    rows = prod(x[:-1])
    return prod(weight) * stored + (prod(x) + rows * weight[0]) * item, 2 * rows * prod(weight)


FLOORS: dict[str, tuple[dict[str, str], Callable[..., tuple[int, int]]]] = {
    "tree_attention": ({"q": "B T Hq D", "k": "pages page Hkv D"}, _attention_floor),
    "linear": ({"x": "... K", "weight": "N K"}, _linear_floor),
    "merge_states": ({"o1": "... D"}, lambda item, sizes, o, *_: (3 * prod(o) * item + 12 * prod(o[:-1]), 3 * prod(o))),
    "rms_norm": ({"x": "... H"}, lambda item, sizes, x, *_: (2 * prod(x) * item, 4 * prod(x))),
    "rope": ({"x": "... H D"}, lambda item, sizes, x, *_: (2 * prod(x) * item, 3 * prod(x))),
    "silu_mul": ({"x": "... 2F"}, lambda item, sizes, x, *_: (3 * prod(x) // 2 * item, 3 * prod(x))),
    "embed": ({"ids": "...", "table": "V H"}, lambda item, sizes, ids, table, *_: (2 * prod(ids) * table[-1] * item, 0)),
    "row_stats": ({"logits": "R V"}, lambda item, sizes, x, *_: (prod(x) * item + 12 * x[0], 3 * prod(x))),
    "topk_logits": ({"logits": "R V"}, lambda item, sizes, x, *_: (prod(x) * item + 8 * x[0] * sizes.get("k", 1), prod(x))),
    "verify_greedy": ({"tokens": "B T"}, lambda item, sizes, tokens, *_: (12 * prod(tokens), 0)),
    "kv_append": ({"k": "B T Hkv D"}, lambda item, sizes, k, *_: (4 * prod(k) * item, 0)),
    "kv_commit": (
        {"tail_k": "B T Hkv D", "tail_v": "B T Hkv D", "k_cache": "pages page Hkv D", "v_cache": "pages page Hkv D", "path": "B A"},
        lambda item, sizes, k, v, kc, vc, path, *_: (4 * prod(path) * prod(k[2:]) * item, 0),
    ),
}
"""Op -> (shapes its floor needs, by name and with their axes; floor(itemsize, sizes, *shapes) -> least bytes moved, least flops)."""


def params(op: str) -> list:
    """pytest parameters, one per backend of `op`, each with .name and .device; one that cannot run here is skipped and says why."""
    import pytest

    rows = [row for row in TABLE if row.op == op]
    marks = {row.backend: missing(row.backend) for row in rows} | {"reference": ""}
    return [
        pytest.param(TestBackend(name, DEVICE_OF.get(name, "cpu")), id=name, marks=[pytest.mark.skip(reason=why)] if why else [])
        for name, why in marks.items()
    ]


@dataclass(frozen=True)
class TestBackend:
    """What a test of an op runs on."""

    __test__ = False  # not a test class, whatever pytest reads into the name

    name: str
    device: str


def _pick(op: str, why: Mapping[str, str]) -> str:
    """The forced backend, even where it cannot run; else the first that can. An op without kernels does not notice a forced kernel."""
    name = forced()
    if name is None or (op in PLAIN and name != "reference"):
        return next(other for other, reason in why.items() if not reason)
    return name


def _decide(op: str, device: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> str:
    why = reasons(op, device, dtype, sizes)
    name = _pick(op, why)
    if why[name]:
        can = _spell(other for other, reason in why.items() if not reason)
        raise ValueError(
            f'{op}: backend "{name}" was forced and cannot run this call ({why[name]}); takes {can}. Use ramify.backend(None).'
        )
    if name == "reference" and name != forced() and op not in PLAIN and (op, dtype) not in _said:
        _said.add((op, dtype))
        told = "; ".join(f"{other}: {reason}" for other, reason in why.items() if reason and reason != "no such kernel")
        log.warning("%s on %s %s runs on the reference (%s).", op, device, _short(dtype), told)
    return name


def _force(name: str | None) -> None:
    global _environment_read, _forced
    _forced, _environment_read = name, True
    _chosen.clear()


@lru_cache
def missing(name: str) -> str:
    """Why a backend cannot run on this machine at all; empty when it can."""
    if name != "cpu":
        return "not part of this build"
    if find_spec("ramify._cpu") is None:
        return "ramify._cpu is not built"
    native()  # a module that is there and does not load is a fault to be seen, not a reason to fall back
    return ""


def native() -> ModuleType:
    """ramify.native, on first use: importing ramify must not load the kernels, and a build without them must still import."""
    global _native
    if _native is None:
        _native = import_module("ramify.native")
    return _native


def _level() -> str:
    return native().isa()


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")


def _spell(values: Any) -> str:
    *most, last = [str(v) for v in values]
    return f"{', '.join(most)} or {last}" if most else last
