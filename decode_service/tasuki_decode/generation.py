"""One POST /generate from its ticket to its last frame.

    take over the prefix   pull, verify, commit into the engine's cache; on any doubt, do without it
    admit                  one engine request a choice, all or none
    stream                 tokens → text → frames, journalled tokens never behind emitted text

Whatever ends it (done, error, the caller gone, the deadline), nothing is left in the engine.
"""

import itertools
import time
from collections.abc import Awaitable, Callable

import msgspec

from tasuki_common import logs, tracing
from tasuki_common.errors import DeadlineError, TasukiError
from tasuki_common.frames import Kind, encode
from tasuki_common.messages import GenerateRequest, ResumedChoice, Ticket, Usage
from tasuki_common.text_stream import TextStream
from tasuki_common.tokenizer import Tokenizer
from tasuki_decode.chunks import ChunkWriter
from tasuki_engine.request import EngineRequest, TokenOutput
from tasuki_pod.engine_client import Mailbox, PrefixError
from tasuki_pod.pod import Pod
from tasuki_pod.wire import PrefixReady

log = logs.get("tasuki.generation")

Write = Callable[[bytes], Awaitable[None]]

_numbers = itertools.count()
_json = msgspec.json.Encoder().encode


class _Choice:
    """Where one of the n choices stands."""

    def __init__(self, index: int, text: TextStream, token_ids: list[int], resumed: int) -> None:
        self.index = index
        self.text = text
        self.token_ids = token_ids
        """Prompt and resumed tokens."""
        self.num_resumed = resumed
        self.last_token_at = 0.0


class Generation:
    """Serves one request: `admit`, then `stream`, and `close` in any case."""

    def __init__(self, pod: Pod, tokenizer: Tokenizer, request: GenerateRequest) -> None:
        self._pod = pod
        self._request = request
        self._arrived = time.monotonic()
        self._name = f"{request.request_id}.{next(_numbers)}"
        self._mailbox = Mailbox()
        self._chunks = ChunkWriter(request, tokenizer)
        self._prefix: PrefixReady | None = None
        self._pinned = False
        self._cached_tokens = 0
        resume = request.resume or (ResumedChoice(token_ids=[]),) * request.sampling.n
        self._num_tokens = sum(len(choice.token_ids) for choice in resume)
        self._open = {
            f"{self._name}.{index}": _Choice(
                index,
                TextStream(tokenizer, request.sampling, choice.token_ids),
                request.prompt_token_ids + choice.token_ids,
                len(choice.token_ids),
            )
            for index, choice in enumerate(resume)
            if not choice.finished
        }
        self._unheard = set(self._open)
        self._first = next(iter(self._open), "")

    async def admit(self) -> None:
        """Takes over the prefix, if there is one, and puts the choices into the engine's queue.

        Raises:
            RequestError, OverloadedError: as the engine refused them.
            EngineLostError: the engine is gone.
        """
        if self._request.ticket is not None and self._open:
            await self._take_over(self._request.ticket)
        if self._open:
            await self._pod.client.admit(self._name, self._engine_requests(), self._mailbox)
        self._pod.metrics.queue_seconds.observe(time.monotonic() - self._arrived)

    async def stream(self, write: Write) -> None:
        """Writes frames until all choices are finished.

        Raises:
            EngineLostError: the engine is gone, another pod may continue.
            TasukiError: what else ended it.
        """
        while self._open:
            frames, failure = [], None
            for output in await self._mailbox.take():
                failure = failure or _failure(output)
                if failure is None and (choice := self._open.get(output.request_id)):
                    frames.append(self._frame(choice, output))
            if frames:
                await write(b"".join(frames))
            if failure is not None:
                raise failure
        usage = Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=self._num_tokens,
            cached_tokens=self._cached_tokens,
        )
        await write(encode(Kind.DONE, 0, [], _json(usage)))

    def close(self) -> None:
        """Leaves nothing in the engine, and a line in the log."""
        prefix, ticket = self._prefix, self._request.ticket
        log.info(
            "generation_ended",
            request_id=self._request.request_id,
            finished=not self._open,
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=self._num_tokens,
            giver=ticket.pod if ticket is not None and prefix is not None else None,
            bytes_taken_over=prefix.bytes if prefix is not None else 0,
            seconds=round(time.monotonic() - self._arrived, 4),
        )
        if self._open:
            self._pod.client.abort(list(self._open))
            self._open.clear()
        self._unpin()

    async def _take_over(self, ticket: Ticket) -> None:
        """Pulls the ticket's prefix; when that fails the prompt is computed here."""
        pod, request = self._pod, self._request
        first = next(iter(self._open.values()))
        try:
            self._check(ticket, first.token_ids)
            timeout = min(pod.config.pull_timeout, request.timeout)
            with tracing.span("hand_over", giver=ticket.pod, tokens=ticket.num_tokens) as leg:
                self._prefix = await pod.client.pull(
                    self._name, ticket, first.token_ids, request.cache_salt, timeout
                )
                self._pinned = True
                leg.note(bytes=self._prefix.bytes, backend=self._prefix.backend)
            pod.metrics.transferred(self._prefix)
        except PrefixError as error:
            pod.metrics.transfer_failed(error.reason)
            log.warning(
                "hand_over_failed",
                request_id=request.request_id,
                giver=ticket.pod,
                reason=error.reason,
                message=str(error),
            )

    def _check(self, ticket: Ticket, token_ids: list[int]) -> None:
        pod, covered = self._pod, ticket.num_tokens
        if ticket.fingerprint != pod.engine.fingerprint:
            raise PrefixError(
                "refused_fingerprint",
                f"Pod {ticket.pod} serves {ticket.fingerprint}, this one {pod.engine.fingerprint}.",
            )
        if not 0 < covered < len(token_ids) or covered % pod.engine.block_size:
            raise PrefixError(
                "refused_prefix",
                f"The ticket covers {covered} of {len(token_ids)} tokens, in blocks of "
                f"{pod.engine.block_size}.",
            )
        if ticket.prefix_hash != pod.prefix_hash(token_ids[:covered], self._request.cache_salt):
            raise PrefixError("refused_prefix", "The ticket is of other tokens or another salt.")

    def _engine_requests(self) -> list[EngineRequest]:
        request, prompt = self._request, self._request.prompt_token_ids
        remaining = request.timeout - (time.monotonic() - self._arrived)
        # A prompt that a lost pod has scored already may come from a cache.
        unscored = msgspec.structs.replace(request.sampling, prompt_logprobs=None)
        return [
            EngineRequest(
                request_id=name,
                prompt_token_ids=prompt,
                sampling=unscored if choice.num_resumed else request.sampling,
                output_token_ids=choice.token_ids[len(prompt) :],
                sample_index=choice.index,
                priority=request.priority,
                timeout=max(0.0, remaining),
                cache_salt=request.cache_salt,
                prefix_id=self._name if self._starts_from_prefix(choice) else None,
            )
            for name, choice in self._open.items()
        ]

    def _starts_from_prefix(self, choice: _Choice) -> bool:
        if self._prefix is None:
            return False
        first, covered = next(iter(self._open.values())), self._prefix.num_tokens
        return choice is first or choice.token_ids[:covered] == first.token_ids[:covered]

    def _frame(self, choice: _Choice, output: TokenOutput) -> bytes:
        """What one step did for one choice: its text, and the tokens that the text comes from."""
        self._measure(choice, output)
        first = output.request_id in self._unheard
        if first:
            self._hear_first(output)
        delta = choice.text.push(output.token_ids, output.finish_reason, output.stop_reason)
        self._num_tokens += len(delta.token_ids)
        if first and not choice.num_resumed:
            payload = self._chunks.first(
                choice.index, delta, output.logprobs, output.prompt_logprobs, self._num_tokens
            )
        else:
            payload = self._chunks.delta(choice.index, delta, output.logprobs, self._num_tokens)
        kind = Kind.CHUNK
        if delta.finished:
            kind = Kind.FINISH
            del self._open[output.request_id]
            if output.finish_reason is None:  # a stop string: the engine does not know yet
                self._pod.client.abort([output.request_id])
            self._pod.metrics.request_ended(delta.finish_reason or "stop")
        return encode(kind, choice.index, list(delta.token_ids), payload)

    def _hear_first(self, output: TokenOutput) -> None:
        """The engine has begun with it: it holds what it needs of the prefix."""
        if output.request_id == self._first:  # the others may hit what it computed
            self._pod.metrics.hit_depth.observe(output.num_cached_tokens)
            elsewhere = 0
            if self._prefix is not None:
                elsewhere = self._prefix.num_tokens - self._prefix.num_cached_tokens
            uncomputed = max(0, output.num_cached_tokens - elsewhere)
            self._cached_tokens = min(uncomputed, len(self._request.prompt_token_ids))
        self._unheard.discard(output.request_id)
        if not self._unheard:
            self._unpin()

    def _measure(self, choice: _Choice, output: TokenOutput) -> None:
        if not output.token_ids:
            return
        now, metrics = time.monotonic(), self._pod.metrics
        if choice.last_token_at:
            metrics.inter_token_seconds.observe(now - choice.last_token_at)
        else:
            metrics.time_to_first_token.observe(now - self._arrived)
        choice.last_token_at = now

    def _unpin(self) -> None:
        if self._pinned:
            self._pinned = False
            self._pod.client.drop_prefix(self._name)


def _failure(output: TokenOutput) -> TasukiError | None:
    """The error that an output ends its whole response with, if it does."""
    match output.finish_reason:
        case "deadline":
            return DeadlineError("The request's deadline passed before it was done.")
        case "error":
            return TasukiError(output.error or "The engine could not go on with the request.")
        case "abort":
            return TasukiError("The request was aborted.")
    return None
