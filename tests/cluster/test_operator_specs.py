"""Specs as people get them wrong: refused with the field's path, or told in the status with it."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.api import Cluster
from cluster.commands import CommandError
from hypothesis import HealthCheck, given, settings, strategies as st
from operator_process import Operator, deployment

Object = dict[str, Any]
Path = tuple[str | int, ...]
NUMBER = 200
NO_PODS = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "no-pods"},
    "spec": {"hard": {"count/pods": "0"}},
}

SECRETS = {"hub": "token=t", "k": "k=k", "redis": "url=redis://127.0.0.1:1"}
"""Those that RICH names."""


@pytest.fixture(scope="module")
def namespace(cluster: Cluster, operator: Operator) -> Iterator[str]:
    """A namespace in which all may be made but pods."""
    with cluster.namespace("spoiled") as name:
        cluster.apply(NO_PODS | {"metadata": {"name": "no-pods", "namespace": name}})
        for secret, entry in SECRETS.items():
            cluster.kubectl(
                "create", "secret", "generic", secret, f"--from-literal={entry}", "-n", name
            )
        yield name


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
    (
        {"prefill": {"env": [{"name": "A", "value": "1"}] * 2}},
        "spec.prefill.env: duplicate entries",
    ),
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
        "env": [
            {"name": "A", "value": "b"},
            {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
        "podTemplate": {
            "metadata": {"annotations": {"a": "b"}},
            "spec": {
                "priorityClassName": "high",
                "containers": [{"name": "engine", "securityContext": {"runAsUser": 1000}}],
            },
        },
    },
    "decode": {"replicas": 3, "image": "x/y:1", "imagePullSecrets": ["registry"]},
    "transfer": {"backends": ["tcp"], "leaseSeconds": 5.5, "keySecret": {"name": "k", "key": "k"}},
    "prefixIndex": {"urlSecret": {"name": "redis", "key": "url"}},
    "gateway": {"prefillThreshold": 100},
    "rollout": {"maxSurge": 0, "maxUnavailable": 1, "startSeconds": 60, "drainSeconds": 5},
}


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """To every field and item."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*path, key))


TEXTS = st.sampled_from(["", "x", "a b", "é\n", "-1", "1e400", "${HOME}", "9" * 2000])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats(-1, 2) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "name", "x y"]), inner, max_size=2)
    ),
    max_leaves=3,
)


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[Object, Path]:
    """A spec with one field replaced, removed or made up; and where."""
    spec = copy.deepcopy(RICH)
    *outer, last = path = draw(st.sampled_from(list(paths(RICH))))
    place: Any = spec
    for key in outer:
        place = place[key]
    match draw(st.sampled_from(["replace", "replace", "replace", "remove", "invent"])):
        case "remove":
            del place[last]
        case "invent" if isinstance(place, dict):
            place["unheardOf"] = draw(VALUES)
            path = (*outer, "unheardOf")
        case _:
            place[last] = draw(VALUES)
    return spec, tuple(path)


def names_it(text: str, path: Path) -> bool:
    """Whether a message has a path in a spec, and the field that is wrong or the one it is in."""
    fields = [part for part in path if isinstance(part, str)]
    return "spec" in text and any(field in text for field in fields[-3:])


def conditions(body: Object) -> dict[str, Object]:
    return {one["type"]: one for one in body.get("status", {}).get("conditions", [])}


@pytest.mark.timeout(900, func_only=True)
def test_of_two_hundred_wrong_specs_each_is_refused_or_reported_with_its_field(
    cluster: Cluster, operator: Operator, namespace: str
) -> None:
    taken: dict[str, Path] = {}
    refused: list[tuple[Path, str]] = []

    @settings(max_examples=NUMBER, suppress_health_check=list(HealthCheck))
    @given(spoiled())
    def try_one(case: tuple[Object, Path]) -> None:
        spec, path = case
        name = f"s{len(taken) + len(refused)}"
        text = json.dumps(deployment(name, namespace) | {"spec": spec})
        text = text.replace('"granite"', f'"{name}"').replace('"chat"', f'"chat-{name}"')
        try:
            cluster.kubectl("create", "--filename=-", stdin=text)
        except CommandError as error:
            refused.append((path, str(error)))
        else:
            taken[name] = path

    try_one()
    assert [(path, said) for path, said in refused if not names_it(said, path)] == []
    cluster.wait("all are told of", lambda: all_told(cluster, namespace, set(taken)), seconds=120)
    reported: dict[str, list[str]] = {}
    for body in cluster.list("infd", namespace):
        name, said = body["metadata"]["name"], conditions(body)
        reported.setdefault(said["Progressing"]["reason"], []).append(name)
        if said["Progressing"]["reason"] in ("InvalidSpec", "ChildRefused"):
            assert names_it(said["Degraded"]["message"], taken[name]), said["Degraded"]["message"]
    counts = {reason: len(names) for reason, names in reported.items()}
    print(f"{len(refused)} refused at admission; of {len(taken)} taken the status says {counts}")
    failed = [one for one in operator.events() if one["event"] == "reconcile_failed"]
    assert [one for one in failed if "Conflict" not in one["reason"]] == []
    assert len(refused) > NUMBER // 4
    assert reported.get("ChildRefused")


def all_told(cluster: Cluster, namespace: str, names: set[str]) -> bool:
    """Whether the status of all is about their specs."""
    found = {body["metadata"]["name"]: body for body in cluster.list("infd", namespace)}
    return set(found) == names and all(
        body.get("status", {}).get("observedGeneration") == body["metadata"]["generation"]
        for body in found.values()
    )


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


def test_every_field_explains_itself(cluster: Cluster, operator: Operator) -> None:
    text = cluster.kubectl("explain", "infd.spec.prefill")
    assert "Pods that compute prompts." in text
    assert "decode pods compute their prompts themselves" in " ".join(text.split())
