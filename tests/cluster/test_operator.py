"""The operator on a real control plane, with the rights of its service account and no more.

Its pods have no engine image here; that a request is answered is tested with the whole system.
"""

import copy
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.api import Cluster
from cluster.commands import CommandError
from fresh_seed import fresh_seed
from operator_process import Operator, condition, deployment, install, running

from tasuki_operator.schema import Spec

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


@pytest.fixture(scope="module")
def operator(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """An operator that serves the whole cluster; nothing it logs may be an error."""
    install(cluster)
    with running(cluster, tmp_path_factory.mktemp("operator")) as one:
        yield one
    assert [event for event in one.events() if event["level"] == "error"] == []


@pytest.fixture
def namespace(cluster: Cluster, operator: Operator) -> Iterator[str]:
    """An empty namespace in which the operator serves."""
    with cluster.namespace(f"models-{random.getrandbits(32):x}") as name:
        yield name


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
    columns = cluster.kubectl("get", "infd", "granite", "--namespace", namespace)
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


def test_an_edited_child_is_set_right_and_what_others_own_is_left(
    cluster: Cluster, namespace: str
) -> None:
    make(cluster, "granite", namespace)
    where = ["--namespace", namespace]
    cluster.kubectl("annotate", "deployment", "granite-decode", "theirs=kept", *where)
    cluster.kubectl("label", "service", "granite-decode", "theirs=kept", *where)
    cluster.kubectl("scale", "deployment", "granite-decode", "--replicas=3", *where)
    edit = json.dumps({"spec": {"selector": {"tasuki.dev/role": "nobody"}}})
    cluster.kubectl("patch", "service", "granite-decode", "--patch", edit, *where)
    cluster.kubectl(
        "label", "service", "granite-decode", "tasuki.dev/role=x", "--overwrite", *where
    )

    def right() -> bool:
        service = cluster.get("service", "granite-decode", namespace)
        pods = cluster.get("deployment", "granite-decode", namespace)
        assert service["metadata"]["labels"]["theirs"] == "kept"
        assert pods["metadata"]["annotations"]["theirs"] == "kept"
        return (
            service["spec"]["selector"]["tasuki.dev/role"] == "decode"
            and service["metadata"]["labels"]["tasuki.dev/role"] == "decode"
            and pods["spec"]["replicas"] == 1
        )

    cluster.wait("the children are as wanted", right, seconds=REPAIR_SECONDS)


def test_nothing_is_written_when_nothing_has_changed(
    cluster: Cluster, namespace: str, operator: Operator
) -> None:
    make(cluster, "granite", namespace)
    time.sleep(3)  # the controllers of the cluster have their say
    before = versions(children(cluster, "granite", namespace))
    status = cluster.get("infd", "granite", namespace)["metadata"]["resourceVersion"]
    operator.stop()
    operator.start()  # it remembers nothing and applies all anew
    cluster.apply(deployment("granite", namespace))
    time.sleep(12)
    assert versions(children(cluster, "granite", namespace)) == before
    assert cluster.get("infd", "granite", namespace)["metadata"]["resourceVersion"] == status


def test_a_killed_operator_leaves_nothing_half_done(
    cluster: Cluster, namespace: str, operator: Operator
) -> None:
    random.seed(fresh_seed())
    wanted = 0
    for number in range(3):
        wanted = number + 2
        cluster.apply(deployment("granite", namespace, decode={"replicas": wanted}))
        time.sleep(random.random() * 2)
        operator.kill()
        operator.start()
    cluster.wait(
        "the last spec is what there is",
        lambda: (
            cluster.get("deployment", "granite-decode", namespace)["spec"]["replicas"] == wanted
            and {kind for kind, _ in children(cluster, "granite", namespace)} == set(CHILD_KINDS)
        ),
        seconds=60,
    )


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
    before = make(cluster, "granite", namespace)
    cluster.apply(deployment("granite", namespace, engine={"maxModelLen": 512}))
    cluster.wait(
        "both revisions' settings",
        lambda: len(cluster.list("configmap", namespace, "tasuki.dev/deployment=granite")) == 2,
        seconds=REPAIR_SECONDS,
    )
    old = next(name for kind, name in before if kind == "configmap")
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


WRONG: list[tuple[Object, str]] = [
    ({"model": {}}, "spec.model.source: Required value"),
    ({"model": {"source": "s3://bucket"}}, "must begin with hf://"),
    ({"model": {"source": "hf://name"}}, "hf://org/name"),
    ({"model": {"source": "file://./here"}}, "file:///folder"),
    ({"model": {"source": "file:///a", "revision": "x"}}, "only known to hf://"),
    ({"engine": {"blockSize": 24}}, "power of two"),
    ({"engine": {"checkpointInterval": 100}}, "multiple of blockSize"),
    ({"engine": {"dtype": "fp8"}}, "spec.engine.dtype"),
    ({"engine": {"memoryShare": 0}}, "spec.engine.memoryShare"),
    ({"decode": {"replicas": 0}}, "spec.decode.replicas"),
    ({"prefill": {"env": [{"name": "TASUKI_PORT", "value": "1"}]}}, "set by the operator"),
    ({"prefill": {"env": [{"name": "A"}]}}, "either value or valueFrom"),
    ({"decode": {"resources": {"limits": {"cpu": "many"}}}}, "spec.decode.resources.limits"),
    ({"transfer": {"backends": []}}, "spec.transfer.backends"),
    ({"rollout": {"maxSurge": 0}}, "cannot both be 0"),
    ({"modell": {}}, "modell"),
]


@pytest.mark.parametrize(("spec", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_spec_is_refused_with_its_field(
    cluster: Cluster, operator: Operator, spec: Object, words: str
) -> None:
    with pytest.raises(CommandError) as caught:
        cluster.apply(deployment("granite", "default", **spec))
    assert words in str(caught.value)


RICH: Object = {
    "model": {
        "source": "hf://org/name",
        "revision": "main",
        "servedName": "granite",
        "aliases": ["chat"],
        "tokenSecret": {"name": "hub", "key": "token"},
    },
    "engine": {"dtype": "bfloat16", "blockSize": 32, "memoryShare": 0.5, "extra": {"seed": 1}},
    "prefill": {
        "replicas": 2,
        "resources": {"requests": {"cpu": 2}, "limits": {"memory": "8Gi"}},
        "accelerator": {"resource": "amd.com/gpu", "count": 1},
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "env": [{"name": "A", "value": "b"}],
        "podTemplate": {"spec": {"priorityClassName": "high"}},
    },
    "decode": {"replicas": 3, "image": "x/y:1", "imagePullSecrets": ["registry"]},
    "transfer": {"backends": ["tcp"], "leaseSeconds": 5.5, "keySecret": {"name": "k", "key": "k"}},
    "prefixIndex": {"urlSecret": {"name": "redis", "key": "url"}},
    "gateway": {"prefillThreshold": 100},
    "rollout": {"maxSurge": 0, "maxUnavailable": 1, "startSeconds": 60, "drainSeconds": 5},
}
ODD = ("", "x", "é\n", "9" * 2000, -1, 0, 1.5, 10**12, True, [], {}, ["x"], {"a": 1}, [{}])


def spoiled(rng: random.Random) -> tuple[Object, str]:
    """A spec with one field replaced, removed or made up; and the name of that field."""
    spec = copy.deepcopy(RICH)
    place: Any = spec
    while True:
        name = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[name]
        if not inner or not isinstance(inner, dict | list) or rng.random() < 0.3:
            break
        place = inner
    field = str(name) if isinstance(place, dict) else ""
    match rng.randrange(6):
        case 0:
            del place[name]
        case 1 if isinstance(place, dict):
            field = "unheardOf"
            place[field] = inner
        case _:
            place[name] = rng.choice(ODD)
    return spec, field


def test_what_admission_takes_the_operator_takes_and_all_else_is_refused_with_its_field(
    cluster: Cluster, operator: Operator
) -> None:
    rng = random.Random(fresh_seed())
    dry = ["apply", "--server-side", "--dry-run=server", "--output=json", "--filename=-"]
    refusals = []
    for _ in range(200):
        spec, field = spoiled(rng)
        text = json.dumps(deployment("spoiled", "default") | {"spec": spec})
        try:
            taken = json.loads(cluster.kubectl(*dry, stdin=text))["spec"]
        except CommandError as error:
            refusals.append((field, str(error)))
        else:
            Spec.model_validate(taken)
    assert [said for field, said in refusals if field not in said and "spec." not in said] == []
    assert len(refusals) > 50


def test_a_name_that_children_could_not_have_is_refused(
    cluster: Cluster, operator: Operator
) -> None:
    for name in ("7b", "a" * 53, "a.b"):
        with pytest.raises(CommandError, match=r"metadata\.name must"):
            cluster.apply(deployment(name, "default"))


def test_a_served_name_stays(cluster: Cluster, namespace: str) -> None:
    cluster.apply(deployment("granite", namespace))
    model = {"source": "file:///models/demo", "servedName": "other"}
    with pytest.raises(CommandError, match="servedName cannot change"):
        cluster.apply(deployment("granite", namespace, model=model))


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


def test_every_field_explains_itself(cluster: Cluster, operator: Operator) -> None:
    text = cluster.kubectl("explain", "infd.spec.prefill")
    assert "Pods that compute prompts." in text
    assert "decode pods compute their prompts themselves" in " ".join(text.split())
