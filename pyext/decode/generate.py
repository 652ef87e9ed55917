"""generate: names and plain arguments in, outputs out. Everything that a call needs is looked up or loaded here, and the loop runs it."""

import os
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ramify.checks import is_model, loaded_model, sequence, show
from ramify.decode.loop import decode
from ramify.decode.output import Output, Request, Stream, read_stops, token_ids
from ramify.draft.base import Drafter
from ramify.registry import drafter as drafters
from ramify.registry import size_policy as size_policies
from ramify.sampling.pipeline import SamplingParams
from ramify.size.base import SizePolicy

ZOO, ZOO_DRAFTER = "zoo", "zoo-drafter"
"""What `ramify.load` calls the embedded models; a target whose config.name is ZOO drafts with ZOO_DRAFTER unless told otherwise."""

_loaded: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # target -> name or path -> its draft model


def generate(
    model: Any,
    prompts: str | Sequence[str | Sequence[int]],
    method: str | Drafter = "auto",
    drafter: Any = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[Any] = (),
    cache: Any = None,
    stream: Stream | None = None,
    size: str | SizePolicy | None = None,
) -> list[Output]:
    """Continue every prompt; one Output each, in order, with text, token_ids, finish_reason and stats.

    model: from `ramify.load`. prompts: strings or lists of ids (tuples, arrays and tensors too); one string is a list of one, no prompts
    give no outputs.
    method: a name of `ramify.methods()`, with options as "prompt_lookup:longest=4", or a Drafter of your own. drafter: the second model
    of the methods that need one: a loaded model, a path, or "zoo"; None is "zoo" when the target is the zoo target.
    temperature .. repetition_penalty: as in transformers; 0 takes the most likely token. seed: the same seed gives the same text,
    whatever else is in the batch and whatever the method, as long as its guesses are deterministic (all are by default).
    stop: strings, ids, or lists of ids that end a text, besides the model's own end-of-text ids. The text ends before a stop string;
    token_ids end with the token that completed it. cache: an empty one of `model.new_cache` with room for every prompt and
    max_new_tokens, which this call frees, or None.
    stream: called with (index, new ids, text) after every step. size: a size policy, by name with options or as an object; None is the
    method's own, or "measured".

    Raises ValueError for an empty prompt, a prompt that with max_new_tokens passes the model's positions, an unknown method, a drafter
    of another vocabulary; TypeError for arguments of another kind.
    """
    loaded_model("model", model, "generate")
    if stream is not None and not callable(stream):
        raise TypeError(f"generate: stream is {show(stream)}; takes a function of (index, new ids, text), or None.")
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    requests = _requests(model, prompts, max_new_tokens, params, read_stops(stop, model.config.vocab_size))
    drafting = build_drafter(model, method, drafter)
    if not isinstance(drafting, Drafter):
        raise TypeError(f"generate: method {show(method)} is {type(drafting).__name__}; takes a Drafter. Derive its class from Drafter.")
    policy = build_size(size, drafting, about=method if isinstance(method, str) else "")
    if cache is not None:
        _check_cache(model, cache, requests)
    return decode(model, requests, drafting, policy, cache=cache, stream=stream) if requests else []


def build_drafter(model: Any, method: str | Drafter, draft_model: Any = None) -> Drafter:
    """The drafter of that name for this target, with its second model when it takes one. A Drafter is returned as it is."""
    if not (draft_model is None or isinstance(draft_model, (str, os.PathLike)) or is_model(draft_model)):
        raise TypeError(f'generate: drafter is {show(draft_model)}; takes a path, a loaded model or "zoo".')
    if isinstance(method, Drafter):
        return method
    cls = drafters.get(method.partition(":")[0] if isinstance(method, str) else method, "generate", "method")
    takes = getattr(cls, "takes_model", "no")
    if takes == "no" or (takes == "maybe" and draft_model is None and not _is_zoo(model)):
        return drafters.build(method, "generate", "method")
    return drafters.build(method, "generate", "method", model=find_draft_model(model, draft_model, cls.name))


def find_draft_model(model: Any, wanted: Any = None, method: str = "draft_chain") -> Any:
    """The second model for a target: `wanted` itself, or loaded from that path, "zoo", or None where the target is the zoo target.

    Raises ValueError when there is none. What is loaded here lives as long as the target.
    """
    if wanted is None and not _is_zoo(model):
        raise ValueError(f'generate: method "{method}" drafts with a second model and drafter is None; takes a path, a model or "zoo".')
    if is_model(wanted):
        return wanted
    name = ZOO_DRAFTER if wanted is None or wanted == ZOO else str(wanted)
    loaded = _loaded.setdefault(model, {})
    if name not in loaded:
        import ramify

        beside = getattr(model, "device", "cpu")  # where the target is
        loaded[name] = ramify.load(name, dtype=getattr(model, "dtype", "bf16"), device=beside)
    return loaded[name]


def build_size(size: str | SizePolicy | None, drafter: Drafter, about: str = "") -> SizePolicy:
    """The size policy of that name; None takes the drafter's own, else "measured", which remembers what it learned about `about`."""
    if isinstance(size, SizePolicy):
        return size
    if size is None:
        own = drafter.size_policy()
        return own if own is not None else size_policies.build("measured", about=about)
    return size_policies.build(size, "generate", "size")


def _is_zoo(model: Any) -> bool:
    return getattr(model.config, "name", "") == ZOO


def _requests(
    model: Any,
    prompts: str | Sequence[str | Sequence[int]],
    max_new_tokens: int,
    params: SamplingParams,
    stops: tuple[tuple[str, ...], tuple[tuple[int, ...], ...]],
) -> list[Request]:
    config = model.config
    eos = frozenset(int(i) for i in config.eos_token_ids)
    requests = []
    given = [prompts] if isinstance(prompts, str) else sequence(prompts)
    if given is None:
        raise TypeError(f"generate: prompts is {show(prompts)}; takes strings or lists of token ids.")
    for i, prompt in enumerate(given):
        ids = _ids(model, prompt, i)
        request = Request(ids, max_new_tokens, params, eos, stops[1], stops[0], tokenizer=model.tokenizer)
        if request.capacity > config.max_positions:
            raise ValueError(
                f"generate: prompt {i} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}; takes {config.max_positions} "
                "together, the positions of the model. Shorten the prompt or lower max_new_tokens."
            )
        requests.append(request)
    return requests


def _ids(model: Any, prompt: Any, i: int) -> list[int]:
    vocab = model.config.vocab_size
    if isinstance(prompt, str):
        if prompt and model.tokenizer is None:
            raise ValueError(
                f"generate: prompt {i} is a string and the model's folder has no tokenizer.json; takes token ids. "
                "Add the file, or give ids in Python."
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            came = f"{show(prompt[error.start])} at {error.start}, which is no character"
            raise ValueError(f"generate: prompt {i} holds {came}; takes text. Decode its bytes as what they are.") from None
        ids = model.tokenizer.encode(prompt) if prompt else []
    else:
        ids = sequence(prompt)
        if ids is None:
            do = "Use .decode()." if isinstance(prompt, (bytes, bytearray)) else "prompts is a list of them."
            raise TypeError(f"generate: prompt {i} is {show(prompt)}; takes a string or a list of token ids. {do}")
        ids = token_ids(f"prompt {i}", ids, vocab, "token ids. prompts is a list of strings or of lists of ids.")
    if not ids:
        raise ValueError(f"generate: prompt {i} is empty; takes one token or more. Give it text, or the model's begin-of-text token.")
    return ids


def _check_cache(model: Any, cache: Any, requests: Sequence[Request]) -> None:
    """A cache of the caller's is this model's, with a slot for each request that is empty and has room for it."""
    if not all(hasattr(cache, part) for part in ("capacities", "free", "of")):
        raise TypeError(f"generate: cache is {show(cache)}; takes one of model.new_cache, or None.")
    if getattr(cache, "model", model) is not model:
        raise ValueError("generate: cache is another model's; takes one that this model's new_cache made.")
    have, need = [int(n) for n in cache.capacities], [r.capacity for r in requests]
    if any(n < 0 for n in have[: len(need)]):
        raise ValueError("generate: cache was freed; a cache serves one call. Make another with model.new_cache.")
    if len(have) < len(need) or any(has < needs for has, needs in zip(have, need)):
        raise ValueError(f"generate: cache has slots of {show(have)} tokens; takes {show(need)} or more, prompts and max_new_tokens.")
    held = cache.of(range(len(need))).lengths
    if held.any():
        raise ValueError(f"generate: cache holds {show(held.tolist())} tokens already; takes empty slots. Crop them, or make another.")
