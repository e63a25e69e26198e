"""What the operator watches, and the lists that find what a watch has lost."""

import asyncio
import dataclasses
from typing import Any

import aiohttp

from tasuki_common import logs
from tasuki_operator import names
from tasuki_operator.api import Api, ApiError
from tasuki_operator.autoscaling import Autoscalers
from tasuki_operator.kinds import AUTOSCALER, INFERENCE_DEPLOYMENT, POD_MONITOR, Kind
from tasuki_operator.store import Store
from tasuki_operator.work import WorkQueue

log = logs.get("tasuki.operator")

_FIRST_PAUSE = 5.0
"""Seconds; kopf's watches begin within one on an idle machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
    """Objects of some kinds: what is known of them, and the queue of those whom a change concerns.

    Raises, from lists: what `Api` raises.
    """

    api: Api
    kinds: tuple[Kind, ...]
    namespaces: tuple[str, ...]
    """None: all."""
    store: Store
    autoscalers: Autoscalers
    queue: WorkQueue

    async def relist(self) -> None:
        """Compares with full lists: a watch that was away has missed what was deleted meanwhile."""
        for kind in self.kinds:
            labels = "" if kind is INFERENCE_DEPLOYMENT else names.DEPLOYMENT
            before = self.store.known(kind)
            for key in self.store.replace(kind, before, await self._all(kind, labels)):
                self.queue.add(key)
        known = self.autoscalers.known()
        for key in self.autoscalers.replace(known, await self._all(AUTOSCALER)):
            self.queue.add(key)

    async def relist_now_and_then(self, seconds: float) -> None:
        """Every `seconds`, at first more often: what goes after the first list and before the
        watches begin shows in no watch.

        Returns when the process should start anew: PodMonitors can be made now, or no longer.
        """
        pause = min(_FIRST_PAUSE, seconds)
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, seconds)
            try:
                await self.relist()
                if await self.api.serves(POD_MONITOR) != (POD_MONITOR in self.kinds):
                    log.info("monitoring_api_changed", advice="this process starts anew")
                    return
            except (ApiError, aiohttp.ClientError, OSError) as error:
                log.warning("api_server_away", reason=str(error))

    async def _all(self, kind: Kind, labels: str = "") -> list[dict[str, Any]]:
        """All objects of a kind in the namespaces that are served."""
        bodies: list[dict[str, Any]] = []
        for namespace in self.namespaces or (None,):
            bodies += await self.api.list(kind, namespace, labels)
        return bodies
