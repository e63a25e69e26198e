"""The Helm chart is the kustomize output by another way: rendered and installed by helm itself."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import binaries, external
from cluster.api import Cluster
from cluster.commands import CommandError, run

Object = dict[str, Any]
Objects = dict[tuple[str, str], Object]
ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/tasuki"
SYSTEM = "tasuki-system"
KUBERNETES = ["--kube-version", "1.34.4"]
"""What helm renders for where it asks no cluster."""


@pytest.fixture(scope="module")
def helm(able: None) -> Path:
    """Built, as is kubectl, before the cluster's network takes the way to Go's modules, and outside
    of the tests' time limits."""
    if external.configured():
        pytest.skip("cluster-wide roles of an installation are made and deleted")
    binaries.path("kubectl")
    return binaries.path("helm")


def by_name(text: str) -> Objects:
    bodies = [body for body in yaml.safe_load_all(text) if body]
    found = {(body["kind"], body["metadata"]["name"]): body for body in bodies}
    assert len(found) == len(bodies)
    return found


def rendered(helm: Path, *flags: str, namespace: str = SYSTEM) -> Objects:
    """What the chart makes with these flags."""
    command = [helm, "template", "tasuki", CHART, "--namespace", namespace, *KUBERNETES]
    return by_name(run([*command, *flags], timeout=60))


def kustomized(overlay: str) -> Objects:
    """What the overlay makes, but for the namespace, which helm makes by a flag of its own."""
    found = by_name(
        run(
            [binaries.path("kubectl"), "kustomize", ROOT / "manifests/overlays" / overlay],
            timeout=60,
        )
    )
    return {key: body for key, body in found.items() if key[0] != "Namespace"}


@pytest.mark.parametrize(
    ("overlay", "namespace", "flags"),
    [("default", SYSTEM, []), ("namespaced", "tasuki", ["--set", "namespaced=true"])],
)
def test_the_chart_makes_what_the_overlay_makes(
    helm: Path, overlay: str, namespace: str, flags: list[str]
) -> None:
    assert rendered(helm, *flags, namespace=namespace) == kustomized(overlay)


def test_a_chart_that_was_packed_is_whole(helm: Path, tmp_path: Path) -> None:
    run([helm, "package", CHART, "--destination", tmp_path], timeout=60)
    (archive,) = tmp_path.glob("tasuki-*.tgz")
    command = [helm, "template", "tasuki", archive, "--namespace", SYSTEM, *KUBERNETES]
    assert by_name(run(command, timeout=60)) == kustomized("default")
    (crd,) = by_name(run([helm, "show", "crds", archive], timeout=60)).values()
    assert crd == yaml.safe_load((ROOT / "crds/tasuki.dev_inferencedeployments.yaml").read_text())


def test_values_change_what_they_name_and_nothing_else(helm: Path, tmp_path: Path) -> None:
    values = {
        "image": "registry/control:1",
        "engineImage": "registry/engine:1",
        "redis": {"enabled": False},
        "gateway": {
            "replicas": 5,
            "resources": {"requests": {"cpu": 2}},
            "env": [{"name": "TASUKI_REDIS_URL", "value": "rediss://managed:6380"}],
            "podSpec": {"nodeSelector": {"pool": "web"}},
        },
    }
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    found, plain = rendered(helm, "--values", str(path)), kustomized("default")
    assert set(plain) - set(found) == {key for key in plain if key[1] == "tasuki-redis"}
    gateway = found["Deployment", "tasuki-gateway"]["spec"]
    before = plain["Deployment", "tasuki-gateway"]["spec"]
    (container,) = gateway["template"]["spec"]["containers"]
    (was,) = before["template"]["spec"]["containers"]
    assert gateway["replicas"] == 5
    assert container["image"] == "registry/control:1"
    assert container["resources"] == {"requests": {"cpu": 2}}
    variables = {item["name"]: item for item in container["env"]}
    assert variables["TASUKI_REDIS_URL"]["value"] == "rediss://managed:6380"
    assert len(variables) == len(container["env"]) == len(was["env"])
    changed = was | {name: container[name] for name in ("image", "resources", "env")}
    assert container == changed
    selected = before["template"]["spec"] | {"nodeSelector": {"pool": "web"}}
    assert gateway["template"]["spec"] == selected | {"containers": [container]}
    operator = found["Deployment", "tasuki-operator"]["spec"]["template"]["spec"]
    images = {"name": "TASUKI_ENGINE_IMAGE", "value": "registry/engine:1"}
    assert images in operator["containers"][0]["env"]
    same = {key for key in found if found[key] == plain[key]}
    assert set(found) - same == {
        ("Deployment", f"tasuki-{name}") for name in ("operator", "gateway")
    }


@pytest.mark.parametrize("flag", ["imagee=x", "gateway.replica=3", "gateway.replicas=0"])
def test_a_value_that_means_nothing_is_refused(helm: Path, flag: str) -> None:
    with pytest.raises(CommandError, match=flag.partition("=")[0].rpartition(".")[2]):
        rendered(helm, "--set", flag)


@pytest.fixture(scope="module")
def released(
    helm: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """The cluster with a release of the chart; its pods have no images here."""
    home = tmp_path_factory.mktemp("helm")
    where = ["--kubeconfig", cluster.kubeconfig, "--kube-context", cluster.context]
    where += ["--namespace", SYSTEM]
    environment = {**os.environ, "HOME": str(home)}
    run(
        [helm, "install", "tasuki", CHART, "--create-namespace", *where],
        timeout=120,
        env=environment,
    )
    try:
        yield cluster
    finally:
        run([helm, "uninstall", "tasuki", "--wait", *where], timeout=240, env=environment)
        left = "deployment,service,serviceaccount,role,rolebinding,networkpolicy,pdb"
        names = [item["metadata"]["name"] for item in cluster.list(left, SYSTEM)]
        assert [name for name in names if name.startswith("tasuki")] == []
        cluster.kubectl("get", "crd", "inferencedeployments.tasuki.dev")
        cluster.kubectl("delete", "-k", ROOT / "manifests/components/crds", "--timeout=60s")
        cluster.kubectl("delete", "namespace", SYSTEM, "--timeout=180s", timeout=190)


def test_a_release_brings_the_crd_and_every_object(released: Cluster) -> None:
    released.wait("the CRD is served", lambda: released.list("infd") is not None)
    for kind, name in kustomized("default"):
        assert released.get(kind, name, SYSTEM)["metadata"]["name"] == name


def test_kustomize_finds_nothing_to_change_in_a_release(released: Cluster) -> None:
    """As the API server itself merges them, defaults and all."""

    def ours(body: Object) -> Object:
        kept = {name: value for name, value in body.items() if name not in ("metadata", "status")}
        return kept | {name: body["metadata"].get(name) for name in ("labels", "generation")}

    apply = ["apply", "--server-side", "--force-conflicts", "--field-manager=helm"]
    bodies = yaml.safe_dump_all(kustomized("default").values())
    command = [*apply, "--dry-run=server", "--output=json", "--filename=-"]
    merged = json.loads(released.kubectl(*command, stdin=bodies))["items"]
    assert len(merged) == len(kustomized("default"))
    for body in merged:
        live = released.get(body["kind"], body["metadata"]["name"], SYSTEM)
        assert ours(body) == ours(live)
