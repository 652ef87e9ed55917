"""What an op asks of its arguments before a pointer leaves Python, and how it says no.

Every message: function, argument, what came; what is taken. What to do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ramify.checks import show

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT32, INT64 = (torch.int32,), (torch.int64,)
INDICES = (torch.int32, torch.int64)

_CASTS = {torch.int32: "int()", torch.int64: "long()", torch.float32: "float()"}


class Shapes:
    """Checks the tensors of one call. Axes are letters; a letter means the same size in every tensor of the call.

    `check = Shapes("linear"); check("x", x, "... K", FLOATS); check("weight", weight, "N K", FLOATS)`
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.source: dict[str, str] = {}
        self.device: torch.device | None = None

    def __call__(self, name: str, x: Tensor, axes: str, dtypes: Sequence[torch.dtype], dense: bool = True) -> None:
        """x has these axes ("..." at the front stands for any) and one of these dtypes, on the device of the first tensor."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.op}: {name} is {show(x)}; takes a tensor [{_spell(axes)}].")
        if x.dtype not in dtypes:
            raise TypeError(f"{self.op}: {name} is {_short(x.dtype)}; takes {_dtypes(dtypes)} [{_spell(axes)}].{_cast(name, dtypes)}")
        self.sized(name, x.shape, axes, x.device)
        if dense and x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{self.op}: the last axis of {name} has stride {x.stride(-1)}; takes 1. Use {name}.contiguous().")

    def sized(self, name: str, shape: Sequence[int], axes: str, device: torch.device) -> None:
        """The same of something that is not one tensor: its axes and its device."""
        if self.device is None:
            self.device, self.source["device"] = device, name
        elif device != self.device:
            raise ValueError(
                f"{self.op}: {name} is on {device} and {self.source['device']} on {self.device}; takes one device. "
                f'Use {name}.to("{self.device}").'
            )
        letters = axes.split()
        free = letters[0] == "..."
        named = letters[1:] if free else letters
        if len(shape) < len(named) or (not free and len(shape) != len(named)):
            raise ValueError(f"{self.op}: {name} is {list(shape)}; takes {len(named)} axes{' or more' if free else ''} [{_spell(axes)}].")
        for letter, size in zip(named, shape[len(shape) - len(named) :]):
            known = self.sizes.get(letter)
            if known is None:
                self.sizes[letter], self.source[letter] = size, name
            elif known != size:
                raise ValueError(
                    f"{self.op}: {name} is {list(shape)}; takes [{_spell(axes)}] with {letter} = {known}, as in {self.source[letter]}."
                )

    def same_shape(self, name: str, x: Tensor, other: str, like: Sequence[int]) -> None:
        """x has exactly this shape, which is `other`'s."""
        if tuple(x.shape) != tuple(like):
            raise ValueError(f"{self.op}: {name} is {list(x.shape)}; takes {list(like)}, the shape of {other}.")

    def same_dtype(self, name: str, x: Tensor, other: str, dtype: torch.dtype) -> None:
        """x has this dtype, which is `other`'s."""
        if x.dtype != dtype:
            raise TypeError(f"{self.op}: {name} is {_short(x.dtype)}; takes {_short(dtype)}, as {other} is. Use {name}.to({other}.dtype).")

    def out(self, name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        """An output tensor: the right shape and dtype, its last axis dense."""
        self(name, x, "...", (dtype,))
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{self.op}: {name} is {list(x.shape)}; takes {list(shape)}, the shape of the result.")

    def fail(self, what: str, takes: str, do: str = "") -> ValueError:
        """A ValueError in the common form, to be raised by the caller."""
        return ValueError(f"{self.op}: {what}; takes {takes}.{' ' + do if do else ''}")


def check_cache(check: Shapes, k_name: str, k: Tensor, v_name: str, v: Tensor, page_table: Tensor | None) -> None:
    """k and v of a cache: [B, S, Hkv, D], or [pages, page, Hkv, D] with a page table [B, P]."""
    axes = "B S Hkv D" if page_table is None else "pages page Hkv D"
    check(k_name, k, axes, FLOATS)
    check(v_name, v, axes, (k.dtype,))
    if page_table is not None:
        check("page_table", page_table, "B P", INT32)


def outputs(op: str, out: object, count: int) -> tuple[Tensor, ...] | None:
    """`out` as a tuple of `count` tensors, or None."""
    if out is None:
        return None
    got = (out,) if isinstance(out, Tensor) else out
    if not isinstance(got, tuple) or len(got) != count:
        takes = "a tensor" if count == 1 else f"a tuple of {count} tensors, in the order they are returned"
        raise TypeError(f"{op}: out is {type(out).__name__}{'' if not isinstance(got, tuple) else f' of {len(got)}'}; takes {takes}.")
    return got


def _spell(axes: str) -> str:
    return ", ".join(axes.split())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(_short(d) for d in dtypes)


def _cast(name: str, dtypes: Sequence[torch.dtype]) -> str:
    return f" Use {name}.{_CASTS[dtypes[0]]}." if dtypes[0] in _CASTS else ""
