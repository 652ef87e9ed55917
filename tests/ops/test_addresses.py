"""Tensors whose addresses their dtype does not have, as a view of bytes may: every op refuses them by name, on every backend."""

import importlib.util
from pathlib import Path

import pytest
import torch

from ramify import backends
from ramify.ops import kv, verify

spec = importlib.util.spec_from_file_location("library", Path(__file__).with_name("test_library.py"))
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
RAW, packet = library.RAW, library.packet


def misaligned(x):
    """The same values, one byte off the addresses that their dtype has."""
    raw = torch.empty(x.numel() * x.itemsize + 16, dtype=torch.uint8)
    moved = torch.frombuffer(raw.numpy(), dtype=x.dtype, count=x.numel(), offset=1 - raw.data_ptr() % 16 % x.itemsize + x.itemsize)
    return moved.view(x.shape).copy_(x)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("name", "args", "outs"), RAW, ids=[f"{i}-{r[0]}" for i, r in enumerate(RAW)])
def test_addresses_are_multiples_of_the_element(name, args, outs, backend):
    """Every tensor of every op, output and input: refused by name before a backend is chosen, though the same call was right before."""
    op, values = packet(name), {**dict(enumerate(args)), **outs}
    with backends.backend(backend):
        for which, tensor in values.items():
            if not isinstance(tensor, torch.Tensor) or tensor.itemsize == 1:
                continue
            given = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in values.items()}
            op(*[given[i] for i in range(len(args))], **{k: given[k] for k in outs})
            given[which] = misaligned(tensor)
            assert given[which].data_ptr() % tensor.itemsize == 1
            argument = op._schema.arguments[which].name if isinstance(which, int) else "out"
            with pytest.raises(
                ValueError, match=rf"^{name.split('.')[0]}: {argument}(\[\d\])? begins at address 0x\w+; takes a multiple of"
            ):
                op(*[given[i] for i in range(len(args))], **{k: given[k] for k in outs})


def test_addresses_of_a_bound_call():
    outs = tuple(t.clone() for t in library.stats)
    cache, rows = library.caches(), library.rows
    for bind in (
        lambda: verify._row_stats.bind(outs, misaligned(library.x)),
        lambda: verify._row_stats.bind((*outs[:2], misaligned(outs[2])), library.x),
        lambda: kv._kv_append.bind(rows, rows, cache[0], misaligned(cache[1]), library.length, None, None),
    ):
        with pytest.raises(ValueError, match="begins at address"):
            bind()
