"""A deployment's children: the same for the same spec, safe, and nothing left to chance."""

import copy
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from tasuki_common.policy import Policy
from tasuki_common.settings import load
from tasuki_operator import builders, names, pods
from tasuki_operator.builders import Owner, Surroundings
from tasuki_operator.credentials import Credentials
from tasuki_operator.kinds import BY_NAME
from tasuki_operator.names import ROLES
from tasuki_operator.schema import Spec
from tasuki_pod.config import PodConfig

OWNER = Owner(namespace="models", name="granite", uid="u-1")
AROUND = Surroundings(
    image="tasuki/engine:1",
    redis_url="redis://redis:6379",
    system_namespace="tasuki-system",
    metrics_namespace="monitoring",
    pod_monitors=True,
)
Manifest = dict[str, Any]


def spec(**fields: Any) -> Spec:
    return Spec.model_validate({"model": {"source": "hf://org/name"}, **fields})


KNOWN = Credentials("d-1")


def children(given: Spec, known: Credentials = KNOWN) -> dict[tuple[str, str], Manifest]:
    made = builders.desired(OWNER, given, AROUND, known)
    found = {(child["kind"], child["metadata"]["name"]): child for child in made}
    assert len(found) == len(made)
    return found


def pod(given: Spec, role: str) -> Manifest:
    found: Manifest = children(given)["Deployment", f"granite-{role}"]["spec"]["template"]
    return found


def environment(given: Spec, role: str) -> dict[str, Any]:
    variables = pod(given, role)["spec"]["containers"][0]["env"]
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in variables}


def test_the_same_spec_makes_the_same_children() -> None:
    first, second = children(spec()), children(copy.deepcopy(spec()))
    assert json.dumps(first.copy() and list(first.values())) == json.dumps(list(second.values()))


def test_a_deployment_has_one_child_of_each_kind_for_each_role() -> None:
    by_role = ("Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "PodMonitor")
    wanted = {(kind, f"granite-{role}") for kind in by_role for role in ROLES}
    config = names.engine_config("granite", builders.revision_of(spec()))
    assert set(children(spec())) == wanted | {
        ("ServiceAccount", "granite"),
        ("ConfigMap", config),
        ("ConfigMap", "granite-gateway"),
    }


def test_every_child_is_labelled_owned_and_of_a_known_kind() -> None:
    for (kind, _), child in children(spec()).items():
        assert BY_NAME[kind].api_version == child["apiVersion"]
        metadata = child["metadata"]
        assert metadata["labels"][names.DEPLOYMENT] == "granite"
        assert metadata["ownerReferences"][0]["uid"] == "u-1"
        assert metadata["ownerReferences"][0]["controller"] is True


@pytest.mark.parametrize("role", ROLES)
def test_pods_fit_the_restricted_standard(role: str) -> None:
    template = pod(spec(), role)["spec"]
    container = template["containers"][0]["securityContext"]
    assert template["securityContext"]["runAsNonRoot"] is True
    assert template["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["allowPrivilegeEscalation"] is False
    assert container["readOnlyRootFilesystem"] is True
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert template["automountServiceAccountToken"] is False


@pytest.mark.parametrize("role", ROLES)
def test_the_pods_own_settings_reader_takes_the_environment(role: str) -> None:
    given = spec(
        model={"source": "hf://org/name", "revision": "v2", "aliases": ["a", "b"]},
        engine={"blockSize": 32, "extra": {"num_window_blocks": 7}},
        transfer={"leaseSeconds": 90.5},
    )
    given_values = environment(given, role)
    values = {key: value for key, value in given_values.items() if isinstance(value, str)}
    config_map = given_values["TASUKI_ENGINE"]["configMapKeyRef"]
    data = children(given)["ConfigMap", config_map["name"]]["data"]
    values |= {
        "TASUKI_ENGINE": data[config_map["key"]],
        "TASUKI_POLICY_FILE": "",
        "TASUKI_TRANSFER_KEY": "secret",
        "TASUKI_ADVERTISE_HOST": "10.0.0.1",
        "TASUKI_TRANSFER_HOST": "10.0.0.1",
    }
    config = load(PodConfig, [], prog="tasuki", environ=values)
    assert (config.model, config.served_name, config.aliases) == ("org/name", "granite", ("a", "b"))
    assert config.engine_config().block_size == 32
    assert config.engine_config().num_window_blocks == 7
    assert config.engine_config().revision == "v2"
    assert (config.port, config.transfer_port) == (names.HTTP_PORT, names.TRANSFER_PORT)
    assert config.lease_seconds == 90.5


def test_variables_are_defined_before_those_that_refer_to_them() -> None:
    order = list(environment(spec(), "decode"))
    for name, value in environment(spec(), "decode").items():
        if isinstance(value, str) and "$(" in value:
            for used in value.replace(")", "$(").split("$(")[1::2]:
                assert order.index(used) < order.index(name)


def test_a_variable_of_the_users_takes_the_place_of_ours() -> None:
    mine = [{"name": "HOME", "value": "/mine"}, {"name": "POD_IP", "value": "::1"}]
    given = spec(decode={"env": [*mine, {"name": "LAST", "value": "1"}]})
    order = [item["name"] for item in pod(given, "decode")["spec"]["containers"][0]["env"]]
    assert len(order) == len(set(order)), "the API server refuses one that is there twice"
    assert environment(given, "decode")["HOME"] == "/mine"
    assert order.index("POD_IP") < order.index("TASUKI_ADVERTISE_HOST")
    assert order[-1] == "LAST"


def test_a_variable_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="A twice"):
        spec(decode={"env": [{"name": "A", "value": value} for value in "12"]})


def test_a_pod_may_leave_in_peace_as_long_as_its_leases_last() -> None:
    given = spec(transfer={"leaseSeconds": 200.0}, rollout={"drainSeconds": 10})
    assert float(environment(given, "prefill")["TASUKI_DRAIN_SECONDS"]) >= 200
    assert pod(given, "prefill")["spec"]["terminationGracePeriodSeconds"] > 200


def test_devices_are_asked_for_by_the_platforms_name() -> None:
    given = spec(decode={"accelerator": {"resource": "amd.com/gpu", "count": 2}})
    container = pod(given, "decode")["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"amd.com/gpu": "2"}
    assert environment(given, "decode")["TASUKI_TRANSFER_BACKENDS"] == "nixl,tcp"
    assert environment(given, "prefill")["TASUKI_TRANSFER_BACKENDS"] == "tcp"


@pytest.mark.parametrize(
    ("source", "location", "volume"),
    [
        ("hf://org/name", "org/name", None),
        ("file:///models/demo", "/models/demo", None),
        ("pvc://claim/some/folder", "/model/some/folder", "persistentVolumeClaim"),
        ("pvc://claim", "/model", "persistentVolumeClaim"),
        ("oci://registry/image:tag", "/model", "image"),
    ],
)
def test_the_model_is_where_the_source_says(source: str, location: str, volume: str | None) -> None:
    given = spec(model={"source": source})
    assert environment(given, "decode")["TASUKI_MODEL"] == location
    volumes = {item["name"]: item for item in pod(given, "decode")["spec"]["volumes"]}
    assert (volume in volumes["model"]) if volume else ("model" not in volumes)


def test_the_revision_changes_with_what_the_fingerprint_depends_on_and_nothing_else() -> None:
    first = builders.revision_of(spec())
    assert builders.revision_of(spec(decode={"replicas": 5})) == first
    assert builders.revision_of(spec(engine={"dtype": "bfloat16"})) != first
    assert builders.revision_of(spec(model={"source": "hf://org/other"})) != first


def test_both_roles_have_one_revision_and_one_configuration() -> None:
    template = [pod(spec(), role) for role in ROLES]
    assert len({item["metadata"]["labels"][names.REVISION] for item in template}) == 1
    assert len({str(environment(spec(), role)["TASUKI_ENGINE"]) for role in ROLES}) == 1


def test_only_its_own_pods_reach_the_transfer_and_only_gateways_and_prometheus_the_rest() -> None:
    policies = {
        role: children(spec())["NetworkPolicy", f"granite-{role}"]["spec"] for role in ROLES
    }
    ports = {
        role: [rule["ports"][0]["port"] for rule in policies[role]["ingress"]] for role in ROLES
    }
    assert ports == {"prefill": ["http", "transfer"], "decode": ["http"]}
    peers = policies["prefill"]["ingress"][1]["from"]
    assert peers == [{"podSelector": {"matchLabels": {names.DEPLOYMENT: "granite"}}}]
    sources = policies["decode"]["ingress"][0]["from"]
    namespaces = [
        source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for source in sources
    ]
    assert namespaces == ["tasuki-system", "monitoring"]


def test_nixl_listens_on_ports_that_its_pods_may_reach_and_tcp_alone_opens_none() -> None:
    first, last = names.NIXL_PORTS
    gpus = spec(**{role: {"accelerator": {}} for role in ROLES})
    for role in ROLES:
        assert environment(gpus, role)["UCX_TCP_PORT_RANGE"] == f"{first}-{last}"
        policy = children(gpus)["NetworkPolicy", f"granite-{role}"]["spec"]
        rule = policy["ingress"][1]
        assert rule["from"] == [{"podSelector": {"matchLabels": {names.DEPLOYMENT: "granite"}}}]
        assert rule["ports"][-1] == {"protocol": "TCP", "port": first, "endPort": last}
        assert "UCX_TCP_PORT_RANGE" not in environment(spec(), role)


def test_new_secrets_bring_new_pods() -> None:
    old, new = (children(spec(), Credentials(digest)) for digest in ("d-1", "d-2"))
    for role in ROLES:
        name = ("Deployment", f"granite-{role}")
        assert old[name]["spec"]["template"] != new[name]["spec"]["template"]


def test_a_given_key_is_used_and_none_is_made_up() -> None:
    given = spec(transfer={"keySecret": {"name": "mine", "key": "k"}})
    assert environment(given, "decode")["TASUKI_TRANSFER_KEY"] == {
        "secretKeyRef": {"name": "mine", "key": "k"}
    }


def test_what_gateways_allow_is_in_a_file_that_pods_can_read_and_no_reason_for_new_pods() -> None:
    limits = {"maxRequests": 5, "maxPromptTokens": 6, "maxOutputTokens": 7}
    given = spec(gateway={"exposed": False, "limits": limits, "prefillThreshold": 8})
    known = Credentials("d-1", ("digest",))
    made = children(given, known)
    data = made["ConfigMap", "granite-gateway"]["data"]["policy.json"]
    assert msgspec.json.decode(data, type=Policy) == Policy(
        exposed=False,
        key_digests=("digest",),
        max_requests=5,
        max_prompt_tokens=6,
        max_output_tokens=7,
        prefill_threshold=8,
    )
    for role in ROLES:
        template = made["Deployment", f"granite-{role}"]["spec"]["template"]
        assert template == pod(spec(), role)
        mounts = {item["name"]: item for item in template["spec"]["containers"][0]["volumeMounts"]}
        assert "subPath" not in mounts["policy"], "it would never change"
        path = environment(given, role)["TASUKI_POLICY_FILE"]
        assert path == f"{mounts['policy']['mountPath']}/policy.json"
        volumes = {item["name"]: item for item in template["spec"]["volumes"]}
        assert volumes["policy"]["configMap"] == {"name": "granite-gateway"}


def test_a_redis_without_a_password_stands_in_the_template_and_one_with_it_does_not() -> None:
    plain = spec(prefixIndex={"url": "rediss://managed:6380"})
    assert environment(plain, "decode")["TASUKI_REDIS_URL"] == "rediss://managed:6380"
    secret = spec(prefixIndex={"urlSecret": {"name": "redis", "key": "url"}})
    assert environment(secret, "decode")["TASUKI_REDIS_URL"] == {
        "secretKeyRef": {"name": "redis", "key": "url"}
    }
    assert environment(spec(), "decode")["TASUKI_REDIS_URL"] == AROUND.redis_url


def test_pods_spread_over_nodes_where_they_can() -> None:
    for role in ROLES:
        (spread,) = pod(spec(), role)["spec"]["topologySpreadConstraints"]
        assert spread["topologyKey"] == "kubernetes.io/hostname"
        assert spread["whenUnsatisfiable"] == "ScheduleAnyway"
        assert spread["labelSelector"]["matchLabels"] == names.selector("granite", role)


def test_an_overlay_merges_containers_by_name() -> None:
    overlay = {
        "metadata": {"annotations": {"a": "b"}},
        "spec": {
            "priorityClassName": "high",
            "containers": [
                {"name": "engine", "env": [{"name": "X", "value": "1"}]},
                {"name": "side", "image": "side:1"},
            ],
        },
    }
    template = pod(spec(decode={"podTemplate": overlay}), "decode")
    engine, side = template["spec"]["containers"]
    assert engine["image"] == "tasuki/engine:1"
    assert engine["env"][-1] == {"name": "X", "value": "1"}
    assert side == {"name": "side", "image": "side:1"}
    assert template["spec"]["priorityClassName"] == "high"
    assert template["metadata"]["annotations"]["a"] == "b"
    assert template["metadata"]["labels"][names.ROLE] == "decode"


_JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(_JSON, _JSON)
def test_overlays_of_any_shape_lay_and_laying_twice_changes_nothing(base: Any, over: Any) -> None:
    once = pods.overlay(base, over)
    assert pods.overlay(base, None) is None
    assert pods.overlay(once, over) == once
