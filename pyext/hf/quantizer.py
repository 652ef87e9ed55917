"""transformers' quantizers "ramify_w4" and "ramify_w8": low-bit folders load with from_pretrained, dense ones are quantised on the way.

A folder whose quantization_config names one of the two has its linear layers replaced by LowBitLinear before its tensors are read; those of
which the folder holds nothing, such as a new head, stay as they are. With quantization_config=RamifyConfig(...) a dense folder is
quantised while it loads, round to nearest; save_pretrained writes what `ramify convert` writes, and loading that gives the same bits.
model.dequantize() makes it dense again. Importing this module registers both.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ramify.errors import CheckpointError
from ramify.fields import Fields
from ramify.hf.coverage import kept_dense, warn_of_little
from ramify.hf.low_bit import LowBitLinear
from ramify.model.damage import damage
from ramify.quant import Format, quantize
from ramify.quant.sources.ramify import FIELDS, ORDER_MISSING, VERSION, Ramify, method_of
from ramify.quant.weight import CODES, SCALES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("ramify_w4", "ramify_w8")

DTYPES = {
    **{torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"},
    **{torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"},
}
"""As headers of safetensors write them."""


class RamifyConfig(QuantizationConfigMixin):
    """What `quantization_config=` of from_pretrained takes to quantise a dense checkpoint while it loads. Needs `pip install 'ramify[hf]'`.

    format: "int4-g64", "int8", "fp8", ... by name. modules_to_not_convert: names of layers, or parts of names, that stay dense besides
    the head, what transformers keeps in fp32 and what models take as a bare matrix. formats: names of layers, or parts of names, that
    have another format. method, head and act_order are notes of the quantizer that wrote a checkpoint.

    A warning tells of a model of which less than half is rounded. Raises UnsupportedModelError for an unknown format.
    """

    def __init__(
        self,
        format: str = "int4-g64",
        modules_to_not_convert: list[str] | None = None,
        method: str = "rtn",
        head: str | None = None,
        formats: dict[str, str] | None = None,
        act_order: list[str] | None = None,
        version: int = VERSION,
        quant_method: str | None = None,
    ) -> None:
        if quant_method is None:
            form = Format.parse(format, "RamifyConfig: format")
            format, quant_method = form.name, method_of(form)
        self.quant_method: Any = quant_method
        self.format, self.method, self.head, self.version = format, method, head, version
        self.formats, self.act_order = formats or {}, act_order or []
        self.modules_to_not_convert = ["lm_head"] if modules_to_not_convert is None else modules_to_not_convert
        self.modules_to_not_convert = list(_source(self).dense)  # raises for what is not read


def _source(config: RamifyConfig) -> Ramify:
    return Ramify(Fields(vars(config), "quantization_config", caller="RamifyConfig"))


class RamifyQuantizer(HfQuantizer):
    """Puts LowBitLinear layers into a model of transformers and fills them, from codes or from dense weights."""

    quantization_config: RamifyConfig

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        config = self.quantization_config
        named = _source(config)
        if not self.pre_quantized:  # what stays dense is written down, so that the saved folder loads alike
            config.modules_to_not_convert = sorted({*config.modules_to_not_convert, *kept_dense(model)})
        source = _source(config)
        headers = _Stored(kwargs.get("checkpoint_files"), str(model.base_model_prefix))  # raises for a file that is not whole
        stored = headers if self.pre_quantized else None
        layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and source.covers(name)}
        if not self.pre_quantized:
            warn_of_little(model, layers, config.format, lambda name: not named.covers(name))
        elif stored is not None and (new := stored.new(layers)):
            config.modules_to_not_convert = sorted({*config.modules_to_not_convert, *new})
            layers = {name: each for name, each in layers.items() if name not in new}
        for name, module in layers.items():
            form, N, K = source.format_of(name), module.out_features, module.in_features
            if form.kind == "int4" and K % form.group:
                raise ValueError(
                    f'RamifyConfig: layer "{name}" has {K} inputs; {form.name} takes multiples of {form.group}. '
                    "Choose a smaller group, or name it in modules_to_not_convert."
                )
            perm = stored is not None and stored.check(name, form, source.ordered(name))
            layer = LowBitLinear(form, N, K, module.bias is not None, perm, module.weight.dtype, device="meta")
            if stored is not None:
                stored.fits(name, layer)
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, layer in model.named_modules():
            if not (self.pre_quantized and isinstance(layer, LowBitLinear)) or any(buffer.is_meta for buffer in layer.buffers()):
                continue  # on meta: it lies on a disk until it is used
            try:
                layer.quantized  # noqa: B018 (it is made, and raises where the tensors make no weight)
            except (ValueError, TypeError) as problem:
                raise ValueError(f'from_pretrained: layer "{name}": {problem} Fetch the checkpoint again.') from None
            for part in ("weight_scale", "weight_zero"):
                if (tensor := getattr(layer, part)) is not None and not bool(tensor.isfinite().all()):
                    raise _wrong(f"{name}.{part}", "holds NaN or infinity; takes finite numbers")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Dense weights of layers that are low-bit in the model."""
        prefix, _, last = param_name.rpartition(".")
        return not self.pre_quantized and last == "weight" and isinstance(model.get_submodule(prefix), LowBitLinear)

    def get_quantize_ops(self) -> "_Quantize":
        """What a dense weight goes through on its way into the model."""
        return _Quantize(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales, zeros and orders keep the dtype of the file; the rest follows the model."""
        own = converter.target_patterns[0].endswith(tuple(f".{name}" for part, name in FIELDS.items() if part != "codes"))
        return None if own else super().get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """Every LowBitLinear becomes an nn.Linear with the values that its codes stand for; a dtype not the model's is for all of it."""
        dtype = dtype or model.dtype
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, LowBitLinear):
                continue
            if any(buffer.is_meta for buffer in layer.buffers()):
                raise ValueError(f'dequantize: layer "{name}" lies on a disk; takes a model in memory. Load it without offloading.')
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            dense.weight = nn.Parameter(layer.quantized.dequantize().to(dtype))
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
            model.set_submodule(name, dense.train(layer.training))
        if dtype != model.dtype:
            nn.Module.to(model, dtype)
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes the codes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No gradients reach the codes."""
        return False


class _Quantize(ConversionOps):
    """One dense weight of a checkpoint -> the tensors of a LowBitLinear."""

    def __init__(self, quantizer: RamifyQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **given: Any) -> dict[str, Any]:
        """Values of `input_dict` are one weight [N, K]; given["full_layer_name"] ends in ".weight"."""
        [w] = [value[0] if isinstance(value, list) else value for value in input_dict.values()]
        prefix = given["full_layer_name"].removesuffix(".weight")
        weight = quantize(w, given["model"].get_submodule(prefix).format)
        named = {f"{prefix}.{FIELDS[part]}": tensor for part, tensor in weight.state_dict().items()}
        if (missing := given.get("missing_keys")) is not None:
            missing -= named.keys()
        return named


class _Stored:
    """The headers of a checkpoint's safetensors. No files, no complaints: then the tensors come from elsewhere."""

    def __init__(self, files: Any, base: str) -> None:
        """base: the prefix of names that a model with a head has and one without has not."""
        self.base = base
        self.headers: dict[str, tuple[str, list[int]]] = {}
        for file in map(Path, files or ()):
            if file.suffix != ".safetensors":
                continue
            try:
                with safe_open(str(file), framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118
                        tensor = shard.get_slice(name)
                        self.headers[self._short(name)] = tensor.get_dtype(), tensor.get_shape()
            except SafetensorError as problem:
                raise CheckpointError(f"from_pretrained: {file.name} in {file.parent} {damage(file, problem)}") from None

    def new(self, layers: Iterable[str]) -> set[str]:
        """The layers of which no file holds any tensor, such as a new head: transformers makes them, as it does in a dense model.

        Not those whose last name a low-bit layer has that is stored and is none of `layers`: their codes may lie under its name.
        """
        held = {name.rpartition(".")[0] for name in self.headers}
        own = {layer: self._short(f"{layer}.weight").rpartition(".")[0] for layer in layers}
        others = {name for name in held - {*own.values()} if f"{name}.weight_scale" in self.headers}
        taken = {name.rpartition(".")[2] for name in others}
        return {layer for layer, short in own.items() if held and short not in held and layer.rpartition(".")[2] not in taken}

    def check(self, layer: str, form: Format, ordered: bool) -> bool:
        """Whether the layer has an order of inputs. CheckpointError for a tensor that is missing or would be cast in silence."""
        taken = {"weight": (DTYPES[CODES[form.kind]],), "weight_scale": tuple(DTYPES[scale] for scale in SCALES)}
        if form.zero_point:
            taken["weight_zero"] = ("F16",)
        for part, dtypes in taken.items():
            header = self._header(f"{layer}.{part}")
            if header is None and self.headers:
                raise _wrong(f"{layer}.{part}", f"is missing; the layer is {form.name}")
            if header is not None and (came := header[0]) not in dtypes:
                raise _wrong(f"{layer}.{part}", f"is {came}; the layer is {form.name}, which takes {' or '.join(dtypes)}")
        perm = self._header(f"{layer}.weight_perm") is not None
        if ordered and not perm and self.headers:
            raise _wrong(f"{layer}.weight_perm", ORDER_MISSING)
        return perm

    def fits(self, name: str, layer: LowBitLinear) -> None:
        """CheckpointError for a tensor of another shape than the layer's."""
        for part in FIELDS.values():
            header, wanted = self._header(f"{name}.{part}"), getattr(layer, part, None)
            if header is not None and wanted is not None and header[1] != list(wanted.shape):
                raise _wrong(f"{name}.{part}", f"is {header[1]}; the layer is {layer.format.name}, which takes {list(wanted.shape)}")

    def _header(self, name: str) -> tuple[str, list[int]] | None:
        """(dtype, shape) as the file writes them."""
        return self.headers.get(self._short(name))

    def _short(self, name: str) -> str:
        """A tensor's name from the base on: the prefix may be missing in the files, or in the model, or stand behind another one."""
        return name.rpartition(f"{self.base}.")[2] if self.base else name


def _wrong(tensor: str, says: str) -> CheckpointError:
    return CheckpointError(f'from_pretrained: tensor "{tensor}" {says}. Fetch the checkpoint again.')


for _method in METHODS:
    AUTO_QUANTIZATION_CONFIG_MAPPING[_method] = RamifyConfig
    AUTO_QUANTIZER_MAPPING[_method] = RamifyQuantizer
