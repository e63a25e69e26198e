"""Kinds of Kubernetes objects that the operator touches, and their addresses at the API server."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind; all of them are namespaced."""

    api_version: str
    name: str
    plural: str

    @property
    def group(self) -> str:
        """Empty for the core group."""
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        """Within the group."""
        return self.api_version.rpartition("/")[2]

    def path(self, namespace: str | None, name: str = "") -> str:
        """URL path of one object, of all in a namespace, or (None) of all in the cluster."""
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"
        parts = [root, *(("namespaces", namespace) if namespace else ()), self.plural, name]
        return "/".join(part for part in parts if part)


INFERENCE_DEPLOYMENT = Kind("tasuki.dev/v1alpha1", "InferenceDeployment", "inferencedeployments")
POD = Kind("v1", "Pod", "pods")
SECRET = Kind("v1", "Secret", "secrets")
EVENT = Kind("v1", "Event", "events")
AUTOSCALER = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
POD_MONITOR = Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors")

CHILDREN = (
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    CONFIG_MAP,
    Kind("v1", "Service", "services"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    DEPLOYMENT,
    POD_MONITOR,
)
BY_NAME = {kind.name: kind for kind in (INFERENCE_DEPLOYMENT, POD, SECRET, EVENT, LEASE, *CHILDREN)}
