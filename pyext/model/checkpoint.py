"""A Hugging Face checkpoint folder as canonical tensors: checked against its config on opening, read one layer at a time.

Canonical names: `embed`, `final_norm`, `lm_head` (absent when tied), and per layer `layers.<i>.` + attn_norm, q, k, v, o,
q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, mlp_norm, gate, up, down, gate_bias, up_bias, down_bias. Matrices are
[out, in], vectors [out]. Which of them a model has follows from its config alone, but for a low-bit lm_head beside tied embeddings.
Matrices that the config's quantization_config covers come as QuantizedWeight, whichever method wrote them.
"""

import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ramify.checks import show
from ramify.errors import CheckpointError
from ramify.model.config import ModelConfig, read_json
from ramify.model.damage import damage
from ramify.quant import Format, QuantizedWeight
from ramify.quant.sources import source_of

log = logging.getLogger("ramify")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = ("qweight", "weight_packed", "_weight_qdata")
"""Parts of a layer that only quantised checkpoints have."""
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # older files carry the table that `rope` computes


def expected(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a model: canonical name -> (Hugging Face name, shape), in the order in which a step uses them."""
    c, hidden = config, config.hidden_size
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    table: dict[str, tuple[str, tuple[int, ...]]] = {"embed": ("model.embed_tokens.weight", (c.vocab_size, hidden))}
    for i in range(c.num_layers):

        def add(short: str, theirs: str, *shape: int, biased: bool = False, i: int = i) -> None:
            table[f"layers.{i}.{short}"] = (f"model.layers.{i}.{theirs}.weight", shape)
            if biased:
                table[f"layers.{i}.{short}_bias"] = (f"model.layers.{i}.{theirs}.bias", shape[:1])

        add("attn_norm", "input_layernorm", hidden)
        add("q", "self_attn.q_proj", q_size, hidden, biased=c.qkv_bias)
        add("k", "self_attn.k_proj", kv_size, hidden, biased=c.qkv_bias)
        add("v", "self_attn.v_proj", kv_size, hidden, biased=c.qkv_bias)
        if c.qk_norm:
            add("q_norm", "self_attn.q_norm", c.head_dim)
            add("k_norm", "self_attn.k_norm", c.head_dim)
        add("o", "self_attn.o_proj", hidden, q_size, biased=c.o_bias)
        add("mlp_norm", "post_attention_layernorm", hidden)
        add("gate", "mlp.gate_proj", c.inner_size, hidden, biased=c.mlp_bias)
        add("up", "mlp.up_proj", c.inner_size, hidden, biased=c.mlp_bias)
        add("down", "mlp.down_proj", hidden, c.inner_size, biased=c.mlp_bias)
    table["final_norm"] = ("model.norm.weight", (hidden,))
    if not c.tied_embeddings:
        table["lm_head"] = ("lm_head.weight", (c.vocab_size, hidden))
    return table


class Checkpoint:
    """An opened folder. Nothing is read but headers until a tensor is asked for; then its bytes come through a memory map.

    Raises CheckpointError, naming file and tensor, for anything missing, cut short or of another shape or dtype than the
    config makes it, and UnsupportedModelError for a config that ramify does not run (see `ModelConfig.from_dict`).
    """

    def __init__(self, folder: str | Path, finite: bool = False, name: str | None = None) -> None:
        """`finite=True` also checks every tensor that is read for NaN and infinity. name: config.name, else that of the folder."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"load: {self.folder} is no folder; takes a folder with config.json and safetensors.")
        self.config = ModelConfig.from_folder(self.folder, name)
        self.finite = finite
        self._table = expected(self.config)
        self._where = self._locate()
        self._source = source_of(self.config.quantization) if self.config.quantization else None
        self._low_bit = self._find_low_bit()
        self._check_headers()

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors, in order of use."""
        return tuple(self._table)

    def source_name(self, name: str) -> str:
        """The Hugging Face name of a canonical one."""
        return self._table[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by canonical name."""
        return self._table[name][1]

    @property
    def low_bit_names(self) -> Collection[str]:
        """Canonical names of the tensors that are stored in a low-bit format."""
        return self._low_bit.keys()

    def nbytes(self, name: str) -> int:
        """Bytes in the files of a tensor by canonical name, of all its parts where it is low-bit."""
        if name not in self._low_bit:
            return self.stored(name).nbytes
        assert self._source is not None
        parts = (self._raw(theirs) for names in self._source.tensors(self._low_bit[name]) for theirs in names)
        return sum(part.nbytes for part in parts if part is not None)

    def check_groups(self, layers: Format | None, head: Format | None) -> None:
        """ValueError for the first dense matrix whose inputs are no multiple of the group of the format that it is to be rounded to."""
        for name, (theirs, shape) in self._table.items():
            is_head = name == ("lm_head" if "lm_head" in self._table else "embed")
            form = head if is_head else layers if name.startswith("layers.") and len(shape) == 2 else None
            if form is not None and form.kind == "int4" and name not in self._low_bit and shape[1] % form.group:
                raise ValueError(
                    f'load: tensor "{theirs}" has K = {shape[1]}; {form.name} takes multiples of {form.group}. '
                    "Choose a smaller group, or int8."
                )

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """One tensor by canonical name: float32 or bfloat16 as stored; float16 comes as float32, which loses nothing.

        A QuantizedWeight where the checkpoint is low-bit.
        """
        if name in self._low_bit:
            assert self._source is not None
            N, K = self.shape(name)
            return self._source.read(self._raw, self._low_bit[name], (N, K), self._file)
        tensor = self.stored(name)
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    def stored(self, name: str) -> Tensor:
        """One dense tensor by canonical name, in the dtype of the file."""
        if name not in self._table:
            raise KeyError(f"Checkpoint.tensor: {name} is no tensor of {self.config.architecture} under this config.")
        tensor = self._raw(self.source_name(name))
        assert tensor is not None  # the headers were checked
        return tensor

    def layer(self, index: int) -> dict[str, Tensor | QuantizedWeight]:
        """The tensors of one layer by short name ("q", "down", ...)."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): self.tensor(name) for name in self._table if name.startswith(prefix)}

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """All tensors by canonical name, in order of use, each read when it is reached."""
        for name in self._table:
            yield name, self.tensor(name)

    def _raw(self, theirs: str) -> Tensor | None:
        """A tensor by its name in the files, as it is stored."""
        file = self._where.get(theirs)
        if file is None:
            return None
        with _opened(file) as shard:
            tensor: Tensor = shard.get_tensor(theirs)
        if self.finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f'load: {file.name}, tensor "{theirs}" holds NaN or infinity; takes finite weights. Fetch it again.')
        return tensor

    def _file(self, theirs: str) -> str:
        return self._where[theirs].name if theirs in self._where else str(self.folder)

    def _find_low_bit(self) -> dict[str, str]:
        """Canonical name -> prefix of the low-bit matrices. The config names them; one that lies in the files dense stays dense."""
        if self._source is None:
            return {}
        head = self._source.tensors("lm_head").needed if self._source.covers("lm_head") else ()
        if "lm_head" not in self._table and any(name in self._where for name in head if name != "lm_head.weight"):
            self._table["lm_head"] = ("lm_head.weight", (self.config.vocab_size, self.config.hidden_size))
        found = {}
        for name, (theirs, shape) in self._table.items():
            prefix = theirs.removesuffix(".weight")
            if len(shape) == 2 and name != "embed" and self._source.covers(prefix):
                codes = self._source.tensors(prefix).needed[0]
                if codes == theirs or codes in self._where or theirs not in self._where:
                    found[name] = prefix
        return found

    def _locate(self) -> dict[str, Path]:
        """Hugging Face name -> file, from the single file or from the index of the shards."""
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file():
            with _opened(single) as shard:
                return dict.fromkeys(shard.keys(), single)
        if not index.is_file():
            pickled = sorted(p.name for p in self.folder.glob("pytorch_model*"))
            others = sorted(p.name for p in self.folder.glob("*.safetensors") if p.is_file())
            hint = f"{pickled[0]} is not read: save it again with safe_serialization." if pickled else "Fetch the checkpoint again."
            hint = f"Rename {others[0]} to {SINGLE}." if len(others) == 1 else hint
            raise CheckpointError(f"load: {self.folder} has neither {SINGLE} nor {INDEX}. {hint}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f'load: {index} has no "weight_map". Fetch the file again.')
        where = {str(name): self.folder / Path(str(file)).name for name, file in weight_map.items()}
        for name, file in where.items():
            if not file.is_file():
                named = show(weight_map[name]).strip('"')  # as it stands there, folders and all
                raise CheckpointError(f'load: {named}, tensor "{name}" is missing: {INDEX} names a file that is not there. Fetch it.')
        return where

    def _check_headers(self) -> None:
        """Every tensor of the table is there, with its shape and a dtype that is read; the others are logged once."""
        wanted_of: dict[str, tuple[int, ...] | None] = {}
        for name, (theirs, shape) in self._table.items():
            if name in self._low_bit:
                assert self._source is not None
                names = self._source.tensors(self._low_bit[name])
                wanted_of |= dict.fromkeys(names.needed)  # shapes and dtypes are the source's business
                wanted_of |= dict.fromkeys(name for name in names.optional if name in self._where)
            else:
                wanted_of[theirs] = shape
        shards: dict[Path, list[tuple[str, tuple[int, ...] | None]]] = {}
        for theirs, wanted_shape in wanted_of.items():
            if theirs not in self._where:
                raise self._missing(theirs)
            shards.setdefault(self._where[theirs], []).append((theirs, wanted_shape))
        for file, wanted in shards.items():
            with _opened(file) as shard:
                present = set(shard.keys())
                for theirs, wanted_shape in wanted:
                    _check_header(file, shard, present, theirs, wanted_shape)
        extra = sorted(set(self._where) - set(wanted_of))
        extra = [name for name in extra if not IGNORED.search(name) and not (name == "lm_head.weight" and self.config.tied_embeddings)]
        if extra:
            log.warning("load: %s has %d tensors that its config does not use, %s first", self.folder, len(extra), extra[0])

    def _missing(self, theirs: str) -> CheckpointError:
        """The error for a tensor that no file has, with what may be the reason."""
        prefix = theirs.removesuffix("weight")
        if self._source is None and theirs.endswith(".weight") and any(f"{prefix}{part}" in self._where for part in CODES):
            does = 'Put quantize_config.json or quant_config.json into config.json as "quantization_config", with its "quant_method".'
            return CheckpointError(f'load: {self.folder}, layer "{prefix[:-1]}" is quantised and config.json does not say how. {does}')
        return CheckpointError(f'load: {self.folder}, tensor "{theirs}" is missing; config.json asks for it. Fetch it again.')


def _check_header(file: Path, shard: safe_open, present: set[str], name: str, shape: tuple[int, ...] | None) -> None:
    if name not in present:
        raise CheckpointError(f'load: {file.name}, tensor "{name}" is missing; {INDEX} says it is there. Fetch the file again.')
    if shape is None:
        return
    header = shard.get_slice(name)
    stored = tuple(header.get_shape())
    if stored != shape:
        raise CheckpointError(
            f'load: {file.name}, tensor "{name}" is {list(stored)}; config.json makes it {list(shape)}. '
            "Fetch config.json and weights of one and the same model."
        )
    if header.get_dtype() not in STORED:
        raise CheckpointError(
            f'load: {file.name}, tensor "{name}" is {header.get_dtype()}; takes {", ".join(STORED)}. Fetch the unquantised checkpoint.'
        )


def _opened(file: Path) -> safe_open:
    """A safetensors file, or CheckpointError with what is wrong with it and what to do."""
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as problem:
        raise CheckpointError(f"load: {file.name} in {file.parent} {damage(file, problem)}") from None
