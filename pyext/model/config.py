"""What a Hugging Face config.json says about a model, checked and in our words.

One table, `FAMILIES`, holds everything in which the supported architectures differ. What it does not hold is refused by
name, and so is every feature of a config that the model layer does not compute: a wrong number is worse than no number.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ramify.backends import HEAD_SIZES
from ramify.checks import listed, show
from ramify.errors import CheckpointError, UnsupportedModelError
from ramify.fields import Fields
from ramify.quant.sources import source_of

ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 24
"""A position times a frequency is worked out in float32, which counts no further."""


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
        config = cls.from_dict(read_json(folder / "config.json"), name=name or folder.resolve().name)
        generation = folder / "generation_config.json"
        if not generation.is_file():
            return config
        said = Fields(read_json(generation), generation.name)
        return config if said.get("eos_token_id") is None else replace(config, eos_token_ids=said.ids("eos_token_id"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "") -> "ModelConfig":
        """From the dict of a config.json, of transformers 4 or 5.

        Raises UnsupportedModelError for an architecture or a feature that is not run, CheckpointError for a field that
        is missing or makes no sense.
        """
        architecture, family = _family(Fields(values))
        read = Fields({**family.defaults, **values})
        _refuse_features(read)
        hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
        kv_heads = read.count("num_key_value_heads", heads)
        head_dim = hidden // heads if read.get("head_dim") is None else read.count("head_dim")
        if heads % kv_heads:
            raise CheckpointError(
                f"load: config.json has {heads} num_attention_heads and {kv_heads} num_key_value_heads; takes a multiple. "
                "Fetch the file again."
            )
        if head_dim not in HEAD_SIZES:
            raise UnsupportedModelError(f"load: config.json makes head_dim {head_dim}; takes {listed(HEAD_SIZES)}.")
        layers = read.count("num_hidden_layers", high=MAX_LAYERS)
        positions = read.count("max_position_embeddings", high=MAX_POSITIONS)
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
            norm_eps=read.number("rms_norm_eps", 1e-6, zero=True),
            rope=_rope(read, positions),
            max_positions=positions,
            tied_embeddings=read.flag("tie_word_embeddings"),
            qkv_bias=family.flag(family.qkv_bias, read),
            o_bias=family.flag(family.o_bias, read),
            mlp_bias=family.flag(family.mlp_bias, read),
            qk_norm=family.qk_norm,
            sliding_windows=family.windows(read, layers),
            eos_token_ids=read.ids("eos_token_id"),
            bos_token_id=next(iter(read.ids("bos_token_id")), None),
            dtype=_dtype(read),
            quantization=_quantization(read),
        )


# ---- the families -------------------------------------------------------------------------------------------------


def _no_window(read: Fields, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def _one_window(read: Fields, layers: int) -> tuple[int | None, ...]:
    """Mistral: every layer slides, unless sliding_window is null."""
    return (_window(read),) * layers


def _window_by_layer(read: Fields, layers: int) -> tuple[int | None, ...]:
    """Qwen: off unless use_sliding_window; then layer_types tells, or in older files the layers from max_window_layers on."""
    window = _window(read) if read.flag("use_sliding_window") else None
    types = read.texts("layer_types")
    if read.get("layer_types") is None:
        first = read.count("max_window_layers", 28, low=0)
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    strange = sorted(set(types) - {"full_attention", "sliding_attention"})
    if strange:
        raise UnsupportedModelError(f"load: config.json has layer type {show(strange[0])}; takes full_attention and sliding_attention.")
    if len(types) != layers:
        raise CheckpointError(f"load: config.json lists {len(types)} layer_types for {layers} layers; takes one a layer. Fetch it again.")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _window(read: Fields) -> int | None:
    return None if read.get("sliding_window") is None else read.count("sliding_window")


@dataclass(frozen=True)
class Family:
    """In what one architecture differs from the others. A bias is on, off, or whatever the named config field says."""

    model_type: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Callable[[Fields, int], tuple[int | None, ...]] = _no_window
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers assumes where config.json is silent

    @staticmethod
    def flag(value: bool | str, read: Fields) -> bool:
        """A bias of this family under this config."""
        return read.flag(value) if isinstance(value, str) else value


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


def _family(read: Fields) -> tuple[str, Family]:
    named, model_type = read.texts("architectures"), read.text("model_type")
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    architecture = named[0] if named else by_type.get(model_type, "")
    if architecture not in FAMILIES:
        came = show(architecture) if named else f"no architectures and model_type {show(model_type)}"
        raise UnsupportedModelError(
            f"load: config.json names {came}; takes {', '.join(FAMILIES)}. "
            "ramify.CustomGenerate still runs it inside transformers' own generate."
        )
    family = FAMILIES[architecture]
    if model_type and model_type != family.model_type:  # transformers goes by model_type
        raise UnsupportedModelError(
            f"load: config.json names {architecture} and model_type {show(model_type)}; takes {show(family.model_type)} with it. "
            "One of the two is wrong."
        )
    return architecture, family


def _refuse_features(read: Fields) -> None:
    activation = read.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"load: config.json has hidden_act {show(activation)}; takes silu.")


def _rope(read: Fields, positions: int) -> RopeConfig:
    """From rope_parameters (transformers 5), or rope_scaling and rope_theta (4)."""
    given = read.object("rope_parameters" if read.get("rope_parameters") else "rope_scaling")
    if any(isinstance(value, Mapping) for value in given.values.values()):
        raise UnsupportedModelError("load: config.json has rope_parameters per layer type; takes one set for all layers.")
    kind = given.text("rope_type", given.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(f"load: config.json has rope type {show(kind)}; takes {listed(ROPE_TYPES)}.")
    if given.number("partial_rotary_factor", read.number("partial_rotary_factor", 1.0)) != 1:
        raise UnsupportedModelError("load: config.json has a partial_rotary_factor; takes 1.")
    theta = given.number("rope_theta", read.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, given.number("factor"))
    low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
    if not low < high:
        raise given.wrong("high_freq_factor", f"a number above low_freq_factor, {low}")
    original = given.count("original_max_position_embeddings", positions)
    return RopeConfig(theta, kind, given.number("factor"), low, high, original)


def _quantization(read: Fields) -> Mapping[str, Any] | None:
    given = read.object("quantization_config").values or read.object("compression_config").values  # compressed-tensors' older name
    if given:
        source_of(given)  # raises for what is not read
    return given or None


def _dtype(read: Fields) -> str:
    name = read.text("dtype", read.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(f"load: config.json has dtype {show(name)}; takes {listed(DTYPES)}.")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; CheckpointError when the file is missing or is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"load: {path.parent} has no {path.name}; takes a Hugging Face checkpoint folder.") from None
    except (OSError, ValueError, RecursionError) as problem:  # ValueError: no UTF-8, no JSON, or a number of thousands of digits
        raise CheckpointError(f"load: {path} cannot be read ({problem}). Fetch the file again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"load: {path} holds no JSON object. Fetch the file again.")
    return values
