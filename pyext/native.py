"""The CPU extension, as Python sees it: argument structs, ISA levels, one call to run a kernel or a captured step.

The structs mirror csrc/common/args.h field by field (every field is 8 bytes; a test compares the sizes). Nothing here checks
shapes: callers have done so, because below this line a wrong number is a wrong address (law 3).
"""

import ctypes
import os
from collections.abc import Sequence

import torch

from ramify import _cpu

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

F32, BF16, F16, INT8, INT4, FP8, F64 = range(7)
DTYPES = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16, torch.float64: F64}
LOW_BIT = {"int8": INT8, "int4": INT4, "fp8": FP8}
ACTIVATIONS = {"exact": 0, "int8": 1, "int8-group": 2, "bf16": 3}
DRAWN = {"det": 0, "iid": 1, "wor": 2}
COPY, RMS_NORM, SILU_MUL = 0, 1, 2
NO_ACTIVATION, SILU = 0, 1
PANEL, TILE, CHUNK = 32, 64, 512


def _struct(name: str, kernel: int, fields: str) -> type[ctypes.Structure]:
    """A struct from "name:kind" words: p pointer, i int64, d double."""
    kinds = {"p": _P, "i": _I, "d": _D}
    pairs = [(field.split(":")[0], kinds[field.split(":")[1]]) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": pairs, "kernel": kernel, "__doc__": f"{name} of csrc/common/args.h."})


LinearArgs = _struct(
    "LinearArgs",
    0,
    "rows:p x:p x_stride:i K:i N:i weight:p dtype:i prologue:i norm_weight:p eps:d bias:p activation:i residual:p residual_stride:i "
    "out:p out_stride:i scratch:p argmax:p top:p lse:p topk:i topk_ids:p topk_values:p group:i scale_dtype:i zeros:i perm:p activations:i",
)
LinearLowBitArgs = type("LinearLowBitArgs", (LinearArgs,), {"kernel": 12, "__doc__": "LinearArgs of a weight in a low-bit format."})
AttentionArgs = _struct(
    "AttentionArgs",
    1,
    "row_start:p B:i T:i Hq:i Hkv:i D:i q:p q_dtype:i q_stride_b:i q_stride_t:i q_stride_h:i "
    "out:p out_stride_b:i out_stride_t:i out_stride_h:i lse:p lse_stride_b:i lse_stride_t:i scale:d window:i sink:i "
    "prefix_len:p tail_len:p ancestors:p words:i row_depth:p tail_depth:p tail_offset:p kv_dtype:i plain:i k:p v:p page_stride:i "
    "page_table:p table_stride:i page:i k_stride_b:i k_stride_s:i k_stride_h:i v_stride_b:i v_stride_s:i v_stride_h:i "
    "tail_k:p tail_v:p tail_page_stride:i tail_page:p tail_stride_b:i tail_stride_t:i tail_stride_h:i "
    "tail_v_stride_b:i tail_v_stride_t:i tail_v_stride_h:i max_slots:i scratch:p start:p end:p",
)
RopeAppendArgs = _struct(
    "RopeAppendArgs",
    2,
    "rows:p qkv:p stride:i Hq:i Hkv:i D:i q_norm:p k_norm:p eps:d cos:p sin:p position:p draft_slot:p kv_dtype:i k:p v:p page_stride:i "
    "plain:i k_stride_s:i k_stride_h:i v_stride_s:i v_stride_h:i",
)
EmbedArgs = _struct("EmbedArgs", 3, "rows:p tokens:p table:p dtype:i V:i hidden:i out:p out_stride:i")
RmsNormArgs = _struct("RmsNormArgs", 4, "rows:p x:p x_stride:i hidden:i residual:p residual_stride:i weight:p eps:d out:p out_stride:i")
SiluMulArgs = _struct("SiluMulArgs", 5, "rows:p x:p x_stride:i K:i out:p out_stride:i")
RopeArgs = _struct("RopeArgs", 6, "rows:p x:p x_stride_t:i x_stride_h:i H:i D:i cos:p sin:p position:p out:p out_stride_t:i out_stride_h:i")
CopyRowsArgs = _struct("CopyRowsArgs", 7, "rows:p x:p x_stride:i width:i out:p out_stride:i")
CommitArgs = _struct(
    "CommitArgs",
    8,
    "count:p source:p target:p L:i Hkv:i D:i kv_dtype:i k:p v:p layer_stride:i page_stride:i draft_k:p draft_v:p draft_layer_stride:i",
)
RowStatsArgs = _struct(
    "RowStatsArgs", 9, "rows:p logits:p dtype:i V:i stride:i argmax:p top:p lse:p topk:i topk_ids:p topk_values:p scratch:p"
)
PackArgs = _struct("PackArgs", 10, "weight:p dtype:i N:i K:i stride:i out:p")
ProbeArgs = _struct("ProbeArgs", 11, "kind:i data:p bytes:i streams:i repeat:i done:p sink:p")
MergeArgs = _struct("MergeArgs", 13, "rows:i D:i dtype:i o1:p o2:p o1_stride:i o2_stride:i lse1:p lse2:p out:p out_stride:i lse:p")
PlaceArgs = _struct(
    "PlaceArgs",
    14,
    "L:i B:i A:i Hkv:i D:i path:p count:p length:p x:p dtype:i x_stride_l:i x_stride_b:i x_stride_t:i x_stride_h:i "
    "cache:p cache_dtype:i cache_stride_l:i cache_stride_b:i cache_stride_s:i cache_stride_h:i page_table:p table_stride:i page:i",
)
VerifyArgs = _struct(
    "VerifyArgs",
    15,
    "B:i T:i tokens:p parents:p n_rows:p path:p count:p bonus:p argmax:p logits:p dtype:i V:i stride_b:i stride_t:i "
    "temperature:p seed:p position:p q:p q_stride_b:i q_stride_t:i drawn:i scratch:p",
)
ResidualArgs = _struct("ResidualArgs", 16, "rows:i V:i dtype:i p:p q:p p_stride:i q_stride:i u:p ids:p scratch:p")
ColsumArgs = _struct(
    "ColsumArgs",
    17,
    "B:i T:i Hq:i Hkv:i D:i slots:i q:p q_dtype:i q_stride_b:i q_stride_t:i q_stride_h:i k:p kv_dtype:i k_stride_b:i k_stride_s:i "
    "k_stride_h:i page_table:p table_stride:i page:i lse:p lse_stride_b:i lse_stride_t:i prefix_len:p tail_rows:p depth:p scale:d "
    "window:i sink:i out:p out_stride_b:i out_stride_h:i scratch:p",
)
TableDraftArgs = _struct("TableDraftArgs", 19, "B:i T:i V:i W:i table:p table_stride:i roots:p parents:p ranks:p out:p out_stride:i")
TableLearnArgs = _struct("TableLearnArgs", 20, "M:i V:i W:i table:p table_stride:i tokens:p likely:p likely_stride:i")

STRUCTS = (
    LinearArgs,
    AttentionArgs,
    RopeAppendArgs,
    EmbedArgs,
    RmsNormArgs,
    SiluMulArgs,
    RopeArgs,
    CopyRowsArgs,
    CommitArgs,
    RowStatsArgs,
    PackArgs,
    ProbeArgs,
    MergeArgs,
    PlaceArgs,
    VerifyArgs,
    ResidualArgs,
    ColsumArgs,
    TableDraftArgs,
    TableLearnArgs,
)

uniform = _cpu.uniform
draw = _cpu.draw
"""draw(address of f32 logits, V, temperature, seed, position): a token from softmax(logits / temperature), or -1 for weights that have no
finite sum. The random number is `uniform` of the seed and the position."""


def check_words(ancestors: torch.Tensor, used: torch.Tensor | None = None, depth: torch.Tensor | None = None) -> int:
    """Check contiguous ancestor words int64 [B, T, W] of which used[b] rows count; fill depth int32 [B, T] when it is given.

    Returns b * T + i of the first row that does not see itself or sees a later one, or -1.
    """
    return _cpu.check_words(ancestors.data_ptr(), *ancestors.shape, pointer(used) or 0, pointer(depth) or 0)


def levels() -> dict[str, bool]:
    """ISA level -> whether this machine runs it, lowest first."""
    return dict(_cpu.levels())


def isa() -> str:
    """The ISA level in use."""
    return _cpu.level()


def set_isa(name: str) -> None:
    """Use another ISA level from now on; captured steps follow at their next replay.

    Raises ValueError for a level that this build lacks or that this machine cannot run.
    """
    if not _cpu.set_level(name):
        raise ValueError(_refused("set_isa: level", name))


def _refused(what: str, name: str) -> str:
    taken = ", ".join(level for level, runs in levels().items() if runs)
    return f"{what} is {name!r}; takes {taken} on this machine. Unset it or name one of these."


def threads() -> int:
    """Threads of a kernel call: torch's own setting, so that one pool serves both."""
    return torch.get_num_threads()


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's first element; None stays None (a null pointer)."""
    return None if tensor is None else tensor.data_ptr()


def scratch_bytes(args: ctypes.Structure) -> int:
    """Bytes of scratch that this call needs, at the row count its `rows` pointer names now."""
    return _cpu.scratch(args.kernel, ctypes.addressof(args), threads())


def with_scratch(args: ctypes.Structure) -> torch.Tensor:
    """Allocate the call's scratch and set its pointer. Keep the result alive as long as the arguments."""
    buffer = torch.empty(max(1, scratch_bytes(args)) + 64, dtype=torch.uint8, device="cpu")
    args.scratch = (buffer.data_ptr() + 63) // 64 * 64
    return buffer


def run(args: ctypes.Structure) -> None:
    """Run one kernel now, in a parallel region of its own."""
    _cpu.run(args.kernel, ctypes.addressof(args), threads())


class Program:
    """A captured list of kernel calls. `replay` is one native call."""

    def __init__(self, calls: Sequence[ctypes.Structure], keep: Sequence[object] = ()):
        self._keep = (*calls, *keep)
        self._entries = (ctypes.c_int64 * (2 * len(calls)))()
        for i, args in enumerate(calls):
            self._entries[2 * i], self._entries[2 * i + 1] = args.kernel, ctypes.addressof(args)
        self._address, self.length = ctypes.addressof(self._entries), len(calls)

    def replay(self, threads: int) -> None:
        """Run the list in order, on as many threads as its scratch was sized for."""
        _cpu.replay(self._address, self.length, threads)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weight [N, K], f32 or bf16, dense rows -> panels of 32 features (csrc/common/layouts.h), flat, zero-padded."""
    N, K = weight.shape
    even = K + K % 2 if weight.dtype == torch.bfloat16 else K
    out = torch.empty(-(-N // PANEL) * PANEL * even, dtype=weight.dtype, device="cpu")
    run(PackArgs(weight=weight.data_ptr(), dtype=DTYPES[weight.dtype], N=N, K=K, stride=weight.stride(0), out=out.data_ptr()))
    return out


if (_forced := os.environ.get("RAMIFY_ISA")) and not _cpu.set_level(_forced):
    raise ValueError(_refused("RAMIFY_ISA", _forced))
