"""Small Kubernetes objects that tests put into a cluster."""

from typing import Any

from cluster import images

Object = dict[str, Any]
SAFE = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


def pod_spec(*command: str, port: int | None = None) -> Object:
    """A pod of one busybox container that Pod Security `restricted` admits."""
    container: Object = {
        "name": "main",
        "image": images.BUSYBOX,
        "imagePullPolicy": "Never",
        "args": list(command),
        "securityContext": SAFE,
    }
    if port is not None:
        probe = {"httpGet": {"port": port}, "periodSeconds": 1}
        container |= {"ports": [{"containerPort": port}], "readinessProbe": probe}
    return {
        "containers": [container],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": 0,
    }


def pod(name: str, namespace: str, spec: Object) -> Object:
    """A Pod that runs once."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {**spec, "restartPolicy": "Never"},
    }


def deployment(name: str, namespace: str, spec: Object, replicas: int = 1) -> Object:
    """A Deployment whose pods carry the label app=NAME."""
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def service(name: str, namespace: str, port: int) -> Object:
    """A Service with a virtual address for the pods app=NAME."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": port}]},
    }
