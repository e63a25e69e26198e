"""InferenceDeployment, v1alpha1: the one file a user writes.

These models are the schema: `tasuki up` reads files through them, and the CRD is generated from
them, descriptions included. A field is absent (None) where the engine decides for itself.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field
from pydantic.alias_generators import to_camel

from tasuki_common.errors import ConfigError

_DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_SOURCE = re.compile(r"^(hf|file|pvc|oci)://(.+)$")
_HF_ID = re.compile(r"^[\w.-]+/[\w.-]+$", re.ASCII)

Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\s,]+$")]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        strict=True,
        use_attribute_docstrings=True,
    )


class Metadata(_Model):
    """Kubernetes object metadata, as far as a file has it."""

    name: str = Field(pattern=_DNS_LABEL)
    """Name of the deployment; also the served name unless `spec.model.servedName` is set."""
    namespace: str | None = Field(default=None, pattern=_DNS_LABEL)
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class ModelSpec(_Model):
    """Which weights are served, and under which names."""

    source: str
    """Where the weights are: `hf://org/name`, `file:///folder` (`file://./folder` is relative to
    the file that says so), `pvc://claim/folder` or `oci://registry/image:tag`."""
    revision: str | None = None
    """Branch, tag or commit of an `hf://` source; absent: its default branch."""
    served_name: Name | None = None
    """Name that clients send as `model`; absent: `metadata.name`."""
    aliases: list[Name] = []
    """Other names that clients may send."""

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
    block_size: int = Field(default=16, ge=8)
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
        return self.model_dump(exclude_none=True)


class PrefillSpec(_Model):
    """Pods that compute prompts."""

    replicas: int = Field(default=1, ge=0)
    """0: decode pods compute their prompts themselves."""


class DecodeSpec(_Model):
    """Pods that take over a prompt's state and generate tokens."""

    replicas: Positive = 1


class TransferSpec(_Model):
    """How state moves from a prefill pod to a decode pod."""

    backends: list[Literal["nixl", "tcp"]] | None = Field(default=None, min_length=1)
    """In order of preference; a pair of pods uses the first that both have. Absent: nixl, tcp on
    CUDA; tcp on the CPU, where NIXL's progress thread would take a core from the model."""
    lease_seconds: float = Field(default=30.0, gt=0.0, le=3600.0)
    """How long a prefill pod keeps state that nobody fetches or renews."""


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
    gateway: GatewaySpec = GatewaySpec()


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
