"""From a client's fields to `SamplingParams`."""

import re
import secrets
from typing import Any

from tasuki_common.errors import RequestError
from tasuki_common.sampling import MAX_LOGPROBS, SamplingParams
from tasuki_gateway import bodies

_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_COPIED = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
)
_BIAS_LIMIT = 100.0
_COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions."""
_ID = re.compile(r"[0-9]{1,10}")


def sampling_params(
    body: bodies.Completion | bodies.Chat,
    *,
    defaults: dict[str, Any],
    vocab_size: int,
    most: int | None = None,
) -> SamplingParams:
    """The sampling parameters of a request; a seed is drawn where it has none.

    `defaults` are the model's own (generation_config.json); `most` tokens may a choice have (None:
    as many as the context holds). Another pod can continue the request only with the same draws,
    hence the seed.

    Raises:
        RequestError: a value is out of its range.
    """
    values = {name: getattr(body, name) for name in _COPIED}
    for name in _DEFAULTED:
        value = getattr(body, name)
        value = defaults.get(name) if value is None else value
        if value is not None:
            values[name] = value
    values["seed"] = secrets.randbits(63) if body.seed is None else body.seed
    values["logprobs"] = _logprobs(body)
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs is not served with stream.", param="prompt_logprobs")
    if isinstance(body, bodies.Completion) and body.echo and body.logprobs is not None:
        values["prompt_logprobs"] = body.logprobs
    if body.logit_bias:
        values["logit_bias"] = _logit_bias(body.logit_bias, vocab_size)
    check_ids("stop_token_ids", body.stop_token_ids or [], vocab_size)
    values["max_tokens"] = _max_tokens(body, most)
    return SamplingParams(**values)


def _logprobs(body: bodies.Completion | bodies.Chat) -> int | None:
    if isinstance(body, bodies.Completion):
        return body.logprobs
    if not body.logprobs:
        if body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        return None
    top = body.top_logprobs or 0
    if not 0 <= top <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs is {top}; it must be from 0 to {MAX_LOGPROBS}.", param="top_logprobs"
        )
    return top


def _max_tokens(body: bodies.Completion | bodies.Chat, most: int | None) -> int | None:
    """The limit asked for, else `most` at most; None: to the end of the context."""
    name, asked, default, least = "max_tokens", body.max_tokens, most, 1
    if isinstance(body, bodies.Completion):
        default = _COMPLETION_TOKENS if most is None else min(_COMPLETION_TOKENS, most)
        least = 0 if body.echo else 1
    elif body.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", body.max_completion_tokens
    if asked is None:
        return default
    if asked < least:
        raise RequestError(f"{name} is {asked}; it must be {least} or more.", param=name)
    if most is not None and asked > most:
        raise RequestError(f"{name} is {asked}; this model gives {most} at most.", param=name)
    return asked


def _logit_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bad = [key for key in given if not (_ID.fullmatch(key) and int(key) < vocab_size)]
    if bad:
        shown = ", ".join(key[:16] for key in bad[:8])
        raise RequestError(
            f"logit_bias has keys {shown}; each must be a token id below the "
            f"vocabulary's size, {vocab_size}.",
            param="logit_bias",
        )
    for key, bias in given.items():
        if abs(bias) > _BIAS_LIMIT:
            raise RequestError(
                f"logit_bias of {key} is {bias}; it must be from -100 to 100.", param="logit_bias"
            )
    return {int(key): bias for key, bias in given.items()}


def check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    bad = [token for token in ids if not 0 <= token < vocab_size]
    if bad:
        raise RequestError(
            f"{name} holds {', '.join(map(str, bad[:8]))}; token ids are from 0 to "
            f"{vocab_size - 1}.",
            param=name,
        )
