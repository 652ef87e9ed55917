"""What a page format and a cache policy are: how tokens are stored, and which of them stay."""

import torch
from torch import Tensor


class PageFormat:
    """How the 64 slots of a page are stored. Registered with `@page_format(name)`.

    dtype: element type of the page. lossless: whether a stored value equals what attention of the model's own precision saw.
    """

    dtype: torch.dtype
    name: str
    lossless: bool

    def page_bytes(self, head_dim: int) -> int:
        """Bytes of one page of one layer and KV head, keys and values together."""
        return 2 * 64 * head_dim * self.dtype.itemsize


class CachePolicy:
    """Which committed tokens stay. Registered with `@cache_policy(name)`; asked by `commit` and by nothing else.

    needs: what a step must collect for it ("colsum", ...). budget: slots it keeps, None for all.
    """

    needs: tuple[str, ...] = ()
    budget: int | None = None

    def keep(self, layer: int, n_slot: Tensor) -> Tensor | None:
        """Slot ranges that stay, int32 [B, ranges, 2], begin and end; None keeps everything."""
        raise NotImplementedError(f"cache policy {type(self).__name__} defines no keep")
