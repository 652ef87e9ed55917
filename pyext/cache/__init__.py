"""Committed keys and values in pages, a draft region beside them, and one commit that joins the two."""

from ramify.cache.arena import Arena
from ramify.cache.base import PageFormat
from ramify.cache.cache import Cache, CacheView

__all__ = ["Arena", "Cache", "CacheView", "PageFormat"]
