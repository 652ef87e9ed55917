"""Rounds of a device that drafts, decides and commits by itself: the host keeps turns queued ahead and reads what they emitted.

They serve drafters whose trees are filled from a table, and texts whose next token is the likeliest one or a plain draw; all else takes
Rounds. A text that ends is known a turn late: what the device emitted in the meantime is dropped, what its table learned stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ramify.decode.output import Output
from ramify.decode.rounds import Parts, Rounds
from ramify.model.device_turns import AHEAD
from ramify.tree import MAX_ROWS, StaticTree
from ramify.verify.base import Verdict


class DeviceRounds(Rounds):
    """Turns of the live requests, two in flight. The size policy is asked once for each round that it is told of."""

    def __init__(self, parts: Parts, cache: Any, outs: Sequence[Output], live: Sequence[int], tree: StaticTree) -> None:
        super().__init__(parts, cache, outs, live)
        left, roots = [o.left for o in self.outs], [o.ids[-1] for o in self.outs]
        self._turns = parts.model.turns(self.view, tree, roots, left, self.sampling.draws())
        self._rows: list[int] = []  # of the turns in flight, as they were asked for
        self._wanted = 0  # what the size policy asks for in the round to come; 0 while it was not asked

    @property
    def ahead(self) -> int:  # type: ignore[override]
        """Turns in flight."""
        return len(self._turns)

    def draft(self) -> None:
        """Queue turns, unless a text has ended and what is in flight is to be the last of these rounds."""
        if any(o.finish_reason for o in self.outs):
            return
        if not self._wanted:
            self._wanted = min(MAX_ROWS, max(1, *self.parts.size.rows(self.live, self.view.lengths)))
        most = max(o.left for o in self.outs)
        while self.ahead < min(AHEAD, most):  # a turn emits a token or more
            self._turns.queue(self._wanted, self.parts.model.eager)
            self._rows.append(self._wanted)

    def run(self) -> None:
        """Wait for the oldest turn. One that was queued before the size policy changed its mind is not the one that it asked for."""
        rows = self._rows.pop(0)
        self.told = rows == self._wanted
        if self.told:
            self._wanted = 0
        self.out = self._turns.take()
        self.tree = self.out.tree

    def decide(self) -> Verdict:
        """What the device has decided."""
        return Verdict(self.out.path, self.out.emitted)

    def commit(self, verdict: Verdict) -> None:
        """The device has committed, and learned, by itself."""

    def close(self) -> None:
        """Let the turns in flight end, and the drafter have its table."""
        self._turns.close()


def rounds(parts: Parts, cache: Any, outs: Sequence[Output], live: Sequence[int]) -> Rounds:
    """The steps of these requests: on the device where it can do all of them alone."""
    tree = parts.drafter.static() if parts.verifier is None and getattr(parts.model, "takes_turns", False) else None
    if tree is not None and all(o.request.params.is_plain or not o.request.params.needs_logits for o in outs):
        return DeviceRounds(parts, cache, outs, live, tree)
    return Rounds(parts, cache, outs, live)
