"""The queue of deployments to look at: each at most once at a time, failures ever more seldom."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import aiohttp

from tasuki_common import logs
from tasuki_operator.api import ApiError
from tasuki_operator.metrics import Metrics
from tasuki_operator.store import Key

log = logs.get("tasuki.operator")

_FIRST_DELAY, _LAST_DELAY = 0.5, 60.0
_SETTLE = 0.02
"""Seconds in which the events of one change are taken together."""

_EXPECTED = (ApiError, aiohttp.ClientError, OSError)
"""An API server that is away, or that an object changed in between: no mistake of the operator."""

Reconcile = Callable[[Key], Awaitable[float | None]]
"""Looks at one deployment; returns after how many seconds to look again (None: when told to)."""


class WorkQueue:
    """Keys to reconcile. A key that is added while it is worked on is worked on once more."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: set[Key] = set()
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """Soon."""
        if key in self._busy:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            asyncio.get_running_loop().call_later(_SETTLE, self._ready.put_nowait, key)
            self._metrics.queue_depth.set(len(self._waiting))

    def add_after(self, key: Key, seconds: float) -> None:
        """Later; the newest time counts."""
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(seconds, self._due, key)

    async def work(self, reconcile: Reconcile) -> None:
        """One worker, for ever."""
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._busy.add(key)
            self._metrics.queue_depth.set(len(self._waiting))
            try:
                await self._reconcile(key, reconcile)
            finally:
                self._busy.discard(key)
            if key in self._again:
                self._again.discard(key)
                self.add(key)

    async def _reconcile(self, key: Key, reconcile: Reconcile) -> None:
        begun = asyncio.get_running_loop().time()
        result = "ok"
        try:
            again = await reconcile(key)
        except Exception as error:  # whatever it was: others must go on, this one tries again
            result, again = "error", self._delay(key)
            self._metrics.reconcile_failures.labels(type(error).__name__).inc()
            tell = log.warning if isinstance(error, _EXPECTED) else log.exception
            tell(
                "reconcile_failed",
                deployment=str(key),
                reason=str(error) or type(error).__name__,
                retry_seconds=round(again, 1),
            )
        else:
            self._failures.pop(key, None)
        self._metrics.failing_deployments.set(len(self._failures))
        seconds = asyncio.get_running_loop().time() - begun
        self._metrics.reconcile_seconds.labels(result).observe(seconds)
        if again is not None:
            self.add_after(key, again)

    def _delay(self, key: Key) -> float:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay: float = _FIRST_DELAY * 2 ** min(failures - 1, 10)
        return min(_LAST_DELAY, delay) * random.uniform(0.8, 1.2)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)
