"""One Redis or Redis Cluster behind a time limit and a circuit breaker.

Routing must never wait for a Redis that is in trouble. A call ends within `timeout`; after one that
failed, calls fail at once for `PAUSE` seconds, and then one of them is let through as a probe.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from tasuki_common.errors import ConfigError
from tasuki_index.errors import IndexUnavailable

PAUSE = 1.0
"""Seconds without calls after a failed one."""
CONNECTIONS = 8
"""At most, of a process; one call takes one for a round trip, more would only queue in Redis."""
CLUSTER_SCHEME = "redis+cluster://"


class Script:
    """A Lua script made of files in `scripts/`, joined in the order given."""

    def __init__(self, *names: str) -> None:
        folder = resources.files("tasuki_index") / "scripts"
        files = ("common", *names)
        self.source = "\n".join((folder / f"{name}.lua").read_text("utf-8") for name in files)
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class Connection:
    """Runs commands and scripts; raises only `IndexUnavailable`.

    `url`: redis://, rediss://, unix:// or redis+cluster://host:port. `timeout`: seconds of a call.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._client = _client(url, timeout)
        self._room = asyncio.Semaphore(CONNECTIONS)
        self._closed_until = 0.0
        self._failure = ""

    async def command(self, *parts: bytes | str | int) -> Any:
        """The answer to one command; its first key decides the cluster's node."""
        return await self._guarded(lambda: self._client.execute_command(*parts))

    async def run(self, script: Script, key: str, *arguments: bytes | str | int) -> Any:
        """The answer of a script in one round trip; loads it where Redis does not know it."""
        return await self._guarded(lambda: self._evaluate(script, key, arguments))

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def _evaluate(
        self, script: Script, key: str, arguments: tuple[bytes | str | int, ...]
    ) -> Any:
        try:
            return await self._client.execute_command("EVALSHA", script.sha, 1, key, *arguments)
        except NoScriptError:
            return await self._client.execute_command("EVAL", script.source, 1, key, *arguments)

    async def _guarded(self, call: Callable[[], Awaitable[Any]]) -> Any:
        now = time.monotonic()
        if now < self._closed_until:
            raise IndexUnavailable(self._failure)
        if self._closed_until:
            # This call is the probe; others fail meanwhile.
            self._closed_until = now + self._timeout
        try:
            async with asyncio.timeout(self._timeout), self._room:
                answer = await _cancellable(call())
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            self._closed_until = time.monotonic() + PAUSE
            reason = str(error) or type(error).__name__
            where = _without_password(self._url)
            self._failure = f"Redis at {where} gave no answer: {reason}"
            raise IndexUnavailable(self._failure) from error
        self._closed_until = 0.0
        return answer


async def _cancellable(call: Awaitable[Any]) -> Any:
    """The result of a call of redis-py, unless this task was cancelled meanwhile.

    redis-py sends through `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that
    comes as it completes: a loop over calls would never end, a client's hang-up go unheard.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await call
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


def _client(url: str, timeout: float) -> Redis | RedisCluster:
    limits: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    once_more = Retry(NoBackoff(), 1)  # a pooled connection may have died with the Redis before
    try:
        if url.startswith(CLUSTER_SCHEME):
            plain = "redis://" + url.removeprefix(CLUSTER_SCHEME)
            return RedisCluster.from_url(plain, retry=once_more, **limits)
        return Redis.from_url(url, retry=once_more, **limits)
    except (ValueError, RedisClusterException) as error:
        raise ConfigError(f"redis_url is {_without_password(url)!r}: {error}") from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
