"""What the gateway itself says in OpenAI's words: whole responses, usage, in-stream errors.

Pods format all chunks. A client that does not stream gets the same chunks merged here, so that both
ways to ask have one source.
"""

from typing import Any

import msgspec

from tasuki_common.messages import Endpoint, ErrorResponse, Usage

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode
_PREFIX = len(b"data: ")


class _Delta(msgspec.Struct):
    content: str | None = None


class _Logprobs(msgspec.Struct, omit_defaults=True):
    """Chat has `content`; completions have the other four."""

    content: list[msgspec.Raw] | None = None
    tokens: list[msgspec.Raw] | None = None
    token_logprobs: list[msgspec.Raw] | None = None
    top_logprobs: list[msgspec.Raw] | None = None
    text_offset: list[msgspec.Raw] | None = None

    def extend(self, other: "_Logprobs") -> None:
        """Appends what came later."""
        for name in self.__struct_fields__:
            mine, more = getattr(self, name), getattr(other, name)
            if mine is not None and more is not None:
                mine += more


class _ChunkChoice(msgspec.Struct):
    index: int
    delta: _Delta | None = None
    text: str = ""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: msgspec.Raw | None = None


class _Chunk(msgspec.Struct):
    choices: list[_ChunkChoice]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: msgspec.Raw | None = None


class _Merged:
    """One choice, as far as it has come."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: _Logprobs | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.extra: dict[str, Any] = {}

    def add(self, chunk: _ChunkChoice) -> None:
        """Takes the next chunk in."""
        self.texts.append(chunk.delta.content or "" if chunk.delta else chunk.text)
        if self.logprobs is None:
            self.logprobs = chunk.logprobs
        elif chunk.logprobs is not None:
            self.logprobs.extend(chunk.logprobs)
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if chunk.stop_reason is None else chunk.stop_reason
        if chunk.token_ids is not None:
            self.extra.setdefault("token_ids", []).extend(chunk.token_ids)
        for name in ("prompt_token_ids", "prompt_logprobs"):
            if (value := getattr(chunk, name)) is not None:
                self.extra[name] = value


class Merger:
    """Collects the chunks of a response, and writes it whole."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._chat = endpoint == "chat"
        self._decoder = msgspec.json.Decoder(_Chunk)
        self._choices: dict[int, _Merged] = {}
        self._top: dict[str, Any] = {}

    async def take(self, payload: bytes) -> None:
        """Takes a payload of whole server-sent events in; a relay's sink."""
        for event in payload.split(b"\n\n"):
            if not event:
                continue
            chunk = self._decoder.decode(event[_PREFIX:])
            for choice in chunk.choices:
                self._choices.setdefault(choice.index, _Merged()).add(choice)
            for name in ("prompt_token_ids", "prompt_logprobs"):
                if (value := getattr(chunk, name)) is not None:
                    self._top[name] = value

    def response(self, response_id: str, created: int, model: str, usage: Usage) -> bytes:
        """The whole response."""
        kind = "chat.completion" if self._chat else "text_completion"
        whole = {
            "id": response_id,
            "object": kind,
            "created": created,
            "model": model,
            "choices": [self._choice(index, c) for index, c in sorted(self._choices.items())],
            "usage": usage_object(usage),
            **self._top,
        }
        return _encode(whole)

    def _choice(self, index: int, merged: _Merged) -> dict[str, Any]:
        text = "".join(merged.texts)
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        )
        return {
            "index": index,
            **content,
            "logprobs": merged.logprobs,
            "finish_reason": merged.finish_reason,
            "stop_reason": merged.stop_reason,
            **merged.extra,
        }


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def usage_event(
    endpoint: Endpoint, response_id: str, created: int, model: str, usage: Usage
) -> bytes:
    """The last chunk of a stream that was asked to include its usage."""
    chunk: dict[str, Any] = {
        "id": response_id,
        "object": "chat.completion.chunk" if endpoint == "chat" else "text_completion",
        "created": created,
        "model": model,
        "choices": [],
        "usage": usage_object(usage),
    }
    return b"data: " + _encode(chunk) + b"\n\n"


def error_event(error: ErrorResponse) -> bytes:
    """An error after the first byte; ends the stream."""
    return b"data: " + _encode(error) + b"\n\n" + DONE


def total(usages: list[Usage]) -> Usage:
    """The usage of a response of several prompts."""
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    )
