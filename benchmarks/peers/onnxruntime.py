"""onnxruntime's MatMulNBits: `pip install onnxruntime onnx`. The copies are nodes of graphs: entering one costs little of each."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers import Held, Hold, Layer, graphs

ACCURACY = 4  # inputs rounded to int8 in the call


def missing() -> str:
    """Why it is not there, or ""."""
    return "" if find_spec("onnxruntime") and find_spec("onnx") else "pip install onnxruntime onnx"


def int4(format: str) -> Hold:
    """Int4 groups of weights with fp32 scales."""

    def hold(layer: Layer, count: Callable[[int], int]) -> Held:
        q = layer.quantized(format)
        scale = q.scale.float()
        size = q.codes.nbytes + scale.nbytes
        plan = graphs(count(size), size)
        codes = q.codes.view(layer.N, -1, q.format.group // 2)
        sessions = [_session(layer, codes, scale, q.format.group, numbers) for numbers in plan]
        return Held(size, q.dequantize(), lambda x: _bound(sessions, x, layer.N), len(plan[0]))

    return hold


@lru_cache
def _one_pool() -> None:
    """One pool of threads for all sessions: a pool each would spin on the others' cores. It keeps the size that it is given first."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)


def _session(layer: Layer, codes: Tensor, scale: Tensor, group: int, numbers: Sequence[int]) -> Any:
    """A graph with a layer for each of `numbers`; equal numbers share a weight."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights, calls, outs = [], [], []
    for number in sorted(set(numbers)):
        parts = {f"codes{number}": codes, f"scale{number}": scale.flatten()}
        weights += [numpy_helper.from_array(values.numpy(), name) for name, values in parts.items()]
    for node, number in enumerate(numbers):
        inputs = ["x", f"codes{number}", f"scale{number}"]
        facts = {"K": layer.K, "N": layer.N, "bits": 4, "block_size": group, "accuracy_level": ACCURACY}
        calls.append(helper.make_node("MatMulNBits", inputs, [f"y{node}"], domain="com.microsoft", **facts))
        outs.append(helper.make_tensor_value_info(f"y{node}", TensorProto.FLOAT, ["M", layer.N]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", layer.K])
    graph = helper.make_graph(calls, "linear", [x], outs, weights)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    _one_pool()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # equal nodes must not become one
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bound(sessions: Sequence[Any], x: Tensor, N: int) -> list[tuple]:
    """Inputs and outputs in fixed memory: all nodes write the same output, as the layers of a step would."""
    import numpy as np
    import onnxruntime

    given, out = onnxruntime.OrtValue.ortvalue_from_numpy(x.contiguous().numpy()), torch.full((x.shape[0], N), torch.nan)
    calls = []
    for session in sessions:
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", given)
        for each in session.get_outputs():
            binding.bind_output(each.name, "cpu", 0, np.float32, list(out.shape), out.data_ptr())
        calls.append((session, binding, out))
    return calls


def run(session: Any, binding: Any, out: Tensor) -> Tensor:
    """Run every node; the output of the last."""
    session.run_with_iobinding(binding)
    return out
