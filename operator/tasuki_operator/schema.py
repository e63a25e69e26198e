"""InferenceDeployment, v1alpha1: the one file a user writes.

These models are the schema: `tasuki up` reads files through them, and the CRD is generated from
them (`tasuki_operator.crd`), descriptions included. A field is absent (None) where the engine
decides for itself. `_rules` of a model are CEL: what the API server refuses, in the same words.
What only a cluster has (resources, placement, secrets) means nothing to `tasuki up`.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import Field
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema

from tasuki_common.errors import ConfigError

_DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_SOURCE = re.compile(r"^(hf|file|pvc|oci)://(.+)$")
_HF_ID = re.compile(r"^[\w.-]+/[\w.-]+$", re.ASCII)

MAX_REPLICAS = 1000
MAX_NAME = 52
"""Of a deployment: its children's names are longer by up to eleven characters, labels have 63."""

Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\s,]+$")]
ObjectName = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Label = Annotated[str, Field(max_length=63)]
Quantity = Annotated[
    int | str,
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "pattern": r"^\d+(\.\d+)?(m|[kMGTPE]i?|)$",
        }
    ),
]
"""An amount as Kubernetes writes it: 2, "500m", "16Gi"."""
KubernetesObject = Annotated[
    dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
]
"""A piece of a Kubernetes object that is passed on as it is."""


class _Model(pydantic.BaseModel):
    _rules: ClassVar[tuple[tuple[str, str], ...]] = ()
    """CEL expressions that must hold, each with the sentence for when it does not."""

    model_config = pydantic.ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        strict=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        result = handler.resolve_ref_schema(handler(core))
        if cls._rules:
            rules = [{"rule": rule, "message": message} for rule, message in cls._rules]
            result["x-kubernetes-validations"] = rules
        return result


class Metadata(_Model):
    """Kubernetes object metadata, as far as a file has it."""

    name: str = Field(pattern=_DNS_LABEL)
    """Name of the deployment; also the served name unless `spec.model.servedName` is set."""
    namespace: str | None = Field(default=None, pattern=_DNS_LABEL)
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class SecretKey(_Model):
    """One entry of a Secret in the deployment's namespace."""

    name: ObjectName
    """Of the Secret."""
    key: str = Field(min_length=1, max_length=253)
    """Of the entry in its data."""


class ModelSpec(_Model):
    """Which weights are served, and under which names."""

    _rules = (
        (
            "self.source.matches('^(hf|file|pvc|oci)://.+$')",
            "source must begin with hf://, file://, pvc:// or oci:// and name something",
        ),
        (
            "!self.source.startsWith('hf://')"
            " || self.source.matches('^hf://[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$')",
            "source must name a repository as hf://org/name",
        ),
        (
            "!self.source.startsWith('file://') || self.source.startsWith('file:///')",
            "source must name a folder of the engine's image as file:///folder",
        ),
        (
            "!self.source.startsWith('pvc://')"
            " || self.source.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?$')",
            "source must name a claim as pvc://claim/folder",
        ),
        (
            "!has(self.revision) || self.source.startsWith('hf://')",
            "revision is only known to hf:// sources",
        ),
        (
            "has(self.servedName) == has(oldSelf.servedName)"
            " && (!has(self.servedName) || self.servedName == oldSelf.servedName)",
            "servedName cannot change, clients know it; add an alias, or a second deployment",
        ),
    )

    source: str = Field(max_length=1024)
    """Where the weights are: `hf://org/name`, `file:///folder` (`file://./folder` is relative to
    the file that says so; in a cluster the folder is one of the engine's image),
    `pvc://claim/folder` or `oci://registry/image:tag` (mounted as an image volume)."""
    revision: str | None = Field(default=None, max_length=200)
    """Branch, tag or commit of an `hf://` source; absent: its default branch."""
    served_name: Name | None = None
    """Name that clients send as `model`; absent: `metadata.name`."""
    aliases: list[Name] = Field(default=[], max_length=32)
    """Other names that clients may send."""
    token_secret: SecretKey | None = None
    """Token for an `hf://` source that is not open to all."""

    @pydantic.field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        match = _SOURCE.match(source)
        if match is None:
            raise ValueError("must begin with hf://, file://, pvc:// or oci:// and name something")
        if match[1] == "hf" and not _HF_ID.match(match[2]):
            raise ValueError("must name a repository as hf://org/name")
        if match[1] == "file" and not match[2].startswith(("/", "./", "../")):
            raise ValueError("must name a folder as file:///folder or file://./folder")
        return source

    @pydantic.model_validator(mode="after")
    def _revision_fits(self) -> Self:
        if self.revision is not None and not self.source.startswith("hf://"):
            raise ValueError("revision is only known to hf:// sources")
        return self

    def local(self, base: Path) -> str:
        """The source as a folder or a Hugging Face id, for a machine without a cluster.

        `base` is the folder that `file://./…` is relative to.

        Raises:
            ConfigError: the source needs a cluster, or the folder is not there.
        """
        scheme, _, rest = self.source.partition("://")
        if scheme == "hf":
            return rest
        if scheme != "file":
            raise ConfigError(
                f"spec.model.source is {self.source!r}; {scheme}:// needs a cluster. "
                "On one machine use hf://org/name or file:///folder."
            )
        folder = (base / rest).resolve()
        if not folder.is_dir():
            raise ConfigError(f"spec.model.source is {self.source!r}; there is no folder {folder}.")
        return str(folder)


class EngineSpec(_Model):
    """How prefill and decode pods compute; the same for both, so that they can share state."""

    _rules = (
        (
            "self.blockSize in [8, 16, 32, 64, 128, 256, 512, 1024]",
            "blockSize must be a power of two from 8 to 1024",
        ),
        (
            "self.checkpointInterval % self.blockSize == 0",
            "checkpointInterval must be a multiple of blockSize",
        ),
    )

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is a device, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and KV cache; auto: the checkpoint's on CUDA, float32 on the CPU."""
    state_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the recurrent state; auto: what the model asks for, else float32."""
    max_model_len: Positive | None = None
    """Tokens of prompt and output; absent: what the model was made for, as far as memory goes."""
    max_num_seqs: Positive | None = None
    """Requests computed at once; absent: 256 on CUDA, 32 on the CPU."""
    max_num_batched_tokens: Positive | None = None
    """Tokens computed in one step; absent: 8192 on CUDA, 512 on the CPU."""
    block_size: int = Field(default=16, ge=8, le=1024)
    """Tokens in a KV block, a power of two; prefixes are shared on this grid."""
    checkpoint_interval: Positive = 256
    """Tokens between kept recurrent states, a multiple of `blockSize`."""
    enable_prefix_caching: bool = True
    """Keep computed prefixes for later prompts."""
    hash_algorithm: Literal["xxh3", "sha256"] = "xxh3"
    """Names of cached blocks; sha256 where mutually hostile tenants share a cache."""
    memory_share: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of the free device memory for weights and caches (CUDA)."""
    num_blocks: Positive | None = None
    """KV blocks of a pod; absent: from memory."""
    num_state_slots: Positive | None = None
    """Recurrent states of a pod, running and kept; absent: from memory."""
    max_queued_requests: Positive = 1024
    """Waiting requests beyond which a pod answers 503."""
    cpu_threads: Positive | None = None
    """Threads of one pod on the CPU; absent: half of the cores."""
    extra: KubernetesObject = {}
    """Other settings of the engine, by their names there (`num_window_blocks: 64`)."""

    @pydantic.model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"blockSize is {self.block_size}; it must be a power of two")
        if self.checkpoint_interval % self.block_size:
            raise ValueError(
                f"checkpointInterval is {self.checkpoint_interval}; "
                f"it must be a multiple of blockSize ({self.block_size})"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """The fields of `EngineConfig` that are set here."""
        return {**self.model_dump(exclude_none=True, exclude={"extra"}), **self.extra}


class Resources(_Model):
    """What one pod asks of its node."""

    requests: dict[str, Quantity] = {"cpu": "500m", "memory": "1Gi"}
    """What the scheduler sets aside."""
    limits: dict[str, Quantity] = {}
    """What the pod may use at most."""


class Accelerator(_Model):
    """Devices of one pod."""

    resource: str = Field(default="nvidia.com/gpu", max_length=317)
    """Name under which the platform's device plug-in offers them."""
    count: Positive = 1
    """How many; the engine computes on one, others are for what a pod template adds."""


class EnvVar(_Model):
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


class PodsSpec(_Model):
    """Pods of one role."""

    resources: Resources = Resources()
    """Processor and memory of one pod."""
    accelerator: Accelerator | None = None
    """Devices of one pod; absent: it computes on the CPU."""
    node_selector: dict[str, Label] = {}
    """Labels that a node must have."""
    tolerations: list[KubernetesObject] = Field(default=[], max_length=64)
    """Taints that the pods accept, as in a pod."""
    affinity: KubernetesObject = {}
    """Affinity, as in a pod."""
    image: str | None = Field(default=None, min_length=1, max_length=1024)
    """Of the engine; absent: the one that belongs to the operator's version."""
    image_pull_secrets: list[ObjectName] = Field(default=[], max_length=16)
    """Secrets for the image's registry."""
    env: list[EnvVar] = Field(default=[], max_length=256)
    """Further environment variables of the engine."""
    pod_template: KubernetesObject = {}
    """Laid over the pod template (`metadata`, `spec`) that the operator makes: mappings are merged,
    lists of named things by name, anything else replaced."""


class PrefillSpec(PodsSpec):
    """Pods that compute prompts."""

    replicas: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    """0: decode pods compute their prompts themselves."""


class DecodeSpec(PodsSpec):
    """Pods that take over a prompt's state and generate tokens."""

    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS)
    """Number of pods; `kubectl scale` and autoscalers set it."""


class TransferSpec(_Model):
    """How state moves from a prefill pod to a decode pod."""

    backends: list[Literal["nixl", "tcp"]] | None = Field(default=None, min_length=1)
    """In order of preference; a pair of pods uses the first that both have. Absent: nixl, tcp on
    CUDA; tcp on the CPU, where NIXL's progress thread would take a core from the model."""
    lease_seconds: float = Field(default=30.0, gt=0.0, le=3600.0)
    """How long a prefill pod keeps state that nobody fetches or renews."""
    key_secret: SecretKey | None = None
    """Key that the pods show each other; absent: the operator makes one."""


class PrefixIndexSpec(_Model):
    """The Redis through which gateways find pods and prefixes."""

    url_secret: SecretKey | None = None
    """Redis of your own, as a URL; its gateways must use the same. Absent: the operator's."""


class RolloutSpec(_Model):
    """How pods are replaced when the model, the engine or the pods' template changes."""

    _rules = (
        (
            "self.maxSurge > 0 || self.maxUnavailable > 0",
            "maxSurge and maxUnavailable cannot both be 0: no pod could ever be replaced",
        ),
    )

    max_surge: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    """Pods of a role beyond its replicas; 0 where there is no spare device."""
    max_unavailable: int = Field(default=0, ge=0, le=MAX_REPLICAS)
    """Pods of a role that may be missing meanwhile."""
    start_seconds: int = Field(default=1800, ge=10, le=86400)
    """Time for a pod to load its model; beyond it the pod is started anew, and the rollout is
    reported as failed while the old pods go on serving."""
    drain_seconds: int = Field(default=60, ge=1, le=86400)
    """How long a pod that leaves waits for its requests and leases (never less than
    `transfer.leaseSeconds`)."""

    @pydantic.model_validator(mode="after")
    def _can_move(self) -> Self:
        if not self.max_surge and not self.max_unavailable:
            raise ValueError("maxSurge and maxUnavailable cannot both be 0")
        return self


class GatewaySpec(_Model):
    """How the gateway treats this model."""

    prefill_threshold: int = Field(default=256, ge=0)
    """Prompts with fewer tokens to compute stay on the decode pod: a hand-over costs more."""


class Spec(_Model):
    """What is served, and by how many pods of each role."""

    model: ModelSpec
    engine: EngineSpec = EngineSpec()
    prefill: PrefillSpec = PrefillSpec()
    decode: DecodeSpec = DecodeSpec()
    transfer: TransferSpec = TransferSpec()
    prefix_index: PrefixIndexSpec = PrefixIndexSpec()
    gateway: GatewaySpec = GatewaySpec()
    rollout: RolloutSpec = RolloutSpec()


class InferenceDeployment(_Model):
    """A model served by prefill pods and decode pods behind one OpenAI endpoint."""

    api_version: Literal["tasuki.dev/v1alpha1"]
    kind: Literal["InferenceDeployment"]
    metadata: Metadata
    spec: Spec

    @property
    def served_name(self) -> str:
        """The name clients send as `model`."""
        return self.spec.model.served_name or self.metadata.name
