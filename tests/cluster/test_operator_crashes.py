"""An operator that is killed anywhere, fifty times: what it left is made whole by the next one."""

import contextlib
import copy
import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import audit
from cluster.api import Cluster
from cluster.own import OwnCluster
from fresh_seed import fresh_seed
from operator_process import SYSTEM, Operator, deployment

Object = dict[str, Any]
KILLS = 50
MAKING, CHANGING = 32, 10
"""Requests that the operator needs to make a deployment's children, and to change some."""
PATIENCE_SECONDS = 5.0
NOWHERE = {"nodeSelector": {"type": "nowhere"}}
KINDS = "serviceaccount,configmap,service,networkpolicy,poddisruptionbudget,deployment,secret"
OURS = ("labels", "ownerReferences")


def wanted(rng: random.Random, name: str, namespace: str) -> Object:
    """A spec of which every part that makes or changes a child may differ from the last one."""
    roles = {
        "prefill": {**NOWHERE, "replicas": rng.randrange(3)},
        "decode": {**NOWHERE, "replicas": rng.randrange(1, 4), "image": f"x/y:{rng.randrange(3)}"},
    }
    engine = {"maxModelLen": rng.choice([128, 256, 512])}
    return deployment(name, namespace, engine=engine, **roles)


def kept(body: Object) -> Object:
    """What the operator says of a child: without what the API server or a controller adds."""
    body = copy.deepcopy(body)
    metadata = {key: value for key, value in body["metadata"].items() if key in OURS}
    for reference in metadata["ownerReferences"]:
        del reference["uid"]
    result = {key: value for key, value in body.items() if key in ("spec", "data")}
    if body["kind"] == "Secret":
        result["data"] = sorted(body["data"])
    template = result.get("spec", {}).get("template", {}).get("metadata", {})
    template.get("annotations", {}).pop("tasuki.dev/secrets", None)  # of this one's own key
    return {**result, "metadata": metadata}


def children(cluster: Cluster, name: str, namespace: str) -> dict[str, Object]:
    """All of a deployment's, by kind and name, in words that fit any deployment."""
    found = cluster.list(KINDS, namespace, f"tasuki.dev/deployment={name}")
    texts = {f"{one['kind']} {one['metadata']['name']}": json.dumps(kept(one)) for one in found}
    return {
        key.replace(name, "NAME"): json.loads(text.replace(name, "NAME"))
        for key, text in texts.items()
    }


@contextlib.contextmanager
def killed_after(
    cluster: OwnCluster, operator: Operator, namespace: str, requests: int
) -> Iterator[None]:
    """Kills the operator when it has asked that much of the API server, or asks no more."""
    log = cluster.machine.folder / "logs" / "audit.log"
    marks = (audit.OPERATOR, f'"namespace":"{namespace}"')
    start = log.stat().st_size

    def kill() -> None:
        seen, deadline = 0, time.monotonic() + PATIENCE_SECONDS
        with log.open() as lines:
            lines.seek(start)
            while seen < requests and time.monotonic() < deadline:
                line = lines.readline()
                if not line:
                    time.sleep(0.001)
                seen += all(mark in line for mark in marks)
        operator.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def is_told(cluster: Cluster, name: str, namespace: str) -> bool:
    """Whether the status is about the newest spec."""
    body = cluster.get("infd", name, namespace)
    seen = body.get("status", {}).get("observedGeneration")
    return bool(seen == body["metadata"]["generation"])


@pytest.mark.timeout(1200, func_only=True)
def test_after_each_of_fifty_kills_the_next_operator_makes_what_an_undisturbed_one_makes(
    cluster: Cluster, namespace: str, operator: Operator
) -> None:
    if not isinstance(cluster, OwnCluster):
        pytest.skip("the audit log of a cluster of the tests' own is needed")
    rng = random.Random(fresh_seed())
    states = {"untouched": 0, "half done": 0, "done": 0}
    for number in range(KILLS):
        anew = number % 2 == 0  # it is killed while it makes, and while it changes
        if anew:
            cluster.kubectl("delete", "infd", "--all", "--namespace", namespace)
        body = wanted(rng, "killed", namespace)
        before = children(cluster, "killed", namespace)
        requests = rng.randrange(1, MAKING if anew else CHANGING)
        with killed_after(cluster, operator, namespace, requests):
            cluster.apply(body)
        left = children(cluster, "killed", namespace)
        cluster.kubectl("delete", "lease", "tasuki-operator", "--namespace", SYSTEM)
        cluster.apply(twin := body | {"metadata": {"name": "twin", "namespace": namespace}})
        operator.start()
        cluster.wait(
            f"what was left by kill {number} is whole",
            lambda: (
                is_told(cluster, "killed", namespace)
                and is_told(cluster, "twin", namespace)
                and children(cluster, "killed", namespace) == children(cluster, "twin", namespace)
            ),
        )
        whole = children(cluster, "killed", namespace)
        states["untouched" if left == before else "done" if left == whole else "half done"] += 1
        assert twin["spec"] == body["spec"]
    print(f"when it was killed, the children were {states}")
    assert states["half done"] > KILLS // 5
