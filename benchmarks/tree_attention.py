"""Tree attention at decode, against what torch offers: `python -m benchmarks.tree_attention [--quick] [--json F] [--plot F]`.

T rows of a token tree attend to a context and to their own ancestors. torch has no tree attention: its ways take the whole
[T, context + T] boolean mask. Their inputs are laid out and packed for them outside the clock, tail joined to the cache included;
ramify gets the plain tensors of a user. The floor is the larger of the cache's bytes over this run's read speed and
4 * Hq * T * (context + T) * D operations over this run's peak (bf16 where the CPU has bf16 dot products, else fp32).
"""

import math
import shutil
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plots, probes, report
from benchmarks.registry import OPS, Case, Cell, op, provider, run_cell

SIZES = {"large": (32, 8, 128), "small": (8, 4, 64), "tiny": (4, 2, 64)}  # Hq, Hkv, D
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
LIMITS = {"bf16": 0.02, "f32": 5e-5}  # see error_of: 8 bits of mantissa in inputs, weights and outputs; fp32 rounding


class Inputs:
    """One copy of a cell's tensors, in the axes of ramify.ops and, on demand, in those that torch wants."""

    def __init__(self, size: str, context: int, T: int, dtype: str, seed: int, device: str = "cpu") -> None:
        (Hq, Hkv, D), kind = SIZES[size], DTYPES[dtype]
        rng = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=device).to(kind)

        self.q = 2 * random(1, T, Hq, D)  # scores spread as widely as in a trained model: a flat softmax hides errors
        self.k, self.v = random(1, context, Hkv, D), random(1, context, Hkv, D)
        self.tail_k, self.tail_v = random(1, T, Hkv, D), random(1, T, Hkv, D)
        self.visible = random_tree(T, torch.Generator().manual_seed(seed)).to(device)  # bool [T, T]
        self.ancestors = words(self.visible)[None]  # int64 [1, T, W]
        self.prefix_len = torch.tensor([context], dtype=torch.int32, device=device)
        self.group = Hq // Hkv

    @cached_property
    def joined(self) -> tuple[Tensor, Tensor]:
        """Keys and values with the tail behind the context, dense [1, Hkv, context + T, D]."""
        pairs = ((self.k, self.tail_k), (self.v, self.tail_v))
        keys, values = (torch.cat(pair, dim=1).transpose(1, 2).contiguous() for pair in pairs)
        return keys, values

    @cached_property
    def mask(self) -> Tensor:
        """bool [T, context + T]: the dense mask that torch needs."""
        return torch.cat([self.visible.new_ones(len(self.visible), self.k.shape[1]), self.visible], dim=1)


def random_tree(T: int, rng: torch.Generator) -> Tensor:
    """bool [T, T]: row i sees its ancestors and itself in a random tree whose parents are mostly recent rows."""
    visible = torch.eye(T, dtype=torch.bool)
    for row in range(1, T):
        back = int(torch.randint(1, min(row, 6) + 1, (1,), generator=rng))
        visible[row] |= visible[row - back]
    return visible


def words(visible: Tensor) -> Tensor:
    """bool [T, T] -> ancestor words int64 [T, ceil(T / 64)]: bit j & 63 of word j >> 6."""
    padded = F.pad(visible, (0, -len(visible) % 64)).view(len(visible), -1, 64).long()
    return (padded << torch.arange(64, device=visible.device)).sum(-1)


def exact(x: Inputs) -> Tensor:
    """The reference, in float64: every provider's output must be this, o [1, T, Hq, D]."""
    keys, values = (t.double().repeat_interleave(x.group, dim=1) for t in x.joined)
    scores = x.q.double().transpose(1, 2) @ keys.mT / math.sqrt(keys.shape[-1])
    weights = scores.masked_fill(~x.mask, -math.inf).softmax(-1)
    return (weights @ values).transpose(1, 2)


@op(
    "tree_attention",
    size=("large", "small"),
    dtype=("bf16", "f32"),
    context=(512, 2048, 8192),
    T=(1, 8, 32, 64),
    quick={"size": ("tiny",), "context": (192,), "T": (1, 8)},
)
def case(size: str, context: int, T: int, dtype: str, seed: int) -> Case:
    """One copy of a cell."""
    x = Inputs(size, context, T, dtype, seed)
    Hq, Hkv, D = SIZES[size]
    return Case(
        args=(x,),
        bytes=2 * (context + T) * Hkv * D * x.k.element_size(),
        flops=4 * Hq * T * (context + T) * D,
        arithmetic="bf16" if dtype == "bf16" else "fp32",
        want=lambda: exact(x),
        limit=LIMITS[dtype],
    )


def whole(x: Inputs, dtype: torch.dtype | None = None) -> tuple:
    """q [1, Hq, T, D], keys, values and the mask, optionally in another dtype."""
    keys, values = (t.to(dtype or t.dtype) for t in x.joined)
    return x.q.transpose(1, 2).to(keys.dtype).contiguous(), keys, values, x.mask


def packed(x: Inputs, dtype: torch.dtype | None = None) -> tuple:
    """The query heads of a group as further rows, q [1, Hkv, group * T, D], and the mask repeated for each."""
    q, keys, values, mask = whole(x, dtype)
    return q.reshape(1, keys.shape[1], -1, q.shape[-1]), keys, values, mask.repeat(x.group, 1), q.shape[1]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def sdpa_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.reshape(1, heads, -1, o.shape[-1]).transpose(1, 2)


def is_bf16(cell: Cell) -> bool:
    return cell["dtype"] == "bf16"


provider("tree_attention", "sdpa, boolean mask", baseline=True, prepare=whole)(sdpa)
provider("tree_attention", "sdpa, heads packed by hand", baseline=True, prepare=packed)(sdpa_packed)
provider("tree_attention", "sdpa, fp32 copy of the cache", baseline=True, only=is_bf16, prepare=lambda x: whole(x, torch.float32))(sdpa)
provider(
    "tree_attention",
    "sdpa, fp32 copy, heads packed by hand",
    baseline=True,
    only=is_bf16,
    prepare=lambda x: packed(x, torch.float32),
)(sdpa_packed)


def no_compiler() -> str:
    return "" if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler"


def flex_inputs(x: Inputs) -> tuple:
    """The inputs of FlexAttention, its block mask among them: the tree as a mask function over one captured tensor."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, keys, values, _ = whole(x)
    context, visible = x.k.shape[1], x.visible

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < context) | visible[row, (key - context).clamp(min=0)]

    return q, keys, values, create_block_mask(seen, None, None, q.shape[2], keys.shape[2], device=q.device.type)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # a few seconds for each dtype and head shape, not for each cell


def flex(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    """FlexAttention, compiled once for all lengths."""
    return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


provider(
    "tree_attention",
    "FlexAttention, compiled",
    baseline=True,
    needs=no_compiler,
    only=lambda cell: cell["size"] != "tiny",  # compiling takes longer than all of a quick run
    prepare=flex_inputs,
)(flex)


def no_ramify() -> str:
    try:
        from ramify import ops

        return "" if hasattr(ops, "tree_attention") else "ramify.ops has no tree_attention"
    except ImportError as error:
        return str(error)


def ramify_backend() -> str:
    return f"ramify {report.isa()}"


@provider(
    "tree_attention",
    "ramify",
    backend=ramify_backend,
    needs=no_ramify,
    prepare=lambda x: (x.q, x.k, x.v, x.tail_k, x.tail_v, x.ancestors, x.prefix_len),
)
def ramify_op(*tensors: Tensor) -> Tensor:
    from ramify import ops

    return ops.tree_attention(*tensors)


def own_pages(x: Inputs) -> tuple:
    """The same tensors on the model's pages."""
    from benchmarks.own_pages import Call

    return (Call(x.q[0].float(), x.k[0], x.v[0], x.tail_k[0], x.tail_v[0], x.visible, x.ancestors[0]),)


provider("tree_attention", "ramify, the model's pages", backend=ramify_backend, needs=no_ramify, prepare=own_pages)(lambda call: call.run())


def ours(row: dict) -> bool:
    """Rows whose failure or slowing down is ours to mend."""
    return row["provider"].startswith("ramify")


def verdict(rows: Sequence[dict]) -> str:
    """ramify against the best torch way, over the cells that have both."""
    mine = [row for row in rows if row["provider"] == "ramify" and "ratio" in row]
    wrong = sum(row["status"] in ("wrong", "failed") for row in rows)
    if not mine:
        return f"ramify was not measured; {wrong} wrong or failed"
    trees = [row["ratio"] for row in mine if row["shape"]["T"] >= 8 and row["shape"]["context"] >= 2048]
    text = f"ramify {median(row['ratio'] for row in mine):.2f}x the best torch way (median of {len(mine)} cells)"
    if trees:
        text += f"; T >= 8 and context >= 2048: {median(trees):.2f}x, {min(trees):.2f}x to {max(trees):.2f}x"
    slower = [f"{r['dtype']} {r['shape']['size']} {r['shape']['context']}/{r['shape']['T']}" for r in mine if r["ratio"] < 1]
    return text + f"; slower: {', '.join(slower) or 'none'}; {wrong} wrong or failed"


def show(rows: Sequence[dict]) -> None:
    """One table per head shape and dtype."""
    for size, dtype in dict.fromkeys((row["shape"]["size"], row["dtype"]) for row in rows):
        print(f"\ntree_attention {size}: Hq {SIZES[size][0]}, Hkv {SIZES[size][1]}, D {SIZES[size][2]}; {dtype} cache; us per call\n")
        lines, before = [], None
        for row in (row for row in rows if (row["shape"]["size"], row["dtype"]) == (size, dtype)):
            cell = (str(row["shape"]["context"]), str(row["shape"]["T"]))
            figures = ("", "", "", "", "")
            if row["status"] == "ok":
                figures = (f"{row['us']['median']:.0f}", f"{report.spread(row):.0%}", f"{row.get('ratio', math.nan):.2f}x")
                figures += (report.share(row), f"{row['max_error']:.1e}" if "max_error" in row else "")
            lines.append((*(cell if cell != before else ("", "")), row["provider"], *figures, report.notes(row)))
            before = cell
        report.table(("context", "T", "provider", "us", "spread", "ratio", "of floor", "error", ""), lines, left=3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    options = report.arguments(__doc__.splitlines()[0]).parse_args(arguments)
    plan = report.start(options)
    only, named = report.chosen(options)
    target = OPS["tree_attention"]
    cells = list(target.cells(options.quick, only))
    probe = probes.Probe.of(options.quick)
    limits = probes.limits(probe, quick=options.quick)
    print(f"{report.isa()}; {limits}")
    results = []
    for number, cell in enumerate(cells):
        report.progress(f"{number + 1}/{len(cells)} {' '.join(f'{k}={v}' for k, v in cell.items())}")
        rows, first = run_cell(target, cell, plan, seed=options.seed, cold=report.cold(options), named=named)
        results.append((rows, first.bytes, first.flops, first.arithmetic))
    report.progress("")
    limits.read = max(limits.read, probe.read(1 << 40, limits.threads))  # bandwidth drifts: the better of before and after counts
    for rows, size, flops, arithmetic in results:
        report.finish(rows, limits.floor(size, flops, arithmetic))
    rows = [{**row, "dtype": row["shape"]["dtype"]} for found, *_ in results for row in found]
    show(rows)
    text = verdict(rows)
    print(f"\nratio: fastest torch way over this row. verdict: {text}")
    return report.last(report.document("tree_attention", options, plan, limits, rows, text), options, plots.tree_attention, ours)


if __name__ == "__main__":
    report.run_main(main)
