"""All that a deployment's status is made from, and what can be counted and read from it."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from tasuki_common.messages import Member
from tasuki_operator import names, troubles
from tasuki_operator.names import ROLES, Role
from tasuki_operator.schema import Spec
from tasuki_operator.troubles import Trouble

Manifest = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """All that the status is made from."""

    namespace: str
    name: str
    generation: int
    spec: Spec | None
    """None: it does not fit the schema, and `refusal` says why."""
    names: Sequence[str]
    """Those that are its own, for clients to call it."""
    previous: Manifest
    """The status as it stands."""
    deployments: Mapping[Role, Manifest]
    """Those that exist."""
    pods: Mapping[Role, Sequence[Manifest]]
    scaled: frozenset[Role]
    """Those whose replicas an autoscaler sets."""
    members: Sequence[Member] | None
    """Of this deployment, as the index lists them; None: the index does not answer."""
    index_error: str
    gateways: int | None
    """Gateways that are ready; None: not asked."""
    endpoint: str
    refusal: Trouble | None
    """Why the children are not as wanted: the spec, a rival, or the API server."""
    now: datetime.datetime
    worry: Trouble | None = None
    """What a person should see to, though the children are kept up: a Secret that is gone, a pod of
    another operator's with the same name in the same index."""

    def counts(self, role: Role) -> Manifest:
        """What the status tells of the role's pods in numbers."""
        wanted = self.wanted(role)
        ready = sum(is_ready(pod) for pod in self.pods[role])
        status = self.deployments.get(role, {}).get("status") or {}
        selector = names.selector(self.name, role)
        return {
            "desired": wanted,
            "replicas": len(self.staying(role)),
            "ready": ready,
            "updated": int(status.get("updatedReplicas", 0)),
            "summary": f"{ready}/{wanted}",
            "selector": ",".join(f"{key}={value}" for key, value in selector.items()),
        }

    def wanted(self, role: Role) -> int:
        """Pods of the role that there should be."""
        if role in self.scaled and role in self.deployments:
            return int(self.deployments[role]["spec"]["replicas"])
        if self.spec is None:
            before: Manifest = self.previous.get(role) or {}
            return int(before.get("desired", 0))
        return (self.spec.prefill if role == "prefill" else self.spec.decode).replicas

    def staying(self, role: Role) -> list[Manifest]:
        """The role's pods that neither leave nor have ended."""
        return [pod for pod in self.pods[role] if not (is_leaving(pod) or troubles.is_over(pod))]

    def telling(self, role: Role) -> Sequence[Manifest]:
        """Pods that may tell of a trouble; one that has ended may until it is replaced."""
        staying = self.staying(role)
        return staying if len(staying) >= self.wanted(role) else self.pods[role]

    def serving(self) -> list[Member]:
        """Members that are ready by their own word and by Kubernetes'."""
        pods = (pod for role in ROLES for pod in self.pods[role])
        ready = {index_name(self.namespace, pod) for pod in pods if is_ready(pod)}
        return [
            member for member in self.members or () if member.pod in ready and not member.draining
        ]

    def trouble(self, role: Role) -> Trouble | None:
        """Why the role's pods do not serve."""
        made = troubles.of_deployment(self.deployments.get(role))
        return self.refusal or troubles.worst(self.telling(role)) or made

    def is_rolling(self, role: Role) -> bool:
        """Whether the role's Deployment is not yet what it was last told to be."""
        deployment = self.deployments.get(role)
        if deployment is None:
            return True
        status, wanted = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
        return (
            int(status.get("observedGeneration", 0))
            < int(deployment["metadata"].get("generation", 0))
            or int(status.get("updatedReplicas", 0)) < wanted
            or int(status.get("replicas", 0)) > wanted
        )

    def is_stuck(self, role: Role) -> bool:
        """Whether the rollout of what was told last has passed its deadline."""
        deployment = self.deployments.get(role) or {"metadata": {}}
        status = deployment.get("status") or {}
        generation = int(deployment["metadata"].get("generation", 0))
        return int(status.get("observedGeneration", 0)) >= generation and any(
            item["type"] == "Progressing" and item.get("reason") == "ProgressDeadlineExceeded"
            for item in status.get("conditions") or []
        )


def is_leaving(pod: Manifest) -> bool:
    """Whether it is being deleted."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def index_name(namespace: str, pod: Manifest) -> str:
    """The name under which the index lists a pod."""
    return f"{namespace}/{pod['metadata']['name']}"


def is_ready(pod: Manifest) -> bool:
    """Whether Kubernetes says so, and it does not leave."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    ready = any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)
    return ready and not is_leaving(pod)
