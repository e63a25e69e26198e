"""From a deployment's spec to the manifests of its children: pure, the same input the same output.

Values stand as the API server stores them, and nothing stands here that it would fill in: what is
not here belongs to others (autoscalers, other controllers, people).
"""

import dataclasses
import hashlib
from typing import Any

import msgspec

from tasuki_operator import names, pods
from tasuki_operator.crd import GROUP, VERSION
from tasuki_operator.credentials import Credentials
from tasuki_operator.names import ROLES, Role
from tasuki_operator.pods import Manifest
from tasuki_operator.schema import Spec
from tasuki_operator.schema_base import SecretKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """The InferenceDeployment that children belong to."""

    namespace: str
    name: str
    uid: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the operator knows beside the spec."""

    image: str
    """Of the engine, where the spec names none."""
    redis_url: str
    system_namespace: str
    """Where the gateways are."""
    metrics_namespace: str
    """Where Prometheus is."""
    pod_monitors: bool
    """Whether the cluster knows PodMonitor."""


def desired(
    owner: Owner, spec: Spec, around: Surroundings, credentials: Credentials
) -> list[Manifest]:
    """All children of the deployment but its transfer Secret, in the order to apply them."""
    revision = revision_of(spec)
    children = [
        _child(owner, "v1", "ServiceAccount", owner.name, automountServiceAccountToken=False),
        _config_map(owner, spec, revision),
        _policy_map(owner, spec, credentials),
    ]
    for role in ROLES:
        name = names.of_role(owner.name, role)
        children += [
            _service(owner, role, name),
            _network_policy(owner, spec, role, name, around),
            _disruption_budget(owner, role, name),
            _deployment(owner, spec, role, name, around, revision, credentials),
        ]
        if around.pod_monitors:
            children.append(_pod_monitor(owner, role, name))
    return children


def revision_of(spec: Spec) -> str:
    """Changes with the model and the engine's settings, thus with the fingerprint."""
    text = f"{spec.model.source}\n{pods.engine_json(spec)}"
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def transfer_secret(owner: Owner, key: str) -> Manifest:
    """The Secret with `key` that prefill and decode pods show each other."""
    return _child(
        owner,
        "v1",
        "Secret",
        names.transfer_secret(owner.name),
        type="Opaque",
        immutable=True,
        stringData={names.KEY_ENTRY: key},
    )


def _child(
    owner: Owner, version: str, kind: str, name: str, role: Role | None = None, **body: Any
) -> Manifest:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner.namespace,
            "labels": names.labels(owner.name, role),
            "ownerReferences": [
                {
                    "apiVersion": f"{GROUP}/{VERSION}",
                    "kind": "InferenceDeployment",
                    "name": owner.name,
                    "uid": owner.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        **body,
    }


def _config_map(owner: Owner, spec: Spec, revision: str) -> Manifest:
    """Immutable: a pod of the old revision that starts anew finds the settings it had."""
    data = {"engine.json": pods.engine_json(spec)}
    name = names.engine_config(owner.name, revision)
    child = _child(owner, "v1", "ConfigMap", name, data=data, immutable=True)
    child["metadata"]["labels"][names.REVISION] = revision
    return child


def _policy_map(owner: Owner, spec: Spec, credentials: Credentials) -> Manifest:
    """Of no revision: pods follow it while they run."""
    policy = spec.gateway.policy(credentials.key_digests)
    data = {names.POLICY_ENTRY: msgspec.json.encode(policy).decode()}
    return _child(owner, "v1", "ConfigMap", names.gateway_policy(owner.name), data=data)


def _service(owner: Owner, role: Role, name: str) -> Manifest:
    """Headless, to find the pods by name; gateways find them through the index."""
    ports = [{"name": "http", "port": names.HTTP_PORT, "protocol": "TCP", "targetPort": "http"}]
    spec = {
        "type": "ClusterIP",
        "clusterIP": "None",
        "selector": names.selector(owner.name, role),
        "ports": ports,
    }
    return _child(owner, "v1", "Service", name, role, spec=spec)


def _network_policy(
    owner: Owner, spec: Spec, role: Role, name: str, around: Surroundings
) -> Manifest:
    """Requests only from gateways, metrics only from Prometheus, state only between its pods."""
    gateways = {
        "namespaceSelector": _namespace(around.system_namespace),
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "gateway"}},
    }
    prometheus = {"namespaceSelector": _namespace(around.metrics_namespace)}
    ingress: list[Manifest] = [
        {"from": [gateways, prometheus], "ports": [{"protocol": "TCP", "port": "http"}]}
    ]
    transfer: list[Manifest] = []
    if role == "prefill":
        transfer.append({"protocol": "TCP", "port": "transfer"})
    if any("nixl" in pods.backends(spec, each) for each in (spec.prefill, spec.decode)):
        first, last = names.NIXL_PORTS
        transfer.append({"protocol": "TCP", "port": first, "endPort": last})
    if transfer:
        peers = {"podSelector": {"matchLabels": {names.DEPLOYMENT: owner.name}}}
        ingress.append({"from": [peers], "ports": transfer})
    body = {
        "podSelector": {"matchLabels": names.selector(owner.name, role)},
        "policyTypes": ["Ingress"],
        "ingress": ingress,
    }
    return _child(owner, "networking.k8s.io/v1", "NetworkPolicy", name, role, spec=body)


def _namespace(name: str) -> Manifest:
    return {"matchLabels": {"kubernetes.io/metadata.name": name}}


def _disruption_budget(owner: Owner, role: Role, name: str) -> Manifest:
    """A node drain takes one pod of a role at a time, and any that does not work."""
    spec = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": names.selector(owner.name, role)},
    }
    return _child(owner, "policy/v1", "PodDisruptionBudget", name, role, spec=spec)


def _deployment(
    owner: Owner,
    spec: Spec,
    role: Role,
    name: str,
    around: Surroundings,
    revision: str,
    credentials: Credentials,
) -> Manifest:
    given = spec.transfer.key_secret
    made = SecretKey(name=names.transfer_secret(owner.name), key=names.KEY_ENTRY)
    rollout = spec.rollout
    template = pods.template(
        owner.name,
        spec,
        role,
        image=around.image,
        redis_url=spec.prefix_index.url or around.redis_url,
        config_map=names.engine_config(owner.name, revision),
        revision=revision,
        key=given or made,
        annotations={names.SECRETS: credentials.digest},
    )
    body = {
        "replicas": (spec.prefill if role == "prefill" else spec.decode).replicas,
        "revisionHistoryLimit": 2,
        "progressDeadlineSeconds": rollout.start_seconds + 60,
        "selector": {"matchLabels": names.selector(owner.name, role)},
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {
                "maxSurge": rollout.max_surge,
                "maxUnavailable": rollout.max_unavailable,
            },
        },
        "template": template,
    }
    return _child(owner, "apps/v1", "Deployment", name, role, spec=body)


def _pod_monitor(owner: Owner, role: Role, name: str) -> Manifest:
    spec = {
        "selector": {"matchLabels": names.selector(owner.name, role)},
        "podTargetLabels": [names.DEPLOYMENT, names.ROLE],
        "podMetricsEndpoints": [{"port": "http", "path": "/metrics"}],
    }
    return _child(owner, "monitoring.coreos.com/v1", "PodMonitor", name, role, spec=spec)
