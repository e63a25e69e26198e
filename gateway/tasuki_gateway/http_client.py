"""A pooled HTTP/1.1 client for the legs to the pods: one `asyncio.Protocol` over httptools.

A relay needs little of a client: a body known in advance, an answer read as it comes, a deadline on
each phase, and cancellation by closing the connection. For a streamed answer httpx takes six times
the CPU of this, aiohttp half as much again (benchmarks/gateway.py measures it).

    UpstreamError
    ├── ConnectError    nothing was sent
    ├── BrokenError     the connection ended, or spoke nonsense, before the answer was whole
    └── SilentError     no byte within the time allowed
"""

import asyncio
from typing import cast
from urllib.parse import urlsplit

import httptools

_HIGH_WATER = 1 << 18
_MAX_IDLE_PER_HOST = 256


class UpstreamError(Exception):
    """The exchange with a pod failed; the sentence names the pod's address."""


class ConnectError(UpstreamError):
    """No connection could be made in time."""


class BrokenError(UpstreamError):
    """The connection was lost, or was not HTTP, before the answer was complete."""


class SilentError(UpstreamError):
    """The pod sent nothing within the time allowed."""


class _Host:
    """Connections to one address."""

    def __init__(self) -> None:
        self.idle: list[_Connection] = []
        self.active: set[_Connection] = set()


class _Connection(asyncio.Protocol):
    """One connection; carries one exchange at a time."""

    def __init__(self, address: str, host: _Host) -> None:
        self.address = address
        self.transport: asyncio.Transport
        self.open = False
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.answering = self.complete = False
        self.error: UpstreamError | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._parser = httptools.HttpResponseParser(self)

    def send(self, request: bytes) -> None:
        """Starts an exchange on an idle connection."""
        self._begin()
        self.transport.write(request)

    def allow(self, seconds: float) -> None:
        """The longest silence from now on; each byte that arrives starts it anew."""
        self._silence = seconds
        self._heard = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._check_silence)

    def _check_silence(self) -> None:
        if self._chunks:  # it is the reader who lets us wait
            self._heard = self._loop.time()
        due = self._heard + self._silence
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._check_silence)
        else:
            self.fail(SilentError(f"{self.address} was silent for {self._silence:.1f} s."))

    def fail(self, error: UpstreamError) -> None:
        """Ends the exchange and the connection."""
        if not self.complete and self.error is None:
            self.error = error
        self.close()
        self._wake()

    def close(self) -> None:
        """Drops the connection; the pod sees the client gone."""
        self.rest()
        self.open = False
        self.transport.abort()

    def rest(self) -> None:
        """Ends the watch over silence, at the end of an exchange."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def wait(self) -> None:
        """Until something new is known: headers, bytes, the end, or a failure."""
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> bytes:
        """All body bytes that have arrived."""
        if not self._chunks:
            return b""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._size > _HIGH_WATER and self.open:
            self.transport.resume_reading()
        self._size = 0
        return data

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by type
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self.answering = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(BrokenError(f"{self.address} did not speak HTTP: {error}."))
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._host.idle:
            self._host.idle.remove(self)
        self.fail(BrokenError(f"{self.address} closed the connection before its answer was whole."))

    # httptools callbacks
    def on_message_begin(self) -> None:
        if self.complete:  # it must not become the answer to the next request
            raise httptools.HttpParserError("an answer to nothing")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        before, self._size = self._size, self._size + len(body)
        if before <= _HIGH_WATER < self._size:
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        self.complete = True
        if not self._parser.should_keep_alive():
            self.open = False


class Response:
    """The answer of a pod, read as it arrives; `close` it in every case."""

    def __init__(self, connection: _Connection, host: _Host) -> None:
        self.status = connection.status
        self.headers = connection.headers
        self._connection = connection
        self._host = host

    def allow(self, seconds: float) -> None:
        """The longest silence from now on; after it, `read` raises SilentError."""
        self._connection.allow(seconds)

    async def read(self) -> bytes:
        """What has arrived, once something has; b"" at the end of the body.

        Raises:
            BrokenError: the body was cut.
            SilentError: nothing came in the time allowed.
        """
        connection = self._connection
        while True:
            if data := connection.take():
                return data
            if connection.complete:
                return b""
            if connection.error is not None:
                raise connection.error
            await connection.wait()

    async def body(self) -> bytes:
        """The whole body."""
        parts: list[bytes] = []
        while data := await self.read():
            parts.append(data)
        return b"".join(parts)

    def close(self) -> None:
        """Gives the connection back, or drops it when the body was not read to its end."""
        connection = self._connection
        self._host.active.discard(connection)
        reusable = connection.complete and connection.open and not connection.take()
        if reusable and len(self._host.idle) < _MAX_IDLE_PER_HOST:
            connection.rest()
            self._host.idle.append(connection)
        else:
            connection.close()


class HttpClient:
    """Connections to pods, kept alive between requests."""

    def __init__(self, *, connect_timeout: float) -> None:
        self._connect_timeout = connect_timeout
        self._hosts: dict[str, _Host] = {}

    async def request(
        self, method: str, url: str, body: bytes = b"", *, silence: float
    ) -> Response:
        """Sends the request; returns once the answer's headers are here.

        `silence`: seconds without a byte that are allowed, for the headers and then for the body
        until `allow` changes it. A kept-alive connection that turns out dead before it answered is
        replaced once.

        Raises:
            UpstreamError: one of its leaves, see the module.
        """
        parts = urlsplit(url)
        if (host := self._hosts.get(parts.netloc)) is None:
            host = self._hosts[parts.netloc] = _Host()
        message = _encode(method, parts.path, parts.netloc, body)
        while True:
            connection, reused = await self._connect(parts.hostname or "", parts.port or 80, host)
            host.active.add(connection)
            try:
                connection.send(message)
                connection.allow(silence)
                while not connection.status and connection.error is None:
                    await connection.wait()
            except BaseException:
                host.active.discard(connection)
                connection.close()
                raise
            if connection.status:
                return Response(connection, host)
            host.active.discard(connection)
            stale = reused and not connection.answering
            if not (stale and isinstance(connection.error, BrokenError)):
                assert connection.error is not None
                raise connection.error

    async def _connect(self, name: str, port: int, host: _Host) -> tuple[_Connection, bool]:
        """A connection, and whether it was used before."""
        if host.idle:
            return host.idle.pop(), True
        address = f"{name}:{port}"
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, fresh = await loop.create_connection(
                    lambda: _Connection(address, host), name, port
                )
        except (OSError, TimeoutError) as error:
            raise ConnectError(f"{address} took no connection: {error or 'time out'}.") from error
        return fresh, False

    def abandon(self, url: str, reason: str) -> None:
        """Fails all exchanges with the host of `url`."""
        address = urlsplit(url).netloc
        if (host := self._hosts.get(address)) is not None:
            for connection in list(host.active):
                connection.fail(SilentError(f"{address} {reason}."))
            while host.idle:
                host.idle.pop().close()

    def close(self) -> None:
        """Ends all connections."""
        for address in self._hosts:
            self.abandon(f"//{address}", "is no longer wanted: the client closes")


def _encode(method: str, path: str, netloc: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: {netloc}\r\ncontent-length: {len(body)}\r\n"
    if body:
        head += "content-type: application/msgpack\r\n"
    return head.encode() + b"\r\n" + body
