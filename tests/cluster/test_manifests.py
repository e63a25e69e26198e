"""A real API server takes the manifests as they are, and admits their pods as restricted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.api import Cluster
from cluster.commands import CommandError

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
SAMPLES = sorted((MANIFESTS / "samples").glob("*.yaml"))
DRY = ("apply", "--server-side", "--dry-run=server", "--validate=strict")


@pytest.fixture(scope="module")
def with_crd(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with our CRD until these tests are done."""
    folder = MANIFESTS / "components/crds"
    cluster.kustomize(folder)
    try:
        cluster.wait("the CRD is served", lambda: cluster.list("infd") is not None)
        yield cluster
    finally:
        cluster.kubectl("delete", "-k", folder, "--timeout=60s", timeout=70)


def built(cluster: Cluster, overlay: str) -> list[dict[str, Any]]:
    text = cluster.kubectl("kustomize", MANIFESTS / "overlays" / overlay)
    return [body for body in yaml.safe_load_all(text) if body["kind"] != "Route"]


@pytest.mark.parametrize(
    ("overlay", "namespace"),
    [
        ("default", "tasuki-system"),
        ("dev", "tasuki-system"),
        ("openshift", "tasuki-system"),
        ("namespaced", "tasuki"),
    ],
)
def test_the_api_server_takes_an_overlay_and_admits_its_pods(
    cluster: Cluster, overlay: str, namespace: str
) -> None:
    """Dry runs, every field checked; each pod is tried as its Deployment would make it."""
    objects = built(cluster, overlay)
    with cluster.namespace(namespace):
        cluster.kubectl(*DRY, "-f", "-", stdin=yaml.safe_dump_all(objects))
        accounts = [body for body in objects if body["kind"] == "ServiceAccount"]
        cluster.apply(*accounts)
        deployments = [body for body in objects if body["kind"] == "Deployment"]
        assert len(deployments) == 3
        for body in deployments:
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": body["metadata"]["name"], "namespace": namespace},
                "spec": body["spec"]["template"]["spec"],
            }
            cluster.kubectl(*DRY, "-f", "-", stdin=yaml.safe_dump(pod))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_the_crd_takes_a_sample(with_crd: Cluster, path: Path) -> None:
    with_crd.kubectl(*DRY, "-f", path)


def test_the_crd_refuses_what_it_does_not_know(with_crd: Cluster) -> None:
    sample = yaml.safe_load((MANIFESTS / "samples/minimal.yaml").read_text())
    sample["spec"]["decode"]["replica"] = 3
    with pytest.raises(CommandError, match=r"spec\.decode\.replica"):
        with_crd.kubectl(*DRY, "-f", "-", stdin=yaml.safe_dump(sample))


def test_kubectl_explains_a_field_in_a_sentence(with_crd: Cluster) -> None:
    explain = ("explain", "infd.spec.prefill")
    with_crd.wait("the API's description", lambda: with_crd.kubectl(*explain))  # it comes later
    text = with_crd.kubectl(*explain)
    assert "Pods that compute prompts." in text
    assert "0: decode pods compute their prompts themselves." in text


def test_the_operators_account_may_do_its_work_and_no_more(with_crd: Cluster) -> None:
    """As the API server's authorizer sees the ClusterRole, not as we read it."""
    roles = [
        body
        for body in built(with_crd, "default")
        if body["kind"] in ("ClusterRole", "ClusterRoleBinding")
    ]
    account = "--as=system:serviceaccount:tasuki-system:tasuki-operator"
    with_crd.apply(*roles)
    try:

        def may(verb: str, resource: str, subresource: str = "") -> bool:
            words = ["auth", "can-i", verb, resource, account, "--namespace=models", "--quiet"]
            words += [f"--subresource={subresource}"] if subresource else []
            try:
                with_crd.kubectl(*words)
            except CommandError:
                return False
            return True

        with_crd.wait("the role counts", lambda: may("list", "inferencedeployments.tasuki.dev"))
        assert may("patch", "inferencedeployments.tasuki.dev", "status")
        assert may("create", "deployments.apps")
        assert may("get", "secrets")
        assert not may("list", "secrets")
        assert not may("create", "pods")
        assert not may("create", "pods", "exec")
        assert not may("patch", "inferencedeployments.tasuki.dev")
        assert not may("create", "rolebindings.rbac.authorization.k8s.io")
    finally:
        with_crd.kubectl("delete", "-f", "-", stdin=yaml.safe_dump_all(roles))
