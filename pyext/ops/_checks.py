"""What an op asks of its arguments before a pointer leaves Python, and how it says no.

Every message: function, argument, what came; what is taken. What to do.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ramify import backends
from ramify.checks import INT32_MAX, INT64_MAX, show, whole
from ramify.tree import MAX_ROWS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT32, INT64 = (torch.int32,), (torch.int64,)
INDICES = (torch.int32, torch.int64)

Results = Sequence[tuple[Sequence[int], torch.dtype]]
"""Shape and dtype of every output of an op."""

_FILLED = {"D", "H", "Hkv", "K", "V", "page"}  # axes that are summed over, divided by or looked up in: never empty
_CASTS = {torch.int32: "int()", torch.int64: "long()", torch.float32: "float()"}


class Shapes:
    """Checks the tensors of one call. Axes are letters; a letter means the same size in every tensor of the call. All are on one
    device: that of `like`, where it is given, else of the first.

    `check = Shapes("linear"); check("x", x, "... K", FLOATS); check("weight", weight, "N K", FLOATS)`
    """

    __slots__ = ("device", "first", "op", "sizes")

    def __init__(self, op: str, like: Tensor | None = None) -> None:
        self.op = op
        self.sizes: dict[str, tuple[int, str]] = {}  # letter -> its size, and the tensor that said so
        self.device: torch.device | None = None if like is None else like.device
        self.first = "the first input"

    def __call__(self, name: str, x: Tensor, axes: str, dtypes: Sequence[torch.dtype], dense: bool = True) -> None:
        """x has these axes ("..." at the front stands for any) and one of these dtypes, on the device of the first tensor."""
        if x.dtype not in dtypes:
            self.dtype(name, x.dtype, dtypes, f" [{_spell(axes)}].{_cast(name, dtypes)}")
        device = x.device
        if self.device is None:
            self.device, self.first = device, name
        elif device != self.device:
            raise ValueError(
                f'{self.op}: {name} is on {device} and {self.first} on {self.device}; takes one device. Use {name}.to("{self.device}").'
            )
        free, letters = _letters(axes)
        shape = x.shape
        more = len(shape) - len(letters)
        if more < 0 or (more and not free):
            raise ValueError(f"{self.op}: {name} is {list(shape)}; takes {len(letters)} axes{' or more' if free else ''} [{_spell(axes)}].")
        for letter, size in zip(letters, shape[more:] if more else shape):
            known, source = self.sizes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(f"{self.op}: {name} is {list(shape)}; takes [{_spell(axes)}] with {letter} = {known}, as in {source}.")
            if size == 0 and letter in _FILLED:
                raise ValueError(f"{self.op}: {name} is {list(shape)}; takes [{_spell(axes)}] with {letter} of 1 or more.")
        if dense and shape and x.stride(-1) != 1 and shape[-1] > 1:
            raise ValueError(f"{self.op}: the last axis of {name} has stride {x.stride(-1)}; takes 1. Use {name}.contiguous().")

    def dtype(self, name: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype], more: str = ".") -> None:
        """dtype is one of these."""
        if dtype not in dtypes:
            raise TypeError(f"{self.op}: {name} is {_short(dtype)}; takes {_dtypes(dtypes)}{more}")

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
        if x.shape != shape:
            raise ValueError(f"{self.op}: {name} is {list(x.shape)}; takes {list(shape)}, the shape of the result.")

    def fail(self, what: str, takes: str, do: str = "") -> ValueError:
        """A ValueError in the common form, to be raised by the caller."""
        return ValueError(f"{self.op}: {what}; takes {takes}.{' ' + do if do else ''}")


def check_addresses(op: str, named: Iterable[tuple[str, object]]) -> None:
    """Each tensor begins at a multiple of its element's size: anything else is a fault on a GPU. Real tensors only, never fake ones."""
    for name, x in named:
        if isinstance(x, Tensor) and x.data_ptr() % x.itemsize:
            takes = f"takes a multiple of {x.itemsize}, the bytes of {_short(x.dtype)}. Use {name}.clone()."
            raise ValueError(f"{op}: {name} begins at address {x.data_ptr():#x}; {takes}")


def check_cache(check: Shapes, k_name: str, k: Tensor, v_name: str, v: Tensor, page_table: Tensor | None, layers: str = "") -> None:
    """k and v of a cache: [B, S, Hkv, D], or [pages, page, Hkv, D] with a page table [B, P]; `layers`: axes that stand before."""
    axes = layers + ("B S Hkv D" if page_table is None else "pages page Hkv D")
    check(k_name, k, axes, FLOATS)
    check(v_name, v, axes, (k.dtype,))
    if page_table is not None:
        check("page_table", page_table, "B P", INT32)


def window_of(op: str, window: int | None, sink: int | None) -> tuple[int, int]:
    """A window and its sink as kernels take them, 0 for none. Positions are 32 bits wide: beyond all of them one is as good as another."""
    width = whole("window", window, 1, op, INT64_MAX) if window is not None else 0
    sink = whole("sink", sink, 0, op, INT64_MAX) if sink is not None else 0
    return min(width, INT32_MAX), min(sink, INT32_MAX)


def check_window(check: Shapes, window: int, sink: int) -> None:
    """A window and the sink behind it; 0 is none."""
    for name, value in (("window", window), ("sink", sink)):
        if value < 0:
            raise check.fail(f"{name} is {value}", "0 or more")
    if sink and not window:
        raise check.fail(f"sink is {sink} and window is None", "a sink behind a window", "Give a window too, or leave sink out.")


def tensor(op: str, name: str, x: object) -> Tensor:
    """x, which is a tensor of the ordinary kind: strided, not nested, not one of torch's quantized ones."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is {show(x)}; takes a tensor.")
    if x.is_nested:
        raise TypeError(f"{op}: {name} is a nested tensor; takes a plain one. Use torch.nested.to_padded_tensor({name}, 0.0).")
    if x.is_quantized:
        raise TypeError(f"{op}: {name} is a quantized tensor of torch; takes a plain one. Use {name}.dequantize().")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} is a {_short(x.layout)} tensor; takes a strided one. Use {name}.to_dense().")
    return x


def outputs(op: str, out: object, count: int) -> tuple[Tensor, ...]:
    """`out` as a tuple of `count` tensors."""
    got = out if isinstance(out, tuple) else (out,)
    if len(got) != count or any(not isinstance(x, Tensor) for x in got):
        takes = "a tensor" if count == 1 else f"a tuple of {count} tensors, in the order they are returned"
        came = f"tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
        raise TypeError(f"{op}: out is {came}; takes {takes}.")
    for i, x in enumerate(got):
        tensor(op, "out" if count == 1 else f"out[{i}]", x)
    return got


@lru_cache
def _letters(axes: str) -> tuple[bool, tuple[str, ...]]:
    """Whether more axes may stand in front, and the letters of the others."""
    letters = axes.split()
    free = letters[0] == "..."
    return free, tuple(letters[free:])


def _spell(axes: str) -> str:
    return ", ".join(axes.split())


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _dtypes(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(_short(d) for d in dtypes)


def _cast(name: str, dtypes: Sequence[torch.dtype]) -> str:
    return f" Use {name}.{_CASTS[dtypes[0]]}." if dtypes[0] in _CASTS else ""


def check_pages(op: str, page_table: Tensor, length: Tensor, k: Tensor) -> None:
    """Every page that holds one of the first length[b] slots is one of k [pages, slots of a page, ...]."""
    for b, n in enumerate(length.tolist()):
        pages = page_table[b, : -(-n // k.shape[1])]
        if n and not (0 <= int(pages.min()) and int(pages.max()) < k.shape[0]):
            i = int(((pages < 0) | (pages >= k.shape[0])).nonzero()[0])
            raise ValueError(f"{op}: page_table[{b}, {i}] is {int(pages[i])}; takes 0 to {k.shape[0] - 1}, the pages of k.")


def check_heads(op: str, Hq: int, Hkv: int) -> None:
    """Every KV head serves as many query heads."""
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(
            f"{op}: q has {Hq} heads and k has {Hkv}; q heads must be a multiple of k heads. Axes are q [B, T, Hq, D], k [B, S, Hkv, D]."
        )


def check_tree(check: Shapes, q: Tensor, Hkv: int, ancestors: Tensor | None, scale: float, window: int, sink: int) -> None:
    """Heads, rows (none at all included), words and numbers of an attention by the rows of trees."""
    _, T, Hq, _ = q.shape
    check_heads(check.op, Hq, Hkv)
    if T > MAX_ROWS:
        raise check.fail(f"q has {T} rows a sequence", f"1 to {MAX_ROWS}", "Lower the rows of the tree, or feed them in chunks.")
    if ancestors is not None and 64 * ancestors.shape[2] < T:
        raise check.fail(f"ancestors has {ancestors.shape[2]} words a row", f"{-(-T // 64)} for {T} rows")
    if not math.isfinite(scale):
        raise check.fail(f"scale is {scale}", "a finite number")
    check_window(check, window, sink)


def slots_of(k: Tensor, page_table: Tensor | None) -> int:
    """Slots of a sequence in a cache [B, S, ...], or in the pages of its table."""
    return k.shape[1] * (1 if page_table is None else page_table.shape[1])


def check_tree_values(
    op: str, q: Tensor, k: Tensor, prefix_len: Tensor, page_table: Tensor | None, tail_rows: Tensor | None, ancestors: Tensor | None
) -> None:
    """Lengths fit their tensors, pages exist, and every row in use sees itself and no later row."""
    for name, lengths, most in (("prefix_len", prefix_len, slots_of(k, page_table)), ("tail_rows", tail_rows, q.shape[1])):
        for b, n in enumerate([] if lengths is None else lengths.tolist()):
            if not 0 <= n <= most:
                raise ValueError(f"{op}: {name}[{b}] is {n}; takes 0 to {most}.")
    if page_table is not None:
        check_pages(op, page_table, prefix_len, k)
    if ancestors is not None and (wrong := wrong_row(ancestors, tail_rows)):
        b, i = wrong
        words = [f"{int(word) % 2**64:#x}" for word in ancestors[b, i]]
        raise ValueError(
            f"{op}: ancestors[{b}, {i}] is {', '.join(words)}; takes the row's own bit and bits of rows before it. "
            "Order the rows so that a parent stands before its child."
        )


def wrong_row(ancestors: Tensor, used: Tensor | None) -> tuple[int, int] | None:
    """The first row (b, i) of ancestor words [B, T, W] that lacks its own bit or has a later row's; of used[b] rows, or of all T."""
    judge = _first_wrong if backends.missing("cpu") else backends.native().check_words
    row = judge(ancestors.contiguous(), used)
    return None if row < 0 else divmod(row, ancestors.shape[1])


def _first_wrong(ancestors: Tensor, used: Tensor | None) -> int:
    """What native.check_words returns, in plain torch: b * T + i of that row, or -1."""
    _, T, W = ancestors.shape
    i, w = torch.arange(T)[:, None], torch.arange(W)
    own = torch.where(w == i // 64, torch.ones(1, dtype=torch.int64) << i % 64, 0)
    upto = torch.where(w < i // 64, -1, own | own - (own != 0).long())  # bits of rows up to i, word by word
    wrong = ((ancestors & own != own) | (ancestors & ~upto != 0)).any(-1)
    if used is not None:
        wrong &= torch.arange(T) < used[:, None]
    first = wrong.flatten().nonzero()
    return int(first[0]) if len(first) else -1
