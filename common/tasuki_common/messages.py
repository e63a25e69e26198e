"""What gateway and pods say to each other: msgspec structs, one per message.

Times in messages are durations in seconds, never points in time: clocks of two machines differ.
"""

from typing import Literal

import msgspec

from tasuki_common.hashing import HashAlgorithm
from tasuki_common.policy import Policy
from tasuki_common.sampling import SamplingParams

Role = Literal["prefill", "decode"]
Endpoint = Literal["chat", "completion"]


class Load(msgspec.Struct, frozen=True):
    """How busy a pod is; part of each heartbeat."""

    running: int = 0
    """Requests in the running batch."""
    waiting: int = 0
    """Requests admitted and not yet running."""
    waiting_tokens: int = 0
    """Prompt tokens still to compute, over waiting and running requests."""
    blocks_free: int = 0
    """KV blocks that a new request could take (free or evictable)."""
    blocks_total: int = 0
    leases: int = 0
    """Prefixes kept for other pods."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One pod, as it announces itself: all that a gateway must know to route to it."""

    pod: str
    """Name, unique among live pods (the Kubernetes pod name, or role-number on one machine)."""
    incarnation: str
    """Random, new at every start of the process."""
    role: Role
    model: str
    """Served name."""
    aliases: tuple[str, ...] = ()
    fingerprint: str
    """Hash of weights, dtype and cache layout; only pods of one fingerprint are paired."""
    url: str
    """Base of the pod's HTTP API, http://host:port."""
    transfer: tuple[str, ...] = ()
    """Transports it can use, best first ("nixl", "tcp")."""
    max_model_len: int
    block_size: int
    hash_algorithm: HashAlgorithm
    hash_revision: str
    """`revision` of `hashing.root_hash`."""
    needs_checkpoint: bool
    """True for models with recurrent layers: a prefix resumes only at a checkpoint."""
    draining: bool = False
    policy: Policy = Policy()
    load: Load = Load()


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """GET /card of a pod: what the gateway needs to parse, render and tokenize for the model.

    Equal for all pods of a fingerprint; what may differ between them is in `Member`.
    """

    model: str
    """Served name of the pod that was asked."""
    fingerprint: str
    root: str
    """Where the weights came from."""
    vocab_size: int
    created: int
    """Unix seconds."""
    files: dict[str, bytes]
    """Text files of the model folder: tokenizer.json, tokenizer_config.json, chat_template.jinja,
    generation_config.json, special_tokens_map.json, config.json — those that exist."""


class PrefillRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /prefill of a prefill pod, answered with a Ticket as soon as it is admitted.

    The pod computes all full blocks of `prompt_token_ids[:-1]`, so that at least one token is left
    for the decode pod, which samples.
    """

    request_id: str
    prompt_token_ids: list[int]
    """Prompt, and after a fail-over the tokens that were already sent to the client."""
    cache_salt: str | None = None
    priority: int = 0
    timeout: float = 600.0
    trace: str = ""
    """`traceparent` of the gateway's leg, where requests are traced."""


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """A claim on a prefix that a prefill pod computes and keeps under a lease.

    Spans follow over the transfer connection as they are finished; the ticket only says where to
    ask and what must match. A decode pod refuses it when the fingerprint differs from its own.
    """

    request_id: str
    num_tokens: int
    """Tokens that will be handed over: a multiple of the block size."""
    pod: str
    incarnation: str
    fingerprint: str
    host: str
    port: int
    """Of the pod's transfer listener."""
    backends: tuple[str, ...]
    """Transports the pod offers, best first."""
    lease_seconds: float
    """From the moment of writing; extended by the puller's heartbeats."""
    prefix_hash: bytes = b""
    """Name of the last block handed over (`hashing.block_hashes`); the decode pod computes its own
    and refuses a prefix of other tokens or another salt."""


class ResumedChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice had already produced when its decode pod was lost."""

    token_ids: list[int]
    finished: bool = False


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /generate of a decode pod, answered with a stream of frames (`tasuki_common.frames`).

    `sampling.seed` is always set by the gateway, so that another pod can go on with the same draws.
    """

    request_id: str
    model: str
    """Name to print in the chunks: the one the client used."""
    endpoint: Endpoint
    response_id: str
    """`id` of the client's response object."""
    created: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    fingerprint: str = ""
    """Of the pods whose tokenizer made these tokens; a pod of another refuses them. Empty: any."""
    choice_offset: int = 0
    """`index` of the first of the n choices (prompt number x n for a list of prompts)."""
    echo: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    continuous_usage: bool = False
    cache_salt: str | None = None
    priority: int = 0
    timeout: float = 600.0
    ticket: Ticket | None = None
    resume: tuple[ResumedChoice, ...] = ()
    """One per choice, or empty: tokens that the client has, never to be sent again."""
    trace: str = ""
    """`traceparent` of the gateway's leg, where requests are traced."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of the last frame of a stream."""

    prompt_tokens: int
    completion_tokens: int
    """Over all choices, resumed tokens included."""
    cached_tokens: int
    """Prompt tokens that no pod had to compute for this request."""


UNAVAILABLE = "unavailable"
"""`ErrorBody.code` of a pod that will take no such request, however often it is asked."""


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The `error` object of OpenAI's error shape."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every non-2xx answer of gateway and pods, and payload of an error frame."""

    error: ErrorBody
