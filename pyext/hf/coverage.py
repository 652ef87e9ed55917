"""Which layers of a model of transformers become low-bit, and a warning where they are few."""

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection
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
        bare = _matrices(type(module))  # type: ignore[arg-type]  # a class can be hashed
        for short, layer in module.named_children():
            name = f"{owner}.{short}" if owner else short
            if isinstance(layer, nn.Linear) and (short in bare or (patterns and in_fp32.search(f"{name}.weight"))):
                found.add(name.removeprefix(f"{model.base_model_prefix}."))
    return found | set(get_keys_to_not_convert(model))


def warn_of_little(model: "PreTrainedModel", rounded: Collection[str], format: str, named: Callable[[str], bool]) -> None:
    """A UserWarning where the layers `rounded` have less than half of the weights outside embeddings and head.

    named: whether the user has asked for a layer to stay dense. Weights are parameters of two axes and more.
    """
    apart = [each for each in model.modules() if isinstance(each, nn.Embedding) or each is model.get_output_embeddings()]
    seen = {id(parameter) for each in apart for parameter in each.parameters()}
    low_bit, dense = 0, Counter[str]()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name in rounded:
                low_bit += parameter.numel()
                continue
            kept = "named in modules_to_not_convert" if named(name) else "in fp32, a bare matrix or the last layer"
            why = kept if isinstance(module, nn.Linear) else "no nn.Linear"
            dense[f"{type(module).__name__} ({{:,}}, {why})"] += parameter.numel()
    total = low_bit + dense.total()
    if 2 * low_bit < total or not rounded:
        largest = ", ".join(what.format(count) for what, count in dense.most_common(3))
        warnings.warn(
            f"RamifyConfig: {format} rounds {low_bit:,} of {total:,} weights ({low_bit / max(total, 1):.0%}) of {type(model).__name__} "
            f"outside embeddings and head. The largest that stay dense: {largest or 'none'}. Only layers of class nn.Linear are rounded; "
            "without quantization_config the model loads as it is.",
            stacklevel=2,
        )


@lru_cache(maxsize=256)
def _matrices(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the layers of a class that its code takes as matrices; none where its code is not at hand."""
    try:
        return frozenset(MATRIX.findall(inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset()
