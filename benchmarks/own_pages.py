"""The tree attention kernel on the model's own pages (csrc/common/layouts.h), as a captured step calls it: one native call, no checks.

What a model's step pays, where `ramify.ops.tree_attention` shows what a user's plain tensors pay.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

PAGE, PANEL = 64, 32


def key_pages(k: Tensor) -> Tensor:
    """Keys [S, Hkv, D] -> [pages, Hkv, 64 D]: panels of 32 slots, features outside, pairs of features in a bf16 lane."""
    S, H, D = k.shape
    lane = 2 if k.dtype == torch.bfloat16 else 1
    k = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, -S % PAGE)).view(-1, 2, PANEL, H, D // lane, lane)
    return k.permute(0, 3, 1, 4, 2, 5).reshape(-1, H, PAGE * D).contiguous()


def value_pages(v: Tensor) -> Tensor:
    """Values [S, Hkv, D] -> [pages, Hkv, 64 D]: rows, in bf16 two slots interleaved."""
    S, H, D = v.shape
    lane = 2 if v.dtype == torch.bfloat16 else 1
    v = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, -S % PAGE)).view(-1, PAGE // lane, lane, H, D)
    return v.permute(0, 3, 1, 4, 2).reshape(-1, H, PAGE * D).contiguous()


class Call:
    """The kernel's arguments for one tree, and all the memory they name."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, tail_k: Tensor, tail_v: Tensor, visible: Tensor, ancestors: Tensor) -> None:
        """q f32 [T, Hq, D]; k, v [S, Hkv, D]; tail_k, tail_v [T, Hkv, D]; visible bool [T, T]; ancestors int64 [T, W]."""
        from ramify import native

        (T, Hq, D), S, Hkv = q.shape, k.shape[0], k.shape[1]
        self.out = torch.empty(1, T, Hq, D)
        depth = (visible.sum(1) - 1).int()
        pages = key_pages(k)
        self.memory: dict[str, Tensor] = {
            "q": q.contiguous(),
            "out": self.out,
            "row_start": _ints(0, T),
            "prefix_len": _ints(S),
            "tail_len": _ints(T),
            "ancestors": ancestors.contiguous(),
            "row_depth": depth,
            "tail_depth": depth,
            "tail_offset": _ints(0),
            "k": pages,
            "v": value_pages(v),
            "page_table": torch.arange(len(pages), dtype=torch.int32),
            "tail_k": key_pages(tail_k),
            "tail_v": value_pages(tail_v),
            "tail_page": _ints(0),
        }
        sizes = {"B": 1, "T": T, "Hq": Hq, "Hkv": Hkv, "D": D, "words": ancestors.shape[1], "page": PAGE, "max_slots": S + T}
        strides = {"q_stride_t": Hq * D, "q_stride_h": D, "out_stride_t": Hq * D, "out_stride_h": D, "table_stride": len(pages)}
        strides |= {"page_stride": Hkv * PAGE * D, "tail_page_stride": Hkv * PAGE * D}
        addresses = {name: tensor.data_ptr() for name, tensor in self.memory.items()}
        self.args: ctypes.Structure = native.AttentionArgs(
            scale=D**-0.5, q_dtype=native.F32, kv_dtype=native.DTYPES[k.dtype], **sizes, **strides, **addresses
        )
        self.memory["scratch"] = native.with_scratch(self.args)
        self.run_native: Any = native.run

    def run(self) -> Tensor:
        """o f32 [1, T, Hq, D], overwritten by the next run."""
        self.run_native(self.args)
        return self.out


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
