"""The operator on a real control plane, with the rights of its service account and no more.

Its pods have no engine image here; that a request is answered is tested with the whole system.
"""

import json
import time
from pathlib import Path
from typing import Any

import kopf
import pytest
from cluster import audit
from cluster.api import Cluster
from cluster.own import OwnCluster
from operator_process import Operator, condition, deployment, kubeconfig

from tasuki_operator.api import Api
from tasuki_operator.autoscaling import Autoscalers
from tasuki_operator.builders import Owner, Surroundings
from tasuki_operator.children import Children
from tasuki_operator.credentials import Named
from tasuki_operator.metrics import Metrics
from tasuki_operator.schema import Spec
from tasuki_operator.store import Store, key_of

Object = dict[str, Any]
CHILD_KINDS = (
    "serviceaccount",
    "configmap",
    "service",
    "networkpolicy",
    "poddisruptionbudget",
    "deployment",
    "secret",
)
REPAIR_SECONDS = 10.0
COLUMNS = "NAME MODEL PREFILL DECODE READY REASON AGE ENDPOINT FINGERPRINT TRANSFER MESSAGE"
NOWHERE: Object = {role: {"nodeSelector": {"type": "no"}} for role in ("prefill", "decode")}


def children(cluster: Cluster, name: str, namespace: str) -> dict[tuple[str, str], Object]:
    """All that belongs to the deployment by its labels, by kind and name."""
    kinds = ",".join(CHILD_KINDS)
    found = cluster.list(kinds, namespace, f"tasuki.dev/deployment={name}")
    return {(item["kind"].lower(), item["metadata"]["name"]): item for item in found}


def make(cluster: Cluster, name: str, namespace: str, **spec: Any) -> dict[tuple[str, str], Object]:
    """Applies a deployment, and waits until the operator has said something of it."""
    cluster.apply(deployment(name, namespace, **spec))
    cluster.wait(
        f"status of {name}",
        lambda: condition(cluster, name, namespace, "Progressing")[1] in ("Starting", "Rolling"),
    )
    return children(cluster, name, namespace)


def versions(found: dict[tuple[str, str], Object]) -> dict[tuple[str, str], str]:
    """Resource versions of what only the operator writes (a Deployment's status is not its)."""
    kept = {key: item for key, item in found.items() if key[0] not in ("deployment",)}
    return {
        key: item["metadata"]["resourceVersion"]
        for key, item in kept.items()
        if key[0] != "poddisruptionbudget"
    } | {
        key: str(item["metadata"]["generation"])
        for key, item in found.items()
        if "generation" in item["metadata"]
    }


def test_three_lines_make_all_children_and_a_status_in_words(
    cluster: Cluster, namespace: str
) -> None:
    found = make(cluster, "granite", namespace)
    assert {kind for kind, _ in found} == set(CHILD_KINDS)
    assert ("deployment", "granite-prefill") in found
    assert ("deployment", "granite-decode") in found
    status, reason, message = condition(cluster, "granite", namespace, "Ready")
    assert status == "False"
    assert reason
    assert message.endswith((".", "..."))
    for kinds in ("infd", "tasuki"):  # by its short name, and by its category
        columns = cluster.kubectl("get", kinds, "--namespace", namespace, "--output", "wide")
        assert columns.split()[:11] == COLUMNS.split()
        assert "0/1" in columns
    assert condition(cluster, "granite", namespace, "IndexReady")[1] == "Unreachable"


def test_every_child_that_is_deleted_comes_back(cluster: Cluster, namespace: str) -> None:
    before = {
        key: item["metadata"]["uid"] for key, item in make(cluster, "granite", namespace).items()
    }
    for kind, name in before:
        cluster.kubectl("delete", kind, name, "--namespace", namespace, "--wait=false")

    def again() -> bool:
        found = children(cluster, "granite", namespace)
        return set(found) == set(before) and all(
            found[key]["metadata"]["uid"] != uid for key, uid in before.items()
        )

    cluster.wait("all are there again", again, seconds=REPAIR_SECONDS)


EDITS: dict[str, Object] = {
    "serviceaccount": {"automountServiceAccountToken": True},
    "configmap": {"metadata": {"labels": {"app.kubernetes.io/instance": "x"}}},
    "service": {"spec": {"selector": {"tasuki.dev/role": "nobody"}}},
    "networkpolicy": {"spec": {"ingress": [{}]}},
    "poddisruptionbudget": {"spec": {"maxUnavailable": 5}},
    "deployment": {
        "spec": {"replicas": 7, "template": {"spec": {"terminationGracePeriodSeconds": 1}}}
    },
}
"""By kind, what a person changes of what is the operator's; the Secret is immutable."""
THEIRS = {"metadata": {"labels": {"theirs": "kept"}, "annotations": {"theirs": "kept"}}}


def ours(body: Object) -> Object:
    """A child without what Kubernetes and others write."""
    metadata, rest = body["metadata"], {**body}
    for name in ("metadata", "status"):
        rest.pop(name, None)
    labels = {name: value for name, value in metadata["labels"].items() if name != "theirs"}
    return {**rest, "labels": labels, "owner": metadata["ownerReferences"]}


@pytest.mark.parametrize("label", ["granite", None, "another"], ids=["edited", "lost", "moved"])
def test_every_child_that_is_edited_is_set_right_and_what_others_own_is_left(
    cluster: Cluster, namespace: str, label: str | None
) -> None:
    before = make(cluster, "granite", namespace)
    edited = {key: body for key, body in before.items() if key[0] in EDITS}
    assert {kind for kind, _ in edited} == set(EDITS)
    for (kind, name), body in edited.items():
        # Without the label the operator's watches lose sight of it; with another one, they take it
        # for another deployment's.
        labelled = {"metadata": {"labels": {"tasuki.dev/deployment": label}}}
        changes = [EDITS[kind], THEIRS, labelled]
        if kind == "configmap" and not body.get("immutable"):
            changes.append({"data": dict.fromkeys(body["data"], "{}")})
        for change in changes:
            patch = ["--type=merge", "--patch", json.dumps(change)]
            cluster.kubectl("patch", kind, name, "--namespace", namespace, *patch)
    wrong: dict[tuple[str, str], Object] = {}

    def right() -> bool:
        now = children(cluster, "granite", namespace)
        wrong.clear()
        wrong.update({key: now.get(key, {}) for key in edited if key not in now})
        wrong.update({key: now[key] for key in now if ours(now[key]) != ours(before[key])})
        for key in edited.keys() & now.keys():
            assert now[key]["metadata"]["labels"]["theirs"] == "kept"
            assert now[key]["metadata"]["annotations"]["theirs"] == "kept"
        return not wrong

    try:
        cluster.wait("the children are as wanted", right, seconds=REPAIR_SECONDS)
    except TimeoutError as error:
        raise AssertionError(f"not set right: {wrong}") from error


def test_nothing_is_written_when_nothing_has_changed(
    cluster: Cluster, namespace: str, operator: Operator
) -> None:
    make(cluster, "granite", namespace, **NOWHERE)  # no kubelet says now this, now that
    cluster.wait(
        "its pods are told of",
        lambda: condition(cluster, "granite", namespace, "Ready")[1] == "Unschedulable",
    )

    def is_still() -> bool:
        version = cluster.get("infd", "granite", namespace)["metadata"]["resourceVersion"]
        time.sleep(3)
        now = cluster.get("infd", "granite", namespace)
        return bool(now["metadata"]["resourceVersion"] == version)

    cluster.wait("the controllers of the cluster have had their say", is_still)
    before = versions(children(cluster, "granite", namespace))
    body = cluster.get("infd", "granite", namespace)
    operator.stop()
    operator.start()  # it remembers nothing and applies all anew
    cluster.apply(deployment("granite", namespace, **NOWHERE))
    time.sleep(12)
    assert versions(children(cluster, "granite", namespace)) == before
    after = cluster.get("infd", "granite", namespace)
    assert after["status"] == body["status"]
    assert after["metadata"]["resourceVersion"] == body["metadata"]["resourceVersion"]


def test_scaling_the_deployment_scales_its_decode_pods(cluster: Cluster, namespace: str) -> None:
    make(cluster, "granite", namespace)
    cluster.kubectl("scale", "infd", "granite", "--replicas=3", "--namespace", namespace)
    cluster.wait(
        "three decode pods are wanted",
        lambda: cluster.get("deployment", "granite-decode", namespace)["spec"]["replicas"] == 3,
        seconds=REPAIR_SECONDS,
    )


def test_a_new_revision_has_new_settings_and_the_old_ones_stay_as_long_as_a_pod_has_them(
    cluster: Cluster, namespace: str
) -> None:
    make(cluster, "granite", namespace)
    settings = "tasuki.dev/deployment=granite,tasuki.dev/revision"
    (old,) = [item["metadata"]["name"] for item in cluster.list("configmap", namespace, settings)]
    for role in ("prefill", "decode"):
        selector = f"tasuki.dev/role={role}"
        cluster.wait("a pod has them", lambda s=selector: cluster.list("pod", namespace, s))
    cluster.apply(deployment("granite", namespace, engine={"maxModelLen": 512}))
    cluster.wait(
        "both revisions' settings",
        lambda: len(cluster.list("configmap", namespace, settings)) == 2,
        seconds=REPAIR_SECONDS,
    )
    for role in ("prefill", "decode"):
        pods = cluster.list("pod", namespace, f"tasuki.dev/role={role}")
        assert pods, role
    template = cluster.get("deployment", "granite-decode", namespace)["spec"]["template"]
    assert old not in json.dumps(template)


def test_a_deployment_takes_over_nobody_elses_objects(cluster: Cluster, namespace: str) -> None:
    uid = cluster.get("serviceaccount", "default", namespace)["metadata"]["uid"]
    cluster.apply(deployment("default", namespace))
    cluster.wait(
        "it says whose the name is",
        lambda: condition(cluster, "default", namespace, "Degraded")[1] == "NameTaken",
    )
    assert "ServiceAccount default" in condition(cluster, "default", namespace, "Ready")[2]
    account = cluster.get("serviceaccount", "default", namespace)
    assert account["metadata"]["uid"] == uid
    assert "ownerReferences" not in account["metadata"]


def test_what_a_deleted_namesake_left_is_told_and_waited_for(
    cluster: Cluster, namespace: str
) -> None:
    make(cluster, "granite", namespace)
    patch = ("patch", "service", "granite-decode", "--namespace", namespace, "--type=merge", "-p")
    cluster.kubectl(*patch, '{"metadata": {"finalizers": ["tests.tasuki.dev/held"]}}')
    cluster.kubectl("delete", "infd", "granite", "--namespace", namespace)
    cluster.apply(deployment("granite", namespace))
    cluster.wait(
        "it says what is left",
        lambda: (
            "Service granite-decode is left" in condition(cluster, "granite", namespace, "Ready")[2]
        ),
    )
    assert condition(cluster, "granite", namespace, "Degraded")[1] == "Leftover"
    cluster.kubectl(*patch, '{"metadata": {"finalizers": []}}')
    cluster.wait(
        "all is made",
        lambda: {kind for kind, _ in children(cluster, "granite", namespace)} == set(CHILD_KINDS),
        seconds=REPAIR_SECONDS,
    )


async def test_what_a_deleted_namesake_left_hinders_nobody_once_it_is_gone_unseen(
    cluster: Cluster,
    namespace: str,
    operator: Operator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was in the lists of the start, and went before the watches began: no event tells of it."""
    left = make(cluster, "granite", namespace)
    operator.stop()
    cluster.kubectl("delete", "infd", "granite", "--namespace", namespace)
    cluster.wait("all has gone", lambda: not children(cluster, "granite", namespace))
    cluster.apply(deployment("granite", namespace))
    body = cluster.get("infd", "granite", namespace)
    store = Store()
    for one in (body, *left.values()):
        if one["kind"] != "Secret":  # which is not watched
            store.put(one)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(cluster, tmp_path / "kubeconfig")))
    info = kopf.login_with_kubeconfig(settings=kopf.OperatorSettings())
    assert info is not None
    metrics = Metrics()
    api = Api(info, metrics)
    try:
        trouble = await Children(
            api,
            store,
            Autoscalers(),
            Surroundings(
                image="x/y:1",
                redis_url="redis://127.0.0.1:2",
                system_namespace="tasuki-system",
                metrics_namespace="monitoring",
                pod_monitors=False,
            ),
            metrics,
        ).make(
            key_of(body),
            Owner(namespace=namespace, name="granite", uid=body["metadata"]["uid"]),
            Spec.model_validate(body["spec"]),
            Named({}, None),
            None,
        )
    finally:
        await api.close()
        operator.start()
    assert trouble is None
    assert {kind for kind, _ in children(cluster, "granite", namespace)} == set(CHILD_KINDS)


def test_what_went_between_the_first_list_and_the_watches_is_looked_for_soon(
    own_cluster: OwnCluster, operator: Operator
) -> None:
    def lists() -> int:
        requests = audit.of_operator(own_cluster)
        return sum((one.verb, one.resource) == ("list", "pods") for one in requests)

    operator.stop()
    before = lists()
    operator.start()
    own_cluster.wait("the start's, the watch's, and one after both", lambda: lists() >= before + 3)


def test_of_two_with_one_served_name_the_older_has_it_until_it_goes(
    cluster: Cluster, namespace: str
) -> None:
    make(cluster, "first", namespace)
    time.sleep(1.1)  # creation times are whole seconds
    model = {"source": "file:///models/demo", "servedName": "first"}
    cluster.apply(deployment("second", namespace, model=model))
    cluster.wait(
        "the younger one is told",
        lambda: condition(cluster, "second", namespace, "Ready")[1] == "NameTaken",
    )
    assert f"{namespace}/first" in condition(cluster, "second", namespace, "Ready")[2]
    assert children(cluster, "second", namespace) == {}
    cluster.kubectl("delete", "infd", "first", "--namespace", namespace)
    cluster.wait(
        "the younger one has the name",
        lambda: ("deployment", "second-decode") in children(cluster, "second", namespace),
        seconds=REPAIR_SECONDS,
    )


def test_a_model_in_an_image_becomes_an_image_volume(
    own_cluster: OwnCluster, namespace: str
) -> None:
    model = {"source": "oci://registry.example/models/granite:1"}
    found = make(own_cluster, "granite", namespace, model=model, **NOWHERE)
    template = found["deployment", "granite-decode"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in template["volumes"]}
    assert volumes["model"]["image"]["reference"] == "registry.example/models/granite:1"
    assert condition(own_cluster, "granite", namespace, "Ready")[1] != "ChildRefused"


def test_what_the_api_server_refuses_of_a_template_is_in_the_status(
    cluster: Cluster, namespace: str
) -> None:
    wrong = {"spec": {"restartPolicy": "Never"}}
    cluster.apply(deployment("granite", namespace, decode={"podTemplate": wrong}))
    cluster.wait(
        "the refusal is told",
        lambda: condition(cluster, "granite", namespace, "Degraded")[1] == "ChildRefused",
    )
    assert "restartPolicy" in condition(cluster, "granite", namespace, "Degraded")[2]
    cluster.apply(deployment("granite", namespace))
    cluster.wait(
        "it is made good",
        lambda: ("deployment", "granite-decode") in children(cluster, "granite", namespace),
    )


def test_a_quota_that_leaves_no_secret_is_in_the_status(cluster: Cluster, namespace: str) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "spec": {"hard": {"count/secrets": "0"}}}
    cluster.apply(quota | {"metadata": {"name": "none", "namespace": namespace}})
    cluster.wait(
        "it counts", lambda: "used" in cluster.get("quota", "none", namespace).get("status", {})
    )
    cluster.apply(deployment("granite", namespace))
    cluster.wait(
        "the refusal is told",
        lambda: condition(cluster, "granite", namespace, "Degraded")[1] == "ChildRefused",
    )
    assert "exceeded quota" in condition(cluster, "granite", namespace, "Degraded")[2]


def test_deleting_the_deployment_deletes_all_of_it(cluster: Cluster, namespace: str) -> None:
    make(cluster, "granite", namespace)
    cluster.kubectl("delete", "infd", "granite", "--namespace", namespace)
    cluster.wait("nothing is left", lambda: not children(cluster, "granite", namespace))
    time.sleep(3)
    assert children(cluster, "granite", namespace) == {}


def test_a_namespace_that_goes_takes_everything_along_and_nothing_fights_it(
    cluster: Cluster, operator: Operator
) -> None:
    with cluster.namespace("leaving") as name:
        make(cluster, "granite", name)
    failed = [event for event in operator.events() if event["event"] == "reconcile_failed"]
    assert [event for event in failed if event["deployment"].startswith("leaving/")] == []
