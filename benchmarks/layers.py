"""One linear layer as every provider of `linear` gets it, and as ramify keeps it: packed, captured, replayed by one native call."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import copies_needed
from benchmarks.registry import Loaded

TOP = 128
"""Most rows of an input."""

NODES = 16
"""Layers of a graph whose weights stay in cache: enough that entering it costs little of each."""

GRAPH = 4 << 20
"""Bytes of weights in a graph of cold layers: as many as hide its entry, and few enough that a disturbed call is one of many."""

FLOAT, HALF = 1e-3, 0.02
"""Largest errors (registry.error_of) of sums in fp32, and of a result rounded to bf16."""

INT8, INT7 = 0.06, 0.15
"""The same of inputs rounded to 8 or 7 bits. A row of a normal distribution has its extremes 8 deviations apart, so the rounding of its
values has 0.01 (0.02) of their deviation; a sum's error is as much of its own, and the worst of a million sums 5 times that."""


@dataclass
class Held:
    """A provider's weights of one layer: copies of them, ready to be multiplied."""

    bytes: int  # of one copy
    weight: Tensor | None  # f32 [N, K]: what a copy stands for; let go of once the result is known
    calls: Callable[[Tensor], Sequence[tuple]]  # x f32 [M, K] -> the arguments of each call
    parts: int = 1  # layers in a call
    want: Tensor | None = None  # f32 [TOP, N]


@dataclass
class Layer:
    """A weight [N, K] and inputs [TOP, K] of normal distributions, in values that bf16 holds. `held`: what providers made of it."""

    N: int
    K: int
    seed: int
    held: dict[str, Held] = field(default_factory=dict)
    formats: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """w f32 [N, K] and x f32 [TOP, K]."""
        rng = torch.Generator().manual_seed(self.seed)
        w = torch.randn(self.N, self.K, generator=rng).mul_(self.K**-0.5).bfloat16().float()
        return w, torch.randn(TOP, self.K, generator=rng).bfloat16().float()

    def quantized(self, name: str) -> Any:
        """The weight rounded to a format of ramify.quant, as a QuantizedWeight: peers of the same format multiply the same numbers."""
        if name not in self.formats:
            from ramify.quant import Format
            from ramify.quant.quantize import quantize

            self.formats[name] = quantize(self.tensors[0], Format.parse(name))
        return self.formats[name]


Hold = Callable[[Layer, Callable[[int], int]], Held]
"""(layer, bytes of a copy -> how many copies) -> Held."""


def loader(title: str, hold: Hold, limit: float, arithmetic: str) -> Callable[[Layer, int, bool], Loaded]:
    """A provider's `load`: weights are made once a layer and serve every number of rows."""

    def load(layer: Layer, M: int, cold: bool) -> Loaded:
        held = layer.held.get(title)
        if held is None:
            held = layer.held[title] = hold(layer, lambda size: copies_needed(size, cold))
            assert held.weight is not None
            held.want, held.weight = layer.tensors[1] @ held.weight.T, None
        x = layer.tensors[1][:M]
        return Loaded(held.calls(x), held.bytes, arithmetic, held.want[:M], limit, held.parts)

    return load


def graphs(copies: int, size: int) -> list[list[int]]:
    """Which copies of `size` bytes the layers of each graph multiply by: graphs of the same length, no copy twice but where it is one."""
    if copies == 1:
        return [[0] * NODES]
    length = min(copies, max(1, GRAPH // size))
    return [list(range(first, first + length)) for first in range(0, copies - length + 1, length)]


# ---- ramify


def captured(layer: Layer, copies: Sequence[Tensor], kind: type[ctypes.Structure], **fields: int) -> dict[str, Any]:
    """`calls` and `parts` of steps whose layers are copies of one packed weight; all read the same rows and write the same output."""
    from ramify import native

    plan = graphs(len(copies), copies[0].nbytes)

    def calls(x: Tensor) -> list[tuple]:
        x, rows, out = x.contiguous(), torch.tensor([x.shape[0]], dtype=torch.int32), torch.full((x.shape[0], layer.N), torch.nan)
        args = kind(rows=rows.data_ptr(), x=x.data_ptr(), x_stride=layer.K, K=layer.K, N=layer.N, prologue=native.COPY, **fields)
        args.out, args.out_stride = out.data_ptr(), layer.N
        scratch = native.with_scratch(args)
        programs = []
        for numbers in plan:
            entries = [kind.from_buffer_copy(args) for _ in numbers]
            for entry, number in zip(entries, numbers):
                entry.weight = copies[number].data_ptr()
            programs.append(native.Program(entries, keep=(x, rows, scratch, *copies)))
        return [(program, native.threads(), out) for program in programs]

    return {"calls": calls, "parts": len(plan[0])}


def replay(program: Any, threads: int, out: Tensor) -> Tensor:
    """Run every layer of a step; the output of the last."""
    program.replay(threads)
    return out


def dense(layer: Layer, count: Callable[[int], int]) -> Held:
    """The bf16 weight in panels."""
    from ramify import native
    from ramify.memory import on_huge_pages

    w = layer.tensors[0].bfloat16()
    packed = native.pack_weight(w)
    copies = [on_huge_pages(packed) for _ in range(count(packed.nbytes))]
    return Held(w.nbytes, w.float(), **captured(layer, copies, native.LinearArgs, dtype=native.BF16))


def low_bit(format: str, activations: str) -> Hold:
    """A weight in a low-bit format, its inputs taken exactly or rounded in the call."""

    def hold(layer: Layer, count: Callable[[int], int]) -> Held:
        from ramify import native
        from ramify.memory import on_huge_pages
        from ramify.quant.packing import packed

        q = layer.quantized(format)
        panels = packed(q)
        copies = [on_huge_pages(panels) for _ in range(count(panels.nbytes))]
        fields = {"dtype": native.LOW_BIT[q.format.kind], "group": q.format.group, "scale_dtype": native.DTYPES[q.scale.dtype]}
        fields["activations"] = native.ACTIVATIONS[activations]
        return Held(q.nbytes, q.dequantize(), **captured(layer, copies, native.LinearLowBitArgs, **fields))

    return hold


def eager(format: str, activations: str) -> Hold:
    """The same, for a Python call each."""

    def hold(layer: Layer, count: Callable[[int], int]) -> Held:
        from ramify import ops

        q = layer.quantized(format)
        copies = [q.to("cpu") for _ in range(count(q.nbytes))]
        for copy in copies:
            ops.linear(layer.tensors[1][:1], copy, activations=activations)  # packs it
        return Held(q.nbytes, q.dequantize(), lambda x: [(x, copy, activations) for copy in copies])

    return hold


def op(x: Tensor, weight: Any, activations: str) -> Tensor:
    """The public op."""
    from ramify import ops

    return ops.linear(x, weight, activations=activations)
