"""Named arrays in one buffer on the host and the same in one buffer on a device, so that all of them cross in one copy."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 16  # bytes; what the widest load of a kernel asks of an address
_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


class Mirror:
    """host[name], a numpy view, and device[name], a tensor view, of arrays {name: (shape, dtype)}; zeros at first.

    The host's buffer is pinned where the device is a GPU. Copies are queued on the current stream and wait for nothing.
    """

    def __init__(self, device: torch.device, arrays: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        places, size = {}, 0
        for name, (shape, dtype) in arrays.items():
            places[name] = size
            size += -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNED) * _ALIGNED
        self._host = torch.zeros(max(size, 1), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        self._device = torch.zeros(max(size, 1), dtype=torch.uint8, device=device)
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype) in arrays.items():
            span = slice(places[name], places[name] + int(np.prod(shape)) * dtype.itemsize)
            self.host[name] = self._host[span].numpy().view(_NUMPY[dtype]).reshape(shape)
            self.device[name] = self._device[span].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that a copy moves."""
        return self._host.nbytes

    def upload(self) -> None:
        """Host to device."""
        self._device.copy_(self._host, non_blocking=True)

    def download(self) -> None:
        """Device to host."""
        self._host.copy_(self._device, non_blocking=True)


def wait(device: torch.device) -> None:
    """Until everything that is queued on the device's current stream is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
