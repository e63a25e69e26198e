"""What goes wrong with a pod stands in the status, as a real kubelet and scheduler meet it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import images
from cluster.api import Cluster
from operator_process import condition, deployment, install, running

Object = dict[str, Any]
SMALL = {"requests": {"cpu": "10m", "memory": "16Mi"}}
NO_PREFILL: Object = {"prefill": {"replicas": 0}}
HUB = "model is 'a/b', which is no local folder and which the Hub did not give: 404"


@pytest.fixture(scope="module")
def namespace(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A namespace that admits restricted pods only, in which an operator serves."""
    install(cluster)
    with (
        running(cluster, tmp_path_factory.mktemp("operator")),
        cluster.namespace("troubles") as name,
    ):
        yield name


def says(*command: str) -> Object:
    """Decode pods of a small program in place of the engine, and no prefill pods."""
    container = {"name": "engine", "args": list(command)}
    template = {"containers": [container], "terminationGracePeriodSeconds": 1}
    pods = {"image": images.BUSYBOX, "resources": SMALL}
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
    cluster.wait(
        f"Ready says {reason}",
        lambda: condition(cluster, name, namespace, "Ready")[:2] == ("False", reason),
    )
    assert words in condition(cluster, name, namespace, "Ready")[2]
    assert condition(cluster, name, namespace, "Degraded")[:2] == ("True", reason)
    events = cluster.list("event", namespace)
    assert [
        event
        for event in events
        if event["involvedObject"]["name"] == name and event["reason"] == reason
    ]
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
