"""What a Hugging Face config.json says about a model, checked and in our words.

One table, `FAMILIES`, holds everything in which the supported architectures differ. What it does not hold is refused by
name, and so is every feature of a config that the model layer does not compute: a wrong number is worse than no number.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramify.backends import HEAD_SIZES
from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.quant.sources import source_of

ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `kind` is one of ROPE_TYPES; `factor` belongs to linear and llama3, the rest to llama3 alone."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one decoder. `sliding_windows[i]` counts the positions that layer i sees, its own included; None is all.

    quantization: the checkpoint's quantization_config as it came, of a method that `quant.sources` reads; None for dense weights.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner_size: int
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    quantization: Mapping[str, Any] | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, name: str | None = None) -> "ModelConfig":
        """Reads config.json and, where there is one, generation_config.json (its eos_token_id wins). Raises as `from_dict`.

        name: default is the folder's.
        """
        folder = Path(folder)
        values = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        if generation.is_file():
            eos = read_json(generation).get("eos_token_id")
            values = values if eos is None else {**values, "eos_token_id": eos}
        return cls.from_dict(values, name=name or folder.resolve().name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "") -> "ModelConfig":
        """From the dict of a config.json, of transformers 4 or 5.

        Raises UnsupportedModelError for an architecture or a feature that is not run, CheckpointError for a field that
        is missing or makes no sense.
        """
        architecture, family = _family(values)
        read = _Reader({**family.defaults, **values})
        _refuse_features(read.values)
        hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
        kv_heads = read.count("num_key_value_heads", heads)
        head_dim = read.count("head_dim", hidden // heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"load: config.json has {heads} num_attention_heads and {kv_heads} num_key_value_heads; takes a multiple. "
                "Fetch the file again."
            )
        if head_dim not in HEAD_SIZES:
            raise UnsupportedModelError(f"load: config.json makes head_dim {head_dim}; takes {_listed(HEAD_SIZES)}.")
        layers, positions = read.count("num_hidden_layers"), read.count("max_position_embeddings")
        return cls(
            name=name,
            architecture=architecture,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            inner_size=read.count("intermediate_size"),
            norm_eps=float(read.values.get("rms_norm_eps", 1e-6)),
            rope=_rope(read.values, positions),
            max_positions=positions,
            tied_embeddings=bool(read.values.get("tie_word_embeddings", False)),
            qkv_bias=family.flag(family.qkv_bias, read.values),
            o_bias=family.flag(family.o_bias, read.values),
            mlp_bias=family.flag(family.mlp_bias, read.values),
            qk_norm=family.qk_norm,
            sliding_windows=family.windows(read.values, layers),
            eos_token_ids=_token_ids(read.values.get("eos_token_id")),
            bos_token_id=next(iter(_token_ids(read.values.get("bos_token_id"))), None),
            dtype=_dtype(read.values),
            quantization=_quantization(read.values),
        )


# ---- the families -------------------------------------------------------------------------------------------------


def _no_window(values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def _one_window(values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Mistral: every layer slides, unless sliding_window is null."""
    return (_window(values),) * layers


def _window_by_layer(values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Qwen: off unless use_sliding_window; then layer_types tells, or in older files the layers from max_window_layers on."""
    window = _window(values) if values.get("use_sliding_window") else None
    types = values.get("layer_types")
    if types is None:
        first = values.get("max_window_layers", 28)
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    strange = sorted(set(types) - {"full_attention", "sliding_attention"})
    if strange:
        raise UnsupportedModelError(f"load: config.json has layer type {strange[0]}; takes full_attention and sliding_attention.")
    if len(types) != layers:
        raise CheckpointError(f"load: config.json lists {len(types)} layer_types for {layers} layers; takes one a layer. Fetch it again.")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


@dataclass(frozen=True)
class Family:
    """In what one architecture differs from the others. A bias is on, off, or whatever the named config field says."""

    model_type: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Callable[[Mapping[str, Any], int], tuple[int | None, ...]] = _no_window
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers assumes where config.json is silent

    @staticmethod
    def flag(value: bool | str, values: Mapping[str, Any]) -> bool:
        """A bias of this family under this config."""
        return bool(values.get(value, False)) if isinstance(value, str) else value


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults={"max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1},
    ),
    "MistralForCausalLM": Family(
        "mistral",
        windows=_one_window,
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "eos_token_id": 2,
            "bos_token_id": 1,
        },
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        qkv_bias=True,
        windows=_window_by_layer,
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        windows=_window_by_layer,
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
}


def _family(values: Mapping[str, Any]) -> tuple[str, Family]:
    named = values.get("architectures")
    if named:
        architecture = str(named[0])
    else:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        architecture = by_type.get(str(values.get("model_type")), f"no architectures and model_type {values.get('model_type')}")
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"load: config.json names {architecture}; takes {', '.join(FAMILIES)}. "
            "ramify.CustomGenerate still runs it inside transformers' own generate."
        )
    return architecture, FAMILIES[architecture]


def _refuse_features(values: Mapping[str, Any]) -> None:
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"load: config.json has hidden_act {activation}; takes silu.")


# ---- single fields ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    values: Mapping[str, Any]

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; null and absent take the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            what = "no" if value is None else f"{value!r} for"
            raise CheckpointError(f'load: config.json has {what} "{key}"; takes a whole number of 1 or more. Fetch the file again.')
        return value


def _rope(values: Mapping[str, Any], positions: int) -> RopeConfig:
    given: Mapping[str, Any] = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UnsupportedModelError("load: config.json has rope_parameters per layer type; takes one set for all layers.")
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(f"load: config.json has rope type {kind}; takes {_listed(ROPE_TYPES)}.")
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"load: config.json has partial_rotary_factor {partial}; takes 1.")

    def number(key: str) -> float:
        value = given.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise CheckpointError(f'load: config.json has rope type {kind} with "{key}" {value!r}; takes a number above 0. Fetch it again.')
        return float(value)

    theta = float(given.get("rope_theta") or values.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, number("factor"))
    original = int(given.get("original_max_position_embeddings") or positions)
    return RopeConfig(theta, kind, number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)


def _quantization(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    given = values.get("quantization_config") or values.get("compression_config")  # the second is compressed-tensors' older name
    if given:
        source_of(given)  # raises for what is not read
    return given or None


def _window(values: Mapping[str, Any]) -> int | None:
    return None if values.get("sliding_window") is None else _Reader(values).count("sliding_window")


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, (list, tuple)) else (int(value),)


def _dtype(values: Mapping[str, Any]) -> str:
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(f"load: config.json has dtype {name}; takes {_listed(DTYPES)}.")
    return name


def _listed(choices: tuple[Any, ...]) -> str:
    return ", ".join(str(choice) for choice in choices[:-1]) + f" or {choices[-1]}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; CheckpointError when the file is missing or is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"load: {path.parent} has no {path.name}; takes a Hugging Face checkpoint folder.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise CheckpointError(f"load: {path} cannot be read ({problem}). Fetch the file again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"load: {path} holds no JSON object. Fetch the file again.")
    return values
