"""A checkpoint's tensors, fused and packed as the kernels take them."""

from ctypes import Structure
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ramify.backends import native
from ramify.memory import on_huge_pages
from ramify.model.checkpoint import Checkpoint
from ramify.model.config import ModelConfig
from ramify.quant import Format, QuantizedWeight, quantize
from ramify.quant.packing import packed


@dataclass
class Linear:
    """A weight [N, K] as the kernels take it (csrc/common/layouts.h) and its bias f32 [N], if it has one.

    low_bit: what the format of a low-bit weight says to the kernel, as fields of LinearArgs; empty for a dense one. perm: int32 [K]
    or None, the order of its inputs.
    """

    panels: Tensor
    N: int
    K: int
    bias: Tensor | None = None
    low_bit: dict[str, int] = field(default_factory=dict)
    perm: Tensor | None = None

    @classmethod
    def dense(cls, weight: Tensor, bias: Tensor | None = None) -> "Linear":
        """Pack a float32 or bfloat16 weight."""
        return cls(on_huge_pages(native().pack_weight(weight.contiguous())), *weight.shape, bias)

    @classmethod
    def quantized(cls, weight: QuantizedWeight, bias: Tensor | None, activations: str) -> "Linear":
        """Pack a low-bit weight. activations: how its kernel takes the input; fp8, where that is int8, as it is."""
        how = native().ACTIVATIONS["exact" if weight.format.kind == "fp8" and activations.startswith("int8") else activations]
        numbers = {"dtype": native().LOW_BIT[weight.format.kind], "group": weight.format.group, "activations": how}
        numbers |= {"scale_dtype": native().DTYPES[weight.scale.dtype], "zeros": int(weight.zero is not None)}
        return cls(packed(weight), *weight.shape, bias, numbers, weight.perm)

    @property
    def nbytes(self) -> int:
        """Bytes that one step reads."""
        return sum(t.nbytes for t in (self.panels, self.bias, self.perm) if t is not None)

    def arguments(self) -> Structure:
        """The kernel's arguments, as far as they are the weight's."""
        kernel = native().LinearLowBitArgs if self.low_bit else native().LinearArgs
        args = kernel(N=self.N, K=self.K, weight=self.panels.data_ptr(), bias=native().pointer(self.bias))
        for name, value in (self.low_bit or {"dtype": native().DTYPES[self.panels.dtype]}).items():
            setattr(args, name, value)
        args.perm = native().pointer(self.perm)
        return args


@dataclass
class DeviceLinear:
    """A weight [N, K] on another device as it was read, a matrix or a QuantizedWeight, and its bias [N], if it has one."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None = None

    @property
    def N(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that one step reads."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


Linears = tuple[Linear | DeviceLinear, ...]
"""Matrices that share their input and whose outputs lie side by side: one, unless their formats or orders of inputs differ."""


@dataclass(frozen=True)
class Settings:
    """How weights are held: dtype of dense ones (and of the cache), and for low-bit ones how their kernels take the input.

    layers, head: formats in which dense layers and a dense lm_head are rounded while they are read; None leaves them as they are.
    device: where tensors go for a model whose steps are made of ops; None keeps them here, packed for the captured steps of the CPU.
    """

    dtype: torch.dtype
    layers: Format | None = None
    head: Format | None = None
    activations: str = "int8"
    device: torch.device | None = field(default=None, repr=False)

    def on_device(self, x: Tensor) -> Tensor:
        """x where the model's tensors lie."""
        return x if self.device is None else x.to(self.device)

    def hold(self, part: Tensor | QuantizedWeight, bias: Tensor | None) -> Linear | DeviceLinear:
        """One matrix as the kernels take it."""
        dense = isinstance(part, Tensor)
        if self.device is None:
            return Linear.dense(part.to(self.dtype), bias) if dense else Linear.quantized(part, bias, self.activations)
        bias = None if bias is None else bias.to(self.device, self.dtype)
        return DeviceLinear(part.to(self.device, self.dtype) if dense else part.to(self.device), bias)

    def fuse(self, parts: list[Tensor | QuantizedWeight], biases: list[Tensor | None], format: Format | None) -> Linears:
        """Pack matrices that share their input (q, k, v; gate, up), as one where they can be."""
        if format is not None:
            parts = [quantize(part, format) if isinstance(part, Tensor) else part for part in parts]
        rows = [part.shape[0] for part in parts]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [torch.zeros(n, dtype=torch.float32, device="cpu") if b is None else b.float() for n, b in zip(rows, biases, strict=True)]
            )
        dense = [part for part in parts if isinstance(part, Tensor)]
        if len(dense) == len(parts):
            return (self.hold(torch.cat([part.to(self.dtype) for part in dense]), bias),)
        stacked = None if dense else QuantizedWeight.stack([part for part in parts if isinstance(part, QuantizedWeight)])
        if stacked is not None:
            return (self.hold(stacked, bias),)
        each = [None] * len(parts) if bias is None else bias.split(rows)
        return tuple(self.hold(part, b) for part, b in zip(parts, each, strict=True))


@dataclass
class Layer:
    """One decoder layer."""

    attn_norm: Tensor
    qkv: Linears
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linears
    mlp_norm: Tensor
    gate_up: Linears
    down: Linears

    @property
    def nbytes(self) -> int:
        """Bytes of the four matrices."""
        return sum(part.nbytes for part in (*self.qkv, *self.o, *self.gate_up, *self.down))


@dataclass
class Weights:
    """All weights of a model: matrices as `settings` says, the embedding table in its dtype, norms and biases in f32."""

    settings: Settings
    embed: Tensor
    layers: list[Layer] = field(default_factory=list)
    final_norm: Tensor | None = None
    lm_head: Linears = ()

    @property
    def step_bytes(self) -> int:
        """Weight bytes that a step of any width reads once: everything but the embedding table's unused rows."""
        return sum(layer.nbytes for layer in self.layers) + sum(part.nbytes for part in self.lm_head)

    @property
    def dtype(self) -> torch.dtype:
        """Of dense matrices, the embedding table and the cache."""
        return self.settings.dtype

    @classmethod
    def load(cls, checkpoint: Checkpoint, settings: Settings) -> "Weights":
        """Read, fuse and pack layer by layer, so that a large checkpoint is never in memory twice."""
        if settings.device is None:
            native()  # so that kernels which cannot be loaded are not taken for a tensor's fault
        config: ModelConfig = checkpoint.config
        embed = checkpoint.stored("embed")
        weights = cls(settings, settings.on_device(embed.to(settings.dtype).contiguous()))
        for i in range(config.num_layers):
            t = checkpoint.layer(i)

            def fuse(*names: str, t=t, i=i) -> Linears:
                try:
                    return settings.fuse([t[name] for name in names], [t.get(f"{name}_bias") for name in names], settings.layers)
                except ValueError as problem:
                    which = ", ".join(checkpoint.source_name(f"layers.{i}.{name}") for name in names)
                    raise ValueError(f"load: {which}: {problem}") from None

            def gain(name: str, t=t) -> Tensor | None:
                return settings.on_device(t[name].float().contiguous()) if name in t else None

            weights.layers.append(
                Layer(
                    attn_norm=gain("attn_norm"),
                    qkv=fuse("q", "k", "v"),
                    q_norm=gain("q_norm"),
                    k_norm=gain("k_norm"),
                    o=fuse("o"),
                    mlp_norm=gain("mlp_norm"),
                    gate_up=fuse("gate", "up"),
                    down=fuse("down"),
                )
            )
        weights.final_norm = settings.on_device(checkpoint.stored("final_norm").float().contiguous())
        head = checkpoint.tensor("lm_head") if "lm_head" in checkpoint.names else embed
        try:
            weights.lm_head = settings.fuse([head], [None], settings.head)
        except ValueError as problem:
            which = checkpoint.source_name("lm_head" if "lm_head" in checkpoint.names else "embed")
            raise ValueError(f"load: {which}: {problem}") from None
        return weights
