"""What goes wrong in a cluster so that an alert is due; see alert_faults for those of a relay."""

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from cluster.api import Cluster
from demo_cluster import NAMESPACE, OVERLAY, SYSTEM, demo

Fault = Callable[[Cluster], AbstractContextManager[None]]
NOTHING = "example.com/nothing:1"


@contextlib.contextmanager
def nothing_runs(cluster: Cluster) -> Iterator[None]:
    """Neither gateway nor operator."""
    with _scaled_to_nothing(cluster, "tasuki-gateway", "tasuki-operator"):
        yield


@contextlib.contextmanager
def no_index(cluster: Cluster) -> Iterator[None]:
    """No Redis."""
    with _scaled_to_nothing(cluster, "tasuki-redis"):
        yield


@contextlib.contextmanager
def broken_deployment(cluster: Cluster) -> Iterator[None]:
    """One whose pods have no image."""
    broken = demo(name="broken")
    broken["spec"]["decode"]["image"] = NOTHING
    cluster.apply(broken)
    try:
        yield
    finally:
        cluster.kubectl("delete", "infd", "broken", "--namespace", NAMESPACE, "--timeout=60s")


@contextlib.contextmanager
def no_secrets(cluster: Cluster) -> Iterator[None]:
    """The operator may read no Secret, which it does at each look; all else it may."""
    role = cluster.get("clusterrole", "tasuki-operator")
    role["rules"] = [rule for rule in role["rules"] if "secrets" not in rule["resources"]]
    cluster.kubectl("replace", "-f", "-", stdin=json.dumps(role))
    try:
        yield
    finally:
        cluster.kustomize(OVERLAY)


@contextlib.contextmanager
def _scaled_to_nothing(cluster: Cluster, *deployments: str) -> Iterator[None]:
    scale = ("scale", "--namespace", SYSTEM, "deployment", *deployments)
    cluster.kubectl(*scale, "--replicas=0")
    try:
        yield
    finally:
        cluster.kubectl(*scale, "--replicas=1")
        for name in deployments:
            cluster.wait_for_rollout(name, SYSTEM, seconds=120)


FAULTS: tuple[tuple[Fault, frozenset[str]], ...] = (
    (broken_deployment, frozenset({"TasukiDeploymentNotReady"})),
    (no_secrets, frozenset({"TasukiReconcilesFail"})),
    (nothing_runs, frozenset({"TasukiGatewayAbsent", "TasukiOperatorAbsent"})),
    (no_index, frozenset({"TasukiIndexUnreachable"})),
)
"""Each fault with the alerts that are due."""
