"""What the operator asks outside of its watches: the index, and whether gateways are there.

Both are asked for all deployments together, and an answer counts for some seconds.
"""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

from tasuki_common.messages import Member
from tasuki_index import Index, IndexUnavailable
from tasuki_operator.api import Api
from tasuki_operator.kinds import DEPLOYMENT, SECRET
from tasuki_operator.schema import SecretKey

T = TypeVar("T")

_FRESH_SECONDS = 1.0
_INDEX_SECONDS = 2.0


class _Shared(Generic[T]):
    """A question that many ask at once and one answers."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask, self._lock = ask, asyncio.Lock()
        self._asked = -_FRESH_SECONDS
        self._answer: T | None = None

    async def __call__(self) -> T:
        async with self._lock:
            if self._answer is None or time.monotonic() - self._asked > _FRESH_SECONDS:
                self._answer = await self._ask()
                self._asked = time.monotonic()
            return self._answer


class Listing(NamedTuple):
    """What the index said."""

    members: list[Member] | None
    """None: it gave no answer."""
    error: str = ""


class Outside:
    """The index at each URL, and the gateways' Deployment."""

    def __init__(self, api: Api, redis_url: str, gateway: tuple[str, str] | None) -> None:
        """`gateway`: namespace and name of the Deployment; None: not looked at."""
        self._api, self._redis_url, self._gateway = api, redis_url, gateway
        self._indexes: dict[str, Index] = {}
        self._listings: dict[str, _Shared[Listing]] = {}
        self._gateways = _Shared(self._count_gateways)

    async def listing(self, namespace: str, url_secret: SecretKey | None) -> Listing:
        """All members in the index of a deployment."""
        url = self._redis_url
        if url_secret is not None:
            found = await self._secret(namespace, url_secret)
            if found is None:
                name, key = url_secret.name, url_secret.key
                return Listing(None, f"Secret {name} has no entry {key} with a Redis URL")
            url = found
        if url not in self._listings:
            index = self._indexes[url] = Index(url, timeout=_INDEX_SECONDS)
            self._listings[url] = _Shared(lambda: _members(index))
        return await self._listings[url]()

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

    async def _secret(self, namespace: str, key: SecretKey) -> str | None:
        secret = await self._api.get(SECRET, namespace, key.name)
        data = ((secret or {}).get("data") or {}).get(key.key)
        return base64.b64decode(data).decode().strip() if data else None


async def _members(index: Index) -> Listing:
    try:
        return Listing(await index.members())
    except IndexUnavailable as error:
        return Listing(None, str(error))
