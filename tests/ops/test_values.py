"""What an op asks of its inputs: shapes once for calls that agree, values on the CPU always and elsewhere when debugging."""

from importlib import import_module

import pytest
import torch

import ramify
from ramify import backends
from ramify.ops._library import InPlaceOp, Op, _Checked, _copied
from ramify.testing.tensors import attention_case, sample_case

I32 = torch.int32


def test_a_check_is_made_once_for_inputs_that_agree(monkeypatch):
    """In shape, strides, dtype, device and numbers; a refusal is never remembered as a pass, and not every shape is remembered."""
    seen = []

    def check(x, y, eps):
        seen.append(eps)
        if y is not None and x.shape != y.shape:
            raise ValueError("no")
        return ((x.shape, x.dtype),)

    tensors = (0, "x", False), (1, "y", True)
    checked, x, y = _Checked("op", tensors, check), torch.ones(2, 4), torch.ones(2, 4)
    for value in (x, x + 1, x.clone()):
        assert checked((value, y, 2.0)) == (((2, 4), torch.float32),)
    assert len(seen) == 1
    others = [
        (x[:1], y[:1], 2.0),
        (x.t().contiguous().t(), y, 2.0),
        (x.double(), y, 2.0),
        (x, y.to("meta"), 2.0),
        (x, y, 3.0),
        (x, None, 2.0),
    ]
    for count, inputs in enumerate(others, 2):
        assert checked(inputs)[0] == (inputs[0].shape, inputs[0].dtype) and len(seen) == count
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            checked((x, y[:1], 2.0))
    monkeypatch.setattr(_Checked, "most", 3)
    for rows in range(1, 9):
        checked((torch.ones(rows, 4), None, 2.0))
    assert len(checked._seen) <= 3


def inputs_of_every_look():
    """Op name -> inputs that are fine, as torch.ops takes them."""
    paged = attention_case([40, 17], 3, 2, 1, 64, page=16, tail_rows=[3, 1])
    rows, cache, one, at = torch.randn(2, 3, 1, 4), torch.zeros(2, 8, 1, 4), torch.ones(2, dtype=I32), torch.arange(3)
    *sampled, q = sample_case(2, 4, 9, mode="wor")
    tokens, parents, n_rows = sampled[1:4]
    angles, spans = torch.randn(10, 2), torch.zeros(2, 3, dtype=I32)
    lse = torch.zeros(2, 3, 2)
    return {
        "tree_attention": (*paged.tensors, paged.page_table, 0.1, 7, 2, paged.tail_rows),
        "interval_attention": (paged.q, rows, rows, spans, spans + 2, 0.1),
        "attention_colsum": (paged.q, paged.k, lse, paged.prefix_len, paged.ancestors, paged.page_table, 0.1, 5, 2, paged.tail_rows),
        "rope": (
            rows,
            angles,
            angles,
            at,
        ),
        "rope_append": (torch.randn(3, 16), angles, angles, at, at.int(), cache[0], cache[0], None, None, 1e-6),
        "embed": (at, torch.randn(6, 4), torch.float32),
        "kv_append": (rows, rows, cache, cache, one, None, None),
        "kv_commit": (rows, rows, cache, cache, torch.tensor([[0, 2], [1, 1]]), one, one, None),
        "table_draft": (tokens[:4], one, parents[0], n_rows[:1].expand(parents.shape[1]) * 0),
        "verify_greedy": (tokens, parents, tokens, n_rows),
        "verify_sample": (*sampled, q, "wor"),
        "residual_sample": (q[0], q[1], torch.rand(4).double()),
    }


def test_debug_looks_at_what_is_on_a_device():
    """A copy of a device's small tensors, and the shapes of the others, is all that any op's look at values needs."""
    modules = [import_module(f"ramify.ops.{name}") for name in ("attention", "colsum", "draft", "glue", "kv", "sample", "verify")]
    looking = {x.name: x for module in modules for x in vars(module).values() if isinstance(x, (Op, InPlaceOp)) and x._values}
    fine = inputs_of_every_look()
    assert looking.keys() == fine.keys()
    for name, inputs in fine.items():
        looking[name]._values(*_copied(inputs))
    bad = list(fine["tree_attention"])
    bad[7] = bad[7] + 100
    with pytest.raises(ValueError, match=r"page_table\[0, 0\] is 1\d\d; takes 0 to \d+, the pages of k"):
        looking["tree_attention"]._values(*_copied(tuple(bad)))


def test_debug_is_on_or_off():
    assert not backends.looks("cuda") and backends.looks("cpu")
    with ramify.debug(True):
        assert backends.looks("cuda")
    assert not backends.looks("cuda")
    with pytest.raises(TypeError, match='debug: on is "yes"'):
        ramify.debug("yes")
