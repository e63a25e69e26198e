"""One client's request and its answer, over raw ASGI: the hot path passes no framework."""

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Iterator

import msgspec
from starlette.types import Receive, Scope, Send

from tasuki_gateway import chunks
from tasuki_gateway.failures import BodyTooLargeError, Failure

_JSON = (b"content-type", b"application/json")
_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_encode = msgspec.json.Encoder().encode


class ClientGone(Exception):  # noqa: N818 - what clients do
    """The client left before its request was read."""


def end_now(limit: asyncio.Timeout) -> None:
    """Ends what runs within `limit`, if it does not end already."""
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())


class Exchange:
    """Reads a request, writes its answer, and notices when the client leaves."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.began = time.monotonic()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.status = 0
        """Of the answer; 0 while it has not begun."""
        self.gone = False
        """The client left."""
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.trace = self.headers.get(b"traceparent", b"").decode("latin-1")
        """Of the client's own trace, if it has one."""
        self.path_params: dict[str, str] = scope.get("path_params", {})
        self.limit: asyncio.Timeout
        """The scope within which the request is served."""
        self.first_write = 0.0
        self._receive = receive
        self._send = send

    @property
    def key(self) -> bytes:
        """The API key that the client shows; empty without one."""
        scheme, _, key = self.headers.get(b"authorization", b"").partition(b" ")
        return key.strip() if scheme.lower() == b"bearer" else b""

    async def body(self, limit: int) -> bytes:
        """The request's whole body.

        Raises:
            BodyTooLargeError: it has more than `limit` bytes.
            ClientGone: it ended early.
        """
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts: list[bytes] = [message.get("body", b"")]
        size = len(parts[0])
        while message.get("more_body") and size <= limit:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
        if size > limit:
            raise BodyTooLargeError(f"The body has more than {limit} bytes.")
        return b"".join(parts)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Ends `limit` at once when the client leaves; for use after the body was read."""
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        end_now(self.limit)

    async def write(self, payload: bytes) -> None:
        """A piece of a stream; the first one starts it."""
        if not self.status:
            self.first_write = time.monotonic()
            await self._start(200, _STREAM)
        await self._send({"type": "http.response.body", "body": payload, "more_body": True})

    async def finish(self, payload: bytes) -> None:
        """The last piece of a stream."""
        if not self.status:
            await self._start(200, _STREAM)
        await self._send({"type": "http.response.body", "body": payload})

    async def answer(self, body: bytes, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
        """A whole JSON answer."""
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, (_JSON, length, *headers))
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, failure: Failure) -> None:
        """An error: as the answer, or in a stream that has begun as its last event."""
        if self.status:
            await self.finish(chunks.error_event(failure.body))
        else:
            await self.answer(_encode(failure.body), failure.status, *failure.headers)

    async def _start(self, status: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.status = status
        request_id = (b"x-request-id", self.request_id.encode())
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [*headers, request_id]}
        )
