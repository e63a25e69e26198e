"""New revisions on a real kubelet: broken ones, and ones that are overtaken by the next.

The pods are small programs that answer the engine's probes; they stand in the index by the test.
"""

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from announced_members import Members
from cluster import images
from cluster.api import Cluster
from operator_process import condition, deployment
from redis_server import RedisServer

Object = dict[str, Any]
START_SECONDS = 10
"""Of spec.rollout: the least. The rollout's deadline is a minute later."""
SERVES = "mkdir /tmp/www; cd /tmp/www; echo ok > health; {wait} echo ok > ready; httpd -f -p 8100"
BREAKS = "echo first; echo the weights are torn; exit 1"


class Place(NamedTuple):
    """Where the tests' deployments are, and who writes their pods into the index."""

    cluster: Cluster
    namespace: str
    members: Members


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[RedisServer]:
    """The index, on the cluster's network."""
    server = RedisServer(tmp_path_factory.mktemp("redis"), tcp=True).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def operator_flags(redis: RedisServer) -> tuple[str, ...]:
    """It looks into that index."""
    return (f"--redis-url={redis.url}",)


@pytest.fixture
def place(cluster: Cluster, namespace: str, redis: RedisServer) -> Place:
    """A namespace that admits restricted pods only, an operator and an index."""
    return Place(cluster, namespace, Members(cluster, namespace, redis.url))


def wanted(place: Place, name: str, script: str, length: int, replicas: int = 1) -> Object:
    """Decode pods that run `script` in place of the engine; another length, another revision."""
    container = {"name": "engine", "args": ["sh", "-c", script]}
    template = {"containers": [container], "terminationGracePeriodSeconds": 1}
    resources = {"requests": {"cpu": "10m", "memory": "16Mi"}}
    decode = {"image": images.BUSYBOX, "resources": resources, "replicas": replicas}
    return deployment(
        name,
        place.namespace,
        engine={"maxModelLen": length},
        prefill={"replicas": 0},
        decode={**decode, "podTemplate": {"spec": template}},
        rollout={"startSeconds": START_SECONDS},
    )


def says(place: Place, name: str, kind: str) -> tuple[str, str, str]:
    """A condition, after the index has heard of all pods."""
    place.members.refresh()
    return condition(place.cluster, name, place.namespace, kind)


def is_done(place: Place, name: str) -> bool:
    """Whether all of the newest spec serves."""
    body = place.cluster.get("infd", name, place.namespace)
    now = body.get("status", {}).get("observedGeneration") == body["metadata"]["generation"]
    return (
        now
        and says(place, name, "Progressing")[:2] == ("False", "Done")
        and says(place, name, "Ready")[0] == "True"
    )


def test_a_broken_new_revision_leaves_the_old_one_serving_and_says_so(place: Place) -> None:
    cluster, namespace = place.cluster, place.namespace
    good = wanted(place, "torn", SERVES.format(wait=""), 256)
    cluster.apply(good)
    cluster.wait("it serves", lambda: is_done(place, "torn"))
    old = {pod["metadata"]["name"] for pod in cluster.list("pods", namespace)}
    cluster.apply(wanted(place, "torn", BREAKS, 512))
    ready: set[str] = set()

    def is_told() -> bool:
        ready.add(says(place, "torn", "Ready")[0])
        return says(place, "torn", "Progressing")[1] == "RolloutFailed"

    cluster.wait("the rollout has failed", is_told, seconds=START_SECONDS + 60 + 60)
    assert ready == {"True"}, "the old revision served all the time"
    status, _, message = says(place, "torn", "Progressing")
    assert status == "False"
    assert "1 decode pods of the old revision go on serving" in message
    assert "the weights are torn" in message
    assert says(place, "torn", "Degraded")[:2] == ("True", "RolloutFailed")
    assert says(place, "torn", "Ready")[:2] == ("True", "Serving")
    assert old <= {pod["metadata"]["name"] for pod in cluster.list("pods", namespace)}
    told = [
        event
        for event in cluster.list("event", namespace)
        if event["involvedObject"]["kind"] == "InferenceDeployment"
    ]
    assert ("Warning", "RolloutFailed") in {(event["type"], event["reason"]) for event in told}
    cluster.apply(good)
    cluster.wait("the old spec mends it", lambda: is_done(place, "torn"))
    assert says(place, "torn", "Degraded")[0] == "False"


def test_a_deployment_that_is_edited_while_it_rolls_ends_at_the_last_edit_and_serves_all_along(
    place: Place,
) -> None:
    cluster, namespace = place.cluster, place.namespace
    slow = SERVES.format(wait="sleep 3;")
    cluster.apply(wanted(place, "hasty", slow, 256, replicas=2))
    cluster.wait("it serves", lambda: is_done(place, "hasty"))
    ready: set[tuple[str, str]] = set()
    for number in range(1, 6):
        cluster.apply(wanted(place, "hasty", slow, 256 + 16 * number, replicas=2 + number % 2))
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            ready.add(says(place, "hasty", "Ready")[:2])
    cluster.wait("it serves what was said last", lambda: is_done(place, "hasty"), seconds=120)
    assert {status for status, _ in ready} == {"True"}, ready
    selector = "tasuki.dev/deployment=hasty"

    def only_the_last() -> bool:
        maps = cluster.list("configmap", namespace, selector)
        texts = [one["data"]["engine.json"] for one in maps if "engine.json" in one["data"]]
        pods = cluster.list("pods", namespace, selector)
        lengths = [json.loads(text)["max_model_len"] for text in texts]
        return lengths == [256 + 16 * 5] and len(pods) == 3

    cluster.wait("settings of old revisions are gone", only_the_last)
