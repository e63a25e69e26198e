"""What goes wrong with a pod stands in the status, as a real kubelet and scheduler meet it."""

import json
from typing import Any

import pytest
from cluster import images
from cluster.api import Cluster
from operator_process import condition, deployment

Object = dict[str, Any]
SMALL = {"cpu": "10m"}
NO_PREFILL: Object = {"prefill": {"replicas": 0}}
HUB = "model is 'a/b', which is no local folder and which the Hub did not give: 404"


def says(*command: str, memory: str = "24Mi") -> Object:
    """Decode pods of a small program in place of the engine, and no prefill pods."""
    container = {"name": "engine", "args": list(command)}
    template = {"containers": [container], "terminationGracePeriodSeconds": 1}
    resources = {"requests": {**SMALL, "memory": memory}, "limits": {"memory": memory}}
    pods = {"image": images.BUSYBOX, "resources": resources}
    return {
        **NO_PREFILL,
        "decode": {**pods, "podTemplate": {"spec": template}},
    }


CASES: dict[str, tuple[Object, str, str]] = {
    "gpu": ({**NO_PREFILL, "decode": {"accelerator": {}}}, "Unschedulable", "nvidia.com/gpu"),
    "image": (
        {**NO_PREFILL, "decode": {"image": "example.invalid/no/image:1"}},
        "ImagePull",
        "no/image:1",
    ),
    "command": (says("no-such-program"), "CrashLoop", "applet not found"),
    "memory": (
        says("dd", "if=/dev/zero", "of=/dev/null", "bs=200M"),
        "OutOfMemory",
        "killed for memory",
    ),
    "crash": (says("sh", "-c", "echo first; echo last words; exit 1"), "CrashLoop", "last words"),
    "refused": (
        says("sh", "-c", f"echo '{json.dumps({'reason': 'port 1 cannot be used'})}'; exit 2"),
        "ConfigurationRefused",
        "port 1 cannot be used",
    ),
    "model": (
        says("sh", "-c", f'echo "{HUB}"; exit 2'),
        "ModelNotFound",
        "the Hub did not give",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_and_the_words_are_those_of_the_trouble(
    cluster: Cluster, namespace: str, name: str
) -> None:
    spec, reason, words = CASES[name]
    cluster.apply(deployment(name, namespace, **spec))

    def told() -> bool:
        status = cluster.get("infd", name, namespace).get("status", {})
        said = {one["type"]: one for one in status.get("conditions", [])}
        return (
            [said.get(kind, {}).get("reason") for kind in ("Ready", "Degraded")] == [reason] * 2
            and (said["Ready"]["status"], said["Degraded"]["status"]) == ("False", "True")
            and words in said["Ready"]["message"]
        )

    cluster.wait(f"Ready and Degraded say {reason}", told)
    cluster.wait(
        "an event says so",
        lambda: any(
            event["involvedObject"]["name"] == name and event["reason"] == reason
            for event in cluster.list("event", namespace)
        ),
    )
    cluster.kubectl("delete", "infd", name, "--namespace", namespace)


def test_a_missing_secret_is_named_and_found_when_it_appears(
    cluster: Cluster, namespace: str
) -> None:
    key = {"keySecret": {"name": "keys", "key": "transfer"}}
    cluster.apply(deployment("late", namespace, **says("sleep", "1000"), transfer=key))
    cluster.wait(
        "the secret is missed",
        lambda: condition(cluster, "late", namespace, "Ready")[1] == "SecretMissing",
    )
    assert '"keys"' in condition(cluster, "late", namespace, "Ready")[2]
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "keys", "namespace": namespace},
            "stringData": {"transfer": "a key"},
        }
    )
    cluster.wait(
        "nothing is missed any more",
        lambda: condition(cluster, "late", namespace, "Ready")[1] != "SecretMissing",
        seconds=90,
    )
    assert condition(cluster, "late", namespace, "Ready")[1] == "IndexUnreachable"
