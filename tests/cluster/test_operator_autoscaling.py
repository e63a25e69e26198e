"""Autoscalers of Kubernetes itself and the operator do not fight, whichever object is scaled.

Without metrics an autoscaler still keeps its bounds, which is enough to see who wins.
"""

import time
from typing import Any

from cluster.api import Cluster
from operator_process import condition, deployment

Object = dict[str, Any]
NOWHERE = {"nodeSelector": {"type": "nowhere"}}
CALM_SECONDS = 20.0
"""An autoscaler looks every 15 seconds."""


def autoscaler(namespace: str, kind: str, name: str, least: int) -> Object:
    version = {"Deployment": "apps/v1", "InferenceDeployment": "tasuki.dev/v1alpha1"}[kind]
    load = {"type": "Resource", "resource": {"name": "cpu"}}
    load["resource"]["target"] = {"type": "Utilization", "averageUtilization": 80}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": f"of-{name}", "namespace": namespace},
        "spec": {
            "scaleTargetRef": {"apiVersion": version, "kind": kind, "name": name},
            "minReplicas": least,
            "maxReplicas": least + 2,
            "metrics": [load],
        },
    }


def replicas(cluster: Cluster, name: str, namespace: str) -> int:
    return int(cluster.get("deployment", name, namespace)["spec"]["replicas"])


def test_an_autoscaler_of_prefill_pods_has_its_way_until_it_is_gone(
    cluster: Cluster, namespace: str
) -> None:
    granite = deployment("granite", namespace, prefill=NOWHERE, decode=NOWHERE)
    child = "granite-prefill"
    cluster.apply(granite)
    cluster.wait("one pod is wanted", lambda: replicas(cluster, child, namespace) == 1)
    cluster.apply(autoscaler(namespace, "Deployment", child, least=3))
    cluster.wait("it is scaled", lambda: replicas(cluster, child, namespace) == 3)
    scaled = cluster.get("deployment", child, namespace)["metadata"]["generation"]
    time.sleep(CALM_SECONDS)
    after = cluster.get("deployment", child, namespace)
    assert after["metadata"]["generation"] == scaled, "the two fight"
    assert cluster.get("infd", "granite", namespace)["status"]["prefill"]["desired"] == 3
    assert "of 3 prefill pods" in condition(cluster, "granite", namespace, "PrefillReady")[2]

    # What is the operator's is still set right, and a new revision keeps the replicas.
    cluster.kubectl(
        "label", "deployment", child, "tasuki.dev/role=x", "--overwrite", "-n", namespace
    )
    cluster.apply(granite | {"spec": {**granite["spec"], "engine": {"maxModelLen": 512}}})

    def is_right() -> bool:
        found = cluster.get("deployment", child, namespace)
        assert found["spec"]["replicas"] == 3
        changed = found["spec"]["template"] != after["spec"]["template"]
        return changed and found["metadata"]["labels"]["tasuki.dev/role"] == "prefill"

    cluster.wait("all else is as wanted", is_right, seconds=10)
    cluster.kubectl("delete", "hpa", f"of-{child}", "--namespace", namespace)
    cluster.wait(
        "the spec's number counts again",
        lambda: replicas(cluster, child, namespace) == 1,
        seconds=10,
    )


def test_an_autoscaler_of_the_deployment_itself_scales_its_decode_pods(
    cluster: Cluster, namespace: str
) -> None:
    cluster.apply(deployment("marble", namespace, prefill=NOWHERE, decode=NOWHERE))
    cluster.apply(autoscaler(namespace, "InferenceDeployment", "marble", least=2))
    cluster.wait("it is scaled", lambda: replicas(cluster, "marble-decode", namespace) == 2)
    scaled = cluster.get("infd", "marble", namespace)
    time.sleep(CALM_SECONDS)
    after = cluster.get("infd", "marble", namespace)
    assert scaled["spec"]["decode"]["replicas"] == 2
    assert after["metadata"]["generation"] == scaled["metadata"]["generation"], "the two fight"
    assert replicas(cluster, "marble-decode", namespace) == 2
