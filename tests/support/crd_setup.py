"""The CRD in a test's cluster."""

import time
import uuid
from pathlib import Path

from cluster.api import Cluster, Object

FOLDER = Path(__file__).parents[2] / "crds"
COLLECT_SECONDS = 1.0


def install(cluster: Cluster) -> None:
    """Applies it, and returns when the API server and the garbage collector know it.

    The collector looks for new kinds every 30 seconds. A deployment that comes and goes before
    leaves children for longer: it asks about owners of unknown kinds ever more seldom.
    """
    cluster.kustomize(FOLDER)
    cluster.wait("the CRD is served", lambda: cluster.list("infd") is not None)
    cluster.wait("orphans are collected", lambda: _collects(cluster), seconds=120)


def _collects(cluster: Cluster) -> bool:
    """Whether a new object whose InferenceDeployment never was is soon gone."""
    uid = str(uuid.uuid4())
    owner = {
        "apiVersion": "tasuki.dev/v1alpha1",
        "kind": "InferenceDeployment",
        "name": "nobody",
        "uid": uid,
    }
    name = f"orphan-{uid}"
    metadata: Object = {"name": name, "namespace": "default", "ownerReferences": [owner]}
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    time.sleep(COLLECT_SECONDS)
    return name not in [one["metadata"]["name"] for one in cluster.list("configmap")]
