"""The pod's entry in the index: heartbeats with its load, and what its prefix cache holds."""

from collections.abc import Callable, Sequence

from tasuki_common.messages import Member
from tasuki_engine.request import CacheEvent
from tasuki_index.index import Index
from tasuki_index.publisher import Publisher
from tasuki_pod.config import PodConfig


class Membership:
    """Speaks to the index where one is configured; without one it keeps quiet."""

    def __init__(self, config: PodConfig, member: Callable[[], Member]) -> None:
        self._index: Index | None = None
        self._publisher: Publisher | None = None
        self._started = False
        if config.redis_url is not None:
            self._index = Index(config.redis_url)
            self._publisher = Publisher(self._index, member, ttl=config.heartbeat_seconds)

    @property
    def announced(self) -> bool:
        """Whether gateways can have heard of the pod, as far as the index goes."""
        return self._publisher is None or self._publisher.announced

    def start(self) -> None:
        """Announces the pod, and goes on doing so."""
        if self._publisher is not None:
            self._publisher.start()
            self._started = True

    def announce_soon(self) -> None:
        """Tells at once what has changed about the pod."""
        if self._publisher is not None:
            self._publisher.announce_soon()

    async def stop(self) -> None:
        """Withdraws the pod."""
        if self._publisher is not None and self._started:
            await self._publisher.close()
        if self._index is not None:
            await self._index.close()

    def on_cache_events(self, events: Sequence[CacheEvent]) -> None:
        """Publishes what came into the cache and what left it."""
        if self._publisher is not None:
            self._publisher.record(events)
