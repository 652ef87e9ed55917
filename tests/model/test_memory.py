"""Copies on huge pages: the same values, memory of their own, and nothing held longer than its tensors."""

import gc
import mmap
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ramify import memory
from ramify.memory import LINE, PAGE, REGION, on_huge_pages


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No region yet."""
    monkeypatch.setattr(memory, "_region", None)


def regions(monkeypatch) -> list:
    """Every mapping that is made from now on, weakly."""
    made = []

    class Mapping(mmap.mmap):
        def __new__(cls, *arguments, **flags):
            memory = super().__new__(cls, *arguments, **flags)
            made.append(weakref.ref(memory))
            return memory

    monkeypatch.setattr(memory.mmap, "mmap", Mapping)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32])
def test_values_shape_and_storage(dtype):
    rng = torch.Generator().manual_seed(0)
    for shape in ((3,), (5, 7), (1000, 333)):
        x = torch.randint(0, 100, shape, generator=rng).to(dtype)
        copy = on_huge_pages(x.t() if len(shape) == 2 else x)  # a view that is not contiguous
        assert torch.equal(copy, x.t() if len(shape) == 2 else x) and copy.dtype == dtype and copy.is_contiguous()
        assert copy.data_ptr() % LINE == 0
        assert copy.untyped_storage().nbytes() == x.nbytes  # saving or cloning one saves no other
        assert copy.data_ptr() != x.data_ptr()


def test_empty_is_left_alone():
    x = torch.empty(0, 4)
    assert on_huge_pages(x) is x


def test_neighbours_do_not_overlap(monkeypatch):
    made = regions(monkeypatch)
    sizes = [1, 63, 64, 65, 4096, PAGE - 1, PAGE + 1, REGION // 2, REGION // 2, REGION - 1, REGION + 1, 3 * REGION, 5]
    copies = [on_huge_pages(torch.full((size,), i, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    for i, (size, copy) in enumerate(zip(sizes, copies)):
        assert len(copy) == size and bool((copy == i).all())
    spans = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    assert len(made) < len(sizes)
    assert copies[0].data_ptr() % PAGE == 0


def test_many_threads_at_once():
    def one(i: int) -> bool:
        return bool((on_huge_pages(torch.full((10_000 + i,), i % 251, dtype=torch.uint8)) == i % 251).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(400)))


def test_memory_goes_back_with_its_last_tensor(monkeypatch):
    made = regions(monkeypatch)
    first, second = (on_huge_pages(torch.ones(REGION, dtype=torch.uint8)) for _ in range(2))
    view = first[5:9]
    del first
    gc.collect()
    assert [memory() is not None for memory in made] == [True, True]
    assert bool((view == 1).all()) and bool((second == 1).all())
    del view
    gc.collect()
    assert [memory() is not None for memory in made] == [False, True]
    del second
    gc.collect()
    assert [memory() is not None for memory in made] == [False, False]  # the last one too: a full region is held by its tensor alone


def test_a_system_without_huge_pages(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError("no")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    assert bool((on_huge_pages(torch.ones(100)) == 1).all())
    monkeypatch.setattr(memory, "_region", None)
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert bool((on_huge_pages(torch.ones(100)) == 1).all())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux alone says how memory is mapped")
def test_memory_is_private_and_asks_for_huge_pages():
    """Shared memory would have none: the setting that systems ship with gives huge pages to private memory."""
    address = on_huge_pages(torch.ones(PAGE + 5)).data_ptr()
    flags, here = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            here = int(found[1], 16) <= address < int(found[2], 16)
            shared = found[3][3] != "p" if here else None
        elif here and line.startswith("VmFlags"):
            flags = line.split()[1:]
            break
    assert here and not shared
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags


@pytest.mark.parametrize(
    "setting, said", [("always [madvise] never\n", "huge pages: transparent_hugepage is madvise"), ("[never]", "small")]
)
def test_what_env_says(setting, said, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: setting)
    assert said in memory.system()
    monkeypatch.undo()
    monkeypatch.setattr(memory, "Path", lambda name: Path("/no/such/file"))
    assert "no transparent huge pages" in memory.system()
