"""A folder that `convert` wrote, read back as the dense float32 checkpoint that its codes stand for: an oracle, and slow."""

from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ramify.errors import CheckpointError
from ramify.model.checkpoint import Checkpoint, expected
from ramify.model.config import ModelConfig, read_json
from ramify.quant import Format, QuantizedWeight, quantize


class DequantizedCheckpoint(Checkpoint):
    """Stands where a Checkpoint stands: `Weights.load` and `reference.model.forward` take it.

    The head is dequantised from the format that the folder names for it, so a tied head comes untied. Raises CheckpointError for
    a folder without our quantization_config and for tensors that are missing or do not fit, by name.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.finite = Path(folder), False
        values = read_json(self.folder / "config.json")
        settings = values.pop("quantization_config", {})
        if not str(settings.get("quant_method")).startswith("ramify_"):
            raise CheckpointError(f"load: {self.folder} was not written by ramify convert: its quant_method is none of ramify's.")
        self.format = Format.parse(settings["format"])
        self.head = Format.parse(settings["head"]) if settings.get("head") else None
        config = ModelConfig.from_dict(values, name=self.folder.name)
        self._table = expected(replace(config, tied_embeddings=False))
        self._tied, self.config = config.tied_embeddings, replace(config, tied_embeddings=False)
        self._where = self._locate()

    def tensor(self, name: str) -> Tensor:
        """One tensor by canonical name, float32 where it was quantised."""
        if name == "lm_head":
            head = self.stored("embed" if self._tied else "lm_head").float()
            return head if self.head is None else quantize(head, self.head).dequantize()
        prefix = self._table[name][0].removesuffix(".weight")
        return self.quantized(prefix).dequantize() if f"{prefix}.weight_scale" in self._where else super().tensor(name)

    def quantized(self, prefix: str) -> QuantizedWeight:
        """The low-bit weight of one linear layer, "model.layers.0.self_attn.q_proj" say."""
        parts = {"codes": "weight", "scale": "weight_scale", "zero": "weight_zero", "perm": "weight_perm"}
        found = {ours: self._read(f"{prefix}.{theirs}") for ours, theirs in parts.items() if f"{prefix}.{theirs}" in self._where}
        try:
            return QuantizedWeight(self.format, **found)
        except (TypeError, ValueError) as problem:
            raise CheckpointError(f'load: {self.folder.name}, tensor "{prefix}.weight" does not fit: {problem}') from None

    def _read(self, theirs: str) -> Tensor:
        with safe_open(str(self._where[theirs]), framework="pt", device="cpu") as shard:
            return shard.get_tensor(theirs)
