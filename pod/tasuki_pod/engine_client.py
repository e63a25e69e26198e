"""The HTTP process's side of the engine: asyncio, without torch.

A `Mailbox` collects what the engine produces for one HTTP request, whatever the number of its
samples. Every request ends exactly once: by an output with a finish reason, by `abort`, by
`EngineLostError` out of the mailbox, or, if its prefix was kept for another pod, by `PrefixEnded`.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Sequence

import msgspec

from tasuki_common import logs
from tasuki_common.errors import OverloadedError, RequestError, TasukiError
from tasuki_common.messages import Ticket
from tasuki_common.processes import die_with_parent
from tasuki_engine.request import CacheEvent, EngineRequest, EngineStats, TokenOutput
from tasuki_pod.wire import (
    LENGTH,
    Abort,
    Add,
    Admitted,
    Command,
    Crashed,
    Drain,
    Drained,
    DropPrefix,
    PrefixEnded,
    PrefixFailed,
    PrefixReady,
    Pull,
    Ready,
    Rejected,
    Report,
    Start,
    Stepped,
    Stop,
    pack,
)

log = logs.get("tasuki.engine_client")


class EngineLostError(TasukiError):
    """The engine process is gone; another pod may go on with the request."""


class PrefixError(TasukiError):
    """A prefix could not be taken over; `reason` is a metric label. The prompt is computed here."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Mailbox:
    """Outputs for one consumer, in order; what came while it was busy is taken in one go."""

    def __init__(self) -> None:
        self._outputs: list[TokenOutput] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput) -> None:
        """Adds one; ignored after `fail`."""
        if self._error is not None:
            return
        self._outputs.append(output)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing will come any more; `take` raises `error` after what is there."""
        self._error = error
        self._wake()

    async def take(self) -> list[TokenOutput]:
        """All that is there, at least one; raises what `fail` was given."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class EngineClient:
    """One engine process: started, spoken to, and stopped.

    `on_cache_events` and `on_prefix_ended` hear what no single request asks for.
    """

    def __init__(
        self,
        *,
        on_cache_events: Callable[[Sequence[CacheEvent]], None],
        on_prefix_ended: Callable[[PrefixEnded], None],
    ) -> None:
        self._on_cache_events = on_cache_events
        self._on_prefix_ended = on_prefix_ended
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._answers: dict[str, asyncio.Future[Report]] = {}
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stats = EngineStats()
        self.leases = 0

    async def start(self, start: Start) -> None:
        """Starts the process and lets it load; `ready` waits for it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tasuki_pod.engine_process",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # signals to the group go to who conducts the drain
                preexec_fn=die_with_parent(),
            )
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        self._answers["ready"] = loop.create_future()
        self._transport, _ = await loop.create_unix_connection(
            lambda: _Receiver(self._dispatch, self._on_gone), sock=ours
        )
        self._send(start)

    async def ready(self) -> Ready:
        """What the loaded engine says of itself.

        Raises:
            EngineLostError: it could not be loaded.
        """
        answer = await self._answer("ready")
        assert isinstance(answer, Ready)
        self.stats = answer.stats
        return answer

    async def lost(self) -> str:
        """Returns when the engine process is gone; why."""
        return await asyncio.shield(self._lost)

    @property
    def alive(self) -> bool:
        """Whether the engine process still answers."""
        return not self._lost.done()

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._mailboxes)

    async def admit(self, group: str, requests: list[EngineRequest], mailbox: Mailbox) -> None:
        """Puts all `requests` into the engine's queue, or none.

        Raises:
            RequestError, OverloadedError: as the engine refused them.
            EngineLostError: the engine is gone.
        """
        for request in requests:
            self._mailboxes[request.request_id] = mailbox
        try:
            answer = await self._ask(group, Add(group, requests))
        except BaseException:
            self.abort([request.request_id for request in requests])
            raise
        if isinstance(answer, Rejected):
            for request in requests:
                self._mailboxes.pop(request.request_id, None)
            if answer.retry_after is not None:
                raise OverloadedError(answer.message, retry_after=answer.retry_after)
            raise RequestError(answer.message, param=answer.param)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests; nothing more comes of them. Unknown ones are ignored."""
        for request_id in request_ids:
            self._mailboxes.pop(request_id, None)
        if self.alive:
            self._send(Abort(list(request_ids)))

    async def pull(
        self,
        prefix_id: str,
        ticket: Ticket,
        token_ids: list[int],
        cache_salt: str | None,
        seconds: float,
    ) -> PrefixReady:
        """Takes over a ticket's prefix; it stays pinned until `drop_prefix`.

        Raises:
            PrefixError: it could not be taken over, and nothing of it is kept.
            EngineLostError: the engine is gone.
        """
        command = Pull(
            prefix_id=prefix_id,
            ticket=ticket,
            token_ids=token_ids,
            cache_salt=cache_salt,
            timeout=seconds,
        )
        try:
            answer = await self._ask(prefix_id, command)
        except BaseException:
            self.drop_prefix(prefix_id)
            raise
        if isinstance(answer, PrefixFailed):
            raise PrefixError(answer.reason, answer.message)
        assert isinstance(answer, PrefixReady)
        return answer

    def drop_prefix(self, prefix_id: str) -> None:
        """Ends the pull, or unpins the prefix."""
        if self.alive:
            self._send(DropPrefix(prefix_id))

    async def drain(self, seconds: float) -> int:
        """Waits for leases to end; returns how many are left after `seconds`."""
        answer = await self._ask("drain", Drain(seconds))
        assert isinstance(answer, Drained)
        self.leases = answer.leases
        return answer.leases

    async def stop(self, seconds: float) -> None:
        """Ends the process, by force after `seconds`."""
        if self._process is None:
            return
        if self.alive:
            self._send(Stop())
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            log.warning("engine_killed", pid=self._process.pid, seconds=seconds)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._transport is not None:
            self._transport.close()

    async def _ask(self, key: str, command: Command) -> Report:
        if not self.alive:
            raise EngineLostError(self._lost.result())
        self._answers[key] = asyncio.get_running_loop().create_future()
        self._send(command)
        return await self._answer(key)

    async def _answer(self, key: str) -> Report:
        try:
            return await self._answers[key]
        finally:
            self._answers.pop(key, None)

    def _send(self, command: Command) -> None:
        assert self._transport is not None, "start() comes first"
        self._transport.write(pack(command))

    def _dispatch(self, report: Report) -> None:
        match report:
            case Stepped():
                self._on_step(report)
            case Admitted() | Rejected():
                self._resolve(report.group, report)
            case PrefixReady() | PrefixFailed():
                self._resolve(report.prefix_id, report)
            case Ready():
                self._resolve("ready", report)
            case Drained():
                self._resolve("drain", report)
            case Crashed():
                self._on_gone(report.message)

    def _on_step(self, step: Stepped) -> None:
        self.leases = step.leases
        if step.stats is not None:
            self.stats = step.stats
        mailboxes = self._mailboxes
        for output in step.outputs:
            if output.finish_reason is None:
                mailbox = mailboxes.get(output.request_id)
            else:
                mailbox = mailboxes.pop(output.request_id, None)
            if mailbox is not None:
                mailbox.put(output)
        if step.cache_events:
            self._on_cache_events(step.cache_events)
        for ended in step.ended:
            mailboxes.pop(ended.request_id, None)
            self._on_prefix_ended(ended)

    def _resolve(self, key: str, report: Report) -> None:
        answer = self._answers.get(key)
        if answer is not None and not answer.done():
            answer.set_result(report)

    def _on_gone(self, reason: str) -> None:
        if self._lost.done():
            return
        self._lost.set_result(reason)
        error = EngineLostError(reason)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)
        self._mailboxes.clear()


class _Receiver(asyncio.Protocol):
    """Cuts the engine's bytes into reports."""

    def __init__(self, on_report: Callable[[Report], None], on_gone: Callable[[str], None]) -> None:
        self._on_report = on_report
        self._on_gone = on_gone
        self._decoder = msgspec.msgpack.Decoder(Report)
        self._buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start, end = 0, len(buffer)
        while end - start >= LENGTH.size:
            (size,) = LENGTH.unpack_from(buffer, start)
            stop = start + LENGTH.size + size
            if stop > end:
                break
            with memoryview(buffer) as view:
                report = self._decoder.decode(view[start + LENGTH.size : stop])
            start = stop
            self._on_report(report)
        del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._on_gone(f"The engine process is gone{f' ({error})' if error else ''}.")
