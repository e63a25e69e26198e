"""The demo model served by a test's cluster: all of overlay `dev`, and small CPU pods."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crd_setup
from cluster.api import Cluster

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "demo"
OVERLAY = ROOT / "manifests/overlays/dev"
SYSTEM, NAMESPACE = "tasuki-system", "models"
START_SECONDS, READY_SECONDS = 120.0, 240.0
SMALL = {"requests": {"cpu": "50m", "memory": "512Mi"}}


def weights(namespace: str, claim: str = "weights", folder: Path = MODEL) -> tuple[Object, Object]:
    """A volume with a folder of this machine, the demo model's, and the namespace's claim to it."""
    storage = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    name = f"{claim}-{namespace}"
    volume = {
        "capacity": {"storage": "1Gi"},
        "claimRef": {"name": claim, "namespace": namespace},
        "hostPath": {"path": str(folder), "type": "Directory"},
    }
    wish = {"resources": {"requests": {"storage": "1Gi"}}, "volumeName": name}
    return (
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": storage | volume,
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": namespace},
            "spec": storage | wish,
        },
    )


@contextlib.contextmanager
def namespace(cluster: Cluster, name: str) -> Iterator[None]:
    """A namespace for models, which has the weights."""
    try:
        with cluster.namespace(name):
            cluster.apply(*weights(name))
            yield
    finally:
        cluster.kubectl("delete", "pv", f"weights-{name}", "--ignore-not-found")


def demo(
    *,
    name: str = "demo",
    namespace: str = NAMESPACE,
    decode: int = 1,
    env: dict[str, str] | None = None,
    **engine: Any,
) -> Object:
    """An InferenceDeployment of the demo model; every prompt is handed over."""
    variables = [{"name": key, "value": value} for key, value in (env or {}).items()]
    role = {"resources": SMALL, "env": variables}
    return {
        "apiVersion": "tasuki.dev/v1alpha1",
        "kind": "InferenceDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"source": "pvc://weights"},
            "engine": {"numBlocks": 2048, "numStateSlots": 64, "cpuThreads": 1, **engine},
            "prefill": {"replicas": 1, **role},
            "decode": {"replicas": decode, **role},
            "gateway": {"prefillThreshold": 0},
            "rollout": {"drainSeconds": 30},
        },
    }


@contextlib.contextmanager
def installed(cluster: Cluster) -> Iterator[None]:
    """Operator, gateway and Redis run, and the models' namespace has the weights.

    Pods leave before their namespace: Kubernetes looks again only after half of their grace period.
    """
    crd_setup.install(cluster)
    cluster.kustomize(OVERLAY)
    try:
        for name in ("tasuki-redis", "tasuki-operator", "tasuki-gateway"):
            cluster.wait_for_rollout(name, SYSTEM, seconds=START_SECONDS)
        with namespace(cluster, NAMESPACE):
            yield
    finally:
        cluster.kubectl("delete", "deployments", "--all", "--namespace", SYSTEM)
        cluster.wait("the pods are gone", lambda: not cluster.list("pods", SYSTEM))
        for folder in (OVERLAY, crd_setup.FOLDER):
            cluster.kubectl(
                "delete", "-k", folder, "--ignore-not-found", "--timeout=90s", timeout=100
            )


def apply(cluster: Cluster, wanted: Object) -> None:
    """Applies and waits until the operator says that all of it serves."""
    cluster.apply(wanted)
    place = (wanted["metadata"]["name"], wanted["metadata"]["namespace"])
    generation = cluster.get("infd", *place)["metadata"]["generation"]

    def settled() -> bool:
        status = cluster.get("infd", *place).get("status", {})
        said = {one["type"]: one["status"] for one in status.get("conditions", [])}
        counted = [status.get(role, {}) for role in ("prefill", "decode")]
        return (
            status.get("observedGeneration") == generation
            and said.get("Ready") == "True"
            and said.get("Progressing") == "False"
            and all(role["ready"] == role["replicas"] == role["desired"] for role in counted)
        )

    try:
        cluster.wait("the deployment serves as wanted", settled, seconds=READY_SECONDS)
    except TimeoutError as error:
        seen = cluster.kubectl("describe", "infd,pods", "--namespace", place[1])
        raise TimeoutError(f"{error}\n{seen}") from error


def endpoint(cluster: Cluster) -> str:
    """The gateway's base URL at its Service, without /v1."""
    return f"http://{cluster.get('service', 'tasuki-gateway', SYSTEM)['spec']['clusterIP']}"
