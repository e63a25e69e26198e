"""What goes into the engine and what comes out: plain msgspec data, free of tensors.

These cross the border between the engine's process and its pod's HTTP process.
"""

from typing import Literal

import msgspec

from tasuki_common.sampling import SamplingParams
from tasuki_transfer.spans import Span

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


class EngineRequest(msgspec.Struct, kw_only=True):
    """One sequence to compute (n samples of a prompt are n requests with one prompt)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    output_token_ids: list[int] = []
    """Output so far, when the request goes on from another pod; penalties, min_tokens, max_tokens
    and the draws count them, and they are not returned again."""
    sample_index: int = 0
    """Which of the n samples; part of the random key."""
    priority: int = 0
    """Lower runs first."""
    timeout: float | None = None
    """Seconds until the engine ends it with `deadline`."""
    cache_salt: str | None = None
    hand_over: bool = False
    """Compute all full blocks of `prompt_token_ids[:-1]`, keep them pinned, return no token."""
    prefix_id: str | None = None
    """Of a committed import (`Engine.commit`): start from it. It stays pinned until `cancel`."""


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """One token's log-probability of the raw logits, and its rank (1 is the likeliest)."""

    token_id: int
    logprob: float
    rank: int


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """At one position: the token that stands there, and the likeliest ones, best first."""

    token: Logprob
    top: list[Logprob]


class TokenOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step did for one request."""

    request_id: str
    token_ids: list[int] = []
    """New output tokens; a stop token is among them."""
    logprobs: list[TokenLogprobs] | None = None
    """One per new token, when asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """For the whole prompt, once, no later than with the first token; the first entry is None."""
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed here (prefix hit or import), of the first admission."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token that ended it, unless it is the model's eos."""
    error: str | None = None
    """A sentence, when finish_reason is `error`."""


class HandOver(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Progress of a `hand_over` request: spans that are final now, pinned until released."""

    request_id: str
    spans: list[Span] = []
    num_tokens: int = 0
    """Tokens covered by all spans so far."""
    complete: bool = False
    """The last one: the state, if the model has one, is among the spans."""
    num_cached_tokens: int = 0
    error: str | None = None
    """Set when it ended without completing (aborted, deadline, failed); nothing stays pinned."""


class CacheEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A cached prefix block or checkpoint came or went; what the index publishes.

    Prompts bring hundreds of them at once, which the garbage collector need not count.
    """

    kind: Literal["block", "checkpoint"]
    stored: bool
    hash: bytes
    parent: bytes = b""
    """Of a stored block: name of the block before it; empty for the first block of a prompt, and
    where blocks behind a window go first. The index cuts a chain at its first hole with it."""


class EngineStats(msgspec.Struct, kw_only=True):
    """A snapshot for metrics and heartbeats; counters grow from start."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    """Prompt tokens still to compute, of waiting and running requests."""
    blocks_total: int = 0
    blocks_used: int = 0
    """Held by requests, imports or pins; not merely cached."""
    blocks_cached: int = 0
    window_blocks_total: int = 0
    window_blocks_used: int = 0
    slots_total: int = 0
    slots_used: int = 0
    slots_cached: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed."""
    generated_tokens: int = 0
    step_seconds: float = 0.0


class StepResult(msgspec.Struct, kw_only=True):
    """All that one step produced: it leaves the engine as one message."""

    outputs: list[TokenOutput] = []
    hand_overs: list[HandOver] = []


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """Room on the taking side for a prefix: which spans are missing, and where they go.

    `wanted` maps (pool, ordinal) of the giver's spans to indices in the taker's regions; blocks
    that the taker's own cache holds are not in it.
    """

    prefix_id: str
    num_tokens: int
    num_local_tokens: int
    """Tokens whose full-attention blocks were already here."""
    wanted: dict[str, dict[int, int]]
