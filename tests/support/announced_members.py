"""Writes into the index what pods of an operator's test would write of themselves."""

import asyncio
from typing import Any

from cluster.api import Cluster
from index_helpers import member

from tasuki_index import Index

TTL_SECONDS = 3600.0


class Members:
    """Announces every Ready pod of a namespace, and withdraws those that are gone."""

    def __init__(self, cluster: Cluster, namespace: str, url: str) -> None:
        self._cluster, self._namespace, self._url = cluster, namespace, url
        self._known: dict[str, Any] = {}

    def refresh(self) -> None:
        """All as they are now."""
        pods = self._cluster.list("pods", self._namespace)
        ready = {pod["metadata"]["name"]: pod for pod in pods if is_ready(pod)}
        asyncio.run(self._refresh(ready))

    async def _refresh(self, ready: dict[str, Any]) -> None:
        index = Index(self._url, timeout=5.0)
        try:
            for name in self._known.keys() - ready.keys():
                await index.withdraw(self._known.pop(name))
            for name in ready.keys() - self._known.keys():
                labels = ready[name]["metadata"]["labels"]
                owner = labels["tasuki.dev/deployment"]
                self._known[name] = member(
                    f"{self._namespace}/{name}",
                    role=labels["tasuki.dev/role"],
                    model=owner,
                    fingerprint=(owner + labels["tasuki.dev/revision"]).ljust(64, "f"),
                    transfer=("tcp",),
                )
                await index.announce(self._known[name], ttl=TTL_SECONDS)
        finally:
            await index.close()


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether Kubernetes says so, and it does not leave."""
    conditions = pod["status"].get("conditions", [])
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]
