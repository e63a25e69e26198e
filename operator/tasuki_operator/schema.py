"""InferenceDeployment, v1alpha1: the one file a user writes.

These models are the schema: `tasuki up` reads files through them, and the CRD is generated from
them (`tasuki_operator.crd`), descriptions included. A field is absent (None) where the engine
decides for itself. `_rules` of a model are CEL: what the API server refuses, in the same words.
What only a cluster has (resources, placement, secrets) means nothing to `tasuki up`.
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
from pydantic import Field

from tasuki_common.errors import ConfigError
from tasuki_common.policy import Policy
from tasuki_operator.schema_base import (
    MAX_REPLICAS,
    KubernetesObject,
    Model,
    Name,
    Positive,
    SecretKey,
)
from tasuki_operator.schema_pods import DecodeSpec, PrefillSpec

_DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_SOURCE = re.compile(r"^(hf|file|pvc|oci)://(.+)$")
_REDIS = re.compile(r"^(redis|rediss|redis\+cluster)://[^@ ]+$")
_HF_ID = re.compile(r"^[\w.-]+/[\w.-]+$", re.ASCII)

MAX_NAME = 52
"""Of a deployment: its children's names are longer by up to eleven characters, labels have 63."""


class Metadata(Model):
    """Kubernetes object metadata, as far as a file has it."""

    name: str = Field(pattern=_DNS_LABEL)
    """Name of the deployment; also the served name unless `spec.model.servedName` is set."""
    namespace: str | None = Field(default=None, pattern=_DNS_LABEL)
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})


class ModelSpec(Model):
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
    """Token for an `hf://` source that is not open to all; pods read it when they start."""

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


class EngineSpec(Model):
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
    """Tokens computed in one step, and a sixteenth more to end a prompt; absent: 8192 on CUDA, 512
    on the CPU."""
    block_size: int = Field(default=16, ge=8, le=1024)
    """Tokens in a KV block, a power of two; prefixes are shared on this grid."""
    checkpoint_interval: Positive = 256
    """Tokens between kept recurrent states, a multiple of `blockSize`."""
    enable_prefix_caching: bool = True
    """Keep computed prefixes for later prompts."""
    hash_algorithm: Literal["xxh3", "sha256"] = "xxh3"
    """Names of cached blocks; sha256 where mutually hostile tenants share a cache."""
    memory_share: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of the device's memory for a pod's weights and caches, as far as it is free (CUDA)."""
    num_blocks: Positive | None = None
    """KV blocks of a pod; absent: from memory."""
    num_state_slots: Positive | None = None
    """Recurrent states of a pod, running and kept; absent: from memory."""
    max_queued_requests: Positive = 1024
    """Waiting requests beyond which a pod answers 503."""
    cpu_threads: Positive | None = None
    """Threads of one pod on the CPU; absent: half of the cores."""
    extra: KubernetesObject = Field(default={})
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


class TransferSpec(Model):
    """How state moves from a prefill pod to a decode pod."""

    backends: list[Literal["nixl", "tcp"]] | None = Field(default=None, min_length=1)
    """In order of preference; a pair of pods uses the first that both have. Absent: nixl, tcp on
    CUDA; tcp on the CPU, where NIXL's progress thread would take a core from the model."""
    lease_seconds: float = Field(default=30.0, gt=0.0, le=3600.0)
    """How long a prefill pod keeps state that nobody fetches or renews."""
    key_secret: SecretKey | None = None
    """Key that the pods show each other; absent: the operator makes one. Pods are replaced when it
    changes."""


class PrefixIndexSpec(Model):
    """The Redis through which gateways find pods and prefixes; neither field: the operator's."""

    _rules = (
        ("!has(self.url) || !has(self.urlSecret)", "give either url or urlSecret"),
        (
            "!has(self.url) || self.url.matches('^(redis|rediss|redis[+]cluster)://[^@ ]+$')",
            "url must begin with redis://, rediss:// or redis+cluster:// and hold no password; "
            "one with a password belongs into urlSecret",
        ),
    )

    url: str | None = Field(default=None, max_length=1024)
    """Redis of your own that wants no password, as `redis://host:6379`; gateways must use the
    same."""
    url_secret: SecretKey | None = None
    """Redis of your own, as a URL with its password; gateways must use the same. Pods are replaced
    when it changes."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.url is not None and self.url_secret is not None:
            raise ValueError("give either url or urlSecret")
        if self.url is not None and not _REDIS.match(self.url):
            raise ValueError(
                "url must begin with redis://, rediss:// or redis+cluster:// and hold no password; "
                "one with a password belongs into urlSecret"
            )
        return self


class RolloutSpec(Model):
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


class GatewayLimits(Model):
    """What clients of the model may take; absent: as much as it and the gateway can give."""

    max_requests: Positive | None = None
    """Requests that one gateway serves at a time; one more is answered 429."""
    max_prompt_tokens: Positive | None = None
    """Of one prompt; a longer one is answered 400."""
    max_output_tokens: Positive | None = None
    """Of one choice; more cannot be asked for, and who asks for none in particular gets these."""


class GatewaySpec(Model):
    """How gateways treat the model. They follow a change within about a minute; no pod is
    replaced."""

    exposed: bool = True
    """Whether gateways list and serve the model. Its pods run either way: it can be made ready
    before clients see it, and be taken from them without being stopped."""
    api_key_secret: SecretKey | None = None
    """API keys that open the model, one or more with white space between them, each of 16
    characters or more; no other key does. The operator hands on digests of them, never the keys.
    Absent: the gateway's own key opens it, or it is open where the gateway has none."""
    limits: GatewayLimits = GatewayLimits()
    """What clients of the model may take."""
    prefill_threshold: int = Field(default=256, ge=0)
    """Prompts with fewer tokens to compute stay on the decode pod: a hand-over costs more."""

    def policy(self, key_digests: tuple[str, ...]) -> Policy:
        """What the pods announce; `key_digests`: of the keys in `api_key_secret`."""
        return Policy(
            exposed=self.exposed,
            key_digests=key_digests,
            prefill_threshold=self.prefill_threshold,
            **self.limits.model_dump(),
        )


class Spec(Model):
    """What is served, and by how many pods of each role."""

    model: ModelSpec
    engine: EngineSpec = EngineSpec()
    prefill: PrefillSpec = PrefillSpec()
    decode: DecodeSpec = DecodeSpec()
    transfer: TransferSpec = TransferSpec()
    prefix_index: PrefixIndexSpec = PrefixIndexSpec()
    gateway: GatewaySpec = GatewaySpec()
    rollout: RolloutSpec = RolloutSpec()


class InferenceDeployment(Model):
    """A model served by prefill pods and decode pods behind one OpenAI endpoint."""

    api_version: Literal["tasuki.dev/v1alpha1"]
    kind: Literal["InferenceDeployment"]
    metadata: Metadata
    spec: Spec

    @property
    def served_name(self) -> str:
        """The name clients send as `model`."""
        return self.spec.model.served_name or self.metadata.name
