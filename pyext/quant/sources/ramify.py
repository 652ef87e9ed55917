"""ramify's own files: the canonical form itself, so that reading is taking.

A layer has `weight` (the codes), `weight_scale` and, where its format asks for them, `weight_zero` and `weight_perm`, with shapes
and dtypes as in QuantizedWeight. quantization_config: {"quant_method": "ramify_w4" (int4) or "ramify_w8" (int8, fp8), "format":
"int4-g64", "method": the quantizer's name, "head": the format of lm_head or null, "modules_to_not_convert": [...], "version": 1}.
A head among modules_to_not_convert lies in the file dense, and `head` says what the model layer makes of it. "formats" is there
where some layers have another format: {"layers.3.mlp.down_proj": "int8", ...}, names or parts of names. "act_order" is there where
layers have an order of inputs: names or parts of names of those that do, so that a lost `weight_perm` is noticed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ramify.fields import Fields
from ramify.quant.formats import Format
from ramify.quant.sources.base import Parts, Source, refuse, within
from ramify.quant.weight import CODES, QuantizedWeight

VERSION = 1
FIELDS = {"codes": "weight", "scale": "weight_scale", "zero": "weight_zero", "perm": "weight_perm"}
"""Part of a QuantizedWeight -> its name in a file."""
ORDER_MISSING = "is missing; act_order names the layer, so its inputs have an order"


class Ramify(Source):
    """quant_method "ramify_w4" and "ramify_w8"."""

    needed = ("weight", "weight_scale")
    optional = ("weight_zero", "weight_perm")

    def __init__(self, config: Fields) -> None:
        super().__init__(config)
        if config.get("version", VERSION) != VERSION:
            raise refuse(config, "version", f"{VERSION}: a newer ramify wrote it")
        self.format = _format(config, "format")
        self.head = None if config.get("head") is None else _format(config, "head", " or null, which leaves it dense")
        others = config.object("formats")
        self.others = {name: _format(others, name) for name in others.values}
        self.act_order = config.names("act_order")
        if config.get("quant_method") != method_of(self.format):
            raise refuse(config, "quant_method", f"{method_of(self.format)} for the format {self.format.name}")

    def format_of(self, module: str) -> Format:
        """The format of one covered layer."""
        if module == "lm_head" and self.head is not None:
            return self.head
        return next((form for part, form in self.others.items() if within(part, module)), self.format)

    def ordered(self, module: str) -> bool:
        """Whether the config says that this layer has an order of inputs; without a word about it, it may have one."""
        return any(within(part, module) for part in self.act_order)

    def _read(self, parts: Parts) -> QuantizedWeight:
        form = self.format_of(parts.prefix)
        codes = parts.take("weight", (CODES[form.kind],), None, None)
        N, K = parts.sized(codes.shape[0], codes.shape[1] * (2 if form.kind == "int4" else 1))
        groups = form.scale_shape(N, K)
        scale = parts.scale("weight_scale", *groups)
        zero = parts.finite("weight_zero", parts.take("weight_zero", (torch.float16,), *groups)) if form.zero_point else None
        perm = parts.look("weight_perm", (torch.int32,), K)
        if perm is None and self.ordered(parts.prefix):
            raise parts.wrong("weight_perm", ORDER_MISSING)
        return QuantizedWeight(form, codes, scale, zero, perm)


def method_of(form: Format) -> str:
    """The quant_method of a format."""
    return "ramify_w4" if form.bits == 4 else "ramify_w8"


def config_of(
    form: Format,
    method: str = "rtn",
    head: Format | None = None,
    dense: Sequence[str] = ("lm_head",),
    others: Mapping[str, Format] | None = None,
    ordered: Sequence[str] = (),
) -> dict[str, Any]:
    """The quantization_config of a checkpoint in this format. method: the quantizer; dense: layers that are left as they are.

    others: layers that have another format. ordered: layers, or parts of their names, that have an order of inputs.
    """
    return {
        "quant_method": method_of(form),
        "format": form.name,
        "method": method,
        "head": None if head is None else head.name,
        "modules_to_not_convert": list(dense),
        **({"formats": {name: other.name for name, other in others.items()}} if others else {}),
        **({"act_order": list(ordered)} if ordered else {}),
        "version": VERSION,
    }


def short(prefix: str) -> str:
    """A layer's name as models with a head and without one have it."""
    return prefix.removeprefix("model.")


def act_order(ordered: Sequence[str], count: int) -> list[str]:
    """The layers with an order of inputs as "act_order" names them: all `count` of the decoder by the one part that they share."""
    names = [short(name) for name in ordered]
    inner = [name for name in names if name != "lm_head"]
    return names if not inner or len(inner) < count else ["layers", *names[len(inner) :]]


def stored(prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a file that hold this weight as the layer `prefix`."""
    return {f"{prefix}.{FIELDS[part]}": tensor for part, tensor in weight.state_dict().items()}


def _format(config: Fields, key: str, besides: str = "") -> Format:
    name = config.text(key)
    try:
        return Format.parse(name, besides=besides)
    except ValueError as problem:
        raise refuse(config, key, str(problem).partition("takes ")[2].rstrip(".")) from None
