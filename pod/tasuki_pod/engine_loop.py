"""The engine's loop: commands in, steps, reports out; all of it on one thread.

A prefix on its way in goes through `waiting` (no room for it yet) → `pulling` → committed, and
leaves by `DropPrefix` at any of these points; each `Pull` is answered exactly once.
"""

import dataclasses
import queue
import time
from collections.abc import Callable

from tasuki_common.errors import OverloadedError, RequestError
from tasuki_engine.engine import Engine
from tasuki_engine.request import HandOver, StepResult
from tasuki_pod.transfer_agent import PullResult, TransferAgent
from tasuki_pod.wire import (
    Abort,
    Add,
    Admitted,
    Command,
    Drain,
    Drained,
    DropPrefix,
    PrefixEnded,
    PrefixFailed,
    PrefixReady,
    Pull,
    Rejected,
    Report,
    Start,
    Stepped,
    Stop,
)

_STATS_SECONDS = 0.1
_STALLED_SECONDS = 0.05
"""Between two looks at requests that cannot move until a pin is dropped: they may be overdue."""
_ROOM_SECONDS = 0.05
"""Between two looks for the room that a prefix waits for: each hashes all of its tokens."""


@dataclasses.dataclass
class _Import:
    """A prefix on its way in, or here and pinned."""

    pull: Pull
    deadline: float
    num_local_tokens: int = 0
    pulling: bool = False
    dropped: bool = False


class EngineLoop:
    """Owns the engine; `inbox` brings commands, and calls of the transfer thread."""

    def __init__(
        self,
        engine: Engine,
        agent: TransferAgent,
        inbox: "queue.SimpleQueue[Command | Callable[[], None]]",
        send: Callable[[Report], None],
    ) -> None:
        self._engine = engine
        self._agent = agent
        self._inbox = inbox
        self._send = send
        self._imports: dict[str, _Import] = {}
        self._waiting: dict[str, _Import] = {}
        self._look_at = 0.0
        """When room is looked for again, after there was none."""
        self._hand_overs: set[str] = set()
        self._ended: list[PrefixEnded] = []
        self._stats_at = 0.0
        self._stopped = False
        agent.bind(self._on_prefix_ended, self._on_pulled)

    def run(self) -> None:
        """Until `Stop`, when the books must balance; an error of the engine leaves as it is."""
        while not self._stopped:
            self._take_commands()
            result = self._engine.step() if self._engine.has_work() else StepResult()
            for hand_over in result.hand_overs:
                self._offer(hand_over)
            self._reserve_waiting()
            self._report(result)
        self._engine.check_integrity()

    def _take_commands(self) -> None:
        """All commands that are there; when the engine is idle, waits for one."""
        idle = not self._engine.has_work() or self._engine.stalled
        try:
            self._handle(self._inbox.get(block=idle, timeout=self._patience() if idle else None))
            while True:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _patience(self) -> float | None:
        """Seconds until the engine or a reservation must be looked at; None: it can wait."""
        if self._engine.has_work():
            return _STALLED_SECONDS
        if not self._waiting:
            return None
        return max(0.0, self._look_at - time.monotonic())

    def _handle(self, command: Command | Callable[[], None]) -> None:
        match command:
            case Add():
                self._add(command)
            case Abort():
                self._abort(command)
            case Pull():
                entry = _Import(command, time.monotonic() + command.timeout)
                self._imports[command.prefix_id] = self._waiting[command.prefix_id] = entry
            case DropPrefix():
                self._drop(command.prefix_id)
            case Drain():
                self._agent.drain(
                    command.timeout, lambda: self._send(Drained(self._agent.leases()))
                )
            case Stop() | Start():
                self._stopped = True
            case call:
                call()

    def _add(self, command: Add) -> None:
        added: list[str] = []
        try:
            for request in command.requests:
                self._engine.add_request(request)
                added.append(request.request_id)
        except (RequestError, OverloadedError) as error:
            for request_id in added:
                self._engine.abort(request_id)
            self._send(
                Rejected(
                    command.group,
                    str(error),
                    getattr(error, "param", None),
                    getattr(error, "retry_after", None),
                )
            )
            return
        block_size = self._engine.config.block_size
        for request in command.requests:
            if request.hand_over:
                covered = (len(request.prompt_token_ids) - 1) // block_size * block_size
                self._hand_overs.add(request.request_id)
                self._agent.open(request.request_id, covered)
        self._send(Admitted(command.group))

    def _abort(self, command: Abort) -> None:
        for request_id in command.request_ids:
            if request_id in self._hand_overs:
                self._agent.fail(request_id, "cancelled")
            else:
                self._engine.abort(request_id)

    def _offer(self, hand_over: HandOver) -> None:
        request_id = hand_over.request_id
        if hand_over.error is not None:
            self._agent.fail(request_id, hand_over.error)
            return
        self._agent.offer(request_id, hand_over.spans)
        if hand_over.complete:
            self._agent.complete(request_id, hand_over.num_cached_tokens)

    def _on_prefix_ended(self, request_id: str, outcome: str) -> None:
        """The giver is done with it, however: abort what still runs, unpin the rest."""
        if request_id not in self._hand_overs:
            return
        self._hand_overs.discard(request_id)
        self._engine.release(request_id)
        self._ended.append(PrefixEnded(request_id, outcome))

    def _reserve_waiting(self) -> None:
        """Starts the pulls that have room now, in order of arrival."""
        if time.monotonic() < self._look_at:
            return
        for prefix_id, entry in list(self._waiting.items()):
            pull = entry.pull
            reservation = self._engine.reserve(
                prefix_id, pull.token_ids, pull.ticket.num_tokens, pull.cache_salt
            )
            remaining = entry.deadline - time.monotonic()
            if reservation is not None and remaining > 0:
                del self._waiting[prefix_id]
                entry.pulling = True
                entry.num_local_tokens = reservation.num_local_tokens
                self._agent.pull(prefix_id, pull.ticket, reservation.wanted, remaining)
            elif remaining <= 0:
                self._fail(prefix_id, "no_room", "No room for the prefix until the deadline.")
            else:  # first come, first served
                self._look_at = time.monotonic() + min(_ROOM_SECONDS, remaining)
                return

    def _on_pulled(self, prefix_id: str, result: PullResult) -> None:
        entry = self._imports[prefix_id]
        entry.pulling = False
        if entry.dropped:
            self._fail(prefix_id, "cancelled", "Nobody waits for the prefix any more.")
        elif result.reason is not None:
            self._fail(prefix_id, result.reason, result.message)
        else:
            self._engine.commit(prefix_id)
            self._send(
                PrefixReady(
                    prefix_id=prefix_id,
                    num_tokens=entry.pull.ticket.num_tokens,
                    num_local_tokens=entry.num_local_tokens,
                    num_cached_tokens=result.num_cached_tokens,
                    bytes=result.bytes,
                    seconds=result.seconds,
                    backend=result.backend,
                )
            )

    def _drop(self, prefix_id: str) -> None:
        entry = self._imports.get(prefix_id)
        if entry is None:
            return
        if entry.pulling:  # room is freed only when nothing can write into it any more
            entry.dropped = True
            self._agent.cancel_pull(prefix_id)
        elif prefix_id in self._waiting:
            self._fail(prefix_id, "cancelled", "Nobody waits for the prefix any more.")
        else:
            del self._imports[prefix_id]
            self._free(prefix_id)

    def _fail(self, prefix_id: str, reason: str, message: str) -> None:
        del self._imports[prefix_id]
        self._waiting.pop(prefix_id, None)
        self._free(prefix_id)
        self._send(PrefixFailed(prefix_id=prefix_id, reason=reason, message=message))

    def _free(self, prefix_id: str) -> None:
        self._engine.cancel(prefix_id)
        self._look_at = 0.0

    def _report(self, result: StepResult) -> None:
        now = time.monotonic()
        due = now - self._stats_at >= _STATS_SECONDS or not self._engine.has_work()
        if due:
            self._stats_at = now
        self._send(
            Stepped(
                outputs=result.outputs,
                cache_events=self._engine.take_cache_events(),
                ended=self._ended,
                leases=self._agent.leases(),
                stats=self._engine.stats() if due else None,
            )
        )
        self._ended = []
