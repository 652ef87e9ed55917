"""Which layers of a model of transformers become low-bit."""

import re
from typing import TYPE_CHECKING

from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept_dense(model: "PreTrainedModel") -> set[str]:
    """Layers that stay dense whatever the config says, by name: the head, and what transformers keeps in fp32.

    The code of models asks the latter for `weight.dtype` and casts their input to it, which the codes of a weight do not stand for.
    """
    patterns = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    in_fp32 = re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in patterns))  # read as transformers reads them
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {name for name in linear if patterns and in_fp32.search(f"{name}.weight")}
    return {name.removeprefix(f"{model.base_model_prefix}.") for name in found} | set(get_keys_to_not_convert(model))
