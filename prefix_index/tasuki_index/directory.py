"""The gateway's side of membership: the live pods, at hand without waiting."""

import asyncio
import time

from tasuki_common import logs
from tasuki_common.messages import Member
from tasuki_index.errors import IndexUnavailable
from tasuki_index.index import Index

log = logs.get("tasuki.index")

DOWN_SECONDS = 3.0
"""A pod that could not be reached is left out so long, or until it returns as a new incarnation."""


class Directory:
    """The members as Redis last told them, read again every `interval` seconds.

    Without Redis it keeps the last ones it knew and is `stale`; loads are then old, and a pod that
    died shows only by `mark_down`. `learn` adds what a pod said of itself.
    """

    def __init__(self, index: Index, *, interval: float = 1.0) -> None:
        self._index, self._interval = index, interval
        self._members: dict[str, Member] = {}
        self._down_until: dict[tuple[str, str], float] = {}
        self._stale = True
        self._task: asyncio.Task[None] | None = None

    @property
    def stale(self) -> bool:
        """Whether the last attempt to ask Redis failed (or none was made yet)."""
        return self._stale

    def start(self) -> None:
        """Begins to refresh, in a task of the running loop."""
        self._task = asyncio.create_task(self._run(), name="index directory")

    async def close(self) -> None:
        """Stops refreshing; the index stays open."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def members(self, model: str | None = None) -> list[Member]:
        """Pods that serve `model` (its name or an alias; None: any), without those marked down."""
        now = time.monotonic()
        return [
            member
            for member in self._members.values()
            if (model is None or model == member.model or model in member.aliases)
            and self._down_until.get((member.pod, member.incarnation), 0.0) <= now
        ]

    def mark_down(self, member: Member) -> None:
        """Leaves `member` out for a while: it could not be reached."""
        self._down_until[member.pod, member.incarnation] = time.monotonic() + DOWN_SECONDS

    def learn(self, member: Member) -> None:
        """Takes in what a pod said of itself; Redis, when it answers, has the last word."""
        self._members[member.pod] = member

    async def refresh(self) -> None:
        """Asks Redis now; keeps the old members if it does not answer."""
        try:
            found = await self._index.members()
        except IndexUnavailable as error:
            if not self._stale:
                log.warning("directory_stale", members=len(self._members), reason=str(error))
            self._stale = True
            return
        if self._stale:
            log.info("directory_fresh", members=len(found))
        self._stale = False
        self._members = {member.pod: member for member in found}
        now = time.monotonic()
        self._down_until = {key: end for key, end in self._down_until.items() if end > now}

    async def _run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(self._interval)
