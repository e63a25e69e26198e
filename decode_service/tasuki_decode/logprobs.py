"""Log-probabilities in the two shapes that OpenAI gives them, as JSON bytes.

JSON knows no infinity: what is impossible is written as -9999.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from tasuki_common.messages import GenerateRequest
from tasuki_common.text_stream import TextDelta
from tasuki_common.tokenizer import Tokenizer
from tasuki_engine.request import Logprob, TokenLogprobs

FLOOR = -9999.0
_json = msgspec.json.Encoder().encode


class LogprobWriter:
    """Writes the `logprobs` of the chunks of one response."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat = request.endpoint == "chat"
        self._as_ids = request.return_tokens_as_token_ids
        self._top = request.sampling.logprobs or 0
        self._skip_special = request.sampling.skip_special_tokens
        self._base = 0
        if request.echo:
            self._base = len(
                tokenizer.decode(request.prompt_token_ids, skip_special_tokens=self._skip_special)
            )

    def output(self, delta: TextDelta, logprobs: Sequence[TokenLogprobs] | None) -> bytes:
        """Of output tokens: chat's list of tokens, or the four lists of completions."""
        if logprobs is None:
            return b"null"
        entries = logprobs[: len(delta.token_ids)]
        if self._chat:
            return b'{"content":%b}' % _json([self._chat_entry(entry) for entry in entries])
        return _json(self._lists(entries, [self._base + at for at in delta.text_offsets]))

    def echoed(
        self,
        delta: TextDelta,
        logprobs: Sequence[TokenLogprobs] | None,
        prompt_ids: Sequence[int],
        prompt_logprobs: Sequence[TokenLogprobs | None] | None,
    ) -> bytes:
        """Of an echoed prompt and the first output tokens; the prompt's first entries are null."""
        if prompt_logprobs is None:
            return self.output(delta, logprobs)
        offsets = self._prompt_offsets(prompt_ids)
        known = [entry for entry in prompt_logprobs if entry is not None]
        lists: dict[str, list[Any]] = {
            "tokens": [self._text(prompt_ids[0])],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": offsets[:1],
        }
        parts = [self._lists(known, offsets[1:])]
        if logprobs is not None:
            entries = logprobs[: len(delta.token_ids)]
            parts.append(self._lists(entries, [self._base + at for at in delta.text_offsets]))
        return _json({name: sum((part[name] for part in parts), lists[name]) for name in lists})

    def prompt(self, logprobs: Sequence[TokenLogprobs | None]) -> bytes:
        """Of a prompt that is not echoed: by token id, null for the first."""
        return _json(
            [
                None
                if entry is None
                else {
                    str(item.token_id): {
                        "logprob": max(item.logprob, FLOOR),
                        "rank": item.rank,
                        "decoded_token": self._tokenizer.token_text(item.token_id),
                    }
                    for item in (*entry.top, entry.token)
                }
                for entry in logprobs
            ]
        )

    def _prompt_offsets(self, prompt_ids: Sequence[int]) -> list[int]:
        detokenizer = self._tokenizer.detokenizer(
            skip_special_tokens=self._skip_special, at_start=True
        )
        offsets, length = [], 0
        for token_id in prompt_ids:
            offsets.append(length)
            length += len(detokenizer.push((token_id,)))
        return offsets

    def _lists(
        self, entries: Sequence[TokenLogprobs], offsets: Sequence[int]
    ) -> dict[str, list[Any]]:
        return {
            "tokens": [self._text(entry.token.token_id) for entry in entries],
            "token_logprobs": [max(entry.token.logprob, FLOOR) for entry in entries],
            "top_logprobs": [
                {
                    self._text(item.token_id): max(item.logprob, FLOOR)
                    for item in (*entry.top, entry.token)
                }
                for entry in entries
            ],
            "text_offset": list(offsets),
        }

    def _chat_entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        return {
            **self._chat_token(entry.token),
            "top_logprobs": [self._chat_token(item) for item in entry.top[: self._top]],
        }

    def _chat_token(self, item: Logprob) -> dict[str, Any]:
        return {
            "token": self._text(item.token_id),
            "logprob": max(item.logprob, FLOOR),
            "bytes": list(self._tokenizer.token_bytes(item.token_id)),
        }

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)
