"""What every source of low-bit weights has: which layers it covers, which tensors they need, and how these become a QuantizedWeight."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ramify.checks import listed
from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.fields import Fields
from ramify.quant.formats import GROUPS, Format
from ramify.quant.weight import SCALES, SYMMETRIC_ZERO, QuantizedWeight

T = TypeVar("T", int, str)

Get = Callable[[str], Tensor | None]
"""A tensor of the checkpoint by its full name; None where there is none."""


class Names(NamedTuple):
    """Full names of the tensors of one layer, the codes first, and of those that it may have besides."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]


def within(part: str, module: str) -> bool:
    """Whether a name of a config, of a layer or of a part of it ("layers.3", "mlp"), means this module."""
    return f".{part}." in f".{module}."


class Source:
    """One way to store low-bit weights, set up from a checkpoint's quantization_config.

    Raises, naming the field, UnsupportedModelError for a variant that has no exact canonical form or is not read, and CheckpointError
    for what is of another kind than it has to be.
    """

    needed: tuple[str, ...]
    """Tensors of a layer behind its prefix, the codes first."""
    optional: tuple[str, ...] = ()

    def __init__(self, config: Fields) -> None:
        self.dense = config.names("modules_to_not_convert")

    def covers(self, module: str) -> bool:
        """Whether the config makes this linear layer ("model.layers.0.mlp.up_proj") low-bit."""
        return not any(within(part, module) for part in self.dense)

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
        self.grouped = ""
        """Which groups the config makes, once they are counted: why scales have the shape that they have."""

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
            raise self.wrong(name, f"is {list(tensor.shape)}; takes [{taken}]{self.grouped}")
        return tensor

    def scale(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of scales, all of them finite, kept in its own dtype."""
        return self.finite(name, self.take(name, SCALES, *shape))

    def one_scale(self, name: str) -> Tensor:
        """The scale [1, 1] of a whole matrix, stored with whatever axes."""
        scale = self.scale(name)
        if scale.numel() != 1:
            raise self.wrong(name, f"is {list(scale.shape)}; takes one number")
        return scale.reshape(1, 1)

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, if it holds no NaN and no infinity."""
        if not bool(tensor.isfinite().all()):
            raise self.wrong(name, "holds NaN or infinity; takes finite numbers")
        return tensor

    def byte(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of whole numbers as int8, if they fit."""
        low, high = int(tensor.min()), int(tensor.max())
        if low < -128 or high > 127:
            raise self.wrong(name, f"holds {low} to {high}; takes -128 to 127")
        return tensor.to(torch.int8)

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


def group_size(config: Fields, default: int | None = None) -> int | None:
    """The group_size of a config: inputs that share a scale; None for a whole row, which is written -1. It must be there, or a default."""
    value = config.get("group_size", default)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise refuse(config, "group_size", "a whole number above 0, or -1 for a whole row")
    return None if value == -1 else value


def count_groups(parts: Parts, K: int, group: int | None) -> int:
    """Groups of a row of K inputs."""
    if group is not None and K % group:
        raise parts.beyond(f"has {K} inputs and groups of {group}; takes whole groups")
    parts.grouped = f", since config.json says {'one group a row' if group is None else f'groups of {group}'}"
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


def choice(config: Fields, key: str, choices: tuple[T, ...], default: T | None = None) -> T:
    """A field that is one of a few values."""
    value = config.get(key, default)
    for each in choices:
        if value == each:
            return each
    raise refuse(config, key, listed(choices))


def refuse(config: Fields, key: str, taken: str) -> UnsupportedModelError:
    """The error for a field that says what is not read."""
    return UnsupportedModelError(f"{config.said(key)}; takes {taken}. Fetch another quantisation or the unquantised checkpoint.")


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
