"""Bodies of client requests: what is accepted, refused by name, or has no effect.

A body is decoded once, its nulls are dropped (null is the default everywhere), its keys are held
against the fields we serve, and what is left is converted into a typed struct. A field that would
change the answer and is not served is an error, so that nobody gets less than was asked for in
silence.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec

from tasuki_common.errors import RequestError

T = TypeVar("T", bound="_Sampled | Tokenize | Detokenize")
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Of what has no bounds of its own, as much as pods can be sent."""

NO_EFFECT = frozenset(
    [
        "user",
        "store",
        "metadata",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "parallel_tool_calls",
        "prediction",
        "request_id",
    ]
)
"""Fields that never change the tokens; accepted with any value."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "early_stopping": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "include_reasoning": (True,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "use_beam_search": (False,),
}
"""Fields that are not served, with the values that ask for nothing."""


class StreamOptions(msgspec.Struct, frozen=True):
    """OpenAI's `stream_options`, and vLLM's continuous usage."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class _Sampled(msgspec.Struct, kw_only=True):
    """What both endpoints share; None means that the model's own default holds."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: Int64 = 0
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    add_special_tokens: bool | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    cache_salt: str | None = None
    priority: Int64 = 0


class Completion(_Sampled):
    """POST /v1/completions."""

    prompt: Any = None
    """A string, a list of strings, a list of ids, or a list of lists of ids."""
    echo: bool = False
    logprobs: int | None = None


class Chat(_Sampled):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None


class Tokenize(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None


class Detokenize(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def parse(body: bytes, kind: type[T]) -> T:
    """The typed request in `body`.

    Raises:
        RequestError: it is no JSON object, a value has the wrong type, or a field is not served.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object.")
    options = fields.get("stream_options")
    if isinstance(options, dict) and None in options.values():
        raise RequestError("stream_options must not hold null.", param="stream_options")
    given = {name: value for name, value in fields.items() if value is not None}
    _refuse_unserved(given, kind)
    try:
        request = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    if options is not None and not getattr(request, "stream", True):
        raise RequestError("stream_options needs stream to be true.", param="stream_options")
    return request


def _refuse_unserved(given: dict[str, Any], kind: type[Any]) -> None:
    for name in given.keys() - set(kind.__struct_fields__) - NO_EFFECT:
        neutral = NEUTRAL.get(name)
        if neutral is None:
            raise RequestError(f"{name} is not served here; leave it out.", param=name)
        if given[name] not in neutral:
            only = " or ".join(msgspec.json.encode(value).decode() for value in neutral)
            raise RequestError(f"{name} is served as {only} only; leave it out.", param=name)


_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_MISSING = re.compile(r"Object missing required field `(.+?)`")


def _invalid(error: msgspec.ValidationError) -> RequestError:
    """msgspec's message, with the path in it as `param`."""
    message = str(error)
    path = found.group(1) if (found := _PATH.search(message)) else ""
    message = _PATH.sub("", message)
    if missing := _MISSING.search(message):
        path = f"{path}.{missing.group(1)}" if path else missing.group(1)
        return RequestError(f"{path} is required.", param=path)
    return RequestError(f"{path or 'The body'} is not valid: {message}.", param=path or None)
