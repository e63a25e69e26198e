"""What the offline API returns; names and semantics are vLLM's."""

import dataclasses
from collections.abc import Callable, Sequence

from tasuki_engine.request import TokenLogprobs


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one position, from the raw logits; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


TokenTable = dict[int, Logprob]
"""At one position, by token id: the token that stands there and the likeliest ones."""


@dataclasses.dataclass(kw_only=True)
class CompletionOutput:
    """One of the n samples of a prompt."""

    index: int
    text: str = ""
    """Without the stop token or stop string, unless include_stop_str_in_output."""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    """The stop token is among them."""
    cumulative_logprob: float | None = None
    logprobs: list[TokenTable] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass(kw_only=True)
class RequestOutput:
    """One prompt with its samples."""

    request_id: str
    prompt: str | None
    """None when the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenTable | None] | None = None
    """One per prompt token; the first is None."""
    num_cached_tokens: int = 0
    finished: bool = True


def token_table(logprobs: TokenLogprobs, decode: Callable[[int], str]) -> TokenTable:
    """The standing token first, then the likeliest, as vLLM orders them."""
    entries = {entry.token_id: entry for entry in (logprobs.token, *logprobs.top)}
    return {
        token_id: Logprob(entry.logprob, entry.rank, decode(token_id))
        for token_id, entry in entries.items()
    }


def prompt_tables(
    logprobs: Sequence[TokenLogprobs | None], decode: Callable[[int], str]
) -> list[TokenTable | None]:
    """`token_table` of each position; None stays None."""
    return [None if entry is None else token_table(entry, decode) for entry in logprobs]
