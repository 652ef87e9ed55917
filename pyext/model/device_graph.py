"""Recorded calls of a device: replayed as one CUDA graph on a GPU, one after the other elsewhere and in eager mode.

So everything but the graph itself is tested without a GPU. Status: the graph not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ramify import native_cuda
from ramify.ops._bound import ASKING
from ramify.ops._library import Bound

if TYPE_CHECKING:
    from ramify.model.device_steps import DeviceSteps


class Recording:
    """Calls over fixed tensors, in order. graph: what replays them, None where they run one by one. A subclass says how they run idle."""

    def __init__(self, steps: DeviceSteps, calls: Sequence[Bound]):
        self.device, self.calls = steps.device, calls
        self.graph: torch.cuda.CUDAGraph | None = None
        if steps.device.type == "cuda" and self.captures:
            self.graph = self._capture(steps)

    @property
    def captures(self) -> bool:
        """Whether no call needs an answer from the device, as some references do."""
        return not any(call.op in ASKING and call.backend == "reference" for call in self.calls)

    def launch(self, eager: bool = False) -> None:
        """Have everything computed once; on a GPU this queues it and returns."""
        if self.graph is None or eager:
            for call in self.calls:
                call.run()
        else:
            self.graph.replay()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Inside, the calls change nothing that anybody reads."""
        raise NotImplementedError

    def _capture(self, steps: DeviceSteps) -> torch.cuda.CUDAGraph:
        """The calls as a graph, after an idle run on a side stream that compiles and allocates."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), self.idle():
            steps.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(steps.stream):
                self.launch()
                if any(call.backend == "cuda" for call in self.calls):  # held: a later launch that needs more of them makes others
                    self._tickets: Tensor = native_cuda.tickets(self.device, 1)
            steps.stream.synchronize()
            with torch.cuda.graph(graph, pool=steps.pool, stream=steps.stream, capture_error_mode="thread_local"):
                for call in self.calls:
                    call.run()
        return graph
