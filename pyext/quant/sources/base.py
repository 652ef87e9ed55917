"""What every source of low-bit weights has: which layers it covers, which tensors they need, and how these become a QuantizedWeight."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.quant.formats import GROUPS, Format
from ramify.quant.weight import SCALES, SYMMETRIC_ZERO, QuantizedWeight

Get = Callable[[str], Tensor | None]
"""A tensor of the checkpoint by its full name; None where there is none."""


class Names(NamedTuple):
    """Full names of the tensors of one layer, the codes first, and of those that it may have besides."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]


def named(value: Any) -> tuple[str, ...]:
    """The names that a config lists, which may be one string, or none."""
    return (value,) if isinstance(value, str) else tuple(value or ())


class Source:
    """One way to store low-bit weights, set up from a checkpoint's quantization_config.

    Raises UnsupportedModelError, naming the field, for a variant that has no exact canonical form or is not read.
    """

    needed: tuple[str, ...]
    """Tensors of a layer behind its prefix, the codes first."""
    optional: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.dense = named(config.get("modules_to_not_convert"))

    def covers(self, module: str) -> bool:
        """Whether the config makes this linear layer ("model.layers.0.mlp.up_proj") low-bit."""
        return not any(f".{part}." in f".{module}." for part in self.dense)

    def tensors(self, prefix: str) -> Names:
        """What the layer `prefix` needs and may have."""
        return Names(tuple(f"{prefix}.{name}" for name in self.needed), tuple(f"{prefix}.{name}" for name in self.optional))

    def read(
        self,
        get: Get,
        prefix: str,
        shape: tuple[int, int] | None = None,
        file: Callable[[str], str] = lambda name: "the checkpoint",
    ) -> QuantizedWeight:
        """The weight [N, K] of the layer `prefix`. Its dequantised values are those of the original package, bit for bit.

        shape: (N, K) that the model's config makes it, if known. file: the file of a tensor, for messages. Raises
        CheckpointError, naming file and tensor, for what is missing, of another shape or dtype, or makes no sense.
        """
        codes = self.tensors(prefix).needed[0].removeprefix(f"{prefix}.")
        parts = Parts(get, prefix, file, codes, shape)
        try:
            return self._read(parts)
        except (CheckpointError, UnsupportedModelError):
            raise
        except (ValueError, TypeError) as problem:  # what QuantizedWeight itself refuses
            raise parts.wrong(codes, f"makes no weight ({problem})") from None

    def _read(self, parts: "Parts") -> QuantizedWeight:
        raise NotImplementedError


class Parts:
    """The tensors of one layer, each checked as it is taken."""

    def __init__(self, get: Get, prefix: str, file: Callable[[str], str], codes: str, shape: tuple[int, int] | None) -> None:
        self.get, self.prefix, self.file, self.codes, self.shape = get, prefix, file, codes, shape

    def sized(self, N: int, K: int) -> tuple[int, int]:
        """The size that the codes make the weight; every source says it before it reads on."""
        if self.shape is not None and (N, K) != tuple(self.shape):
            raise self.wrong(self.codes, f"makes a weight {[N, K]}; config.json makes it {list(self.shape)}")
        return N, K

    def take(self, name: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor:
        """A tensor that must be there; None in `shape` is any length but 0."""
        tensor = self.look(name, dtypes, *shape)
        if tensor is None:
            raise self.wrong(name, "is missing; the layer is low-bit")
        return tensor

    def look(self, name: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor | None:
        """A tensor that may be there; no `shape` takes any."""
        tensor = self.get(f"{self.prefix}.{name}")
        if tensor is None:
            return None
        if tensor.dtype not in dtypes:
            raise self.wrong(name, f"is {_kind(tensor.dtype)}; takes {' or '.join(map(_kind, dtypes))}")
        fits = len(shape) == tensor.ndim and all(came == want or (want is None and came) for came, want in zip(tensor.shape, shape))
        if shape and not fits:
            taken = ", ".join("any" if want is None else str(want) for want in shape)
            raise self.wrong(name, f"is {list(tensor.shape)}; takes [{taken}]")
        return tensor

    def scale(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of scales, all of them finite, kept in its own dtype."""
        return self.finite(name, self.take(name, SCALES, *shape))

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, if it holds no NaN and no infinity."""
        if not bool(tensor.isfinite().all()):
            raise self.wrong(name, "holds NaN or infinity; takes finite numbers")
        return tensor

    def wrong(self, name: str, says: str) -> CheckpointError:
        """The error that says what is wrong with a tensor."""
        full = f"{self.prefix}.{name}"
        return CheckpointError(f'load: {self.file(full)}, tensor "{full}" {says}. Fetch the checkpoint again.')

    def beyond(self, says: str) -> UnsupportedModelError:
        """The error for a sound layer that has no exact canonical form; `says` is what came and what is taken."""
        return UnsupportedModelError(f'load: layer "{self.prefix}" {says}. Fetch another quantisation of the model.')


def int4(parts: Parts, codes: Tensor, scale: Tensor, zero: Tensor | None, perm: Tensor | None = None) -> QuantizedWeight:
    """Packed codes uint8 [N, K / 2], scales and whole unsigned zeros [N, groups] -> int4 in the canonical form.

    A group of a multiple of 32 inputs, a whole row among them, becomes groups of 128, 64 or 32 with repeated scales. Zeros that
    are all 8 are left out.
    """
    N, K = codes.shape[0], 2 * codes.shape[1]
    groups = scale.shape[1]
    group = K // groups
    fit = next((g for g in reversed(GROUPS) if group % g == 0), None)
    if K % groups or fit is None:
        raise parts.beyond(f"has {groups} groups for {K} inputs; takes groups of {', '.join(map(str, GROUPS))} inputs or a multiple of 32")
    scale = scale.expand(N, groups).repeat_interleave(group // fit, 1).contiguous()
    if zero is not None and bool((zero == SYMMETRIC_ZERO).all()):
        zero = None
    if zero is not None:
        zero = zero.expand(N, groups).repeat_interleave(group // fit, 1).half().contiguous()
    return QuantizedWeight(Format("int4", fit, zero is not None), codes.contiguous(), scale, zero, perm)


def int8(parts: Parts, codes: Tensor, scale: Tensor, zero: Tensor | None) -> QuantizedWeight:
    """Codes int8 [N, K], one scale a row (or for all, [1, 1]) and zeros that must be 0 -> int8 in the canonical form."""
    if scale.shape[1] != 1:
        raise parts.beyond(f"has {scale.shape[1]} groups of 8-bit codes a row; takes one scale a row")
    if zero is not None and bool(zero.any()):
        raise parts.beyond("has 8-bit codes with zero points; takes symmetric ones")
    return QuantizedWeight(Format("int8"), codes.contiguous(), scale.expand(len(codes), 1).contiguous())


def group_size(value: Any) -> int | None:
    """The group_size of a config: inputs that share a scale; None for a whole row."""
    if value in (None, -1):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refuse("group_size", value, "a whole number above 0, or -1 for a whole row")
    return value


def count_groups(parts: Parts, K: int, group: int | None) -> int:
    """Groups of a row of K inputs."""
    if group is not None and K % group:
        raise parts.beyond(f"has {K} inputs and groups of {group}; takes whole groups")
    return 1 if group is None else K // group


def group_order(parts: Parts, name: str, g_idx: Tensor, groups: int) -> Tensor | None:
    """g_idx [K], the group of each input -> perm int32 [K] that brings the groups together; None where they are together already."""
    K = len(g_idx)
    g_idx = g_idx.long()
    in_order = torch.arange(K) // (K // groups)
    perm = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[perm], in_order):
        raise parts.wrong(name, f"does not name each of {groups} groups {K // groups} times")
    return None if torch.equal(g_idx, in_order) else perm.int()


def nibbles(words: Tensor) -> Tensor:
    """Packed words or bytes [R, C] -> uint8 [R, C * nibbles of a word], lowest nibble first (on a little-endian machine)."""
    packed = words.contiguous().view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def refuse(field: str, came: Any, taken: str) -> UnsupportedModelError:
    """The error for a field of a quantization_config."""
    return UnsupportedModelError(f"load: quantization_config has {field} {came}; takes {taken}. Fetch another quantisation of the model.")


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
