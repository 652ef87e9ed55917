"""QuantizedWeight: the bytes that kernels read are those of its tensors as they are now."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ramify import ops
from ramify.quant import Format, QuantizedWeight, quantize
from ramify.quant.packing import pack_panels, packed

CHANGES = {
    "scale in place": lambda w: w.scale.mul_(2),
    "scale replaced": lambda w: setattr(w, "scale", w.scale * 2),
    "scale data replaced": lambda w: setattr(w.scale, "data", w.scale * 2),
    "codes in place": lambda w: w.codes.bitwise_xor_(1),
    "zero in place": lambda w: w.zero.add_(1),
    "zero replaced twice": lambda w: [setattr(w, "zero", w.zero + 1) for _ in range(2)],
}


def made():
    g = torch.Generator().manual_seed(0)
    return quantize(torch.randn(40, 128, generator=g), Format("int4", 64, zero_point=True))


def fresh(w):
    return pack_panels(w.format, w.codes, w.scale, w.zero)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_bytes_follow_the_tensors(change, inference):
    with torch.inference_mode(inference):
        w = made()
        for _ in range(3):
            before = packed(w)
            assert packed(w) is before or inference  # a tensor that inference mode made counts no changes
            CHANGES[change](w)
            assert torch.equal(packed(w), fresh(w)) and not torch.equal(packed(w), before)
        twin = copy.deepcopy(w)
        CHANGES[change](twin)
        assert torch.equal(packed(twin), fresh(twin)) and torch.equal(packed(w), fresh(w))


def test_tensors_of_inference_mode_are_copied_once():
    with torch.inference_mode():
        w = made()
        assert not any(tensor.is_inference() for tensor in w.state_dict().values())
        assert packed(w) is packed(w)
        again = QuantizedWeight(w.format, **w.state_dict())
    assert again.codes is w.codes and packed(again) is packed(again)


def test_packs_in_a_graph_and_without_values():
    """In a graph of torch.compile, before and after the weight was packed; and of fake tensors, without a warning."""
    w, x = made(), torch.randn(3, 128)
    for _ in range(2):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(lambda x: ops.linear(x, w), fullgraph=True, backend="aot_eager")(x), ops.linear(x, w))
    w.scale.mul_(2)
    assert torch.equal(packed(w), fresh(w))
    mode = FakeTensorMode()
    with mode:
        fake = QuantizedWeight(w.format, **{name: mode.from_tensor(tensor) for name, tensor in w.state_dict().items()})
        assert ops.linear(mode.from_tensor(x), fake).shape == (3, 40)
