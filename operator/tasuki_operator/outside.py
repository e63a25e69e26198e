"""What the operator asks outside of its watches: the index, and whether gateways are there.

Both are asked for all deployments together, and an answer counts for some seconds.
"""

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from tasuki_common.errors import ConfigError
from tasuki_common.messages import Member
from tasuki_index import Index, IndexUnavailable
from tasuki_operator.api import Api
from tasuki_operator.kinds import DEPLOYMENT

T = TypeVar("T")

_FRESH_SECONDS = 1.0
_LONGEST_SECONDS = 5.0
_SHARE = 10
"""An answer counts for as many times as long as it took: asking must not become the load."""
_INDEX_SECONDS = 5.0
"""Of a call. An operator that starts among hundreds of deployments is itself slow to listen."""
_FORGOTTEN_SECONDS = 300.0
_BELIEVED_SECONDS = 15.0
"""For so long the last answer of an index that gives none now still counts: it may be busy."""


class _Shared(Generic[T]):
    """A question that many ask at once and one answers."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask, self._lock = ask, asyncio.Lock()
        self._begun = self._until = 0.0
        self._answer: T | None = None
        self.asked_at = time.monotonic()

    async def __call__(self, since: float = 0.0) -> T:
        """`since`, monotonic seconds: an answer to what was asked earlier does not count."""
        self.asked_at = time.monotonic()
        async with self._lock:
            begun = time.monotonic()
            if self._answer is None or begun > self._until or self._begun < since:
                self._answer, self._begun = await self._ask(), begun
                now = time.monotonic()
                counts = max(_FRESH_SECONDS, _SHARE * (now - begun))
                self._until = now + min(counts, _LONGEST_SECONDS)
            return self._answer


class Listing(NamedTuple):
    """What the index said."""

    members: list[Member] | None
    """None: it gave no answer."""
    error: str = ""
    by_pod: Mapping[str, Sequence[Member]] = {}
    """The same by their pods' names."""


class Outside:
    """The index at each URL, and the gateways' Deployment."""

    def __init__(self, api: Api, gateway: tuple[str, str] | None) -> None:
        """`gateway`: namespace and name of the Deployment; None: not looked at."""
        self._api, self._gateway = api, gateway
        self._indexes: dict[str, Index] = {}
        self._listings: dict[str, _Shared[Listing]] = {}
        self._gateways = _Shared(self._count_gateways)

    async def listing(self, url: str, since: float = 0.0) -> Listing:
        """All members in the index at a URL; asked for since then, in monotonic seconds."""
        if url not in self._listings:
            try:
                index = Index(url, timeout=_INDEX_SECONDS)
            except ConfigError as error:
                return Listing(None, str(error))
            forgotten = self._forget()
            self._indexes[url], self._listings[url] = index, _Shared(_Members(index))
            for other in forgotten:  # only now: meanwhile others ask for the same URL
                await other.close()
        return await self._listings[url](since)

    def _forget(self) -> list[Index]:
        """Lets go of indexes that nobody asks for: the URL in a Secret has changed."""
        old = time.monotonic() - _FORGOTTEN_SECONDS
        urls = [url for url, listing in self._listings.items() if listing.asked_at < old]
        for url in urls:
            del self._listings[url]
        return [self._indexes.pop(url) for url in urls]

    async def gateways(self) -> int | None:
        """How many gateways are ready; None when nobody knows."""
        return None if self._gateway is None else await self._gateways()

    async def close(self) -> None:
        """Closes the connections to Redis."""
        for index in self._indexes.values():
            await index.close()

    async def _count_gateways(self) -> int:
        if self._gateway is None:
            return 0
        found = await self._api.get(DEPLOYMENT, *self._gateway)
        return int(((found or {}).get("status") or {}).get("readyReplicas", 0))


class _Members:
    """All members of one index."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._listed: tuple[float, Listing] | None = None

    async def __call__(self) -> Listing:
        try:
            members = await self._index.members()
        except IndexUnavailable as error:
            if self._listed and time.monotonic() - self._listed[0] < _BELIEVED_SECONDS:
                return self._listed[1]
            return Listing(None, str(error))
        by_pod: dict[str, list[Member]] = collections.defaultdict(list)
        for member in members:
            by_pod[member.pod].append(member)
        listing = Listing(members, by_pod=by_pod)
        self._listed = time.monotonic(), listing
        return listing
