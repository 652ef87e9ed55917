"""What a turn queues on a device: its event lies on that device's stream, whichever device is torch's current one; and how a recording
becomes a graph, with stand-ins for the calls of torch.cuda that need a GPU.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ramify.cache import mirror
from ramify.model.device_graph import Recording
from ramify.ops._library import Bound


class Event:
    """Knows the stream that it was recorded on."""

    def record(self, stream=None):
        self.stream = stream


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda whose streams are named after their devices, and whose current device is 0. log: what was asked of it."""
    log, here = [], [torch.device("cuda:0")]

    def note(*words):
        log.append(" ".join(map(str, words)))

    @contextmanager
    def device(place):
        here.append(torch.device(place))
        yield
        here.pop()

    def current_stream(place=None):
        return SimpleNamespace(device=here[-1] if place is None else torch.device(place), synchronize=lambda: note("synchronize current"))

    @contextmanager
    def stream(_):
        note("side stream")
        yield
        note("back")

    @contextmanager
    def graph(made, pool, stream, capture_error_mode):
        note("capture", pool)
        yield
        note("captured")

    class Graph:
        def replay(self):
            note("replay")

    made = {"Event": Event, "device": device, "current_stream": current_stream, "stream": stream, "graph": graph, "CUDAGraph": Graph}
    for name, stand_in in made.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return SimpleNamespace(log=log, note=note)


def test_an_event_lies_on_the_stream_of_its_device(cuda):
    assert mirror.mark(torch.device("cuda:1")).stream.device == torch.device("cuda:1")
    assert mirror.mark(torch.device("cpu")) is None


def test_a_recording_runs_idle_once_and_is_captured(cuda):
    class Recorded(Recording):
        @contextmanager
        def idle(self):
            cuda.note("idle")
            yield
            cuda.note("as it was")

    side = SimpleNamespace(wait_stream=lambda other: cuda.note("waits for", other.device), synchronize=lambda: cuda.note("synchronize"))
    steps = SimpleNamespace(device=torch.device("cuda:1"), stream=side, pool="pool")
    recorded = Recorded(steps, [Bound("one", "torch", lambda: cuda.note("one")), Bound("two", "torch", lambda: cuda.note("two"))])
    warm = ["idle", "waits for cuda:1", "side stream", "one", "two", "back", "synchronize"]
    assert cuda.log == [*warm, "capture pool", "one", "two", "captured", "as it was"]
    cuda.log.clear()
    recorded.launch()
    assert cuda.log == ["replay"]
    recorded.launch(eager=True)
    assert cuda.log == ["replay", "one", "two"]


def test_what_asks_the_device_is_not_captured(cuda):
    steps = SimpleNamespace(device=torch.device("cuda:0"))
    asking = Recording(steps, [Bound("kv_commit", "reference", lambda: cuda.note("asked"))])
    assert asking.graph is None and not asking.captures and not cuda.log
    asking.launch()
    assert cuda.log == ["asked"]
