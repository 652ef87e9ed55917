"""ramify's loop inside transformers' own `generate`, on a model that nobody patched.

    model.generate(**inputs, max_new_tokens=64, custom_generate=ramify.CustomGenerate("token_recycling"))

transformers prepares everything as ever (generation config, logits processors, stopping criteria); ramify then decodes with the
same loop, drafters and verifiers as its own models use. Any batch size, greedy or sampled, padded on the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ramify.decode.generate import build_drafter, build_size
from ramify.decode.loop import decode
from ramify.decode.output import Output, Request
from ramify.draft.base import Drafter
from ramify.hf.model import HFModel
from ramify.registry import drafter as drafters
from ramify.registry import verifier as verifiers
from ramify.sampling.pipeline import Sampling, SamplingParams, inverse_cdf, logits_of
from ramify.sampling.rng import SAMPLE
from ramify.size.base import SizePolicy
from ramify.size.fixed import Fixed
from ramify.tree import TokenTree
from ramify.verify import choose_verifier
from ramify.verify.base import Verdict

_WHO = "CustomGenerate"
_UNDERSTOOD = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
_STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


class CustomGenerate:
    """What `generate(custom_generate=...)` takes: decodes token-parallel with any drafter of ramify. Needs `pip install 'ramify[hf]'`.

    method: a drafter's name, with options if wanted ("prompt_lookup:longest=4"), or a Drafter of your own.
    drafter: for methods with a second model, that model: transformers' or ramify's. size: rows a sequence and step, or a
    size policy; None leaves it to the method. streamer: as generate's own, which does not reach a custom_generate; batch 1 only.

    Greedy text is that of plain `generate` (up to ties within rounding); sampled text follows the same distribution, with numbers
    seeded by torch's generator. `outputs` keeps the last call's Outputs, with their stats.
    """

    def __init__(
        self,
        method: str | Drafter = "token_recycling",
        drafter: Any = None,
        size: int | str | SizePolicy | None = None,
        streamer: Any = None,
    ) -> None:
        if not isinstance(method, Drafter):  # a wrong name is refused here, not in the middle of generate
            drafters.get(method.partition(":")[0] if isinstance(method, str) else method, _WHO, "method")
        self.method, self.size, self.streamer = method, Fixed(size) if isinstance(size, int) else size, streamer
        self.drafter = HFModel(drafter) if isinstance(drafter, PreTrainedModel) else drafter
        self.outputs: list[Output] = []
        self._target: HFModel | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate`. Returns ids int64 [B, L], prompts included, or a GenerateDecoderOnlyOutput with them.

        Raises ValueError for what a tree cannot do (beams, scores, inputs other than ids, padding that is not on the left), and
        UnsupportedModelError for models that take no tree.
        """
        _refuse(generation_config, logits_processor, model_kwargs, input_ids)
        paddings = _paddings(input_ids, model_kwargs)
        if self.streamer is not None and len(input_ids) > 1:
            raise ValueError(f"{_WHO}: input_ids has {len(input_ids)} rows and a streamer is given; takes 1 row. Leave the streamer out.")
        params = _params(generation_config, logits_processor, input_ids, paddings)
        eos = generation_config.eos_token_id
        eos = frozenset(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
        asked = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        requests = [
            Request(
                prompt=row[pads:].tolist(),
                max_new_tokens=generation_config.max_length - input_ids.shape[1],
                params=p,
                eos=eos,
                stop_when=_stop_rule(asked, p) if asked else None,
            )
            for row, pads, p in zip(input_ids, paddings, params, strict=True)
        ]
        target = self._wrapped(model)
        drafter = build_drafter(target, self.method, self.drafter)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        stream = None if self.streamer is None else lambda index, tokens, text: self.streamer.put(torch.tensor(tokens, device="cpu"))
        self.outputs = decode(target, requests, drafter, build_size(self.size, drafter), verifier=_judge, stream=stream)
        if self.streamer is not None:
            self.streamer.end()
        ids = _joined(input_ids, [out.token_ids for out in self.outputs], generation_config)
        if not generation_config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, ids))

    def _wrapped(self, model: PreTrainedModel) -> HFModel:
        """The target; the same object from call to call, so that what a drafter learned of it stays with it."""
        if self._target is None or self._target.model is not model:
            self._target = HFModel(model)
        return self._target


# ---- judging by generate's own processors and criteria -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Params(SamplingParams):
    """SamplingParams for drafters, who guess by them. The target's rows go through `processors`, as in generate, padding in front."""

    processors: LogitsProcessorList | None = None
    padding: tuple[int, ...] = ()
    device: torch.device = torch.device("cpu")
    index: int = 0
    batch: int = 1

    def row(self, ids: Sequence[int]) -> Tensor:
        """Ids as generate's parts see them: int64 [1, L], the padding in front."""
        return torch.tensor([[*self.padding, *ids]], device=self.device)

    @property
    def needs_logits(self) -> bool:
        """False when plain arg-max decides."""
        return self.temperature > 0 or bool(self.processors)


class _Processed(Sampling):
    """A Sampling whose distributions are those that generate would sample from."""

    params: Sequence[_Params]

    def scores(self, b: int, logits_row: np.ndarray, path: Sequence[int]) -> Tensor:
        """What the processors make of a row behind `path`, float32 [V]."""
        params = self.params[b]
        ids, scores = params.row([*self.text[b], *path]), torch.tensor(logits_row, device=params.device)[None]
        for processor in params.processors or ():
            if _knows_batch(processor, params.batch):  # it finds its row by number: fill the others with copies
                whole = processor(ids.expand(params.batch, -1), scores.repeat(params.batch, 1))
                scores = whole[params.index : params.index + 1]
            else:
                scores = processor(ids, scores)
        return scores[0]

    def probabilities(self, b: int, logits_row: np.ndarray, path: Sequence[int] = ()) -> np.ndarray:
        """Their softmax, float64 [V]; greedy: 1 at the largest."""
        scores = self.scores(b, logits_row, path).double()
        p = scores.softmax(-1).cpu().numpy()
        if not np.isfinite(p).all():
            raise ValueError(f"{_WHO}: the logits processors leave no token or NaN in row {b}; takes one finite score or more. Check them.")
        return p if self.params[b].temperature > 0 else np.eye(1, len(p), int(scores.argmax()))[0]

    def draw(self, b: int, logits_row: np.ndarray, path: Sequence[int] = ()) -> int:
        """One token by this position's own random number; greedy: the likeliest."""
        if self.params[b].temperature == 0:
            return int(self.scores(b, logits_row, path).argmax())
        return inverse_cdf(self.probabilities(b, logits_row, path), self.uniform(b, len(path), SAMPLE))

    def choose(self, b: int, out: Any, row: int, path: Sequence[int] = ()) -> int:
        """`draw` for a row of a StepOut."""
        return self.draw(b, logits_of(out, row), path) if self.params[b].needs_logits else int(out.argmax[row])


def _knows_batch(processor: Any, batch: int) -> bool:
    """Whether a logits processor may keep something for each row of the batch. Of those we did not look at, assume it."""
    if batch == 1:
        return False
    own = isinstance(processor, PrefixConstrainedLogitsProcessor) or not type(processor).__module__.startswith("transformers.")
    return own or any(isinstance(x, Tensor) and x.ndim and len(x) == batch for x in vars(processor).values())


def _judge(tree: TokenTree, out: Any, sampling: Sampling) -> Verdict:
    """The exact verifier for this tree, over generate's distributions."""
    chain = len(set(zip(np.repeat(np.arange(tree.B), tree.rows).tolist(), tree.parent.tolist(), strict=True))) == tree.M
    verify = verifiers.get(choose_verifier(tree.mode, sampling.params, chain))()
    return verify(tree, out, _Processed(cast(Sequence[_Params], sampling.params), sampling.text))


def _params(config: Any, processors: LogitsProcessorList, input_ids: Tensor, paddings: list[int]) -> list[_Params]:
    """One per row; seeds come from torch's generator, so torch.manual_seed governs them."""
    known: dict[str, Any] = {}
    seeds = [0] * len(input_ids)
    if config.do_sample:
        wanted = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
        known = {"temperature": 1.0, **{key: value for key, value in wanted.items() if value is not None}}
        seeds = torch.randint(1 << 62, (len(input_ids),)).tolist()
    return [
        _Params(
            **known,
            seed=seeds[i],
            processors=processors,
            padding=tuple(row[: paddings[i]].tolist()),
            device=input_ids.device,
            index=i,
            batch=len(input_ids),
        )
        for i, row in enumerate(input_ids)
    ]


def _stop_rule(criteria: list[Any], params: _Params) -> Any:
    """Whether generate's stopping criteria end a text; they see one row at a time, and no scores."""

    def ends(ids: list[int]) -> bool:
        row = params.row(ids)
        return any(bool(torch.as_tensor(criterion(row, None)).any()) for criterion in criteria)

    return ends


# ---- in and out ----------------------------------------------------------------------------------------------------


def _refuse(config: Any, processors: LogitsProcessorList, model_kwargs: dict[str, Any], input_ids: Tensor) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(f"{_WHO}: num_beams is {config.num_beams}; takes 1. Call generate without custom_generate for beam search.")
    for wanted in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, wanted, None):
            raise ValueError(f"{_WHO}: {wanted} is set; takes ids as the only output. Leave it out.")
    strange = sorted(key for key, value in model_kwargs.items() if key not in _UNDERSTOOD and isinstance(value, Tensor))
    if strange or not input_ids.shape[1]:
        raise ValueError(f"{_WHO}: {strange[0] if strange else 'empty input_ids'} came; takes text as input_ids. Leave it out.")
    cache = model_kwargs.get("past_key_values")
    held = int(cache.get_seq_length()) if cache is not None else 0
    if held:
        raise ValueError(f"{_WHO}: past_key_values holds {held} tokens; takes none, it keeps a cache of its own. Leave it out.")
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            name = type(processor).__name__
            raise ValueError(f"{_WHO}: {name} is among the logits processors; takes functions of one row and its ids. Leave it out.")


def _paddings(input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[int]:
    """Padding tokens in front of each prompt."""
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    seen = torch.ones_like(input_ids) if mask is None else (mask != 0).long()
    if seen.shape != input_ids.shape or bool((seen[:, 1:] < seen[:, :-1]).any()) or not bool(seen[:, -1].all()):
        raise ValueError(f"{_WHO}: attention_mask has zeros behind ones; takes padding on the left. Set tokenizer.padding_side.")
    expected = (seen.cumsum(-1) - 1).to(input_ids.device)
    if positions is not None and not bool((torch.as_tensor(positions) == expected)[seen.bool()].all()):
        raise ValueError(f"{_WHO}: position_ids do not count the prompt's tokens; takes 0, 1, 2, ... Leave them out.")
    return (seen.shape[1] - seen.sum(-1)).tolist()


def _joined(input_ids: Tensor, emitted: list[list[int]], config: Any) -> Tensor:
    """Prompts and continuations, filled on the right with the padding token."""
    eos = config.eos_token_id
    pad = next((x for x in (config.pad_token_id, eos[0] if isinstance(eos, (list, tuple)) and eos else eos) if x is not None), 0)
    tail = input_ids.new_full((len(emitted), max(map(len, emitted))), pad)
    for row, tokens in zip(tail, emitted, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return torch.cat([input_ids, tail], dim=1)
