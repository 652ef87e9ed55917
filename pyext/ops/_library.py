"""How an op reaches torch: one `define` gives it a functional form, an out form, a fake and a backend to run on.

The classic `torch.library.Library` is used because it costs a third of `custom_op` per call and needs no torch at build time.
No gradient is registered: ops are for inference. The public functions say so when a backward pass comes; torch.ops' own forms leave a
gradient out, as torch warns, and forward-mode tangents are 0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ramify import backends, reference
from ramify.ops._checks import Results, Shapes, check_addresses, outputs, tensor
from ramify.ops._memory import crosses, folded, overlap

_library = torch.library.Library("ramify", "DEF")  # alive as long as this module: an op dies with its Library
_tags = (torch.Tag.pt2_compliant_tag,)

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Bound:
    """A call over fixed tensors: shapes checked and a backend chosen once, for `run()` to be called again and again."""

    op: str
    backend: str
    run: Callable[[], Any]


class _Checked:
    """A check of shapes, dtypes, devices, numbers and addresses, made once for inputs that agree in all of them: of an address, in its
    last three bits. Every call on real tensors goes through it, and no other.
    """

    most = 256
    """Calls kept; beyond, they are forgotten together."""

    def __init__(self, op: str, tensors: tuple[tuple[int, str, bool], ...], check: Callable[..., Any]) -> None:
        self.op, self.tensors, self.check = op, tensors, check
        self._seen: dict[tuple, Any] = {}

    def __call__(self, inputs: tuple) -> Any:
        key = tuple([(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 7) if isinstance(x, Tensor) else x for x in inputs])
        results = self._seen.get(key, self)  # self: not seen; None is what a check may return
        if results is self:
            results = self.afresh(inputs)
            if len(self._seen) >= self.most:
                self._seen.clear()
            self._seen[key] = results
        return results

    def afresh(self, inputs: tuple) -> Any:
        """The check itself."""
        results = self.check(*inputs)
        check_addresses(self.op, ((name, inputs[i]) for i, name, _ in self.tensors))
        return results


class Op:
    """torch.ops.ramify.<name> and its out form.

    name: "rms_norm", or "rms_norm.residual" for an overload. arguments: the schema of the inputs, of which the first is a tensor.
    outputs: names of the output tensors. check(*inputs) raises for what the op does not take and returns shape and dtype of each
    output; every way into the op goes through it once: the public function, both torch forms and the fake. It sees shapes, dtypes
    and numbers; values(*inputs) raises for what is in the tensors, and is asked on the CPU, elsewhere under `ramify.debug`: the answer
    costs a synchronisation there.
    sizes(*inputs): what the backend table has to know, dtype= at least. reference(*inputs) returns the outputs;
    cpu(outputs, *inputs) and cuda(outputs, *inputs) fill them, and share no memory between the two; so does the function of that name
    in ops._triton, where `triton` names one.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        outputs: Iterable[str],
        check: Callable[..., Results],
        sizes: Callable[..., dict[str, Any]],
        reference: Callable[..., Any],
        cpu: Callable[..., None] | None = None,
        cuda: Callable[..., None] | None = None,
        triton: str = "",
        values: Callable[..., None] | None = None,
    ) -> None:
        self.name, _, overload = name.partition(".")
        self.outputs, self.tensors = tuple(outputs), _tensors(arguments)
        self._check, self._values, self._sizes, self._reference = check, values, sizes, reference
        self._checked = _Checked(self.name, self.tensors, check)
        self._kernels = {"cpu": cpu, "cuda": cuda, "triton": launcher(triton, lambda args: args[0][0]) if triton else None}
        returns = ", ".join("Tensor" for _ in self.outputs)
        written = ", ".join(f"Tensor({letter}!) {out}" for letter, out in zip("abc", self.outputs))
        into = f"{self.name}.{overload}_out" if overload else f"{self.name}.out"
        _register(name, f"({arguments}) -> ({returns})", self._functional, self._fake)
        _register(into, f"({arguments}, *, {written}) -> ()", self._into, self._fake_into)
        packet = getattr(torch.ops.ramify, self.name)
        self._call, self._call_into = getattr(packet, overload or "default"), getattr(packet, into.partition(".")[2])

    def __call__(self, *inputs: Any, out: Any = None) -> Any:
        """Run on what the user gave; `out` holds one tensor per output. Numbers among the inputs are already of the schema's kind."""
        _check_kinds(self.name, self.tensors, inputs)
        if out is None:
            result = self._call(*inputs)
            _refuse_gradients(self.name, result if type(result) is tuple else (result,))
            return result
        outs = outputs(self.name, out, len(self.outputs))
        for i, x in enumerate(outs):
            _check_leaf(self.name, "out" if len(outs) == 1 else f"out[{i}]", x)
        self._call_into(*inputs, **dict(zip(self.outputs, outs)))
        return _one_or_all(outs)

    def bind(self, outs: Outputs, *inputs: Any) -> Bound:
        """This call over these very tensors, which share no memory between outputs and inputs. What is in them is never looked at."""
        check = Shapes(self.name, inputs[0])
        for out, (shape, dtype) in zip(outs, self._checked.afresh(inputs), strict=True):
            check.out("out", out, shape, dtype)
        check_addresses(self.name, (("out", out) for out in outs))
        backend = backends.choose(self.name, outs[0].device.type, **self._sizes(*inputs))
        kernel = self._kernels.get(backend)
        return Bound(self.name, backend, partial(self._refer, outs, inputs) if kernel is None else partial(kernel, outs, *inputs))

    def _functional(self, *inputs: Any) -> Any:
        device = inputs[0].device
        outs = tuple([torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._checked(inputs)])
        self._run(outs, inputs)
        return _one_or_all(outs)

    def _fake(self, *inputs: Any) -> Any:
        return _one_or_all(tuple([inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in self._check(*inputs)]))

    def _into(self, *inputs: Any, **named: Tensor) -> None:
        outs = self._check_outs(self._checked(inputs), inputs, named)
        names = ["out"] if len(outs) == 1 else [f"out[{i}]" for i in range(len(outs))]
        check_addresses(self.name, zip(names, outs))
        _check_written(self.name, names, outs)
        if any(crosses(out, x) for out in outs for x in inputs if isinstance(x, Tensor)):
            aside = self._functional(*inputs)  # an output that is an input, whole or in part, is written when all is read
            for out, value in zip(outs, aside if isinstance(aside, tuple) else (aside,)):
                out.copy_(value)
        else:
            self._run(outs, inputs)

    def _fake_into(self, *inputs: Any, **named: Tensor) -> None:
        self._check_outs(self._check(*inputs), inputs, named)

    def _check_outs(self, results: Results, inputs: tuple, named: dict[str, Tensor]) -> Outputs:
        outs = tuple([named[name] for name in self.outputs])
        check = Shapes(self.name, inputs[0])
        for i, (out, (shape, dtype)) in enumerate(zip(outs, results)):
            check.out("out" if len(outs) == 1 else f"out[{i}]", out, shape, dtype)
        return outs

    def _run(self, outs: Outputs, inputs: tuple) -> None:
        if outs[0].numel() == 0:
            return
        if self._values is not None and backends.looks(outs[0].device.type):
            self._values(*_on_host(inputs))
        backend = backends.choose(self.name, outs[0].device.type, **self._sizes(*inputs))
        kernel = self._kernels.get(backend)
        if kernel is not None:
            kernel(outs, *inputs)
        else:
            self._refer(outs, inputs)

    def _refer(self, outs: Outputs, inputs: tuple) -> None:
        for out, value in zip(outs, self._reference(*inputs)):
            out.copy_(value)


class InPlaceOp:
    """An op that changes some of its arguments, those with a `!` in the schema. `check` and `values` as for Op.

    Where `returns` says so it also makes a tensor, whose shape and dtype `check` returns; kernels and reference get it before the inputs.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        check: Callable[..., Results | None],
        sizes: Callable[..., dict[str, Any]],
        reference: Callable[..., None],
        cpu: Callable[..., None] | None = None,
        cuda: Callable[..., None] | None = None,
        triton: str = "",
        values: Callable[..., None] | None = None,
        returns: bool = False,
    ) -> None:
        self.name, self.tensors, self._returns = name, _tensors(arguments), returns
        self._kernels = {"cpu": cpu, "cuda": cuda, "triton": launcher(triton, lambda args: args[0]) if triton else None}
        self._written = [(i, argument) for i, argument, _ in self.tensors if "!" in arguments.split(", ")[i]]
        self._check, self._values, self._sizes, self._reference = check, values, sizes, reference
        self._checked = _Checked(name, self.tensors, check)
        _register(name, f"({arguments}) -> {'Tensor' if returns else '()'}", self._run, self._fake)
        self._call = getattr(torch.ops.ramify, name).default

    def __call__(self, *inputs: Any) -> Any:
        """Run on what the user gave."""
        _check_kinds(self.name, self.tensors, inputs)
        for i, name in self._written:
            _check_leaf(self.name, name, inputs[i])
        result = self._call(*inputs)
        if result is not None:
            _refuse_gradients(self.name, (result,))
        return result

    def bind(self, *inputs: Any, out: Tensor | None = None) -> Bound:
        """This call over these very tensors; `out`: what it makes beside. Nothing looks at values, nor at addresses written twice."""
        self._checked.afresh(inputs)
        check_addresses(self.name, (("out", out),))
        backend = backends.choose(self.name, inputs[0].device.type, **self._sizes(*inputs))
        kernel = self._kernels.get(backend) or self._reference
        return Bound(self.name, backend, partial(kernel, *inputs) if out is None else partial(kernel, out, *inputs))

    def _fake(self, *inputs: Any) -> Tensor | None:
        return self._allocate(self._check(*inputs), inputs)

    def _allocate(self, results: Results | None, inputs: tuple) -> Tensor | None:
        return inputs[0].new_empty(results[0][0], dtype=results[0][1]) if self._returns and results else None

    def _run(self, *inputs: Any) -> Tensor | None:
        out = self._allocate(self._checked(inputs), inputs)
        _check_written(self.name, [name for _, name in self._written], [inputs[i] for i, _ in self._written])
        if out is not None and out.numel() == 0:
            return out
        if self._values is not None and backends.looks(inputs[0].device.type):
            self._values(*_on_host(inputs))
        kernel = self._kernels.get(backends.choose(self.name, inputs[0].device.type, **self._sizes(*inputs))) or self._reference
        kernel(*inputs) if out is None else kernel(out, *inputs)
        return out


def _on_host(inputs: tuple) -> tuple:
    """The inputs for a look at their values."""
    return inputs if inputs[0].device.type == "cpu" else _copied(inputs)


def _copied(inputs: tuple) -> tuple:
    """On the CPU. Of activations and caches, floats of three axes or more, the shape is enough."""
    shape_only = [isinstance(x, Tensor) and x.ndim > 2 and x.is_floating_point() for x in inputs]
    return tuple([x.to("meta") if only else x.cpu() if isinstance(x, Tensor) else x for x, only in zip(inputs, shape_only)])


def launcher(name: str, on: Callable[[tuple], Tensor]) -> Callable[..., None]:
    """ops._triton's function `name`, on the device of the tensor `on` finds among its arguments. Triton is imported by the first call."""

    def launch(*args: Any) -> None:
        with torch.cuda.device_of(on(args)):
            getattr(import_module("ramify.ops._triton"), name)(*args)

    return launch


def _register(name: str, schema: str, run: Callable, fake: Callable) -> None:
    _library.define(name + schema, tags=_tags)

    def run_plainly(*args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args, **options)
        with torch.no_grad():  # what a kernel or the reference does inside an op is nothing to differentiate
            return run(*args, **options)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run_plainly, key)
    torch.library.register_fake(f"ramify::{name}", fake, lib=_library)


def _tensors(arguments: str) -> tuple[tuple[int, str, bool], ...]:
    """Place, name and whether None is taken, of every tensor among the arguments of a schema."""
    parts = [part.split() for part in arguments.split(", ")]
    return tuple((i, name, kind.endswith("?")) for i, (kind, name) in enumerate(parts) if kind.startswith("Tensor"))


def _check_kinds(op: str, tensors: tuple[tuple[int, str, bool], ...], inputs: tuple) -> None:
    """Tensors are where the schema has them: torch would say it in several lines."""
    for i, name, optional in tensors:
        x = inputs[i]
        plain = type(x) is Tensor and x.layout is torch.strided and not (x.is_nested or x.is_quantized)
        if not plain and (x is not None or not optional):
            tensor(op, name, x)


def _check_written(op: str, names: Sequence[str], written: Sequence[Tensor]) -> None:
    """No address is written twice."""
    for i, (name, x) in enumerate(zip(names, written)):
        if folded(x):
            raise ValueError(
                f"{op}: {name} is {list(x.shape)} with strides {list(x.stride())}; takes elements at addresses of their own. Give another."
            )
        for other, y in zip(names[:i], written):
            if overlap(x, y):
                raise ValueError(f"{op}: {name} shares memory with {other}; takes tensors apart from each other. Give another.")


def _check_leaf(op: str, name: str, x: Tensor) -> None:
    """A tensor that is written into has no gradient of its own to be wrong."""
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires gradients; takes a tensor that does not, or torch.no_grad(). Use {name}.detach().")


def _refuse_gradients(op: str, results: Sequence[Tensor]) -> None:
    """Whoever asks for a gradient of these is told that there is none: torch alone would leave this op's part of it out."""
    for x in results:
        if x.requires_grad and not torch.compiler.is_compiling():

            def refuse(gradient: Tensor) -> None:
                where = f"ramify.reference.{op} is differentiable" if hasattr(reference, op) else "an op is for inference"
                raise NotImplementedError(f"{op}: backward is not built; {where}. Run the op under torch.no_grad().")

            x.register_hook(refuse)


def _one_or_all(outs: Outputs) -> Any:
    return outs[0] if len(outs) == 1 else outs
