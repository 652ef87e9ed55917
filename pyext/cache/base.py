"""What a page format is: how the tokens of a page are stored."""

import torch


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
