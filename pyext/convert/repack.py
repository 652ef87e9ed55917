"""A quantised checkpoint in ramify's own form: the same codes, scales, zeros and orders of inputs, so that it computes the same bits.

Nothing is rounded. What the source leaves in floats stays in floats, and layers of several formats keep each its own.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ramify.convert.conversion import Conversion, Progress
from ramify.convert.folder import NewFolder
from ramify.model.checkpoint import Checkpoint
from ramify.quant import Format, QuantizedWeight
from ramify.quant.sources.ramify import act_order, config_of, short, stored


def refuse_rounding(checkpoint: Checkpoint, to: Format | None, rounding: Mapping[str, object], head: str | None) -> None:
    """ValueError where quantised weights were to be rounded again. rounding: arguments that only rounding takes, None where not given."""
    name = checkpoint.config.name
    first = _format(checkpoint, next(each for each in checkpoint.names if each in checkpoint.low_bit_names))
    for argument, value in rounding.items():
        if value is not None:
            raise ValueError(
                f"convert: {argument} is given and {name} is {first.name} already; its codes are taken as they are. "
                f"Leave out --{argument}, or start from the float checkpoint."
            )
    if to is not None and first != to:
        raise _twice(name, first, to)
    if head is not None and "lm_head" in checkpoint.low_bit_names and head != (own := _format(checkpoint, "lm_head").name):
        raise ValueError(f'convert: head is "{head}" and that of {name} is {own} already; takes no other. Leave out --head.')


def write_repacked(checkpoint: Checkpoint, new: NewFolder, made: Conversion, to: Format | None, progress: Progress) -> dict[str, Any]:
    """Every tensor into the new folder, in order of use; sizes into `made`. Returns the quantization_config.

    made.head: in which format a head that is dense in the file is held after loading; becomes that of a low-bit one.

    to: the format that every quantised layer must have, if one was asked for; ValueError names the first that has another.
    """
    formats: dict[str, Format] = {}
    dense: list[str] = []
    ordered: list[str] = []
    layer_bytes, total_bytes = [0, 0], [0, 0]
    for name in progress(checkpoint.names, "tensors"):
        theirs = checkpoint.source_name(name)
        prefix = theirs.removesuffix(".weight")
        tensor = checkpoint.tensor(name) if name in checkpoint.low_bit_names else checkpoint.stored(name)
        tensors = {theirs: tensor} if not isinstance(tensor, QuantizedWeight) else stored(prefix, tensor)
        sizes = checkpoint.nbytes(name), sum(each.nbytes for each in tensors.values())
        total_bytes = [total + size for total, size in zip(total_bytes, sizes)]
        if isinstance(tensor, QuantizedWeight):
            formats[prefix] = tensor.format
            if tensor.perm is not None:
                ordered.append(prefix)
            layer_bytes = [total + size for total, size in zip(layer_bytes, sizes)]
            if to is not None and name != "lm_head" and tensor.format != to:
                raise _twice(f'"{prefix}"', tensor.format, to)
        elif tensor.ndim == 2 and name != "embed":
            dense.append(prefix)
        for each, part in tensors.items():
            new.add(each, part)
    head = formats.pop("lm_head", None)
    if head is None and "lm_head" not in dense:
        dense.append("lm_head")  # tied
    counted = Counter(form.name for form in formats.values())
    most = Format.parse(counted.most_common(1)[0][0]) if formats else head
    assert most is not None  # something was low-bit
    made.format, made.formats = most.name, dict(counted)
    if left := sum(each != "lm_head" for each in dense):
        made.formats["dense"] = left
    if head is not None:
        made.head = head.name
    elif made.head is not None:  # dense in the file, and rounded when it is loaded
        head = Format.parse(made.head)
    made.layer_bytes = (layer_bytes[0], layer_bytes[1])
    made.total_bytes = (total_bytes[0], total_bytes[1])
    quantization = checkpoint.config.quantization or {}
    method = quantization.get("method", "unknown") if quantization["quant_method"].startswith("ramify") else quantization["quant_method"]
    others = {short(prefix): form for prefix, form in formats.items() if form != most}
    return config_of(most, method, head, [short(prefix) for prefix in dense], others, act_order(ordered, len(formats)))


def _format(checkpoint: Checkpoint, name: str) -> Format:
    """The format of a low-bit tensor."""
    tensor = checkpoint.tensor(name)
    assert isinstance(tensor, QuantizedWeight)
    return tensor.format


def _twice(what: str, came: Format, to: Format) -> ValueError:
    return ValueError(
        f"convert: {what} is {came.name} already; rounding it again to {to.name} would lose twice. "
        "Leave out --to, or start from the float checkpoint."
    )
