"""What a deployment says of its clients reaches gateways through real pods, and replaces none.

The kubelet of the test looks every 10 s at files that changed, a cluster's by default every minute.
"""

import copy
from typing import Any

import demo_cluster
import httpx
import openai
import pytest
from cluster.api import Cluster
from cluster.own import OwnCluster
from demo_cluster import NAMESPACE

Object = dict[str, Any]
KEY, OTHER = "the-first-key-of-demo", "the-second-key-of-demo"
FOLLOW_SECONDS = 60.0


@pytest.fixture(scope="module")
def serving(installed: OwnCluster) -> OwnCluster:
    """The cluster, in which the demo model serves everybody."""
    demo_cluster.apply(installed, demo_cluster.demo())
    return installed


def pods(cluster: Cluster) -> set[str]:
    """The containers that run, each start of one anew."""
    found = cluster.list("pod", NAMESPACE, "tasuki.dev/deployment=demo")
    return {pod["status"]["containerStatuses"][0]["containerID"] for pod in found}


def allow(cluster: Cluster, **gateway: Any) -> None:
    """Applies the deployment with these fields of `spec.gateway`."""
    wanted = copy.deepcopy(demo_cluster.demo())
    wanted["spec"]["gateway"] |= gateway
    demo_cluster.apply(cluster, wanted)


def give(cluster: Cluster, keys: str) -> None:
    """The Secret with the model's keys."""
    metadata = {"name": "keys", "namespace": NAMESPACE}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
    cluster.apply(secret | {"stringData": {"api": keys}})


def ask(cluster: Cluster, key: str = "", tokens: int = 2) -> int:
    """The status of an answer; a gateway waits 30 s for a pod that was there a moment ago."""
    body = {"model": "demo", "prompt": "And it came to pass", "max_tokens": tokens}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = demo_cluster.endpoint(cluster) + "/v1/completions"
    return httpx.post(url, json=body, headers=headers, timeout=60).status_code


def test_new_keys_and_limits_count_without_a_new_pod(serving: OwnCluster) -> None:
    before = pods(serving)
    assert ask(serving) == 200
    give(serving, KEY)
    limits = {"maxOutputTokens": 4}
    allow(serving, apiKeySecret={"name": "keys", "key": "api"}, limits=limits)
    serving.wait("a key is asked for", lambda: ask(serving) == 401, seconds=FOLLOW_SECONDS)
    assert ask(serving, OTHER) == 401
    assert ask(serving, KEY) == 200
    assert ask(serving, KEY, tokens=5) == 400
    sdk = openai.OpenAI(base_url=demo_cluster.endpoint(serving) + "/v1", api_key=KEY, max_retries=0)
    stream = sdk.completions.create(model="demo", prompt="And", max_tokens=4, stream=True)
    assert len([event for event in stream if event.choices]) > 0
    give(serving, f"{KEY}\n{OTHER}")
    serving.wait("the new key", lambda: ask(serving, OTHER) == 200, seconds=FOLLOW_SECONDS)
    assert ask(serving, KEY) == 200
    give(serving, OTHER)
    serving.wait("not the old one", lambda: ask(serving, KEY) == 401, seconds=FOLLOW_SECONDS)
    assert ask(serving, OTHER) == 200
    assert pods(serving) == before
    allow(serving)
    serving.wait("open again", lambda: ask(serving) == 200, seconds=FOLLOW_SECONDS)


def test_a_model_that_is_not_exposed_runs_out_of_reach(serving: OwnCluster) -> None:
    before = pods(serving)
    allow(serving, exposed=False)
    serving.wait("clients find it no more", lambda: ask(serving) == 404, seconds=FOLLOW_SECONDS)
    status = serving.get("infd", "demo", NAMESPACE)["status"]
    ready = next(item for item in status["conditions"] if item["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "NotExposed")
    assert "endpoint" not in status
    allow(serving)
    serving.wait("clients find it again", lambda: ask(serving) == 200, seconds=FOLLOW_SECONDS)
    assert pods(serving) == before
