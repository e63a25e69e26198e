"""Secrets that a spec names, on a real control plane: missing, appearing, changing, going away."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cluster.api import Cluster
from cluster.commands import CommandError
from cluster.own import OwnCluster
from operator_process import Operator, condition, deployment, running
from redis_server import RedisServer

from tasuki_common.messages import Member
from tasuki_common.policy import key_digest
from tasuki_index import Index

Object = dict[str, Any]
ACCOUNT = "system:serviceaccount:tasuki-system:tasuki-operator"
LOOK_SECONDS = "2"
"""Between looks at what nothing is heard of; by default it is 8."""
SEEN_SECONDS = 20.0
NOWHERE: Object = {"nodeSelector": {"is": "nowhere"}}
SECRETS: Object = {
    "transfer": {"keySecret": {"name": "keys", "key": "transfer"}},
    "prefixIndex": {"urlSecret": {"name": "redis", "key": "url"}},
    "gateway": {"apiKeySecret": {"name": "keys", "key": "api"}},
}


@pytest.fixture(scope="module")
def operator_flags() -> tuple[str, ...]:
    """It looks more often."""
    return ("--resync-seconds", LOOK_SECONDS)


def granite(namespace: str, **spec: Any) -> Object:
    """A deployment whose pods find no node: they come and go with their objects alone."""
    return deployment("granite", namespace, **{"prefill": NOWHERE, "decode": NOWHERE, **spec})


def secret(name: str, namespace: str, **entries: str) -> Object:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": entries}


def give(cluster: Cluster, namespace: str, **changed: str) -> None:
    """Both Secrets, with some entries changed."""
    entries = {
        "transfer": "what-pods-show-each-other",
        "api": "the-first-key-of-clients",
        "url": "redis://:pass@127.0.0.1:1",
        **changed,
    }
    url = entries.pop("url")
    cluster.apply(secret("keys", namespace, **entries), secret("redis", namespace, url=url))


def templates(cluster: Cluster, namespace: str) -> list[Object]:
    """The pod templates of both roles."""
    names = ("granite-prefill", "granite-decode")
    return [cluster.get("deployment", name, namespace)["spec"]["template"] for name in names]


def policy(cluster: Cluster, namespace: str) -> Object:
    """What gateways are to allow."""
    data = cluster.get("configmap", "granite-gateway", namespace)["data"]
    return dict(json.loads(data["policy.json"]))


def until_made(cluster: Cluster, namespace: str) -> None:
    cluster.wait("its pods are there", lambda: templates(cluster, namespace), seconds=SEEN_SECONDS)


def test_nothing_is_made_before_its_secrets_are_there(cluster: Cluster, namespace: str) -> None:
    cluster.apply(granite(namespace, **SECRETS))
    for names, field in ((), "spec.transfer.keySecret"), (("keys",), "spec.prefixIndex.urlSecret"):
        for name in names:
            cluster.apply(secret(name, namespace, transfer="x", api="the-key-of-clients"))
        cluster.wait(
            f"{field} is missed",
            lambda field=field: field in condition(cluster, "granite", namespace, "Ready")[2],
            seconds=SEEN_SECONDS,
        )
        assert condition(cluster, "granite", namespace, "Degraded")[1] == "SecretMissing"
        assert cluster.list("deployment,secret,configmap", namespace, "tasuki.dev/deployment") == []
    give(cluster, namespace)
    until_made(cluster, namespace)
    cluster.wait(
        "nothing is missed",
        lambda: condition(cluster, "granite", namespace, "Degraded")[1] != "SecretMissing",
        seconds=SEEN_SECONDS,
    )


def test_a_new_password_or_transfer_key_replaces_the_pods_and_a_new_label_does_not(
    cluster: Cluster, namespace: str
) -> None:
    give(cluster, namespace)
    cluster.apply(granite(namespace, **SECRETS))
    until_made(cluster, namespace)
    for changed in ({"url": "redis://:new@127.0.0.1:1"}, {"transfer": "another-key-of-the-pods"}):
        before = templates(cluster, namespace)
        give(cluster, namespace, **changed)
        cluster.wait(
            f"new pods for {changed}",
            lambda before=before: all(
                now != then for now, then in zip(templates(cluster, namespace), before, strict=True)
            ),
            seconds=SEEN_SECONDS,
        )
    assert "pass" not in json.dumps(templates(cluster, namespace))
    before = templates(cluster, namespace)
    cluster.kubectl("label", "secret", "redis", "checked=today", "--namespace", namespace)
    looked = condition(cluster, "granite", namespace, "Ready")
    with pytest.raises(TimeoutError):
        cluster.wait("change", lambda: templates(cluster, namespace) != before, seconds=6)
    assert condition(cluster, "granite", namespace, "Ready") == looked


def test_new_keys_of_clients_reach_the_gateways_policy_and_no_pod_is_replaced(
    cluster: Cluster, namespace: str
) -> None:
    give(cluster, namespace)
    cluster.apply(granite(namespace, **SECRETS))
    until_made(cluster, namespace)
    digests = [key_digest("granite", b"the-first-key-of-clients")]
    assert policy(cluster, namespace)["key_digests"] == digests
    before = templates(cluster, namespace)
    both = "the-first-key-of-clients the-second-key-of-clients"
    give(cluster, namespace, api=both)
    digests = sorted(key_digest("granite", key.encode()) for key in both.split())
    cluster.wait(
        "both keys",
        lambda: policy(cluster, namespace)["key_digests"] == digests,
        seconds=SEEN_SECONDS,
    )
    assert templates(cluster, namespace) == before
    for kind in ("configmap", "deployment"):
        assert "first-key" not in json.dumps(cluster.list(kind, namespace))


def test_a_secret_that_goes_is_told_and_what_serves_is_kept_up(
    cluster: Cluster, namespace: str
) -> None:
    give(cluster, namespace)
    cluster.apply(granite(namespace, **SECRETS))
    until_made(cluster, namespace)
    before = templates(cluster, namespace), policy(cluster, namespace)
    cluster.kubectl("delete", "secret", "keys", "--namespace", namespace)
    cluster.wait(
        "it is told",
        lambda: condition(cluster, "granite", namespace, "Degraded")[1] == "SecretMissing",
        seconds=SEEN_SECONDS,
    )
    assert (templates(cluster, namespace), policy(cluster, namespace)) == before
    cluster.kubectl("delete", "networkpolicy", "granite-decode", "--namespace", namespace)
    limits = {"gateway": {**SECRETS["gateway"], "limits": {"maxRequests": 3}}}
    cluster.apply(granite(namespace, **{**SECRETS, **limits}, decode={"replicas": 2, **NOWHERE}))

    def followed() -> bool:
        cluster.get("networkpolicy", "granite-decode", namespace)
        replicas = cluster.get("deployment", "granite-decode", namespace)["spec"]["replicas"]
        return replicas == 2 and policy(cluster, namespace)["max_requests"] == 3

    cluster.wait("the rest is as wanted", followed, seconds=SEEN_SECONDS)
    after = before[0], {**before[1], "max_requests": 3}
    assert (templates(cluster, namespace), policy(cluster, namespace)) == after
    assert condition(cluster, "granite", namespace, "Degraded")[1] == "SecretMissing"
    give(cluster, namespace)
    cluster.wait(
        "it is told no more",
        lambda: condition(cluster, "granite", namespace, "Degraded")[1] != "SecretMissing",
        seconds=SEEN_SECONDS,
    )
    assert (templates(cluster, namespace), policy(cluster, namespace)) == after


def test_a_short_key_is_refused_with_its_field(cluster: Cluster, namespace: str) -> None:
    give(cluster, namespace, api="short")
    cluster.apply(granite(namespace, **SECRETS))
    cluster.wait(
        "it is told",
        lambda: condition(cluster, "granite", namespace, "Degraded")[1] == "SecretUnfit",
        seconds=SEEN_SECONDS,
    )
    assert "spec.gateway.apiKeySecret" in condition(cluster, "granite", namespace, "Degraded")[2]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"prefixIndex": {"url": "redis://:pass@host:1"}}, "belongs into urlSecret"),
        ({"prefixIndex": {"url": "http://host"}}, "must begin with redis://"),
        (
            {"prefixIndex": {"url": "redis://h", "urlSecret": {"name": "a", "key": "b"}}},
            "give either url or urlSecret",
        ),
        ({"decode": {"parallelism": {"tensor": 2}}}, "spec.decode.parallelism.tensor"),
        ({"gateway": {"limits": {"maxRequests": 0}}}, "spec.gateway.limits.maxRequests"),
    ],
)
def test_admission_refuses_what_cannot_be(
    cluster: Cluster, operator: Operator, spec: Object, words: str
) -> None:
    with pytest.raises(CommandError) as caught:
        cluster.apply(deployment("granite", "default", **spec))
    assert words in str(caught.value)


def test_a_plain_redis_needs_no_secret(cluster: Cluster, namespace: str) -> None:
    index = {"url": "redis://127.0.0.1:1"}
    cluster.apply(granite(namespace, prefixIndex=index))
    until_made(cluster, namespace)
    for template in templates(cluster, namespace):
        (engine,) = template["spec"]["containers"]
        assert {"name": "TASUKI_REDIS_URL", "value": index["url"]} in engine["env"]
    cluster.wait(
        "its index is told of",
        lambda: "127.0.0.1:1" in condition(cluster, "granite", namespace, "IndexReady")[2],
        seconds=SEEN_SECONDS,
    )


def test_a_redis_of_ones_own_is_reached_with_its_password_and_with_a_new_one(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path, tcp=True).start()
    admin = server.client()

    def index_is(reason: str) -> bool:
        return condition(cluster, "granite", namespace, "IndexReady")[1] == reason

    try:
        for password in ("first", "second"):
            admin.config_set("requirepass", password)
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            give(cluster, namespace, url=server.url.replace("redis://", f"redis://:{password}@"))
            cluster.apply(granite(namespace, **SECRETS))
            cluster.wait("the index", lambda: index_is("Reachable"), seconds=SEEN_SECONDS)
            assert "endpoint" not in cluster.get("infd", "granite", namespace)["status"]
            give(cluster, namespace, url=server.url.replace("redis://", "redis://:wrong@"))
            cluster.wait("a refusal", lambda: index_is("Unreachable"), seconds=SEEN_SECONDS)
            said = condition(cluster, "granite", namespace, "IndexReady")[2]
            assert password not in said
            assert "wrong" not in said
    finally:
        admin.close()
        server.stop()


def test_secrets_are_read_by_name_and_never_listed(own_cluster: OwnCluster, namespace: str) -> None:
    give(own_cluster, namespace)
    own_cluster.apply(granite(namespace, **SECRETS))
    until_made(own_cluster, namespace)
    verbs = {
        event["verb"]
        for event in map(json.loads, own_cluster.audit())
        if event["user"]["username"] == ACCOUNT
        and event.get("objectRef", {}).get("resource") == "secrets"
    }
    assert verbs <= {"get", "create"}
    assert "get" in verbs


def stranger() -> Member:
    """A pod of a namespace that another operator serves."""
    return Member(
        pod="elsewhere/granite-decode-0",
        incarnation="i",
        role="decode",
        model="granite",
        fingerprint="f",
        url="http://127.0.0.1:1",
        max_model_len=16,
        block_size=16,
        hash_algorithm="xxh3",
        hash_revision="r",
        needs_checkpoint=False,
    )


def test_an_operator_of_one_namespace_sees_in_the_index_who_has_a_name(
    cluster: Cluster, operator: Operator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = RedisServer(tmp_path_factory.mktemp("redis"), tcp=True).start()

    async def announce(ttl: float) -> None:
        index = Index(server.url, timeout=5.0)
        await index.announce(stranger(), ttl)
        await index.close()

    operator.stop()
    try:
        asyncio.run(announce(600))
        folder = tmp_path_factory.mktemp("namespaced")
        with cluster.namespace("mine") as mine:
            flags = ("--namespaces", mine, "--redis-url", server.url)
            with running(cluster, folder, *flags):
                cluster.apply(granite(mine))
                cluster.wait(
                    "the name is taken",
                    lambda: condition(cluster, "granite", mine, "Ready")[1] == "NameTaken",
                )
                assert "elsewhere/" in condition(cluster, "granite", mine, "Ready")[2]
                assert cluster.list("deployment", mine) == []
                asyncio.run(announce(0.01))
                until_made(cluster, mine)
    finally:
        server.stop()
        operator.start()
