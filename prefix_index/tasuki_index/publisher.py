"""The pod's side of the index: heartbeats and cache events, through outages of Redis."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from tasuki_common import logs
from tasuki_common.messages import Member
from tasuki_index.chain import Chain
from tasuki_index.errors import IndexUnavailable
from tasuki_index.events import CacheEvent, Change
from tasuki_index.index import Index, Registration

log = logs.get("tasuki.index")

BATCH = 512
"""Changes in one round trip: 2 ms of Redis's time."""
MAX_PENDING = 65536
"""Changes that wait; beyond it, sending the whole book is cheaper than keeping a diary."""
RETRY_SECONDS = 1.0


class Publisher:
    """Keeps one pod known to the index: who it is, how busy it is, what it has cached.

    `member` is asked at each heartbeat, every `ttl` / 3 seconds. Cache events wait up to `interval`
    seconds for company. When Redis was away or lost its memory, everything is published again.
    """

    def __init__(
        self,
        index: Index,
        member: Callable[[], Member],
        *,
        ttl: float = 10.0,
        interval: float = 0.05,
    ) -> None:
        self._index, self._member = index, member
        self._ttl, self._interval = ttl, interval
        self._chain = Chain()
        self._pending: deque[Change] = deque()
        self._registration: Registration | None = None
        self._reachable = True
        self._next_heartbeat = 0.0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def reachable(self) -> bool:
        """Whether the last contact with Redis succeeded."""
        return self._reachable

    @property
    def pending(self) -> int:
        """Changes not yet published."""
        return len(self._pending)

    def start(self) -> None:
        """Begins to announce and publish, in a task of the running loop."""
        self._task = asyncio.create_task(self._run(), name="index publisher")

    def record(self, events: Iterable[CacheEvent]) -> None:
        """Takes note of what came into the pod's prefix cache and what left it. Never waits."""
        changes = self._chain.apply(events)
        if not changes or self._registration is None:
            return  # a new registration begins with the whole book
        self._pending.extend(changes)
        if len(self._pending) > MAX_PENDING:
            self._start_over()
        self._wake.set()

    def announce_soon(self) -> None:
        """Brings the next heartbeat forward, for news that cannot wait such as a drain."""
        self._next_heartbeat = 0.0
        self._wake.set()

    async def close(self) -> None:
        """Stops, and withdraws the pod if Redis can be reached."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self._index.withdraw(self._member())
        except IndexUnavailable as error:
            log.warning("withdraw_failed", reason=str(error), expires_seconds=self._ttl)

    async def _run(self) -> None:
        while True:
            try:
                await self._turn()
                self._note_reachable()
            except IndexUnavailable as error:
                self._note_unreachable(error)
            await self._rest()

    async def _turn(self) -> None:
        if time.monotonic() >= self._next_heartbeat:
            await self._heartbeat()
        while self._pending:
            await self._publish_batch()

    async def _heartbeat(self) -> None:
        self._next_heartbeat = time.monotonic() + self._ttl / 3
        held = self._registration
        registration = await self._index.announce(self._member(), self._ttl, held)
        if registration != held:
            self._registration = registration
            self._pending = deque(self._chain.snapshot())
            log.info("registered", pod=self._member().pod, entries=len(self._pending))

    async def _publish_batch(self) -> None:
        registration, fingerprint = self._registration, self._member().fingerprint
        batch = list(islice(self._pending, BATCH))
        if registration is None or time.monotonic() >= self._next_heartbeat:
            await self._heartbeat()
            return
        self._registration = None  # until the outcome is known
        published = await self._index.publish(fingerprint, registration, batch)
        if published is None:
            self._start_over()
            return
        self._registration = published
        for _ in batch:
            self._pending.popleft()

    def _start_over(self) -> None:
        self._registration = None
        self._pending.clear()
        self._next_heartbeat = 0.0

    async def _rest(self) -> None:
        """Waits for the next heartbeat, or until changes have waited for company."""
        remaining = max(0.0, self._next_heartbeat - time.monotonic())
        try:
            async with asyncio.timeout(remaining):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()
        await asyncio.sleep(min(self._interval, remaining))

    def _note_reachable(self) -> None:
        if not self._reachable:
            log.info("index_reachable", pod=self._member().pod)
        self._reachable = True

    def _note_unreachable(self, error: IndexUnavailable) -> None:
        if self._reachable:
            log.warning("index_unreachable", pod=self._member().pod, reason=str(error))
        self._reachable = False
        if self._registration is None:
            self._pending.clear()
        self._next_heartbeat = time.monotonic() + RETRY_SECONDS
