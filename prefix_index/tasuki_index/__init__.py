"""Redis: who is alive, who holds which prefix. Losing it loses speed, never an answer."""

from tasuki_index.chain import Chain
from tasuki_index.errors import IndexUnavailable
from tasuki_index.events import CacheEvent, Change, Kind
from tasuki_index.index import Index, Registration
from tasuki_index.publisher import Publisher

__all__ = [
    "CacheEvent",
    "Chain",
    "Change",
    "Index",
    "IndexUnavailable",
    "Kind",
    "Publisher",
    "Registration",
]
