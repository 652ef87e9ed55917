"""Which layers of a model of transformers become low-bit."""

import inspect
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRIX = re.compile(r"self\.(\w+)\.weight(?: @|\.(?:T|t|chunk|reshape|transpose|unsqueeze|view)\b)")
"""Where the code of a module computes with the weight of one of its layers, without calling the layer."""


def kept_dense(model: "PreTrainedModel") -> set[str]:
    """Layers that stay dense whatever the config says, by name: the head, what transformers keeps in fp32, and bare matrices.

    The code of models asks layers in fp32 for `weight.dtype` and casts their input to it, which codes do not stand for. Bare matrices
    are layers whose weight that code takes as it is, such as dt_proj of Mamba.
    """
    patterns = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    in_fp32 = re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in patterns))  # read as transformers reads them
    found = set()
    for owner, module in model.named_modules():
        for short, layer in module.named_children():
            name = f"{owner}.{short}" if owner else short
            if isinstance(layer, nn.Linear) and (short in _matrices(type(module)) or (patterns and in_fp32.search(f"{name}.weight"))):
                found.add(name.removeprefix(f"{model.base_model_prefix}."))
    return found | set(get_keys_to_not_convert(model))


@lru_cache(maxsize=256)
def _matrices(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the layers of a class that its code takes as matrices; none where its code is not at hand."""
    try:
        return frozenset(MATRIX.findall(inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset()
