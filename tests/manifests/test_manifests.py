"""What `kubectl apply -k` brings: no more rights than are used, pods that every cluster admits."""

import functools
import re
import tomllib
from pathlib import Path
from typing import Any

import outside_tools
import pytest
import yaml

from tasuki_common.listening import EVERYWHERE
from tasuki_common.settings import load
from tasuki_gateway.config import GatewayConfig
from tasuki_operator import files, kinds, schema
from tasuki_operator.config import OperatorConfig

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
SAMPLES = sorted((MANIFESTS / "samples").glob("*.yaml"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}

Object = dict[str, Any]


@functools.cache
def built(folder: str) -> tuple[Object, ...]:
    """What kustomize makes of a folder under manifests/."""
    return tuple(
        yaml.safe_load_all(
            outside_tools.run(outside_tools.kubectl(), "kustomize", MANIFESTS / folder)
        )
    )


def overlay(name: str) -> tuple[Object, ...]:
    return built(f"overlays/{name}")


def of_kind(objects: tuple[Object, ...], *kinds: str) -> list[Object]:
    return [body for body in objects if body["kind"] in kinds]


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return overlay(request.param)


def test_no_overlay_brings_the_crd_whose_deletion_would_delete_users_objects(
    objects: tuple[Object, ...],
) -> None:
    assert of_kind(objects, "CustomResourceDefinition") == []
    (crd,) = built("components/crds")
    assert crd["metadata"]["name"] == "inferencedeployments.tasuki.dev"


def test_the_chart_has_the_files_of_the_overlays_and_no_copies() -> None:
    chart = ROOT / "charts/tasuki"
    crd = "crds/tasuki.dev_inferencedeployments.yaml"
    links = {chart / crd: ROOT / crd}
    links |= {path: MANIFESTS / "components" / path.name for path in (chart / "files").iterdir()}
    assert len(links) > 1
    assert {path: path.resolve() for path in links} == links


def test_the_namespaced_overlay_is_in_its_namespace_alone() -> None:
    objects = overlay("namespaced")
    assert of_kind(objects, *CLUSTER_WIDE) == []
    namespaces = {body["metadata"]["namespace"] for body in objects}
    subjects = {
        subject["namespace"]
        for body in of_kind(objects, "RoleBinding")
        for subject in body["subjects"]
    }
    assert len(namespaces) == 1
    assert subjects == namespaces


def test_the_rights_of_both_installations_are_the_same() -> None:
    cluster, alone = (
        next(
            body["rules"]
            for body in of_kind(overlay(name), "ClusterRole", "Role")
            if body["metadata"]["name"] == "tasuki-operator"
        )
        for name in ("default", "namespaced")
    )
    assert cluster == alone


def test_nobody_may_list_secrets_run_commands_or_use_a_wildcard(
    objects: tuple[Object, ...],
) -> None:
    for role in of_kind(objects, "Role", "ClusterRole"):
        for rule in role["rules"]:
            said = (role["metadata"]["name"], rule)
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"], said
            assert not {"pods/exec", "pods/attach", "nodes"} & set(rule["resources"]), said
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"]), said
            if "secrets" in rule["resources"]:
                assert not {"list", "watch", "delete", "update"} & set(rule["verbs"]), said


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("components/rbac/*role.yaml")), ids=str)
def test_every_rule_has_its_reason_and_every_role_its_file(path: Path) -> None:
    text = path.read_text()
    rules = re.findall(r"^  - apiGroups", text, re.MULTILINE)
    reasoned = re.findall(r"^  # .+\n(?:  # .+\n)*  - apiGroups", text, re.MULTILINE)
    assert len(list(yaml.safe_load_all(text))) == 1
    assert rules
    assert len(reasoned) == len(rules)


def test_the_operator_may_do_what_it_does_with_each_kind() -> None:
    (role,) = (
        body
        for body in of_kind(overlay("default"), "ClusterRole")
        if body["metadata"]["name"] == "tasuki-operator"
    )
    verbs = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    for kind in kinds.CHILDREN:
        missing = {"get", "list", "watch", "create", "patch", "delete"} - verbs[
            kind.group, kind.plural
        ]
        assert missing == set(), kind
    used = [*kinds.BY_NAME.values(), kinds.AUTOSCALER]
    known = {(kind.group, kind.plural) for kind in used}
    assert {(group, resource.partition("/")[0]) for group, resource in verbs} <= known


def test_every_pod_is_one_that_pod_security_restricted_admits(objects: tuple[Object, ...]) -> None:
    for deployment in of_kind(objects, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        name = deployment["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        for volume in pod.get("volumes", ()):
            assert {"emptyDir", "configMap", "secret", "projected"} & volume.keys(), name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}, name


def test_openshift_chooses_the_user_ids() -> None:
    for deployment in of_kind(overlay("openshift"), "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        contexts = [pod["securityContext"], *(c["securityContext"] for c in pod["containers"])]
        for context in contexts:
            assert not {"runAsUser", "runAsGroup", "fsGroup"} & context.keys()


def test_selectors_find_the_pods_they_are_meant_for(objects: tuple[Object, ...]) -> None:
    labels = {
        body["metadata"]["name"]: body["spec"]["template"]["metadata"]["labels"]
        for body in of_kind(objects, "Deployment")
    }
    for body in of_kind(objects, "Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"):
        spec = body["spec"]
        found = spec.get("selector") or spec["podSelector"]
        wanted = found.get("matchLabels", found)
        name = body["metadata"]["name"]
        assert [pod for pod, has in labels.items() if wanted.items() <= has.items()] == [name]


def test_images_are_of_this_version(objects: tuple[Object, ...]) -> None:
    images = {
        container["image"]
        for deployment in of_kind(objects, "Deployment")
        for container in deployment["spec"]["template"]["spec"]["containers"]
    }
    assert {image for image in images if "tasuki" in image} == {f"tasuki/control:{VERSION}"}


def test_the_settings_that_manifests_give_are_settings(
    objects: tuple[Object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, settings in (("operator", OperatorConfig), ("gateway", GatewayConfig)):
        (deployment,) = (
            body
            for body in of_kind(objects, "Deployment")
            if body["metadata"]["name"] == f"tasuki-{name}"
        )
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        verb, *flags = container["args"]
        assert verb == name
        for variable in container["env"]:
            monkeypatch.setenv(variable["name"], variable.get("value", "given"))
        config = load(settings, flags, prog=f"tasuki {name}")
        (port,) = container["ports"]
        assert config.port == port["containerPort"]  # type: ignore[attr-defined]
        assert config.host == EVERYWHERE  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_samples_are_valid(path: Path) -> None:
    assert files.load(path).kind == "InferenceDeployment"


def test_the_full_sample_has_every_field() -> None:
    def fields(model: type, prefix: str) -> set[str]:
        found = set()
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            alias = f"{prefix}.{field.alias or name}"
            inner = field.annotation
            if hasattr(inner, "model_fields"):
                found |= fields(inner, alias)
            else:
                found.add(alias)
        return found

    def given(value: Any, prefix: str) -> set[str]:
        if not isinstance(value, dict):
            return {prefix}
        return {prefix}.union(*(given(inner, f"{prefix}.{key}") for key, inner in value.items()))

    sample = yaml.safe_load((MANIFESTS / "samples/full.yaml").read_text())
    wanted = {name for name in fields(schema.Spec, "spec") if not name.startswith("spec.decode.")}
    wanted -= {"spec.prefixIndex.url"}  # or a Secret with it, never both
    assert wanted - given(sample["spec"], "spec") == set()
