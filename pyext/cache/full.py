"""Keep every token: plain attention."""

from ramify.cache.base import CachePolicy
from ramify.registry import cache_policy


@cache_policy("full", lossless=True)
class Full(CachePolicy):
    """Nothing is ever evicted."""

    def keep(self, layer, n_slot):
        """None: every slot stays."""
        return None
