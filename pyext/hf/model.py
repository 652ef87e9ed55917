"""A Hugging Face model behind ramify's Model interface: trees through its own `forward`, unpatched.

The tree goes in as a dense mask and explicit position ids; the cache is ours, handed over through transformers' cache interface.
A sequence's keys lie in order of position, and the rows of a step right behind them. So rejection is forgetting, and commit
moves only those accepted rows that do not lie in a row already.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ramify.errors import UnsupportedModelError
from ramify.model.model import StepOut
from ramify.tree import MAX_ROWS, TokenTree

PREFILL_ROWS = 512
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class HFConfig:
    """What drafters and the loop ask of a model's config."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    eos_token_ids: tuple[int, ...]


class HFModel:
    """Runs token trees through any decoder of transformers whose forward takes 4D masks and position ids.

    Raises UnsupportedModelError for models that cannot: encoder-decoders, recurrent state, chunked or ALiBi attention, and
    attention implementations that take no dense mask.
    """

    tokenizer = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = model.config.get_text_config(decoder=True)
        dtype = str(model.dtype).removeprefix("torch.")
        self.fingerprint = f"transformers {type(model).__name__} {model.device} {dtype} {config.to_json_string(use_diff=False)}"
        self.windows = _windows(model, config)
        _implementation(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        heads = config.num_attention_heads
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self.config = HFConfig(
            name=type(model).__name__,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_positions=getattr(config, "max_position_embeddings", 1 << 30),
            eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        )

    def new_cache(self, capacities: Sequence[int]) -> "HFCache":
        """A cache with one empty slot per sequence. Memory grows with what is committed; a capacity bounds positions."""
        return HFCache(self.config.num_layers, capacities)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: "HFCache",
        slots: Sequence[int] | None = None,
        topk: int = 0,
        taps: Sequence[int] = (),
        rows_out: Callable[[int, list[int], StepOut], None] | None = None,
    ) -> None:
        """Feeds and commits all given tokens, PREFILL_ROWS a sequence and call; rows_out(slot, tokens, StepOut) per chunk and sequence."""
        slots = range(len(prompts)) if slots is None else slots
        for at in range(0, max(map(len, prompts), default=0), PREFILL_ROWS):
            chunks = {slot: list(p[at : at + PREFILL_ROWS]) for slot, p in zip(slots, prompts, strict=True) if len(p) > at}
            rows = [_Rows(np.array(chunk), 0, np.arange(len(chunk)), np.tri(len(chunk), dtype=bool)) for chunk in chunks.values()]
            logits, hidden = self._run(cache.of(list(chunks)), rows, taps, last=rows_out is None)
            for b, (slot, chunk) in enumerate(chunks.items()):
                if rows_out is not None:
                    here = {layer: x[b, : len(chunk)] for layer, x in hidden.items()}
                    rows_out(slot, chunk, _stats(logits[b, : len(chunk)], here, topk, False))
                cache.lengths[slot] += len(chunk)

    def forward(
        self,
        tree: TokenTree,
        view: "HFView",
        first: np.ndarray | None = None,
        taps: Sequence[int] = (),
        topk: int = 0,
        logits: bool = False,
    ) -> StepOut:
        """Rows first[b] and later of every sequence of the tree (all by default), packed. taps[i] is the hidden state after i layers.

        Raises ValueError when the logits of a row are not finite.
        """
        bits = np.unpackbits(np.ascontiguousarray(tree.ancestors).view(np.uint8), axis=1, bitorder="little").view(bool)
        rows = []
        for b in range(tree.B):
            span, skip = tree.span(b), 0 if first is None else int(first[b])
            new = slice(span.start + skip, span.stop)
            rows.append(_Rows(tree.tokens[new], skip, tree.depth[span], bits[new, : span.stop - span.start]))
        values, hidden = self._run(view, rows, taps)
        packed = [(b, t) for b, r in enumerate(rows) for t in range(len(r.tokens))]
        at = tuple(torch.tensor(packed, device=values.device).T)
        return _stats(values[at], {layer: x[at] for layer, x in hidden.items()}, topk, logits)

    @torch.no_grad()
    def _run(self, view: "HFView", rows: list["_Rows"], taps: Sequence[int], last: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [B, T, V] of the new rows of each sequence, padded to the longest, and the taps likewise [B, T, hidden]."""
        device, count = self.model.device, max(len(r.tokens) for r in rows)
        lengths = [int(n) for n in view.lengths]
        width = max(n + r.first for n, r in zip(lengths, rows, strict=True)) + count
        view.cache.step = _Step(view.places, [n + r.first for n, r in zip(lengths, rows, strict=True)], width)
        ids = np.zeros((len(rows), count), np.int64)
        positions = np.zeros((len(rows), count), np.int64)
        sees = np.zeros((len(rows), count, width), bool)
        sliding = any(window is not None for window in self.windows.values())
        behind = np.zeros((len(rows), count, width) if sliding else 0, np.int64)  # how far a key's position lies behind the row's
        for b, (n, r) in enumerate(zip(lengths, rows, strict=True)):
            new = len(r.tokens)
            ids[b, :new] = r.tokens
            positions[b, :new] = n + r.depth[r.first :]
            sees[b, :new, :n] = True
            sees[b, :new, n : n + len(r.depth)] = r.sees
            sees[b, new:, 0] = True  # a softmax over nothing would be NaN
            if sliding:
                keys = np.arange(width)
                keys[n : n + len(r.depth)] = n + r.depth
                behind[b] = positions[b][:, None] - keys
        limit = np.array([view.cache.capacities[slot] for slot in view.slots])[:, None]
        np.minimum(positions, limit - 1, out=positions)  # rows beyond can never be kept, and a table of positions may end there
        masks = {kind: self._mask(sees if window is None else sees & (behind < window)) for kind, window in self.windows.items()}
        out = self.model(
            input_ids=torch.from_numpy(ids).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=view.cache.handed,
            use_cache=True,
            output_hidden_states=bool(taps),
            **({"logits_to_keep": 1} if last and self._keeps_logits else {}),
        )
        return out.logits, {layer: out.hidden_states[layer] for layer in taps}

    def _mask(self, sees: np.ndarray) -> Tensor:
        """[B, 1, T, width]: true where a row sees a key, or for eager attention what is added to the scores."""
        mask = torch.from_numpy(sees[:, None]).to(self.model.device)
        if _implementation(self.model) == "sdpa":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


class HFCache:
    """Keys and values of up to B sequences, [B, Hkv, S, D] a layer, for an `HFModel`. `of` gives the live ones to a step."""

    def __init__(self, layers: int, capacities: Sequence[int]) -> None:
        self.capacities = [int(n) for n in capacities]
        self.lengths = np.zeros(len(self.capacities), np.int32)
        self.step = _Step([], [], 0)
        self.layers = [_Layer(self) for _ in range(layers)]
        self.handed = Cache(layers=[*self.layers])
        self._place = {slot: slot for slot in range(len(self.capacities))}  # slot -> row of the stored tensors

    def of(self, slots: Sequence[int]) -> "HFView":
        """The given slots, one per sequence of a tree."""
        return HFView(self, list(slots))

    def places(self, slots: Sequence[int]) -> list[int]:
        """Where these slots are stored."""
        return [self._place[slot] for slot in slots]

    @torch.no_grad()
    def free(self, slots: Sequence[int]) -> None:
        """Forgets these slots; what is left moves together, so that a step over all live slots reads without copying."""
        kept = [slot for slot in self._place if slot not in set(slots)]
        if len(kept) == len(self._place):
            return
        for layer in self.layers:
            layer.keep(self.places(kept))
        self._place = {slot: place for place, slot in enumerate(kept)}


class HFView:
    """Some slots of a cache, in the order of a tree's sequences."""

    def __init__(self, cache: HFCache, slots: list[int]) -> None:
        self.cache, self.slots = cache, slots

    @property
    def lengths(self) -> np.ndarray:
        """Committed tokens of each sequence, int32 [B]."""
        return self.cache.lengths[self.slots]

    @property
    def places(self) -> list[int]:
        """Where the slots are stored."""
        return self.cache.places(self.slots)

    @torch.no_grad()
    def commit(self, paths: Sequence[np.ndarray]) -> None:
        """Keeps these rows (ascending) of the last tree of each sequence, and no others."""
        for slot, place, path in zip(self.slots, self.places, paths, strict=True):
            length = int(self.cache.lengths[slot])
            if len(path) and int(path[-1]) != len(path) - 1:  # else the rows lie where they belong
                for layer in self.cache.layers:
                    layer.gather(place, length, path)
            self.cache.lengths[slot] = length + len(path)

    def crop(self, lengths: Sequence[int]) -> None:
        """Drops the newest committed tokens down to these lengths; a longer length keeps all."""
        self.cache.lengths[self.slots] = np.minimum(self.lengths, np.asarray(lengths, np.int32))


class _Rows(NamedTuple):
    """The rows of one sequence in a call: those from `first` on are new; depth is of all, sees is [new, all]."""

    tokens: np.ndarray
    first: int
    depth: np.ndarray
    sees: np.ndarray


class _Step(NamedTuple):
    """Where a call writes: the stored row and the first column of each sequence; and how many columns it reads."""

    places: list[int]
    starts: list[int]
    width: int


class _Layer(CacheLayerMixin):
    """One layer of an HFCache, in the form that transformers hands keys and values to."""

    is_sliding = False
    is_croppable = False
    is_compileable = False
    keys: Tensor
    values: Tensor

    def __init__(self, owner: HFCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty storage in the dtype and on the device of the first keys."""
        count = len(self.owner.capacities)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x.new_zeros(count, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new rows behind what their sequences have, and returns all that the step may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places, starts, width = self.owner.step
        self._grow(width)
        count = key_states.shape[2]
        for b, (place, start) in enumerate(zip(places, starts, strict=True)):
            self.keys[place, :, start : start + count] = key_states[b]
            self.values[place, :, start : start + count] = value_states[b]
        if places == list(range(places[0], places[0] + len(places))):
            rows: Any = slice(places[0], places[0] + len(places))
        else:
            rows = torch.tensor(places, device=self.keys.device)
        return self.keys[rows, :, :width], self.values[rows, :, :width]

    def gather(self, place: int, length: int, path: np.ndarray) -> None:
        """Moves the draft rows `path` of one sequence right behind its committed columns."""
        if self.is_initialized:
            source = torch.from_numpy(np.asarray(path, np.int64) + length).to(self.keys.device)
            for stored in (self.keys[place], self.values[place]):
                stored[:, length : length + len(path)] = stored[:, source]

    def keep(self, places: list[int]) -> None:
        """Keeps these rows of the storage."""
        if self.is_initialized:
            index = torch.tensor(places, dtype=torch.int64, device=self.keys.device)
            self.keys, self.values = self.keys[index], self.values[index]

    def get_seq_length(self) -> int:
        """Columns before the newest call's rows, as far as transformers needs to know."""
        return max(self.owner.step.starts, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns that `update` returns."""
        return self.owner.step.width, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    def _grow(self, width: int) -> None:
        held = self.keys.shape[2]
        if width > held:
            more = max(width, 2 * held, MAX_ROWS) - held
            self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))


def _stats(logits: Tensor, taps: dict[int, Tensor], topk: int, keep: bool) -> StepOut:
    """The StepOut of packed logits [M, V]."""
    logits = logits.float()
    top, argmax = logits.max(dim=-1)
    lse = logits.logsumexp(dim=-1)
    if not bool(torch.isfinite(lse).all()):
        row = int((~torch.isfinite(lse)).nonzero()[0])
        raise ValueError(f"forward: logits of row {row} hold NaN or infinity; takes finite ones. Check the weights and the dtype.")
    out = StepOut(_host(argmax.int()), _host(top), _host(lse), taps={layer: _host(x.float()) for layer, x in taps.items()})
    if topk:
        values, ids = logits.topk(topk, dim=-1)
        out.topk_values, out.topk_ids = _host(values), _host(ids.int())
    if keep:
        out.logits = _host(logits)
    return out


def _host(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def _implementation(model: PreTrainedModel) -> str:
    name: str = model.config._attn_implementation
    if name not in ("eager", "sdpa"):
        raise UnsupportedModelError(
            f'CustomGenerate: {type(model).__name__} runs attention "{name}"; takes sdpa or eager. Use set_attn_implementation("sdpa").'
        )
    return name


def _windows(model: PreTrainedModel, config: Any) -> dict[str, int | None]:
    """Layer type -> how many positions its layers see (None: all). Raises UnsupportedModelError for models that trees do not fit."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"CustomGenerate: {name} has an encoder; takes decoder-only models. Call generate without it.")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"CustomGenerate: forward of {name} has no position_ids; a tree needs them. Call generate without it.")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = set(getattr(config, "layer_types", None) or [FULL if window is None else SLIDING])
    strange = sorted(types - {FULL, SLIDING})
    if strange or getattr(config, "attention_types", None):
        kind = strange[0] if strange else "attention_types"
        raise UnsupportedModelError(f"CustomGenerate: {name} has {kind} layers; takes {FULL} and {SLIDING}. Call generate without it.")
    return {kind: window if kind == SLIDING else None for kind in sorted(types)}
