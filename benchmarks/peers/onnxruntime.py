"""onnxruntime's MatMulNBits: `pip install onnxruntime onnx`. All copies are nodes of one graph: entering it costs little of each."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers import Held, Hold, Layer, nodes

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
        copies = count(size)
        session = _session(layer, q.codes.view(layer.N, -1, q.format.group // 2), scale, q.format.group, copies)
        return Held(size, q.dequantize(), lambda x: [(session, *_bound(session, x, layer.N))], nodes(copies))

    return hold


def _session(layer: Layer, codes: Tensor, scale: Tensor, group: int, copies: int) -> Any:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights, calls, outs = [], [], []
    for copy in range(copies):
        weights += [
            numpy_helper.from_array(codes.numpy(), f"codes{copy}"),
            numpy_helper.from_array(scale.flatten().numpy(), f"scale{copy}"),
        ]
    for node in range(nodes(copies)):
        inputs = ["x", f"codes{node % copies}", f"scale{node % copies}"]
        facts = {"K": layer.K, "N": layer.N, "bits": 4, "block_size": group, "accuracy_level": ACCURACY}
        calls.append(helper.make_node("MatMulNBits", inputs, [f"y{node}"], domain="com.microsoft", **facts))
        outs.append(helper.make_tensor_value_info(f"y{node}", TensorProto.FLOAT, ["M", layer.N]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", layer.K])
    graph = helper.make_graph(calls, "linear", [x], outs, weights)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    onnx.checker.check_model(model, full_check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # equal nodes must not become one
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bound(session: Any, x: Tensor, N: int) -> tuple[Any, Tensor]:
    """Inputs and outputs in fixed memory: all nodes write the same output, as the layers of a step would."""
    import numpy as np
    import onnxruntime

    given, out = x.contiguous().numpy(), torch.full((x.shape[0], N), torch.nan)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(given))
    for each in session.get_outputs():
        binding.bind_output(each.name, "cpu", 0, np.float32, list(out.shape), out.data_ptr())
    return binding, out


def run(session: Any, binding: Any, out: Tensor) -> Tensor:
    """Run every node; the output of the last."""
    session.run_with_iobinding(binding)
    return out
