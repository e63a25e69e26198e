"""The text of one choice while its tokens arrive: stop strings, stop tokens, held-back beginnings.

What has been emitted is a pure function of the tokens pushed so far, however they were cut into
pushes. So a stream primed with the tokens that another pod already sent goes on with exactly the
text that is missing, the part that the other pod held back included.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tasuki_common.sampling import SamplingParams
from tasuki_common.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """What one push added."""

    text: str
    token_ids: Sequence[int]
    """Those of the pushed tokens that belong to the output: all, or up to the one that completed a
    stop string."""
    finished: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it."""
    text_offsets: Sequence[int] = ()
    """With logprobs, per token: where its text begins, in characters of the choice's text."""


class TextStream:
    """Turns the tokens of one choice into the text that its client gets."""

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, primed_token_ids: Sequence[int] = ()
    ) -> None:
        """`primed_token_ids`: output tokens whose deltas were already sent by another stream."""
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=sampling.skip_special_tokens)
        self._stops = tuple(sampling.stop or ())
        self._keeps_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._wants_offsets = sampling.logprobs is not None
        self._held = ""
        self._unchecked = 0
        self._num_tokens = 0
        self._num_chars = 0
        self.finished = False
        """No more text comes; after priming: the primed tokens already complete a stop string."""
        self.stop_reason: int | str | None = None
        if primed_token_ids:
            self.push(primed_token_ids)

    def push(
        self,
        token_ids: Sequence[int],
        finish_reason: str | None = None,
        stop_reason: int | None = None,
    ) -> TextDelta:
        """Text completed by `token_ids`; with a `finish_reason`, these are the last ones.

        With the reason `stop` the last token is a stop token: it counts, its text does not appear
        (unless `include_stop_str_in_output`).
        """
        if self.finished:
            return TextDelta("", (), True, "stop", self.stop_reason)
        spoken = token_ids
        if finish_reason == "stop" and not self._keeps_stop:
            spoken = token_ids[:-1]
        offsets: list[int] = []
        if not self._stops and not self._wants_offsets:
            text = self._detokenizer.push(spoken)
        else:
            text, count = self._push_each(spoken, offsets)
            if self.finished:
                return TextDelta(text, token_ids[:count], True, "stop", self.stop_reason, offsets)
        if finish_reason is None:
            return TextDelta(text, token_ids, text_offsets=offsets)
        return self._finish(text, token_ids, finish_reason, stop_reason, offsets)

    def _finish(
        self,
        text: str,
        token_ids: Sequence[int],
        finish_reason: str,
        stop_reason: int | None,
        offsets: list[int],
    ) -> TextDelta:
        offsets += [self._num_chars] * (len(token_ids) - len(offsets) if self._wants_offsets else 0)
        text += self._emit(self._detokenizer.flush())
        if self.finished:
            return TextDelta(text, token_ids, True, "stop", self.stop_reason, offsets)
        self.finished, self.stop_reason = True, stop_reason
        return TextDelta(text + self._held, token_ids, True, finish_reason, stop_reason, offsets)

    def _push_each(self, token_ids: Sequence[int], offsets: list[int]) -> tuple[str, int]:
        """Text and number of tokens taken, one by one so that a stop string cuts at its token."""
        text = ""
        for count, token_id in enumerate(token_ids, 1):
            if self._wants_offsets:
                offsets.append(self._num_chars)
            self._num_tokens += 1
            text += self._emit(self._detokenizer.push((token_id,)))
            if self.finished:
                return text, count
        return text, len(token_ids)

    def _emit(self, new: str) -> str:
        """What may be said now that `new` follows the held text; sets `finished` at a stop string.

        The stop string that ends first wins, of those that end together the longest: so the cut
        depends on the text alone. Text of the first `min_tokens` tokens completes none.
        """
        self._num_chars += len(new)
        if not self._stops or not new:
            return new
        text = self._held + new
        if self._num_tokens <= self._min_tokens:
            self._unchecked = len(text)
        found = min(
            (
                (start + len(stop), start, stop)
                for stop in self._stops
                if (start := text.find(stop, max(0, self._unchecked - len(stop) + 1))) >= 0
            ),
            default=None,
        )
        if found:
            end, start, self.stop_reason = found
            self.finished, self._held = True, ""
            return text[: end if self._keeps_stop else start]
        cut = len(text) - self._overlap(text)
        self._held = text[cut:]
        self._unchecked = max(0, self._unchecked - cut)
        return text[:cut]

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that may begin a stop string."""
        longest = 0
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            longest = max(longest, len(text) - at if at >= 0 else 0)
        return longest
