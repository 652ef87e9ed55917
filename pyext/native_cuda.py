"""The CUDA kernels, as Python sees them: argument structs, one call to launch a kernel, and the driver's answer about this machine.

The structs mirror csrc/common/args_cuda.h field by field (every field is 8 bytes; a test compares the sizes). Nothing here checks
shapes: callers have done so. The module loads without CUDA; the extension is loaded, and the driver asked, at the first question.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

F32, BF16, F16, F64 = range(4)
TYPES = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16, torch.float64: F64}
MODES = {"det": 0, "iid": 1, "wor": 2}
VARIANTS = {"by rows": 0, "few rows": 1, "many rows": 2}
WEIGHTS = {"dense": 0, "int4": 1, "int8": 2, "fp8": 3}
NO_GPU = (35, 100)  # cudaErrorInsufficientDriver, cudaErrorNoDevice


class Library(Protocol):
    """What launches kernels: the extension module ramify._cuda, or the same sources under the emulator."""

    def run(self, kernel: int, args: int, stream: int) -> int:
        """Launch a kernel on the struct at an address; returns a cudaError_t."""

    def message(self, error: int) -> str:
        """Return the runtime's words for a cudaError_t."""

    def size(self, kernel: int) -> int:
        """Return the bytes of a kernel's struct, or -1."""

    def stats_scratch(self, rows: int, V: int, topk: int) -> int:
        """Return the bytes of scratch that row_stats needs."""

    def attention_scratch(self, args: int) -> int:
        """Return the bytes of scratch that attention needs for the struct at an address."""

    def attention_variant(self, args: int) -> int:
        """Return which kernel attention takes for the struct at an address: ops._cuda's MMA, COLUMNS or ROWS."""


def _struct(name: str, kernel: int, fields: str) -> type[ctypes.Structure]:
    """A struct from "name:kind" words: p pointer, i int64, d double."""
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
    pairs = [(field.split(":")[0], kinds[field.split(":")[1]]) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": pairs, "kernel": kernel, "__doc__": f"{name} of csrc/common/args_cuda.h."})


FillArgs = _struct("FillArgs", 0, "out:p count:i value:i")
RmsNormArgs = _struct(
    "RmsNormArgs",
    1,
    "live:p rows:i hidden:i type:i x:p x_stride:i residual:p residual_stride:i sum:p sum_stride:i weight:p weight_type:i eps:d out:p "
    "out_stride:i",
)
SiluMulArgs = _struct("SiluMulArgs", 2, "live:p rows:i K:i type:i x:p x_stride:i out:p out_stride:i")
EmbedArgs = _struct("EmbedArgs", 3, "live:p rows:i hidden:i V:i ids:p table:p table_type:i table_stride:i out:p type:i out_stride:i")
RopeArgs = _struct(
    "RopeArgs",
    4,
    "live:p rows:i H:i D:i half:i positions:i type:i x:p x_stride_t:i x_stride_h:i cos:p sin:p position:p out:p out_stride_t:i "
    "out_stride_h:i",
)
RopeAppendArgs = _struct(
    "RopeAppendArgs",
    5,
    "live:p rows:i Hq:i Hkv:i D:i half:i positions:i type:i qkv:p qkv_stride:i q_norm:p k_norm:p norm_type:i eps:d cos:p sin:p position:p "
    "slot:p q:p q_stride_t:i q_stride_h:i cache_type:i slots:i k:p v:p k_stride_s:i k_stride_h:i v_stride_s:i v_stride_h:i",
)
CommitArgs = _struct(
    "CommitArgs",
    6,
    "B:i A:i T:i L:i Hkv:i D:i tail_type:i cache_type:i tail_k:p tail_v:p "
    "tail_k_stride_l:i tail_k_stride_b:i tail_k_stride_t:i tail_k_stride_h:i "
    "tail_v_stride_l:i tail_v_stride_b:i tail_v_stride_t:i tail_v_stride_h:i "
    "k:p v:p k_stride_l:i k_stride_b:i k_stride_s:i k_stride_h:i v_stride_l:i v_stride_b:i v_stride_s:i v_stride_h:i "
    "path:p path_stride:i count:p length:p page_table:p table_stride:i table_width:i page:i pages:i",
)
RowStatsArgs = _struct(
    "RowStatsArgs",
    7,
    "B:i T:i V:i type:i logits:p stride_b:i stride_t:i n_rows:p argmax:p lse:p top:p topk:i values:p ids:p temperature:p weights:p "
    "scratch:p tickets:p",
)
VerifyGreedyArgs = _struct("VerifyGreedyArgs", 8, "B:i T:i tokens:p parents:p argmax:p n_rows:p path:p count:p bonus:p")
MergeStatesArgs = _struct(
    "MergeStatesArgs", 9, "rows:i D:i type:i o1:p o2:p o1_stride:i o2_stride:i lse1:p lse2:p out:p out_stride:i lse:p"
)
VerifySampleArgs = _struct(
    "VerifySampleArgs",
    10,
    "B:i T:i V:i mode:i logits:p type:i stride_b:i stride_t:i q:p q_stride_b:i q_stride_t:i tokens:p parents:p n_rows:p temperature:p "
    "seed:p position:p argmax:p top:p weights:p scale:p drawn:p path:p count:p bonus:p",
)
ResidualSampleArgs = _struct("ResidualSampleArgs", 11, "rows:i V:i type:i p:p q:p p_stride:i q_stride:i u:p ids:p")
AttentionArgs = _struct(
    "AttentionArgs",
    12,
    "B:i T:i Hq:i Hkv:i D:i type:i q:p q_stride_b:i q_stride_t:i q_stride_h:i out:p out_stride_b:i out_stride_t:i out_stride_h:i "
    "lse:p lse_stride_b:i lse_stride_t:i scale:d window:i sink:i prefix_len:p tail_rows:p ancestors:p words:i start:p end:p "
    "k:p v:p k_stride_b:i k_stride_s:i k_stride_h:i v_stride_b:i v_stride_s:i v_stride_h:i "
    "page_table:p table_stride:i table_width:i page:i pages:i tail_k:p tail_v:p "
    "tail_k_stride_b:i tail_k_stride_t:i tail_k_stride_h:i tail_v_stride_b:i tail_v_stride_t:i tail_v_stride_h:i "
    "chunk:i scratch:p variant:i",
)
ColsumArgs = _struct(
    "ColsumArgs",
    13,
    "B:i T:i Hq:i Hkv:i D:i type:i q:p q_stride_b:i q_stride_t:i q_stride_h:i k:p k_stride_b:i k_stride_s:i k_stride_h:i page_table:p "
    "table_stride:i table_width:i page:i pages:i lse:p lse_stride_b:i lse_stride_t:i prefix_len:p tail_rows:p ancestors:p words:i "
    "scale:d window:i sink:i out:p out_stride_b:i out_stride_h:i",
)
MmaArgs = _struct("MmaArgs", 14, "type:i a:p b:p c:p d:p")
LinearArgs = _struct(
    "LinearArgs",
    15,
    "live:p rows:i N:i K:i type:i x:p x_stride:i kind:i weight:p weight_stride:i scale:p scale_type:i scale_stride:i group:i lines:i "
    "zero:p zero_stride:i perm:p bias:p bias_type:i silu:i residual:p residual_type:i residual_stride:i out:p out_stride:i "
    "shares:i scratch:p tickets:p variant:i",
)
TableDraftArgs = _struct("TableDraftArgs", 16, "B:i T:i V:i W:i table:p table_stride:i roots:p parents:p ranks:p out:p out_stride:i")
TableLearnArgs = _struct("TableLearnArgs", 17, "M:i V:i W:i table:p table_stride:i tokens:p likely:p likely_stride:i")

STRUCTS = (
    FillArgs,
    RmsNormArgs,
    SiluMulArgs,
    EmbedArgs,
    RopeArgs,
    RopeAppendArgs,
    CommitArgs,
    RowStatsArgs,
    VerifyGreedyArgs,
    MergeStatesArgs,
    VerifySampleArgs,
    ResidualSampleArgs,
    AttentionArgs,
    ColsumArgs,
    MmaArgs,
    LinearArgs,
    TableDraftArgs,
    TableLearnArgs,
)

_stand_in: Library | None = None
_running: tuple[Tensor, ...] = ()
_tickets: dict[tuple[torch.device, int], Tensor] = {}


class CudaError(RuntimeError):
    """A launch that the CUDA runtime refused or that failed; the message is the runtime's."""


def missing() -> str:
    """Why CUDA kernels cannot run here; empty when they can. Asks the driver once."""
    return "" if _stand_in is not None else _missing()


@lru_cache
def _missing() -> str:
    if find_spec("ramify._cuda") is None:
        return "ramify._cuda is not built"
    answer = import_module("ramify._cuda").probe()
    if answer["error"] in NO_GPU:
        return f"no GPU here ({answer['message']})"
    if answer["error"]:
        raise CudaError(f"the CUDA driver answers {answer['error']}: {answer['message']}")
    return "" if answer["devices"] else "no GPU here"


def library() -> Library:
    """What launches kernels."""
    return import_module("ramify._cuda") if _stand_in is None else _stand_in


@contextmanager
def stand_in(other: Library) -> Iterator[None]:
    """Launch kernels through `other`, on tensors of the CPU, until the block ends."""
    global _stand_in
    before, _stand_in = _stand_in, other
    _tickets.clear()
    try:
        yield
    finally:
        _stand_in = before
        _tickets.clear()


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element; None stays None (a null pointer)."""
    return None if tensor is None else tensor.data_ptr()


def run(args: ctypes.Structure, *tensors: Tensor | None) -> None:
    """Launch a kernel on the current stream of the tensors' device. `tensors`: what the pointers in args name.

    Raises CudaError with the runtime's words when the launch fails.
    """
    global _running
    _running = tuple(t for t in tensors if t is not None)
    device = _running[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            error = library().run(args.kernel, ctypes.addressof(args), torch.cuda.current_stream().cuda_stream)
    else:
        error = library().run(args.kernel, ctypes.addressof(args), 0)
    _running = ()
    if error:
        raise CudaError(f"{type(args).__name__}: {library().message(error)}")


def running() -> tuple[Tensor, ...]:
    """The tensors of the call that is being launched, for a stand-in that records it."""
    return _running


def tickets(device: torch.device, count: int) -> Tensor:
    """`count` zeros that a kernel counts with and leaves zero; one set for each stream, so that launches never share them."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _tickets.get((device, stream))
    if held is None or len(held) < count:
        held = _tickets[device, stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return held
