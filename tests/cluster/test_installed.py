"""The manifests as they are, with images built here: all runs as pods with its own rights."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import external, images
from cluster.api import Cluster
from cluster.commands import CommandError
from cluster.own import OwnCluster

Object = dict[str, Any]
MANIFESTS = Path(__file__).parents[2] / "manifests"
SYSTEM = "tasuki-system"
NOTHING = "example.com/nothing:1"
CHILDREN = "deployments,pods,services,configmaps,secrets,networkpolicies,poddisruptionbudgets"
OWNED = "tasuki.dev/deployment=granite"


@pytest.fixture(scope="module")
def built(able: None) -> list[str]:
    """Our images, made before the cluster's network takes the way to the packages."""
    if external.configured():
        pytest.skip("images that are built here are needed on the node")
    return [images.control(), images.redis()]


@pytest.fixture(scope="module")
def installed(built: list[str], cluster: Cluster) -> Iterator[OwnCluster]:
    """The cluster with the CRD and all of overlay `dev` running."""
    assert isinstance(cluster, OwnCluster)
    cluster.load_images(built)
    crds, overlay = MANIFESTS / "components/crds", MANIFESTS / "overlays/dev"
    cluster.kustomize(crds)
    cluster.wait("the CRD is served", lambda: cluster.list("infd") is not None)
    cluster.kustomize(overlay)
    for name in ("tasuki-redis", "tasuki-operator", "tasuki-gateway"):
        cluster.wait_for_rollout(name, SYSTEM, seconds=120)
    yield cluster
    for folder in (overlay, crds):
        cluster.kubectl("delete", "-k", folder, "--timeout=90s", timeout=100)


def ready(cluster: Cluster, namespace: str) -> Object:
    """The condition Ready of the deployment; empty while there is none."""
    status = cluster.get("infd", "granite", namespace).get("status", {})
    return {one["type"]: one for one in status.get("conditions", [])}.get("Ready", {})


def test_the_gateway_answers_at_its_service(installed: OwnCluster) -> None:
    address = installed.get("service", "tasuki-gateway", SYSTEM)["spec"]["clusterIP"]

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://{address}/v1/models", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.URLError:
            return False

    installed.wait("the gateway answers", answers)


def test_an_image_that_is_not_there_is_told_in_words_and_deleting_leaves_nothing(
    installed: OwnCluster,
) -> None:
    sample = yaml.safe_load((MANIFESTS / "samples/minimal.yaml").read_text())
    sample["spec"]["decode"]["image"] = NOTHING
    with installed.namespace("models") as namespace:
        sample["metadata"]["namespace"] = namespace
        installed.apply(sample)

        def told() -> bool:
            said = ready(installed, namespace)
            return said.get("reason") == "ImagePull" and NOTHING in said["message"]

        installed.wait("the operator says so", told, seconds=120)
        assert installed.list(CHILDREN, namespace, OWNED)
        installed.kubectl("delete", "infd", "granite", "-n", namespace, "--timeout=60s")
        installed.wait(
            "all children are gone",
            lambda: not installed.list(CHILDREN, namespace, OWNED),
            seconds=120,
        )
        with pytest.raises(CommandError, match="not found"):
            installed.get("infd", "granite", namespace)
