"""Nodes that run nothing: kwok says of their pods what a kubelet would, for hundreds at once.

A pod comes to such a node by `PLACEMENT`. It is Ready at once, unless its annotation `STATE` names
another of `STATES`.
"""

import json
from typing import Any

from . import binaries
from .own import OwnCluster

Object = dict[str, Any]
STATE = "tests.tasuki.dev/state"
LABEL = {"type": "kwok"}
PLACEMENT: Object = {
    "nodeSelector": LABEL,
    "tolerations": [{"key": "kwok", "operator": "Exists", "effect": "NoSchedule"}],
}
STATES: dict[str, Object] = {
    "crashing": {
        "waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting"},
        "last": {"exitCode": 1, "reason": "Error", "message": "first\nlast words"},
    },
    "without-image": {
        "waiting": {"reason": "ImagePullBackOff", "message": "no such image"},
    },
}
LEASE_SECONDS = 40
ROOM = {"cpu": "1k", "memory": "1Ti", "pods": "10k"}


def start(cluster: OwnCluster, nodes: int) -> None:
    """Adds that many nodes; returns when they are Ready."""
    machine = cluster.machine
    config = machine.folder / "kwok.yaml"
    stages = (_node(), _ready(), *(_failing(name) for name in STATES), _gone())
    config.write_text("---\n".join(json.dumps(stage) + "\n" for stage in stages))
    command = [binaries.path("kwok"), f"--kubeconfig={cluster.kubeconfig}", f"--config={config}"]
    selector = ",".join(f"{key}={value}" for key, value in LABEL.items())
    command += [f"--manage-nodes-with-label-selector={selector}", "--cidr=10.245.0.0/16"]
    machine.start("kwok", [*command, f"--node-lease-duration-seconds={LEASE_SECONDS}"])
    cluster.apply(*(_new_node(f"kwok-{number}") for number in range(nodes)))

    def ready() -> bool:
        machine.check()
        found = cluster.list("node", selector=selector)
        return len(found) == nodes and all(node["status"].get("conditions") for node in found)

    cluster.wait("the nodes of kwok are Ready", ready)


def _new_node(name: str) -> Object:
    taint = {"key": "kwok", "value": "true", "effect": "NoSchedule"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {**LABEL, "kubernetes.io/hostname": name}},
        "spec": {"taints": [taint]},
    }


def _stage(
    name: str, kind: str, conditions: list[tuple[str, str, list[str]]], then: Object
) -> Object:
    """kwok does `then` to an object of `kind` when all (path, operator, values) hold."""
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {
                "matchExpressions": [
                    {"key": key, "operator": operator, **({"values": values} if values else {})}
                    for key, operator, values in conditions
                ]
            },
            "next": then,
        },
    }


def _node() -> Object:
    """Ready with room for all; the lease, which kwok renews, keeps it so."""
    said = {"type": "Ready", "status": "True", "reason": "Kwok", "message": "played"}
    status = {"conditions": [said], "allocatable": ROOM, "capacity": ROOM, "phase": "Running"}
    return _stage(
        "node-ready",
        "Node",
        [(".status.phase", "NotIn", ["Running"])],
        {"statusTemplate": json.dumps(status)},
    )


def _pending(name: str, state: str, status: Object, containers: str) -> Object:
    """What becomes of a pod that waits for its kubelet and wants `state` ("": none is named)."""
    path = f'.metadata.annotations["{STATE}"]'
    wish = (path, "In", [state]) if state else (path, "DoesNotExist", [])
    texts = {key: json.dumps(value) for key, value in status.items()}
    texts["containerStatuses"] = f"[{{{{ range .spec.containers }}}} {containers} {{{{ end }}}}]"
    return _stage(
        name,
        "Pod",
        [
            (".metadata.deletionTimestamp", "DoesNotExist", []),
            (".status.containerStatuses", "DoesNotExist", []),
            wish,
        ],
        {"statusTemplate": "\n".join(f"{key}: {text}" for key, text in texts.items())},
    )


def _conditions(status: str) -> list[Object]:
    kinds = {"Initialized": "True", "ContainersReady": status, "Ready": status}
    return [{"type": kind, "status": truth} for kind, truth in kinds.items()]


def _ready() -> Object:
    container = (
        "{name: {{ .name | Quote }}, image: {{ .image | Quote }}, ready: true, started: true, "
        "restartCount: 0, state: {running: {startedAt: {{ Now | Quote }}}}},"
    )
    status = {"phase": "Running", "conditions": _conditions("True")}
    return _pending("pod-ready", "", status, container)


def _failing(state: str) -> Object:
    told = STATES[state]
    last = f", lastState: {{terminated: {json.dumps(told['last'])}}}" if "last" in told else ""
    container = (
        "{name: {{ .name | Quote }}, image: {{ .image | Quote }}, ready: false, started: false, "
        f"restartCount: 3, state: {{waiting: {json.dumps(told['waiting'])}}}{last}}},"
    )
    status = {"phase": "Pending", "conditions": _conditions("False")}
    return _pending(f"pod-{state}", state, status, container)


def _gone() -> Object:
    return _stage(
        "pod-gone", "Pod", [(".metadata.deletionTimestamp", "Exists", [])], {"delete": True}
    )
