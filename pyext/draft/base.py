"""What a drafter is: `bind`, `begin`, `propose`, `observe`, `end`, and a list of what it wants from the target.

A whole method can be one function of the text so far: subclass `ChainDrafter` and write `guess`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ramify.registry import drafter
from ramify.tree import StaticTree, TokenTree

if TYPE_CHECKING:
    from ramify.decode.output import Request
    from ramify.size.base import SizePolicy
    from ramify.verify import Verdict

__all__ = ["ChainDrafter", "Drafter", "Wants", "drafter"]


@dataclass(frozen=True, slots=True)
class Wants:
    """What a drafter asks of every target step; the loop passes it on and asks nothing else.

    topk: so many most likely ids of every row, as StepOut.topk_ids. taps: layers whose hidden states to keep. logits: whole rows.
    prompt: also show the rows of the prompt, chunk by chunk, through `read`. Asked before every step, so it may change between steps.
    Under `auto` a drafter may be shown more than it asked for, and begins when it is first asked to draft, with the text so far.
    """

    topk: int = 0
    taps: tuple[int, ...] = ()
    logits: bool = False
    prompt: bool = False


class Drafter:
    """Guesses what the target will say, as one token tree for all live sequences.

    A slot is the place of a request in the call: 0, 1, 2 ... It lives from `begin` to `end`; the live slots of a step are ascending but
    need not be contiguous. Whatever a drafter remembers may change the speed of a later step and never its tokens.
    """

    name: str
    """What it is registered as."""

    wants = Wants()

    def bind(self, model: Any, requests: Sequence["Request"]) -> None:
        """Meet the target and the requests, by slot. Called once, before everything else; no slot is live yet."""

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Start these slots with their prompts; a prompt's last token is the first root. The lists are the caller's: copy what grows."""

    def read(self, slot: int, tokens: Sequence[int], out: Any) -> None:
        """A chunk of a prompt and the target's rows for it (StepOut, views valid during this call). Only with `wants.prompt`."""

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """Return one tree over all slots, at most rows[i] rows for slots[i], its root included.

        Rows stand in order of priority, which is also topological: the tree for fewer rows is a prefix of the tree for more. The loop
        does not ask when every sequence may have its root alone.
        """
        raise NotImplementedError

    def observe(self, slots: Sequence[int], tree: TokenTree, out: Any, verdict: "Verdict") -> None:
        """See what the target made of `tree`, which need not be this drafter's own. `out` holds views that the next step overwrites."""

    def end(self, slots: Sequence[int]) -> None:
        """Forget these slots. Called for every slot that began, also after an interrupt, and harmless for one that did not."""

    def static(self) -> StaticTree | None:
        """What `propose` and `observe` come to, where that is filling one shape from a table; None where it is more.

        A device that can then drafts, decides and learns by itself, several steps ahead of its host, which calls neither.
        """
        return None

    def size_policy(self) -> "SizePolicy | None":
        """A policy that belongs to this drafter, or None for the caller's choice."""
        return None


class ChainDrafter(Drafter):
    """A drafter that is one function of the text: write `guess`."""

    def __init__(self) -> None:
        self._text: dict[int, list[int]] = {}

    def guess(self, text: list[int], count: int) -> Sequence[int]:
        """Return up to `count` tokens that may follow `text` (prompt and everything emitted). Do not change `text`."""
        raise NotImplementedError

    def begin(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Keep a copy of each prompt."""
        for slot, prompt in zip(slots, prompts, strict=True):
            self._text[slot] = list(prompt)

    def propose(self, slots: Sequence[int], roots: Sequence[int], rows: Sequence[int]) -> TokenTree:
        """One chain per sequence."""
        counts = [(self._text[slot], n - 1) for slot, n in zip(slots, rows, strict=True)]
        return TokenTree.chains(roots, [self.guess(text, count)[:count] if count else () for text, count in counts])

    def observe(self, slots: Sequence[int], tree: TokenTree, out: Any, verdict: "Verdict") -> None:
        """Append what was emitted."""
        for slot, tokens in zip(slots, verdict.emitted, strict=True):
            self._text[slot] += tokens

    def end(self, slots: Sequence[int]) -> None:
        """Drop the texts."""
        for slot in slots:
            self._text.pop(slot, None)
