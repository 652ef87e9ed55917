"""Before addresses are taken: who shares memory with whom, and ids in the width that kernels read.

Real tensors only, never fake ones: the answers come from addresses.
"""

import torch
from torch import Tensor


def crosses(a: Tensor, b: Tensor) -> bool:
    """Whether the storages of a and b have a byte in common. Cheap, and True for any two views of one buffer."""
    one, other = a.untyped_storage(), b.untyped_storage()
    first, second = one.data_ptr(), other.data_ptr()
    return first < second + other.nbytes() and second < first + one.nbytes()


def apart(x: Tensor, written: Tensor) -> Tensor:
    """x, or a copy of it where a tensor that is written while x is read may hold it."""
    return x.clone() if crosses(x, written) else x


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether a and b have a byte in common. Exact; marks every byte of a where their storages cross."""
    if a.numel() == 0 or b.numel() == 0 or not crosses(a, b):
        return False
    low = min(a.data_ptr(), b.data_ptr())
    marks = torch.zeros(max(_end(a), _end(b)) - low, dtype=torch.bool, device=a.device)
    _bytes(marks, a, low).fill_(True)
    return bool(_bytes(marks, b, low).any())


def ids32(ids: Tensor) -> Tensor:
    """Ids as dense int32; one beyond int32, which equals none that a kernel makes, becomes the lowest number."""
    if ids.dtype == torch.int64:
        ids = ids.masked_fill(ids != ids.int(), -(1 << 31)).int()
    return ids.contiguous()


def folded(x: Tensor) -> bool:
    """Whether two elements of x may lie at one address, as after expand: some axis steps over less than the axes inside it span."""
    if x.is_contiguous():
        return False
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride < reach:
            return x.numel() > 0
        reach += (size - 1) * stride
    return False


def _end(x: Tensor) -> int:
    """The address behind the last byte of x."""
    return x.data_ptr() + x.itemsize * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())))


def _bytes(marks: Tensor, x: Tensor, low: int) -> Tensor:
    """The marks of x's bytes, where marks[0] stands for address `low`."""
    return marks.as_strided((*x.shape, x.itemsize), (*(x.itemsize * s for s in x.stride()), 1), x.data_ptr() - low)
