"""Plain steps in a row for which nobody is asked: deciding and learning anew would take a twentieth of a small model's step."""

from typing import TYPE_CHECKING

from ramify.size._cost import CostTable
from ramify.size._experience import Experience

if TYPE_CHECKING:
    from ramify.decode.clock import Clock

MOST = 64
"""Steps of one rest, at most."""


class Rest:
    """A run of plain steps, and what they took. left: steps that are still to come; 0 between two rests."""

    __slots__ = ("left", "_batch", "_steps", "_forward", "_others", "_usual")

    def __init__(self) -> None:
        self.left = self._steps = self._batch = 0
        self._forward = self._others = self._usual = 0.0

    def begin(self, steps: int, batch: int, costs: CostTable) -> None:
        """Rest for so many steps, the coming one included; fewer where plain decoding has still to settle, so that both are told apart."""
        self.left = min(steps, costs.unsettled or MOST)
        self._batch, self._steps, self._usual = batch, 0, costs.at(batch)
        self._forward = self._others = 0.0

    def covers(self, batch: int, costs: CostTable) -> bool:
        """Whether the next step belongs to it; a rest ends early when a sequence does."""
        if self.left and self._batch != batch:
            self.left = 0
            self._end(costs)
        return self.left > 0

    def observe(self, clock: "Clock", log: Experience, costs: CostTable) -> None:
        """A step of it went by."""
        forward, others = clock.forward.last, clock.verify.last + clock.commit.last
        log.since += 1
        log.spent += forward + others
        self._forward += min(forward, 2 * self._usual)  # a step that met a busy machine says nothing of the model
        self._others += others
        self._steps += 1
        self.left -= 1
        if not self.left:
            self._end(costs)

    def _end(self, costs: CostTable) -> None:
        if self._steps:
            costs.observe(self._batch, self._forward, self._others, True, self._steps)
