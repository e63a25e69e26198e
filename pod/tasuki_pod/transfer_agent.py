"""The hand-over's thread in an engine process: a giver on prefill pods, a taker on decode pods.

Everything arrives from the engine's thread and goes back through its inbox; they share no state.
"""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from tasuki_common import logs
from tasuki_common.errors import TasukiError
from tasuki_common.messages import Ticket
from tasuki_engine.engine import Engine
from tasuki_pod.wire import Start
from tasuki_transfer.base import TransferError
from tasuki_transfer.giver import Giver
from tasuki_transfer.spans import Span
from tasuki_transfer.taker import Taker

log = logs.get("tasuki.transfer_agent")

T = TypeVar("T")

_START_SECONDS = 30.0
_CLOSE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PullResult:
    """How a pull ended; `reason` is None when all spans are here and verified."""

    reason: str | None = None
    message: str = ""
    bytes: int = 0
    seconds: float = 0.0
    backend: str = ""
    num_cached_tokens: int = 0


_CANCELLED = PullResult(reason="cancelled", message="The pull was cancelled.")


class TransferAgent:
    """The thread, and what the engine's loop may ask of it. `post` puts a call into the inbox."""

    def __init__(
        self, start: Start, engine: Engine, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self._start = start
        self._engine = engine
        self._post = post
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="transfer", daemon=True)
        self._giver: Giver | None = None
        self._taker: Taker | None = None
        self._pulls: dict[str, asyncio.Task[PullResult]] = {}
        self._on_ended: Callable[[str, str], None]
        self._on_pulled: Callable[[str, PullResult], None]

    def bind(
        self,
        on_ended: Callable[[str, str], None],
        on_pulled: Callable[[str, PullResult], None],
    ) -> None:
        """Who hears, on the engine's thread, of ended prefixes and of pulls."""
        self._on_ended = on_ended
        self._on_pulled = on_pulled

    def start(self) -> tuple[str, int, tuple[str, ...]]:
        """Listener's host and port (none on a decode pod) and the transports that can be used."""
        self._thread.start()
        return self._wait(self._come_up(), _START_SECONDS)

    def stop(self) -> None:
        """Closes what is open and ends the thread."""
        if self._thread.is_alive():
            self._wait(self._close(), _CLOSE_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    def open(self, request_id: str, num_tokens: int) -> None:
        """Announces a prefix that will be offered."""
        self._giving().open(request_id, num_tokens)

    def offer(self, request_id: str, spans: Sequence[Span]) -> None:
        """Spans that are final now."""
        if spans:
            self._giving().offer(request_id, list(spans))

    def complete(self, request_id: str, num_cached_tokens: int) -> None:
        """All spans are offered; so many of the tokens had not to be computed."""
        self._giving().complete(request_id, msgspec.msgpack.encode(num_cached_tokens))

    def fail(self, request_id: str, reason: str) -> None:
        """The prefix will not be completed, or not be kept."""
        self._giving().fail(request_id, reason)

    def leases(self) -> int:
        """Prefixes that are open for other pods."""
        return self._giver.leases() if self._giver else 0

    def drain(self, timeout: float, done: Callable[[], None]) -> None:
        """Calls `done` on the engine's thread when no lease is left or the time is over."""

        async def wait() -> None:
            if self._giver is not None:
                await self._giver.drain(timeout)
            self._post(done)

        asyncio.run_coroutine_threadsafe(wait(), self._loop)

    def pull(
        self, prefix_id: str, ticket: Ticket, wanted: dict[str, dict[int, int]], timeout: float
    ) -> None:
        """Fetches spans into the engine's pools; `on_pulled` hears exactly once how it ended."""

        def begin() -> None:
            task = self._loop.create_task(self._pull(prefix_id, ticket, wanted, timeout))
            self._pulls[prefix_id] = task
            task.add_done_callback(ended)

        def ended(task: asyncio.Task[PullResult]) -> None:
            del self._pulls[prefix_id]
            result = _CANCELLED if task.cancelled() else task.result()
            self._post(lambda: self._on_pulled(prefix_id, result))

        self._loop.call_soon_threadsafe(begin)

    def cancel_pull(self, prefix_id: str) -> None:
        """Ends a pull early; `on_pulled` is called when nothing of it is under way any more."""

        def cancel() -> None:
            if task := self._pulls.get(prefix_id):
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)

    async def _pull(
        self, prefix_id: str, ticket: Ticket, wanted: dict[str, dict[int, int]], seconds: float
    ) -> PullResult:
        try:
            if self._taker is None:
                raise TransferError("giver_failed", "This pod takes no prefixes.")
            pulled = await self._taker.pull(ticket, wanted, seconds)
            num_cached = msgspec.msgpack.decode(pulled.note, type=int)
        except TransferError as error:
            return PullResult(reason=error.reason, message=str(error))
        except Exception as error:
            log.exception("pull_failed", prefix_id=prefix_id)
            return PullResult(reason="internal", message=repr(error))
        return PullResult(
            bytes=pulled.bytes,
            seconds=pulled.seconds,
            backend=pulled.backend,
            num_cached_tokens=num_cached,
        )

    async def _come_up(self) -> tuple[str, int, tuple[str, ...]]:
        start = self._start
        if start.role == "decode":
            self._taker = Taker(
                regions=self._engine.regions(),
                fingerprint=self._engine.fingerprint,
                key=start.transfer_key,
                backends=start.transfer_backends,
            )
            return "", 0, self._taker.backends
        self._giver = Giver(
            regions=self._engine.regions(),
            fingerprint=self._engine.fingerprint,
            incarnation=start.incarnation,
            key=start.transfer_key,
            backends=start.transfer_backends,
            lease_seconds=start.lease_seconds,
            generation=self._engine.generation,
            on_end=lambda request_id, outcome: self._post(
                lambda: self._on_ended(request_id, outcome)
            ),
        )
        host, port = await self._giver.start(start.transfer_host, start.transfer_port)
        return host, port, self._giver.backends

    async def _close(self) -> None:
        for task in list(self._pulls.values()):
            task.cancel()
        if self._giver is not None:
            await self._giver.close()
        if self._taker is not None:
            await self._taker.close()

    def _giving(self) -> Giver:
        if self._giver is None:
            raise TasukiError("This pod computes no prefixes for others; send it to a prefill pod.")
        return self._giver

    def _wait(self, coroutine: Coroutine[Any, Any, T], timeout: float) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)
