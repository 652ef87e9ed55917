"""Ops on a GPU for tests that make CPU tensors: every call goes to the device and back, storage by storage.

    with backends.backend("triton"), OnDevice("cuda"):
        ops.rms_norm(x, weight, out=out)          # CPU tensors in, CPU tensors written

A storage travels whole, so a view keeps its strides, its offset and the poison in its gaps, and two views of one storage stay two views
of one. There it lies between bands of 0xFF: a read beyond either end gives NaN in every float type and -1 in every integer, a write
there, or into an argument that the schema does not mark as written, is an AssertionError. What the schema marks comes back whole, so a
write between the elements of a view is seen by a test that looks there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

BAND = 512
"""Bytes on either side of a storage: a multiple of what any kernel asks of an address."""


@dataclass
class _Held:
    """A storage of the CPU and its copy on the device, a band on either side."""

    here: Tensor  # bytes
    there: Tensor  # bytes
    name: str
    written: bool = False


class OnDevice(TorchDispatchMode):
    """Ops of `namespace` called inside the block run on `device`; their tensors, and all other ops, stay on the CPU.

    A call with tensors that lie elsewhere already is left as it is.
    """

    def __init__(self, device: str, namespace: str = "ramify") -> None:
        super().__init__()
        self.device, self.namespace = device, namespace

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one op: there and back when it is ours and its tensors are here."""
        kwargs = kwargs or {}
        away = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device.type != "cpu"]
        if func.namespace != self.namespace or away:
            return func(*args, **kwargs)
        held: dict[tuple[int, int], _Held] = {}
        schema = func._schema.arguments
        moved = [tree_map_only(Tensor, self._sender(argument, held), value) for argument, value in zip(schema, args)]
        named = {a.name: tree_map_only(Tensor, self._sender(a, held), kwargs[a.name]) for a in schema if a.name in kwargs}
        result = func(*moved, **named)
        for each in held.values():
            _fetch(func.name(), each)
        return tree_map_only(Tensor, lambda x: x.to("cpu", copy=True), result)

    def _sender(self, argument: Any, held: dict[tuple[int, int], _Held]) -> Callable[[Tensor], Tensor]:
        """x -> the same view of its storage on the device."""

        def send(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            key = storage.data_ptr(), storage.nbytes()
            if key not in held:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                there = torch.full((storage.nbytes() + 2 * BAND,), 0xFF, dtype=torch.uint8, device=self.device)
                there[BAND:-BAND] = here.to(self.device)
                held[key] = _Held(here, there, argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                held[key].written, held[key].name = True, argument.name
            start = BAND // x.itemsize + x.storage_offset()
            return torch.empty(0, dtype=x.dtype, device=self.device).set_(held[key].there.untyped_storage(), start, x.shape, x.stride())

        return send


def _fetch(op: str, held: _Held) -> None:
    """Bring a storage home. AssertionError when bytes changed that the op had no business with."""
    there = held.there.cpu()
    before, inside, behind = there[:BAND], there[BAND:-BAND], there[-BAND:]
    for where, band in (("before", before), ("behind", behind)):
        assert bool((band == 0xFF).all()), f"{op} wrote {where} the storage of {held.name}"
    if held.written:
        held.here.copy_(inside)
    else:
        assert torch.equal(held.here, inside), f"{op} wrote into {held.name}, which its schema does not mark"
