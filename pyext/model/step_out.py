"""What a forward returns."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class StepOut:
    """What a forward returns, one row per packed row of the tree. Views of the step's buffers: the next forward overwrites them.

    argmax int32 [M]; top, lse f32 [M]: largest logit and log-sum-exp; topk_ids int32 and topk_values f32 [M, k], descending; logits
    f32 [M, V] when asked for; taps {i: f32 [M, hidden]}: the hidden state after i layers, before the norm that follows.
    drawn int32 [M]: the token that plain sampling would emit after each row, when draws were asked for. Without the last layer everything
    but taps is None.
    """

    argmax: np.ndarray | None = None
    top: np.ndarray | None = None
    lse: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    topk_values: np.ndarray | None = None
    logits: np.ndarray | None = None
    taps: dict[int, np.ndarray] = field(default_factory=dict)
    drawn: np.ndarray | None = None


def check_finite(lse: np.ndarray) -> None:
    """Raises ValueError where the log-sum-exp of a row says that its logits are no numbers."""
    if not math.isfinite(lse.sum()):
        row = int(np.flatnonzero(~np.isfinite(lse))[0])
        raise ValueError(f"forward: logits of row {row} are not finite; takes weights without NaN. Check the checkpoint.")


class DeviceStepOut(StepOut):
    """A StepOut whose logits stay on the device until somebody reads them: they are all of its bytes but a few."""

    _logits: "np.ndarray | Callable[[], np.ndarray] | None" = None

    @property  # type: ignore[override]
    def logits(self) -> np.ndarray | None:
        """Logits f32 [M, V], brought here at the first look."""
        if callable(self._logits):
            self._logits = self._logits()
        return self._logits

    @logits.setter
    def logits(self, value: "np.ndarray | Callable[[], np.ndarray] | None") -> None:
        self._logits = value
