"""Where a model whose steps are recorded as a GPU's are can run in a test: fixture `engine`, told in test_device_model.py."""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ramify import backends
from ramify.cache import device_arena
from ramify.cache.mirror import wait
from ramify.model import device_steps, device_turns
from ramify.testing import emulator
from ramify.testing.device_model import device_model
from ramify.testing.tiny_models import FAMILIES, write_tiny_model

ROOT = Path(__file__).parents[2]


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class NoAnswers(TorchDispatchMode):
    """Refuses the ops that answer to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"), func
        return func(*args, **(kwargs or {}))


def _refuse(*_):
    raise AssertionError("a recorded call reads a tensor")


@dataclass
class Engine:
    """Where a model runs, and how much of a test is short enough there."""

    name: str
    dtype: str
    device: str = "cpu"
    library: object = None

    @property
    def slow(self):
        return self.name in ("emulated", "triton")

    @contextmanager
    def running(self):
        forced = {"reference": "reference", "triton": "triton"}.get(self.name)
        with emulator.emulating(self.library) if self.library else backends.backend(forced) if forced else nullcontext():
            yield

    @contextmanager
    def no_answers(self, monkeypatch):
        """Inside, whatever would make the host wait for a device fails."""
        with monkeypatch.context() as patch, NoAnswers():
            for name in READS:
                patch.setattr(torch.Tensor, name, _refuse)
            yield

    @contextmanager
    def waits(self, mode):
        """What torch does inside when something waits for a GPU: "default" or "error"."""
        if self.device != "cuda":
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def counted_waits(self, monkeypatch):
        """A list that grows by one whenever a step waits for the device; only there may anything wait under `waits("error")`."""
        counted = []

        def once(device, event=None):
            counted.append(device)
            with self.waits("default"):
                wait(device, event)

        for module in (device_arena, device_steps, device_turns):
            monkeypatch.setattr(module, "wait", once)
        return counted

    def load(self, folder, weights=None):
        return device_model(folder, self.dtype, self.device, weights)


@pytest.fixture(scope="module")
def library():
    if why := emulator.missing():
        pytest.skip(f"the emulator cannot be built: {why}")
    return emulator.Emulator(emulator.build(ROOT / "csrc", ROOT / "build" / "emulated"))


CASES = ["table-fp32", "table-bf16", "reference-fp32", "emulated-bf16", "triton-fp32", "cuda-fp32", "cuda-bf16"]


@pytest.fixture(params=CASES)
def engine(request):
    """An engine, in force while the test runs."""
    name, dtype = request.param.split("-")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    if name == "triton":
        if not backends.interpreted():
            pytest.skip("TRITON_INTERPRET is not 1; the gate of Triton's values runs it in a process of its own")
        pytest.importorskip("ramify.testing.triton_interpreter").install()
    if name == "table" and backends.missing("cpu"):
        pytest.skip(backends.missing("cpu"))
    if name != "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("tested without the interpreter")
    made = Engine(name, dtype, "cuda" if name == "cuda" else "cpu", request.getfixturevalue("library") if name == "emulated" else None)
    with made.running():
        yield made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random checkpoint of each family. Modules with checkpoints of their own have a fixture of this name too."""
    return {family: write_tiny_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}
