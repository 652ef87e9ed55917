"""QuantizedWeight: the one form, on disk and in memory, that every low-bit weight is brought into."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ramify.quant.formats import BLOCK, Format

CODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
SCALES = (torch.float16, torch.bfloat16, torch.float32)
SYMMETRIC_ZERO = 8
"""The zero of int4 codes without zero points."""


@dataclass(eq=False)
class QuantizedWeight:
    """A weight [N, K] in a low-bit format: w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], where g = k // group.

    codes: int8 [N, K]; or uint8 [N, K / 2] for int4, low nibble first, unsigned; or float8_e4m3fn [N, K]. scale: float16, bfloat16 or
    float32, [N, K / group], [N, 1] for a whole row, [ceil(N / 128), ceil(K / 128)] for fp8 blocks. zero: float16 [N, K / group]
    for int4 with zero points, whole or fractional; otherwise None, and the zero is 8 for int4, 0 for the rest. perm: int32 [K] or
    None: column j of the codes multiplies input perm[j] (act-order). Raises ValueError for shapes, TypeError for dtypes.

    A tensor may be replaced or changed in place: its version counter tells. Tensors of inference mode, which have none, are copied
    once; a change through `.data` is not seen.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    perm: Tensor | None = None
    _packed: tuple[tuple[Tensor | None, ...], Any, Tensor] | None = field(default=None, init=False, repr=False)
    """Kernel-ready bytes behind the tensors that they were made of and their state then: what `packing.packed` has made."""

    def __post_init__(self) -> None:
        f, wanted = self.format, CODES[self.format.kind]
        _dtype("codes", self.codes, (wanted,))
        _dtype("scale", self.scale, SCALES)
        if self.codes.ndim != 2 or 0 in self.codes.shape:
            raise ValueError(f"QuantizedWeight: codes are {list(self.codes.shape)}; takes two axes, none empty.")
        N, K = self.shape
        if f.kind == "int4" and K % f.group:
            raise ValueError(f"QuantizedWeight: K is {K}; {f.name} takes multiples of {f.group}. Choose a smaller group.")
        groups = f.scale_shape(N, K)
        _shape("scale", self.scale, groups)
        if (self.zero is not None) != f.zero_point:
            raise ValueError(f"QuantizedWeight: zero is {'given' if self.zero is not None else 'None'}; {f.name} takes the other.")
        if self.zero is not None:
            _dtype("zero", self.zero, (torch.float16,))
            _shape("zero", self.zero, groups)
        if self.perm is not None:
            _dtype("perm", self.perm, (torch.int32,))
            _shape("perm", self.perm, (K,))
            if not torch.equal(self.perm.long().sort().values.cpu(), torch.arange(K, device="cpu")):
                raise ValueError(f"QuantizedWeight: perm is not a permutation; takes every input 0 to {K - 1} once.")
        for name, tensor in self.state_dict().items():
            if tensor.is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, tensor.clone())

    @property
    def shape(self) -> tuple[int, int]:
        """N outputs and K inputs."""
        N, width = self.codes.shape
        return N, 2 * width if self.format.kind == "int4" else width

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 [N, K], inputs in their own order."""
        N, K = self.shape
        if self.format.kind == "int4":
            low, high = self.codes & 15, self.codes >> 4
            w = torch.stack([low, high], -1).view(N, K).float()
        else:
            w = self.codes.float()
        scale = self.scale.float()
        if self.format.kind == "fp8" and self.format.group:
            w = w * scale.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
        else:
            w = w.view(N, scale.shape[1], -1)
            if self.format.kind == "int4":
                w = w - (SYMMETRIC_ZERO if self.zero is None else self.zero.float()[..., None])
            w = (w * scale[..., None]).view(N, K)
        if self.perm is None:
            return w
        return torch.empty_like(w).index_copy_(1, self.perm.long(), w)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same weight on another device."""
        return QuantizedWeight(self.format, **{name: tensor.to(device) for name, tensor in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, those that are None left out: what a checkpoint stores beside `format.name`."""
        named = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "perm": self.perm}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def stack(cls, parts: "list[QuantizedWeight]") -> "QuantizedWeight | None":
        """Weights that share their input as one weight, outputs one after another; None where their formats or inputs differ."""
        first = parts[0]
        alike = all(p.format == first.format and p.shape[1] == first.shape[1] and p.scale.dtype == first.scale.dtype for p in parts)
        blocks_meet = not (first.format.kind == "fp8" and first.format.group) or all(p.shape[0] % BLOCK == 0 for p in parts[:-1])
        one_order = all(_equal(p.perm, first.perm) for p in parts)
        if not (alike and blocks_meet and one_order):
            return None
        joined = {name: torch.cat([p.state_dict()[name] for p in parts]) for name in first.state_dict() if name != "perm"}
        return cls(first.format, **joined, perm=first.perm)


def pack_nibbles(q: Tensor) -> Tensor:
    """uint8 [..., K] of values 0 to 15 -> uint8 [..., K / 2], low nibble first."""
    q = q.to(torch.uint8)
    return q[..., 0::2] | q[..., 1::2] << 4


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _dtype(name: str, tensor: Tensor, taken: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in taken:
        came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"QuantizedWeight: {name} is {came}; takes {' or '.join(map(str, taken))}.")


def _shape(name: str, tensor: Tensor, taken: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != taken:
        raise ValueError(f"QuantizedWeight: {name} is {list(tensor.shape)}; takes {list(taken)}.")
