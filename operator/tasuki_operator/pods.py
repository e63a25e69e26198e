"""The pod template of a role: one container, `engine`, configured by environment alone."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tasuki_common.listening import EVERYWHERE
from tasuki_operator import names
from tasuki_operator.names import Role
from tasuki_operator.schema import ModelSpec, Spec
from tasuki_operator.schema_base import SecretKey
from tasuki_operator.schema_pods import PodsSpec

_CACHE, _SHARED, _TEMP, _MODEL = "/cache", "/dev/shm", "/tmp", "/model"
_POLICY = "/etc/tasuki/policy"
_LEAVE_SECONDS = 30
"""Beyond the drain: withdrawing from the index, stopping the engine, closing streams."""
_SHARED_MEMORY = "1Gi"

Manifest = dict[str, Any]


def engine_settings(spec: Spec) -> dict[str, Any]:
    """What TASUKI_ENGINE holds."""
    settings = spec.engine.settings()
    if spec.model.revision is not None:
        settings["revision"] = spec.model.revision
    return settings


def drain_seconds(spec: Spec) -> int:
    """How long a pod that leaves waits: its leases end within this time."""
    return max(spec.rollout.drain_seconds, math.ceil(spec.transfer.lease_seconds))


def backends(spec: Spec, pods: PodsSpec) -> Sequence[str]:
    """Transports of the role's pods, best first."""
    return spec.transfer.backends or (["nixl", "tcp"] if pods.accelerator else ["tcp"])


def template(
    name: str,
    spec: Spec,
    role: Role,
    *,
    image: str,
    redis_url: str,
    config_map: str,
    revision: str,
    key: SecretKey,
    annotations: Mapping[str, str],
) -> Manifest:
    """Metadata and spec of the role's pods, with the user's overlay on top."""
    pods: PodsSpec = spec.prefill if role == "prefill" else spec.decode
    pod_spec: Manifest = {
        "serviceAccountName": name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": drain_seconds(spec) + _LEAVE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": names.selector(name, role)},
            }
        ],
        "containers": [
            _container(name, spec, role, pods, image, redis_url, config_map, key),
        ],
        "volumes": _volumes(name, spec.model),
    }
    if pods.node_selector:
        pod_spec["nodeSelector"] = dict(pods.node_selector)
    if pods.tolerations:
        pod_spec["tolerations"] = list(pods.tolerations)
    if pods.affinity:
        pod_spec["affinity"] = pods.affinity
    if pods.image_pull_secrets:
        pod_spec["imagePullSecrets"] = [{"name": secret} for secret in pods.image_pull_secrets]
    result = {
        "metadata": {
            "labels": names.labels(name, role) | {names.REVISION: revision},
            "annotations": {"kubectl.kubernetes.io/default-container": "engine", **annotations},
        },
        "spec": pod_spec,
    }
    merged: Manifest = overlay(result, pods.pod_template)
    return merged


def overlay(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings merged, lists of named things by name, others replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = overlay(base[key], value) if key in base else value
        return merged
    if _named(base) and _named(over):
        by_name = {item["name"]: item for item in base}
        for item in over:
            by_name[item["name"]] = overlay(by_name.get(item["name"], {}), item)
        return list(by_name.values())
    return over


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for item in value
    )


def _container(
    name: str,
    spec: Spec,
    role: Role,
    pods: PodsSpec,
    image: str,
    redis_url: str,
    config_map: str,
    key: SecretKey,
) -> Manifest:
    requests = {key: str(value) for key, value in pods.resources.requests.items()}
    limits = {key: str(value) for key, value in pods.resources.limits.items()}
    if pods.accelerator is not None:
        limits[pods.accelerator.resource] = str(pods.accelerator.count)
    ports = [{"name": "http", "containerPort": names.HTTP_PORT, "protocol": "TCP"}]
    if role == "prefill":
        ports.append({"name": "transfer", "containerPort": names.TRANSFER_PORT, "protocol": "TCP"})
    start = spec.rollout.start_seconds
    return {
        "name": "engine",
        "image": pods.image or image,
        "imagePullPolicy": "IfNotPresent",
        "args": [role],
        "ports": ports,
        "env": _environment(name, spec, pods, redis_url, config_map, key),
        "resources": {"requests": requests, "limits": limits},
        "startupProbe": _probe("/ready", period=2, failures=math.ceil(start / 2)),
        "readinessProbe": _probe("/ready", period=2, failures=1),
        "livenessProbe": _probe("/health", period=10, failures=3),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(spec.model),
    }


def _probe(path: str, *, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _environment(
    name: str, spec: Spec, pods: PodsSpec, redis_url: str, config_map: str, key: SecretKey
) -> list[Manifest]:
    """POD_ variables come first: the others refer to them. The user's take the place of ours."""
    transfer, model, transports = spec.transfer, spec.model, backends(spec, pods)
    url = spec.prefix_index.url_secret
    environment: list[Manifest] = [
        _field("POD_NAME", "metadata.name"),
        _field("POD_NAMESPACE", "metadata.namespace"),
        _field("POD_IP", "status.podIP"),
        _value("HOME", _CACHE),
        _value("TASUKI_MODEL", _location(model)),
        _value("TASUKI_SERVED_NAME", model.served_name or name),
        _value("TASUKI_ALIASES", ",".join(model.aliases)),
        _value("TASUKI_HOST", EVERYWHERE),
        _value("TASUKI_PORT", str(names.HTTP_PORT)),
        _value("TASUKI_ADVERTISE_HOST", "$(POD_IP)"),
        _value("TASUKI_TRANSFER_HOST", "$(POD_IP)"),
        _value("TASUKI_TRANSFER_PORT", str(names.TRANSFER_PORT)),
        _value("TASUKI_TRANSFER_BACKENDS", ",".join(transports)),
        _secret("TASUKI_TRANSFER_KEY", key),
        _value("TASUKI_POD_NAME", "$(POD_NAMESPACE)/$(POD_NAME)"),
        _value("TASUKI_DEPLOYMENT", f"$(POD_NAMESPACE)/{name}"),
        _value("TASUKI_LEASE_SECONDS", str(transfer.lease_seconds)),
        _value("TASUKI_POLICY_FILE", f"{_POLICY}/{names.POLICY_ENTRY}"),
        _value("TASUKI_DRAIN_SECONDS", str(drain_seconds(spec))),
        {
            "name": "TASUKI_ENGINE",
            "valueFrom": {"configMapKeyRef": {"name": config_map, "key": "engine.json"}},
        },
        _secret("TASUKI_REDIS_URL", url) if url else _value("TASUKI_REDIS_URL", redis_url),
    ]
    if "nixl" in transports:
        first, last = names.NIXL_PORTS
        environment.append(_value("UCX_TCP_PORT_RANGE", f"{first}-{last}"))
    if model.token_secret is not None:
        environment.append(_secret("HF_TOKEN", model.token_secret))
    by_name = {variable["name"]: variable for variable in environment}
    for variable in pods.env:
        own = {"name": variable.name, "value": variable.value, "valueFrom": variable.value_from}
        by_name[variable.name] = {key: value for key, value in own.items() if value is not None}
    return list(by_name.values())


def _value(name: str, value: str) -> Manifest:
    return {"name": name, "value": value}


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _secret(name: str, secret: SecretKey) -> Manifest:
    reference = {"name": secret.name, "key": secret.key}
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _location(model: ModelSpec) -> str:
    """What the engine loads: a folder in the container, or a Hugging Face id."""
    scheme, _, rest = model.source.partition("://")
    if scheme == "pvc":
        folder = rest.partition("/")[2].strip("/")
        return f"{_MODEL}/{folder}" if folder else _MODEL
    return _MODEL if scheme == "oci" else rest


def _volumes(name: str, model: ModelSpec) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "policy", "configMap": {"name": names.gateway_policy(name)}},
        {"name": "cache", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}},
    ]
    scheme, _, rest = model.source.partition("://")
    if scheme == "pvc":
        claim = {"claimName": rest.partition("/")[0], "readOnly": True}
        volumes.append({"name": "model", "persistentVolumeClaim": claim})
    elif scheme == "oci":
        image = {"reference": rest, "pullPolicy": "IfNotPresent"}
        volumes.append({"name": "model", "image": image})
    return volumes


def _mounts(model: ModelSpec) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "policy", "mountPath": _POLICY, "readOnly": True},
        {"name": "cache", "mountPath": _CACHE},
        {"name": "tmp", "mountPath": _TEMP},
        {"name": "shm", "mountPath": _SHARED},
    ]
    if model.source.startswith(("pvc://", "oci://")):
        mounts.append({"name": "model", "mountPath": _MODEL, "readOnly": True})
    return mounts


def engine_json(spec: Spec) -> str:
    """The engine's settings as the ConfigMap holds them; equal settings, equal text."""
    return json.dumps(engine_settings(spec), sort_keys=True)
