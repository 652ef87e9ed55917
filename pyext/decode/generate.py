"""generate: names and plain arguments in, outputs out. Everything that a call needs is looked up or loaded here, and the loop runs it."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ramify.decode.loop import decode
from ramify.decode.output import Output, Request, Stream, read_stops
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

    model: from `ramify.load`. prompts: strings or lists of ids; one string is a list of one.
    method: a name of `ramify.methods()`, with options as "prompt_lookup:longest=4", or a Drafter of your own. drafter: the second model
    of the methods that need one: a loaded model, a path, or "zoo"; None is "zoo" when the target is the zoo target.
    temperature .. repetition_penalty: as in transformers; 0 takes the most likely token. seed: the same seed gives the same text,
    whatever else is in the batch and whatever the method, as long as its guesses are deterministic (all are by default).
    stop: strings, ids, or lists of ids that end a text, besides the model's own end-of-text ids. The text ends before a stop string;
    token_ids end with the token that completed it. cache: a cache with room for every request, or None.
    stream: called with (index, new ids, text) after every step. size: a size policy, by name with options or as an object; None is
    "measured".

    Raises ValueError for an empty prompt, a prompt that with max_new_tokens passes the model's positions, an unknown method, a drafter
    of another vocabulary; TypeError for arguments of another kind.
    """
    requests = _requests(
        model, prompts, max_new_tokens, SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed), read_stops(stop)
    )
    drafting = build_drafter(model, method, drafter)
    policy = build_size(size, drafting, about=method if isinstance(method, str) else "")
    return decode(model, requests, drafting, policy, cache=cache, stream=stream) if requests else []


def build_drafter(model: Any, method: str | Drafter, draft_model: Any = None) -> Drafter:
    """The drafter of that name for this target, with its second model when it takes one. A Drafter is returned as it is."""
    if isinstance(method, Drafter):
        return method
    cls = drafters.get(str(method).partition(":")[0] if isinstance(method, str) else method, "generate", "method")
    takes = getattr(cls, "takes_model", "no")
    if takes == "no" or (takes == "maybe" and draft_model is None and not _is_zoo(model)):
        return drafters.build(method, "generate", "method")
    return drafters.build(method, "generate", "method", model=find_draft_model(model, draft_model, cls.name))


def find_draft_model(model: Any, wanted: Any = None, method: str = "draft_chain") -> Any:
    """The second model for a target: `wanted` itself, or loaded from that path, "zoo", or None where the target is the zoo target.

    Raises ValueError when there is none or when the vocabularies differ. What is loaded here lives as long as the target.
    """
    if wanted is None and not _is_zoo(model):
        raise ValueError(f'generate: method "{method}" drafts with a second model and drafter is None; takes a path, a model or "zoo".')
    if wanted is not None and hasattr(wanted, "forward"):
        found = wanted
    else:
        name = ZOO_DRAFTER if wanted is None or wanted == ZOO else str(wanted)
        loaded = _loaded.setdefault(model, {})
        if name not in loaded:
            import ramify

            loaded[name] = ramify.load(name, dtype=getattr(model, "dtype", "bf16"))
        found = loaded[name]
    _check_vocabulary(model, found)
    return found


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
    for i, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
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
    if isinstance(prompt, str) and prompt:
        if model.tokenizer is None:
            raise ValueError(f"generate: prompt {i} is a string and the model has no tokenizer; takes token ids. Give a list of ids.")
        ids = list(model.tokenizer.encode(prompt))
    elif hasattr(prompt, "__iter__"):
        ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    else:
        raise TypeError(
            f"generate: prompt {i} is {type(prompt).__name__}; takes a string or a list of token ids. prompts is a list of them."
        )
    if not ids:
        raise ValueError(f"generate: prompt {i} is empty; takes one token or more. Give it text, or the model's begin-of-text token.")
    vocab = model.config.vocab_size
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"generate: prompt {i} holds {token!r:.40}; takes token ids. prompts is a list of strings or of lists of ids.")
        if not 0 <= token < vocab:
            raise ValueError(f"generate: prompt {i} holds id {token}; takes 0 to {vocab - 1}, the model's vocabulary. Use its tokenizer.")
    return [int(token) for token in ids]


_PROBE = "def f(x):\n    return {'naïve': x ** 2, \"€\": [0.5, 128]}  # The quick brown fox\n"


def _check_vocabulary(target: Any, draft: Any) -> None:
    """Raises ValueError unless both models give the same ids the same tokens."""
    if target.config.vocab_size != draft.config.vocab_size:
        ours, theirs = target.config.vocab_size, draft.config.vocab_size
        raise ValueError(
            f"generate: drafter has {theirs} tokens in its vocabulary; takes {ours}, as the target has. Take a model of one family."
        )
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is None or theirs is None or ours is theirs:
        return
    same = getattr(ours, "fingerprint", None) == getattr(theirs, "fingerprint", None)
    if same and getattr(ours, "fingerprint", None) is None:
        same = ours.encode(_PROBE) == theirs.encode(_PROBE)
    if not same:
        raise ValueError(
            "generate: drafter has another tokenizer than the target; takes one with the same ids. Take a model of one family."
        )
