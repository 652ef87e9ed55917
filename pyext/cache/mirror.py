"""Named arrays in one buffer on the host and the same in one buffer on a device, so that all of them cross in one copy."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 16  # bytes; what the widest load of a kernel asks of an address
_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


class Mirror:
    """host[name], a numpy view, and device[name], a tensor view, of arrays {name: (shape, dtype)}; zeros at first.

    hosts: buffers on the host, `host` the first of them, for results of which one is read while the next arrives. They are pinned where
    the device is a GPU. buffer: the device's bytes. Copies are queued on the current stream and wait for nothing.
    """

    def __init__(self, device: torch.device, arrays: Mapping[str, tuple[tuple[int, ...], torch.dtype]], hosts: int = 1) -> None:
        places, size = {}, 0
        for name, (shape, dtype) in arrays.items():
            places[name] = size
            size += -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNED) * _ALIGNED
        like = {"dtype": torch.uint8, "device": "cpu", "pin_memory": device.type == "cuda"}
        self._hosts = [torch.zeros(max(size, 1), **like) for _ in range(hosts)]
        self.buffer = torch.zeros(max(size, 1), dtype=torch.uint8, device=device)
        self.hosts: list[dict[str, np.ndarray]] = [{} for _ in self._hosts]
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype) in arrays.items():
            span = slice(places[name], places[name] + int(np.prod(shape)) * dtype.itemsize)
            self.device[name] = self.buffer[span].view(dtype).view(shape)
            for named, buffer in zip(self.hosts, self._hosts, strict=True):
                named[name] = buffer[span].numpy().view(_NUMPY[dtype]).reshape(shape)
        self.host = self.hosts[0]

    @property
    def nbytes(self) -> int:
        """Bytes that a copy moves."""
        return self.buffer.nbytes

    def upload(self) -> None:
        """Host to device."""
        self.buffer.copy_(self._hosts[0], non_blocking=True)

    def download(self, host: int = 0) -> None:
        """Device to that buffer of the host."""
        self._hosts[host].copy_(self.buffer, non_blocking=True)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A place in what is queued on the device's current stream, for `wait`; None where nothing is ever queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))  # without it, on the stream of torch's current device, which may be another
    return event


def wait(device: torch.device, event: torch.cuda.Event | None = None) -> None:
    """Until everything that is queued on the device's current stream is done, or only what was before the event."""
    if event is not None:
        event.synchronize()
    elif device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
