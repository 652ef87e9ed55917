"""What a conversion has made, and how it says how far it is."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ramify.model.perplexity import Perplexity

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
"""progress(items, stage) gives the items back, one as each is reached. Stages: "calibration text", "perplexity before", "layers" (of a
quantised checkpoint "tensors") and "perplexity after".
"""


def silent(items: Sequence[Any], stage: str) -> Iterable[Any]:
    """The Progress that shows nothing."""
    return items


@dataclass
class Conversion:
    """What a conversion made. Sizes in bytes, of the quantised layers and of all tensors; errors are |W - Q| / |W| by tensor name,
    output_errors the same of the layer's output on the calibration text, where there was one.

    format: that of most layers; formats counts them all, "dense" ones too. method: the quantizer, or "repack" where the codes are those
    of a quantised checkpoint; source_method is then its quant_method. threads: torch's, on which
    the codes of gptq depend; 0 where nothing does. unmeasured: why there is no perplexity.
    """

    source: str
    out: str
    format: str
    method: str
    head: str | None
    source_method: str | None = None
    formats: dict[str, int] = field(default_factory=dict)
    calibration: str | None = None
    calibration_tokens: int = 0
    threads: int = 0
    layer_bytes: tuple[int, int] = (0, 0)
    total_bytes: tuple[int, int] = (0, 0)
    errors: dict[str, float] = field(default_factory=dict)
    output_errors: dict[str, float] = field(default_factory=dict)
    evaluated_on: str | None = None
    before: Perplexity | None = None
    after: Perplexity | None = None
    unmeasured: str | None = None
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)
