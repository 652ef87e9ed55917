"""How an op reaches torch: one `define` gives it a functional form, an out form, a fake and a backend to run on.

The classic `torch.library.Library` is used because it costs a third of `custom_op` per call and needs no torch at build time.
No autograd is registered: ops are for inference.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ramify import backends

_library = torch.library.Library("ramify", "DEF")  # alive as long as this module: an op dies with its Library
_tags = (torch.Tag.pt2_compliant_tag,)

Outputs = tuple[Tensor, ...]


class Op:
    """torch.ops.ramify.<name> and its out form.

    name: "rms_norm", or "rms_norm.residual" for an overload. arguments: the schema of the inputs.
    outputs: names of the output tensors. allocate(*inputs) makes them, empty; it is also the fake implementation.
    sizes(*inputs): what the backend table has to know, dtype= at least. reference(*inputs) returns the outputs;
    cpu(outputs, *inputs) fills them, and so does ops._triton's function of the name `triton`.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        outputs: Iterable[str],
        allocate: Callable[..., Outputs],
        sizes: Callable[..., dict[str, Any]],
        reference: Callable[..., Any],
        cpu: Callable[..., None] | None = None,
        triton: str = "",
    ) -> None:
        self.name, _, overload = name.partition(".")
        self.outputs = tuple(outputs)
        self._allocate, self._sizes, self._reference, self._cpu, self._triton = allocate, sizes, reference, cpu, triton
        returns = ", ".join("Tensor" for _ in self.outputs)
        written = ", ".join(f"Tensor({letter}!) {out}" for letter, out in zip("abc", self.outputs))
        into = f"{self.name}.{overload}_out" if overload else f"{self.name}.out"
        _register(name, f"({arguments}) -> ({returns})", self._functional, lambda *args: _one_or_all(allocate(*args)))
        _register(into, f"({arguments}, *, {written}) -> ()", self._into, lambda *args, **outs: None)
        packet = getattr(torch.ops.ramify, self.name)
        self._call, self._call_into = getattr(packet, overload or "default"), getattr(packet, into.partition(".")[2])

    def __call__(self, *inputs: Any, out: Outputs | None = None) -> Any:
        """Run on checked inputs; `out` holds one tensor per output."""
        if out is None:
            return self._call(*inputs)
        self._call_into(*inputs, **dict(zip(self.outputs, out)))
        return _one_or_all(out)

    def _functional(self, *inputs: Any) -> Any:
        outs = self._allocate(*inputs)
        self._run(outs, inputs)
        return _one_or_all(outs)

    def _into(self, *inputs: Any, **outs: Tensor) -> None:
        self._run(tuple(outs[name] for name in self.outputs), inputs)

    def _run(self, outs: Outputs, inputs: tuple) -> None:
        if outs[0].numel() == 0:
            return
        backend = backends.choose(self.name, outs[0].device.type, **self._sizes(*inputs))
        if backend == "cpu" and self._cpu is not None:
            self._cpu(outs, *inputs)
            return
        if backend == "triton":
            launch(self._triton, outs[0], outs, *inputs)
            return
        for out, value in zip(outs, self._reference(*inputs)):
            out.copy_(value)


def launch(name: str, on: Tensor, *args: Any) -> None:
    """Call ops._triton's function `name`, on the device of tensor `on`. Triton is imported here, on the first launch."""
    with torch.cuda.device_of(on):
        getattr(import_module("ramify.ops._triton"), name)(*args)


def define_in_place(
    name: str, schema: str, reference: Callable[..., None], sizes: Callable[..., dict[str, Any]], triton: str = ""
) -> Callable[..., None]:
    """An op that changes its arguments and returns nothing. Returns the torch op."""

    def run(*args: Any) -> None:
        if backends.choose(name, args[0].device.type, **sizes(*args)) == "triton":
            launch(triton, args[0], *args)
        else:
            reference(*args)

    _register(name, f"({schema}) -> ()", run, lambda *args: None)
    return getattr(torch.ops.ramify, name).default


def _register(name: str, schema: str, run: Callable, fake: Callable) -> None:
    _library.define(name + schema, tags=_tags)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"ramify::{name}", fake, lib=_library)


def _one_or_all(outs: Outputs) -> Any:
    return outs[0] if len(outs) == 1 else outs
