"""The loop: propose, forward, verify, commit, observe. It names no method; if a method needs a branch here, a noun is wrong.

The prompt's last token is the first root, so the first step is like any other. Rows committed equal tokens emitted (root and accepted
guesses against accepted guesses and the token after them), so a rule that ends a text is one count per sequence.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ramify.checks import show
from ramify.decode.clock import Clock
from ramify.decode.output import Output, Request, Stream
from ramify.draft.base import Drafter
from ramify.registry import verifier as verifiers
from ramify.sampling.pipeline import Sampling
from ramify.size.base import SizePolicy
from ramify.tree import MAX_ROWS, TokenTree
from ramify.verify import choose_verifier
from ramify.verify.base import Verdict

Judge = Callable[[TokenTree, Any, Sampling], Verdict]


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
    live = list(range(len(outs)))
    try:
        with clock.prefill:
            drafter.begin(live, [r.prompt for r in requests])
            _prefill(model, cache, live, requests, drafter)
        group = _Group(model, cache, outs, live)
        while live:
            with clock.draft:
                rows = group.fit(size.rows(live, group.view.lengths))
                roots = [out.ids[-1] for out in group.outs]
                tree = size.trim(_proposed(drafter, live, roots, rows)) if max(rows) > 1 else TokenTree.roots(roots)
            with clock.forward:
                wants = drafter.wants
                wanted = {"taps": wants.taps, "topk": wants.topk, "logits": wants.logits or group.needs_logits}
                out = model.forward(tree, group.view, **wanted, **group.draws())
            with clock.verify:
                verdict = (verifier or group.verifier(tree))(tree, out, group.sampling)
                counts = [o.take(tokens) for o, tokens in zip(group.outs, verdict.emitted, strict=True)]
                verdict = verdict.cut(counts)
            with clock.commit:
                group.view.commit(verdict.path)
                drafter.observe(live, tree, out, verdict)
            size.observe(tree, verdict, clock)
            if stream is not None:
                for o, count in zip(group.outs, counts, strict=True):
                    o.tell(count)
            if any([o.finish_reason for o in group.outs]):
                live = _retire(live, outs, drafter, cache, clock)
                group = _Group(model, cache, outs, live)
    except BaseException:  # an error or an interrupt leaves no slot and no drafter state behind
        with suppress(Exception):  # the first problem is the one to hear of
            drafter.end(live)
        cache.free(live)
        raise
    return outs


def _proposed(drafter: Drafter, live: list[int], roots: list[int], rows: list[int]) -> TokenTree:
    """The drafter's tree: whatever it guesses, a tree over other roots would decode another text."""
    tree = drafter.propose(live, roots, rows)
    name = getattr(drafter, "name", type(drafter).__name__)
    if not isinstance(tree, TokenTree):
        raise TypeError(f"{name}: propose returned {show(tree)}; takes a TokenTree, such as TokenTree.chains(roots, guesses).")
    if tree.tokens[tree.row_start[:-1]].tolist() != roots:
        came = tree.tokens[tree.row_start[:-1]].tolist()
        raise ValueError(f"{name}: propose returned a tree over the roots {came}; takes {roots}, the last tokens emitted.")
    if tree.M > sum(rows):
        raise ValueError(f"{name}: propose returned {tree.rows.tolist()} rows; takes at most {rows}, as it was asked for.")
    return tree


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


class _Group:
    """The live requests between two retirements, and what follows from them."""

    def __init__(self, model: Any, cache: Any, outs: list[Output], live: list[int]) -> None:
        self.outs = [outs[i] for i in live]
        self.view: Any = cache.of(live) if live else None
        self.sampling = Sampling([o.request.params for o in self.outs], [o.ids for o in self.outs])
        self.needs_logits = self.sampling.needs_logits
        self.model_draws = self.needs_logits and getattr(model, "draws", False)
        self.positions = model.config.max_positions
        self.longest = max((o.request.capacity for o in self.outs), default=0)
        self._verifiers: dict[tuple[str, bool], Judge] = {}

    def draws(self) -> dict[str, Any]:
        """For a model that draws tokens where their logits lie: what it needs to."""
        return {"draws": self.sampling.draws()} if self.model_draws else {}

    def fit(self, rows: Sequence[int]) -> list[int]:
        """Rows that can be of use: one where a single token is left, none beyond the last position that the model has."""
        fitted = [1 if o.left == 1 else min(n, MAX_ROWS) for o, n in zip(self.outs, rows, strict=True)]
        if self.longest + max(fitted, default=0) > self.positions:
            fitted = [max(1, min(n, self.positions - len(o.ids) + 1)) for o, n in zip(self.outs, fitted, strict=True)]
        return fitted

    def verifier(self, tree: TokenTree) -> Judge:
        """The verifier for this tree: decided by how its children were chosen, the temperatures, and whether it branches."""
        chain = tree.mode != "det" and bool((tree.depth[1:] > tree.depth[:-1]).sum() == tree.M - tree.B)
        key = tree.mode, chain
        if key not in self._verifiers:
            self._verifiers[key] = verifiers.get(choose_verifier(tree.mode, self.sampling.params, chain))()
        return self._verifiers[key]
