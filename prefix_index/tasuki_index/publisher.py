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
"""Changes in one round trip: 2 to 3 ms of Redis's time."""
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
        self._fingerprint = ""
        self._registered_at = -RETRY_SECONDS
        self._reachable = True
        self._announced = False
        self._next_heartbeat = 0.0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def reachable(self) -> bool:
        """Whether the last contact with Redis succeeded."""
        return self._reachable

    @property
    def announced(self) -> bool:
        """Whether Redis has heard of the pod at least once."""
        return self._announced

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
            except IndexUnavailable as error:
                await self._pause(str(error))
            except Exception as error:  # a pod whose heart stops for a bug would vanish unnoticed
                log.exception("publisher_failed")
                await self._pause(repr(error))
            else:
                self._note_reachable()
                await self._rest()

    async def _turn(self) -> None:
        if time.monotonic() >= self._next_heartbeat:
            await self._heartbeat()
        while self._pending and time.monotonic() < self._next_heartbeat:
            await self._publish_batch()

    async def _heartbeat(self) -> None:
        held, member = self._registration, self._member()
        self._next_heartbeat = time.monotonic() + self._ttl / 3
        registration = await self._index.announce(member, self._ttl, held)
        self._announced = True
        if registration != held:
            self._registration, self._fingerprint = registration, member.fingerprint
            self._registered_at = time.monotonic()
            self._pending = deque(self._chain.snapshot())
            log.info("registered", pod=member.pod, entries=len(self._pending))

    async def _publish_batch(self) -> None:
        registration = self._registration
        if registration is None:
            self._start_over()
            return
        batch = list(islice(self._pending, BATCH))
        try:
            published = await self._index.publish(self._fingerprint, registration, batch)
        except IndexUnavailable:
            self._start_over()  # whether Redis applied it is not known
            raise
        if self._registration is not registration:
            return  # `record` started over meanwhile
        if published is None:
            self._start_over()
            return
        self._registration = published
        for _ in batch:
            self._pending.popleft()

    def _start_over(self) -> None:
        """Makes the next heartbeat register anew, which publishes the whole book."""
        self._registration = None
        self._pending.clear()
        self._next_heartbeat = self._registered_at + RETRY_SECONDS  # two of one name would race

    async def _rest(self) -> None:
        """Waits for the next heartbeat, or until changes have waited for company."""
        remaining = self._next_heartbeat - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, remaining)):
                await self._wake.wait()
                await asyncio.sleep(self._interval)
        except TimeoutError:
            pass  # the heartbeat is due
        self._wake.clear()

    async def _pause(self, reason: str) -> None:
        if self._reachable:
            log.warning("index_unreachable", pod=self._member().pod, reason=reason)
        self._reachable = False
        self._next_heartbeat = 0.0
        await asyncio.sleep(RETRY_SECONDS)

    def _note_reachable(self) -> None:
        if not self._reachable:
            log.info("index_reachable", pod=self._member().pod)
        self._reachable = True
