"""The loop: propose, forward, verify, commit, observe. It names no method; if a method needs a branch here, a noun is wrong.

The prompt's last token is the first root, so the first step is like any other. Rows committed equal tokens emitted (root and accepted
guesses against accepted guesses and the token after them), so a rule that ends a text is one count per sequence.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ramify.checks import show
from ramify.decode.clock import Clock
from ramify.decode.device_rounds import rounds
from ramify.decode.output import Output, Request, Stream
from ramify.decode.rounds import Judge, Parts
from ramify.draft.base import Drafter
from ramify.size.base import SizePolicy


def decode(
    model: Any,
    requests: Sequence[Request],
    drafter: Drafter,
    size: SizePolicy,
    verifier: Judge | None = None,
    cache: Any = None,
    stream: Stream | None = None,
) -> list[Output]:
    """Decode until every request has ended. Returns one Output per request, in the order given.

    verifier: None takes the exact one that accepts most for each tree. cache: None makes one of the right capacities; a given one must
    hold request.capacity tokens in slots 0, 1, ... and is freed slot by slot. Raises what its parts raise; nothing stays behind then.
    """
    if verifier is not None and not callable(verifier):
        raise TypeError(f"decode: verifier is {show(verifier)}; takes a Verifier or None. ramify.verifier.build(name) makes one.")
    outs = [Output(request, i, stream) for i, request in enumerate(requests)]
    clock = Clock()
    drafter.bind(model, requests)
    size.bind(model, requests)
    cache = model.new_cache([r.capacity for r in requests]) if cache is None else cache
    parts, group = Parts(model, drafter, size, verifier), None
    live = list(range(len(outs)))
    try:
        with clock.prefill:
            drafter.begin(live, [r.prompt for r in requests])
            _prefill(model, cache, live, requests, drafter)
        while live:
            group = group or rounds(parts, cache, [outs[i] for i in live], live)
            with clock.draft:
                group.draft()
            with clock.forward:
                group.run()
            with clock.verify:
                verdict = group.decide()
                counts = [o.take(tokens) for o, tokens in zip(group.outs, verdict.emitted, strict=True)]
                verdict = verdict.cut(counts)
            with clock.commit:
                group.commit(verdict)
            if group.told:
                size.observe(group.tree, verdict, clock)
            if stream is not None:
                for o, count in zip(group.outs, counts, strict=True):
                    o.tell(count)
            if any([o.finish_reason for o in group.outs]) and not group.ahead:
                group.close()
                live, group = _retire(live, outs, drafter, cache, clock), None
    except BaseException:  # an error or an interrupt leaves no slot and no drafter state behind
        with suppress(Exception):  # the first problem is the one to hear of
            if group is not None:
                group.close()
            drafter.end(live)
        cache.free(live)
        raise
    return outs


def _prefill(model: Any, cache: Any, slots: list[int], requests: Sequence[Request], drafter: Drafter) -> None:
    """Feed every prompt but its last token; slots whose prompt is that token alone have nothing to feed."""
    fed = [slot for slot in slots if len(requests[slot].prompt) > 1]
    if not fed:
        return
    wants = drafter.wants
    shown = {"topk": wants.topk, "taps": wants.taps, "rows_out": drafter.read} if wants.prompt else {}
    model.prefill([requests[slot].prompt[:-1] for slot in fed], cache, slots=fed, **shown)


def _retire(live: list[int], outs: list[Output], drafter: Drafter, cache: Any, clock: Clock) -> list[int]:
    done = [i for i in live if outs[i].finish_reason]
    drafter.end(done)
    cache.free(done)
    for i in done:
        outs[i].close(clock.totals())
    return [i for i in live if not outs[i].finish_reason]
