"""What the gates share: the emulated kernels, built once, and the two places where the same test can run."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ramify import backends
from ramify.testing import emulator

ROOT = Path(__file__).parents[2]
CSRC, CACHE = ROOT / "csrc", ROOT / "build" / "emulated"


@pytest.fixture(scope="session")
def built():
    """built(mode, program): the path of the emulated library, or of a program of its own."""
    if why := emulator.missing():
        pytest.skip(f"the emulator cannot be built: {why}")
    return lambda mode="plain", program=None: emulator.build(CSRC, CACHE, mode, program)


@pytest.fixture(scope="session")
def emulated(built):
    """The CUDA kernels under the emulator."""
    return emulator.Emulator(built())


class Place:
    """Where a test runs: tensors go to .device, and `everywhere` runs a call in every order that must not matter."""

    def __init__(self, library):
        self.library, self.device = library, "cpu" if library else "cuda"

    @contextmanager
    def running(self):
        """Ops inside run on the CUDA kernels."""
        if self.library is None:
            with backends.backend("cuda"):
                yield
        else:
            with emulator.emulating(self.library):
                yield

    def everywhere(self, call, copies=False):
        """What `call` returns, a tensor or several; the same bits in four schedules, and with copies landing late or at once."""
        schedules = emulator.SCHEDULES if copies else emulator.SCHEDULES[:4]
        results = []
        for schedule in schedules if self.library else ((),):
            if self.library:
                self.library.schedule(*schedule)
            with self.running():
                result = call()
            results.append(result if isinstance(result, tuple) else (result,))
        if self.library:
            self.library.schedule()
        for schedule, other in zip(schedules, results):
            for got, first in zip(other, results[0]):
                assert _same_bits(got, first), f"schedule {schedule} gives other bits"
        return results[0] if len(results[0]) > 1 else results[0][0]


def _same_bits(a, b):
    return torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.fixture(params=["emulated", "gpu"])
def place(request):
    """The emulator, and a GPU where there is one."""
    if request.param == "emulated":
        return Place(request.getfixturevalue("emulated"))
    if why := backends.missing("cuda"):
        pytest.skip(why)
    return Place(None)
