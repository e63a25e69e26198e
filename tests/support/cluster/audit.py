"""What the operator asked of the API server, from the server's own audit log."""

import datetime
import json
from typing import NamedTuple

from .own import OwnCluster

OPERATOR = "system:serviceaccount:tasuki-system:tasuki-operator"
TOKEN = "authentication.kubernetes.io/credential-id"
READS = ("get", "list", "watch")


class Request(NamedTuple):
    """One request that has been answered."""

    token: str
    """Which of the service account's tokens it came with: two operators have two."""
    namespace: str
    name: str
    verb: str
    resource: str
    """With its subresource, as in `deployments/scale`."""
    begun: float
    """Unix seconds, as all times here."""
    ended: float
    code: int

    @property
    def writes(self) -> bool:
        """Whether it could change something."""
        return self.verb not in READS


def of_operator(cluster: OwnCluster, namespace: str = "") -> list[Request]:
    """Its requests so far in a namespace ("": in all), in the order of their answers."""
    found = []
    for line in cluster.audit():
        event = json.loads(line)
        target = event.get("objectRef") or {}
        if event["user"]["username"] != OPERATOR:
            continue
        if namespace and target.get("namespace") != namespace:
            continue
        found.append(
            Request(
                token=str(event["user"].get("extra", {}).get(TOKEN, "")),
                namespace=target.get("namespace", ""),
                name=target.get("name", ""),
                verb=event["verb"],
                resource="/".join(
                    part for part in (target.get("resource"), target.get("subresource")) if part
                ),
                begun=_seconds(event["requestReceivedTimestamp"]),
                ended=_seconds(event["stageTimestamp"]),
                code=int(event.get("responseStatus", {}).get("code", 0)),
            )
        )
    return found


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
