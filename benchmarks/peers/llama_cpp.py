"""llama.cpp's matrix products: ggml's libraries as `pip install llama-cpp-python` builds them, driven through ctypes.

Graphs of mul_mat nodes over copies of one weight, each in the layout that llama.cpp gives it at load. The package's own
Python layer is not imported.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers import Held, Hold, Layer, graphs

TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}
"""Name -> number in ggml.h."""

F32, WORD = 0, 8
HOW = "pip install llama-cpp-python; it compiles llama.cpp, which takes minutes"


class Params(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def folder() -> Path | None:
    """Where the package keeps its libraries."""
    spec = find_spec("llama_cpp")
    found = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    return found if found and any(found.glob("libggml-cpu.*")) else None


def missing() -> str:
    """Why it is not there, or ""."""
    return "" if folder() else HOW


class Ggml:
    """ggml's functions by name, without their prefix: base for tensors and graphs, cpu for what runs them."""

    def __init__(self, where: Path) -> None:
        def load(stem: str) -> ctypes.CDLL:
            return ctypes.CDLL(str(next(where.glob(f"lib{stem}.*"))), mode=ctypes.RTLD_GLOBAL)

        base, cpu = load("ggml-base"), load("ggml-cpu")
        p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        size = ctypes.c_size_t

        def declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            return function

        self.init = declare(base, "ggml_init", p, Params)
        self.free = declare(base, "ggml_free", None, p)
        self.tensor = declare(base, "ggml_new_tensor_2d", p, p, i, n, n)
        self.mul_mat = declare(base, "ggml_mul_mat", p, p, p, p)
        self.graph = declare(base, "ggml_new_graph_custom", p, p, size, ctypes.c_bool)
        self.expand = declare(base, "ggml_build_forward_expand", None, p, p)
        self.nbytes = declare(base, "ggml_nbytes", size, p)
        self.quantize = declare(base, "ggml_quantize_chunk", size, i, p, p, n, n, n, p)
        self.tensor_overhead = declare(base, "ggml_tensor_overhead", size)
        self.graph_overhead = declare(base, "ggml_graph_overhead_custom", size, size, ctypes.c_bool)
        self.allocate = declare(base, "ggml_backend_alloc_ctx_tensors_from_buft", p, p, p)
        self.place = declare(base, "ggml_backend_tensor_alloc", i, p, p, p)
        self.from_memory = declare(base, "ggml_backend_cpu_buffer_from_ptr", p, p, size)
        self.set = declare(base, "ggml_backend_tensor_set", None, p, p, size, size)
        self.free_buffer = declare(base, "ggml_backend_buffer_free", None, p)
        self.compute = declare(base, "ggml_backend_graph_compute", i, p, p)
        self.address_of = declare(base, "ggml_backend_reg_get_proc_address", p, p, ctypes.c_char_p)
        self.device_of = declare(base, "ggml_backend_get_device", p, p)
        self.plain = declare(base, "ggml_backend_cpu_buffer_type", p)
        self.set_threads = declare(cpu, "ggml_backend_cpu_set_n_threads", None, p, i)
        self.dequantize = {name: declare(base, f"dequantize_row_{name[0].lower()}{name[1:]}", None, p, p, n) for name in TYPES}
        self.silence = ctypes.CFUNCTYPE(None, i, ctypes.c_char_p, p)(lambda *_: None)
        declare(base, "ggml_log_set", None, type(self.silence), p)(self.silence, None)
        self.backend = declare(cpu, "ggml_backend_cpu_init", p)()
        self.registry = declare(cpu, "ggml_backend_cpu_reg", p)()

    def repacked(self) -> Any:
        """The buffer type whose tensors are laid out anew when they are set; None where this build has none."""
        address = self.address_of(self.registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(self.device_of(self.backend))
        return kinds[0]

    def context(self, tensors: int, graph: int = 0) -> Any:
        """A context for the descriptions of so many tensors, and of a graph of so many nodes."""
        size = tensors * self.tensor_overhead() + (self.graph_overhead(graph, False) if graph else 0)
        return self.init(Params(size + 1024, None, True))


@lru_cache
def ggml() -> Ggml:
    """The libraries, loaded once."""
    where = folder()
    if where is None:
        raise ImportError(HOW)
    return Ggml(where)


class Weights:
    """Copies of a weight in ggml's memory, freed with this object."""

    def __init__(self, layer: Layer, kind: str, copies: int, data: Tensor) -> None:
        lib = self.lib = ggml()
        self.layer = layer
        self.context = lib.context(copies)
        self.tensors = [lib.tensor(self.context, TYPES[kind], layer.K, layer.N) for _ in range(copies)]
        repacked = lib.repacked() if kind != "Q8_0" else None  # Q8_0 has no such layout on x86
        self.buffer = lib.allocate(self.context, repacked or lib.plain())
        for each in self.tensors:
            lib.set(each, data.data_ptr(), 0, data.numel())

    def __del__(self) -> None:
        if hasattr(self, "buffer"):
            self.lib.free_buffer(self.buffer)
            self.lib.free(self.context)


class Graph:
    """One mul_mat node for each of `numbers`, a copy of the weight each; all read `x` and write `out`, as the layers of a step would."""

    def __init__(self, weights: Weights, numbers: Sequence[int], x: Tensor, out: Tensor) -> None:
        lib, layer = weights.lib, weights.layer
        self.weights, self.x, self.out = weights, x, out
        self.context = lib.context(len(numbers) + 2, graph=len(numbers) + 2)
        self.buffers = [lib.from_memory(each.data_ptr(), each.nbytes) for each in (x, out)]
        given = lib.tensor(self.context, F32, layer.K, x.shape[0])
        lib.place(self.buffers[0], given, x.data_ptr())
        self.graph = lib.graph(self.context, len(numbers) + 2, False)
        for number in numbers:
            product = lib.mul_mat(self.context, weights.tensors[number], given)
            lib.place(self.buffers[1], product, out.data_ptr())
            lib.expand(self.graph, product)

    def run(self) -> Tensor:
        """Run every node; the output of the last. RuntimeError when ggml refuses."""
        lib = self.weights.lib
        if code := lib.compute(lib.backend, self.graph):
            raise RuntimeError(f"ggml_backend_graph_compute: status {code}")
        return self.out

    def __del__(self) -> None:
        if hasattr(self, "graph"):
            for buffer in self.buffers:
                self.weights.lib.free_buffer(buffer)
            self.weights.lib.free(self.context)


def _aligned(values: Tensor) -> Tensor:
    """A copy at a multiple of 64 bytes."""
    memory = torch.empty(values.numel() + 16)
    begin = -(memory.data_ptr() // 4) % 16
    return memory[begin : begin + values.numel()].view_as(values).copy_(values)


def quantized(kind: str) -> Hold:
    """The weight rounded by ggml to one of its types."""

    def hold(layer: Layer, count: Callable[[int], int]) -> Held:
        lib, w = ggml(), layer.tensors[0]
        data = torch.empty(w.nbytes, dtype=torch.uint8)
        size = lib.quantize(TYPES[kind], w.data_ptr(), data.data_ptr(), 0, layer.N, layer.K, None)
        back = torch.empty_like(w)
        lib.dequantize[kind](data.data_ptr(), back.data_ptr(), w.numel())
        plan = graphs(count(size), size)
        weights = Weights(layer, kind, max(map(max, plan)) + 1, data[:size])

        def calls(x: Tensor) -> list[tuple]:
            lib.set_threads(lib.backend, torch.get_num_threads())
            x, out = _aligned(x), _aligned(torch.full((x.shape[0], layer.N), torch.nan))
            return [(Graph(weights, numbers, x, out),) for numbers in plan]

        return Held(size, back, calls, len(plan[0]))

    return hold


def run(graph: Graph) -> Tensor:
    """Run every node; the output of the last."""
    return graph.run()
