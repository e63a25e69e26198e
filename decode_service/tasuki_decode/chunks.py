"""OpenAI's streaming chunks as bytes: what never changes is written once, deltas in between.

One `ChunkWriter` serves one response and keeps nothing between two calls, so a response resumed on
another pod goes on with the next byte.
"""

import msgspec

from tasuki_common.messages import GenerateRequest
from tasuki_common.text_stream import TextDelta
from tasuki_common.tokenizer import Tokenizer
from tasuki_decode.logprobs import LogprobWriter
from tasuki_engine.request import TokenLogprobs

_json = msgspec.json.Encoder().encode
_LINE_ENDS = {
    "\x85".encode(): rb"\u0085",
    "\u2028".encode(): rb"\u2028",
    "\u2029".encode(): rb"\u2029",
}
"""Lines of server-sent events end with CR or LF, but clients that split like Python's `splitlines`
(httpx does) take these for ends as well; JSON escapes all others itself."""


class ChunkWriter:
    """Writes the server-sent events of one response."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._chat = request.endpoint == "chat"
        self._prompt_ids = request.prompt_token_ids
        self._logprobs = LogprobWriter(request, tokenizer)
        kind = b"chat.completion.chunk" if self._chat else b"text_completion"
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,' % (
            _json(request.response_id),
            kind,
            request.created,
            _json(request.model),
        )
        indices = range(request.choice_offset, request.choice_offset + request.sampling.n)
        opening = b'"delta":{"content":' if self._chat else b'"text":'
        self._indices = list(indices)
        self._heads = [
            self._head + b'"choices":[{"index":%d,%b' % (index, opening) for index in indices
        ]
        closing = b"}" if self._chat else b""
        self._plain_end = closing + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._plain = not (
            request.sampling.logprobs is not None
            or request.return_token_ids
            or request.continuous_usage
        )
        self._prompt_text = ""
        if request.echo:
            self._prompt_text = tokenizer.decode(
                self._prompt_ids, skip_special_tokens=request.sampling.skip_special_tokens
            )

    def first(
        self,
        choice: int,
        delta: TextDelta,
        logprobs: list[TokenLogprobs] | None,
        prompt_logprobs: list[TokenLogprobs | None] | None,
        num_tokens: int,
    ) -> bytes:
        """The event, or two, for a choice's first tokens: with chat's role, or an echoed prompt."""
        if self._chat:
            role = self._role(choice, prompt_logprobs, num_tokens - len(delta.token_ids))
            return role + self.delta(choice, delta, logprobs, num_tokens)
        request, extra = self._request, b""
        if request.return_token_ids:
            extra += b',"prompt_token_ids":%b' % _json(self._prompt_ids)
        if request.echo:
            return self._event(
                choice,
                delta._replace(text=self._prompt_text + delta.text),
                self._logprobs.echoed(delta, logprobs, self._prompt_ids, prompt_logprobs),
                num_tokens,
                extra,
            )
        if prompt_logprobs is not None:
            extra += b',"prompt_logprobs":%b' % self._logprobs.prompt(prompt_logprobs)
        if not extra:
            return self.delta(choice, delta, logprobs, num_tokens)
        return self._event(choice, delta, self._logprobs.output(delta, logprobs), num_tokens, extra)

    def delta(
        self,
        choice: int,
        delta: TextDelta,
        logprobs: list[TokenLogprobs] | None,
        num_tokens: int,
    ) -> bytes:
        """The event for one push of tokens, or nothing when the client would learn nothing.

        `num_tokens` is the number of tokens that all choices have so far.
        """
        if self._plain and not delta.finished:
            if not delta.text:
                return b""
            return _one_line(self._heads[choice] + _json(delta.text) + self._plain_end)
        return self._event(choice, delta, self._logprobs.output(delta, logprobs), num_tokens, b"")

    def _event(
        self, choice: int, delta: TextDelta, logprobs: bytes, num_tokens: int, extra: bytes
    ) -> bytes:
        if delta.finished:
            extra += b',"stop_reason":%b' % _json(delta.stop_reason)
        if self._request.return_token_ids:
            extra += b',"token_ids":%b' % _json(list(delta.token_ids))
        return _one_line(
            b'%b%b%b,"logprobs":%b,"finish_reason":%b%b}]%b}\n\n'
            % (
                self._heads[choice],
                _json(delta.text),
                b"}" if self._chat else b"",
                logprobs,
                _json(delta.finish_reason),
                extra,
                self._usage(num_tokens),
            )
        )

    def _role(
        self, choice: int, prompt_logprobs: list[TokenLogprobs | None] | None, num_tokens: int
    ) -> bytes:
        head = self._head
        if choice == 0 and self._request.return_token_ids:
            head += b'"prompt_token_ids":%b,' % _json(self._prompt_ids)
        if choice == 0 and prompt_logprobs is not None:
            head += b'"prompt_logprobs":%b,' % self._logprobs.prompt(prompt_logprobs)
        return (
            b'%b"choices":[{"index":%d,"delta":{"role":"assistant","content":""},'
            b'"logprobs":null,"finish_reason":null}]%b}\n\n'
            % (head, self._indices[choice], self._usage(num_tokens))
        )

    def _usage(self, num_tokens: int) -> bytes:
        if not self._request.continuous_usage:
            return b""
        prompt = len(self._prompt_ids)
        return b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
            prompt,
            num_tokens,
            prompt + num_tokens,
        )


def _one_line(event: bytes) -> bytes:
    """The same JSON, in which no client finds the end of a line."""
    if not event.isascii():
        for raw, escaped in _LINE_ENDS.items():
            event = event.replace(raw, escaped)
    return event
