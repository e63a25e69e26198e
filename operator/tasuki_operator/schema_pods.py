"""Pods of one role, as a spec describes them."""

from typing import Self

import pydantic
from pydantic import Field

from tasuki_operator.schema_base import (
    MAX_REPLICAS,
    KubernetesObject,
    Label,
    Model,
    ObjectName,
    Positive,
    Quantity,
)


class Resources(Model):
    """What one pod asks of its node."""

    requests: dict[str, Quantity] = Field(default={"cpu": "500m", "memory": "1Gi"})
    """What the scheduler sets aside."""
    limits: dict[str, Quantity] = Field(default={})
    """What the pod may use at most."""


class Accelerator(Model):
    """Devices of one pod."""

    resource: str = Field(default="nvidia.com/gpu", max_length=317)
    """Name under which the platform's device plug-in offers them."""
    count: Positive = 1
    """How many; the engine computes on one, others are for what a pod template adds."""


class Parallelism(Model):
    """How one pod spreads the model over devices."""

    tensor: int = Field(default=1, ge=1, le=1)
    """Devices that share each layer. The engine computes on one device, so 1 is the only value
    yet; more throughput comes with more `replicas`."""


class EnvVar(Model):
    """One environment variable of the engine's container."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)
    """TASUKI_ names belong to the operator."""
    value: str | None = None
    """The text itself."""
    value_from: KubernetesObject | None = None
    """A reference, as in a pod: secretKeyRef, configMapKeyRef, fieldRef or resourceFieldRef."""

    _rules = (
        ("!self.name.startsWith('TASUKI_')", "TASUKI_ variables are set by the operator"),
        ("has(self.value) != has(self.valueFrom)", "give either value or valueFrom"),
    )

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.name.startswith("TASUKI_"):
            raise ValueError("TASUKI_ variables are set by the operator")
        if (self.value is None) == (self.value_from is None):
            raise ValueError("give either value or valueFrom")
        return self


class PodsSpec(Model):
    """Pods of one role."""

    replicas: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    """Number of pods."""
    resources: Resources = Resources()
    """Processor and memory of one pod."""
    accelerator: Accelerator | None = None
    """Devices of one pod; absent: it computes on the CPU."""
    parallelism: Parallelism = Parallelism()
    """How one pod spreads the model over devices."""
    node_selector: dict[str, Label] = Field(default={})
    """Labels that a node must have."""
    tolerations: list[KubernetesObject] = Field(default=[], max_length=64)
    """Taints that the pods accept, as in a pod."""
    affinity: KubernetesObject = Field(default={})
    """Affinity, as in a pod."""
    image: str | None = Field(default=None, min_length=1, max_length=1024)
    """Of the engine; absent: the one that belongs to the operator's version."""
    image_pull_secrets: list[ObjectName] = Field(default=[], max_length=16)
    """Secrets for the image's registry."""
    env: list[EnvVar] = Field(
        default=[],
        max_length=256,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    """Further environment variables of the engine; one that the operator sets too counts as it is
    here."""
    pod_template: KubernetesObject = Field(default={})
    """Laid over the pod template (`metadata`, `spec`) that the operator makes: mappings are merged,
    lists of named things by name, anything else replaced."""

    @pydantic.field_validator("env")
    @classmethod
    def _named_once(cls, env: list[EnvVar]) -> list[EnvVar]:
        names = [variable.name for variable in env]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names {twice[0]} twice; keep one")
        return env


class PrefillSpec(PodsSpec):
    """Pods that compute prompts."""

    replicas: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    """Number of pods; 0: decode pods compute their prompts themselves."""


class DecodeSpec(PodsSpec):
    """Pods that take over a prompt's state and generate tokens."""

    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    """Number of pods; `kubectl scale` and autoscalers set it."""
