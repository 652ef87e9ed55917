"""A checkpoint's tensors, fused and packed as the kernels take them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ramify import native
from ramify.model.checkpoint import Checkpoint
from ramify.model.config import ModelConfig
from ramify.quant import QuantizedWeight


@dataclass
class Linear:
    """A packed weight [N, K] (csrc/common/layouts.h) and its bias f32 [N], if it has one."""

    packed: Tensor
    N: int
    K: int
    bias: Tensor | None = None

    @classmethod
    def of(cls, parts: list[Tensor | QuantizedWeight], biases: list[Tensor | None], dtype: torch.dtype) -> "Linear":
        """Stack matrices that share their input (q, k, v; gate, up) into one layer.

        Low-bit weights are dequantised to `dtype` here, the one place that a kernel for them replaces; so formats and orders
        of inputs may differ from part to part.
        """
        dense = [part.dequantize() if isinstance(part, QuantizedWeight) else part for part in parts]
        weight = torch.cat([part.to(dtype) for part in dense]).contiguous()
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([torch.zeros(len(p)) if b is None else b.float() for p, b in zip(dense, biases, strict=True)])
        return cls(native.pack_weight(weight), *weight.shape, bias)

    @property
    def nbytes(self) -> int:
        """Bytes that one step reads."""
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass
class Layer:
    """One decoder layer."""

    attn_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    @property
    def nbytes(self) -> int:
        """Bytes of the four matrices."""
        return self.qkv.nbytes + self.o.nbytes + self.gate_up.nbytes + self.down.nbytes


@dataclass
class Weights:
    """All weights of a model in one dtype, norms and biases in f32."""

    dtype: torch.dtype
    embed: Tensor
    layers: list[Layer] = field(default_factory=list)
    final_norm: Tensor | None = None
    lm_head: Linear | None = None

    @property
    def step_bytes(self) -> int:
        """Weight bytes that a step of any width reads once: everything but the embedding table's unused rows."""
        return sum(layer.nbytes for layer in self.layers) + self.lm_head.nbytes

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "Weights":
        """Read, fuse and pack layer by layer, so that a large checkpoint is never in memory twice."""
        config: ModelConfig = checkpoint.config
        embed = checkpoint.tensor("embed")
        weights = cls(dtype, embed.to(dtype).contiguous())
        for i in range(config.num_layers):
            t = checkpoint.layer(i)

            def fuse(*names: str, t=t) -> Linear:
                return Linear.of([t[name] for name in names], [t.get(f"{name}_bias") for name in names], dtype)

            def gain(name: str, t=t) -> Tensor | None:
                return t[name].float().contiguous() if name in t else None

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
        weights.final_norm = checkpoint.tensor("final_norm").float().contiguous()
        head = checkpoint.tensor("lm_head") if "lm_head" in checkpoint.names else embed
        weights.lm_head = Linear.of([head], [None], dtype)
        return weights
