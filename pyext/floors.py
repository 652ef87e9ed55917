"""`ramify.explain`: which kernel a call would get, why no other, and the least that any kernel must move and compute."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ramify.backends import LOW_BIT, OPS, TABLE, UNPROVEN, forced, invariant, native, pick, reasons, refusal, short
from ramify.checks import listed, one_of, show


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
    name: D= of a head, kv= and weight= and out= dtypes (`dtype` if not given), weight= the name of a low-bit format and
    activations= how it takes its input, k= of a top-k. Nothing runs. Raises ValueError for an unknown op, a shape that it does not
    take or a fact that plays no part in it; TypeError for kinds.
    """
    one_of("op", op, OPS, "explain")
    device, sizes = _checked(op, shapes, dtype, device, sizes)
    why = reasons(op, device, dtype, sizes)
    name = pick(why)
    if why[name] and forced() is None:
        raise ValueError(f"explain: {refusal(why)}")
    if why[name]:
        takes = listed(other for other, reason in why.items() if not reason)
        raise ValueError(f'explain: backend "{name}" is forced and cannot run {op} ({why[name]}); takes {takes}.')
    if forced() == name:
        because = "it is forced"
    elif name == "reference":
        because = "no kernel takes the call"
    else:
        because = f"first that takes {short(dtype)} on {device}" + (f", at {native().isa()}" if name == "cpu" else "")
    if name == "cuda" and invariant():
        because += ", row-invariant"
    elif name == "cuda" and op in WITHIN:
        because += f", {WITHIN[op]}"
    if name in UNPROVEN:
        because += f" ({UNPROVEN[name]})"
    needed, floor = FLOORS[op]
    moved, flops = floor(dtype.itemsize, sizes, *shapes) if len(shapes) >= len(needed) else (None, None)
    others = {other: reason or f"{name} comes first" for other, reason in why.items() if other != name}
    return Explanation(op, name, because, others, moved, flops)


def _checked(op: str, shapes: tuple, dtype: Any, device: Any, sizes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of device, and the facts that the shapes and the caller give. Raises for what `explain` cannot reason about."""
    facts: dict[str, list] = {}
    for row in TABLE:
        for name, takes in row.limits.items() if row.op == op else ():
            facts.setdefault(name, []).extend(takes)
    for name, value in sizes.items():
        if name not in facts:
            known = f"dtype, device{''.join(f', {fact}' for fact in facts)}"
            raise ValueError(f"explain: {name} is {show(value)}, and {op} asks for no {name}; takes {known}.")
        kinds = {type(one): one for one in facts[name]}
        if type(value) not in kinds:
            names = {int: "a whole number", str: "a format" if name == "weight" else "a str"}
            raise TypeError(f"explain: {name} is {show(value)}; takes {listed(names.get(kind, f'a {kind.__name__}') for kind in kinds)}.")
        if isinstance(value, str):
            one_of(name, value, [one for one in dict.fromkeys(facts[name]) if isinstance(one, str)], "explain")
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
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise ValueError(f'explain: device is {show(device)}; takes "cpu" or "cuda".') from None
    alike = {name: dtype for name, takes in facts.items() if any(isinstance(one, torch.dtype) for one in takes)}  # unless it is said
    return kind, alike | {name: letters[name] for name in facts if name in letters} | dict(sizes)


def _attention_floor(item: int, sizes: Mapping[str, Any], q: Sequence[int], k: Sequence[int], *_: Sequence[int]) -> tuple[int, int]:
    kv = sizes["kv"].itemsize if "kv" in sizes else item
    slots = prod(k) // (q[0] * k[-2] * k[-1])  # of one sequence, paged or not
    return 2 * prod(k) * kv + 2 * prod(q) * item, 4 * prod(q) * slots


def _colsum_floor(item: int, sizes: Mapping[str, Any], q: Sequence[int], k: Sequence[int], *_: Sequence[int]) -> tuple[int, int]:
    moved, flops = _attention_floor(item, sizes, q, k)
    return (moved - 2 * prod(q) * item) // 2 + prod(q) * item, flops // 2


def _linear_floor(item: int, sizes: Mapping[str, Any], x: Sequence[int], weight: Sequence[int], *_: Sequence[int]) -> tuple[int, int]:
    kind = sizes.get("weight")
    bits = LOW_BIT[kind] if isinstance(kind, str) else 8 * (kind.itemsize if kind else item)
    rows = prod(x[:-1])
    return int(prod(weight) * bits) // 8 + (prod(x) + rows * weight[0]) * item, 2 * rows * prod(weight)


_WGMMA = "by wgmma on sm_90 where key and value rows lie at multiples of 16 bytes, else by mma.sync"
WITHIN = {"tree_attention": _WGMMA, "interval_attention": _WGMMA}
"""What decides between the kernels of one backend."""

FLOORS: dict[str, tuple[dict[str, str], Callable[..., tuple[int, int]]]] = {
    "tree_attention": ({"q": "B T Hq D", "k": "pages page Hkv D"}, _attention_floor),
    "interval_attention": ({"q": "B T Hq D", "k": "pages page Hkv D"}, _attention_floor),
    "attention_colsum": ({"q": "B T Hq D", "k": "pages page Hkv D"}, _colsum_floor),
    "linear": ({"x": "... K", "weight": "N K"}, _linear_floor),
    "merge_states": ({"o1": "... D"}, lambda item, sizes, o, *_: (3 * prod(o) * item + 12 * prod(o[:-1]), 3 * prod(o))),
    "rms_norm": ({"x": "... H"}, lambda item, sizes, x, *_: (2 * prod(x) * item, 4 * prod(x))),
    "rope": ({"x": "... H D"}, lambda item, sizes, x, *_: (2 * prod(x) * item, 3 * prod(x))),
    "rope_append": ({"qkv": "M N"}, lambda item, sizes, x, *_: (2 * prod(x) * item, 3 * prod(x))),
    "silu_mul": ({"x": "... 2F"}, lambda item, sizes, x, *_: (3 * prod(x) // 2 * item, 3 * prod(x))),
    "embed": ({"ids": "...", "table": "V H"}, lambda item, sizes, ids, table, *_: (2 * prod(ids) * table[-1] * item, 0)),
    "row_stats": ({"logits": "R V"}, lambda item, sizes, x, *_: (prod(x) * item + 12 * x[0], 3 * prod(x))),
    "topk_logits": ({"logits": "R V"}, lambda item, sizes, x, *_: (prod(x) * item + 8 * x[0] * sizes.get("k", 1), prod(x))),
    "verify_greedy": ({"tokens": "B T"}, lambda item, sizes, tokens, *_: (12 * prod(tokens), 0)),
    "verify_sample": ({"logits": "B T V"}, lambda item, sizes, x, *_: (prod(x) * item, 3 * prod(x))),
    "residual_sample": ({"p": "R V"}, lambda item, sizes, p, *_: (2 * prod(p) * item, 2 * prod(p))),
    "table_draft": (
        {"table": "V W", "roots": "B", "parents": "T"},
        lambda item, sizes, table, roots, parents, *_: (8 * (roots[0] + 1) * parents[0], 0),
    ),
    "table_learn": ({"table": "V W", "tokens": "M"}, lambda item, sizes, table, tokens, *_: (tokens[0] * (4 + 8 * table[1]), 0)),
    "kv_append": ({"k": "B T Hkv D"}, lambda item, sizes, k, *_: (4 * prod(k) * item, 0)),
    "kv_commit": (
        {"tail_k": "B T Hkv D", "tail_v": "B T Hkv D", "k_cache": "pages page Hkv D", "v_cache": "pages page Hkv D", "path": "B A"},
        lambda item, sizes, k, v, kc, vc, path, *_: (4 * prod(path) * prod(k[2:]) * item, 0),
    ),
}
"""Op -> (shapes its floor needs, by name and with their axes; floor(itemsize, sizes, *shapes) -> least bytes moved, least flops)."""
