"""The client of the pods, against real sockets that answer byte for byte what a test wrote."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from fresh_seed import fresh_seed

from tasuki_gateway.http_client import (
    BrokenError,
    ConnectError,
    HttpClient,
    Response,
    SilentError,
)

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
SHORT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-Kind: a\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One whole request; b"" when the client is gone."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    fields = head.lower().split(b"content-length: ")
    return head + await reader.readexactly(int(fields[1].split(b"\r\n")[0]))


@contextlib.asynccontextmanager
async def served(talk: Talk) -> AsyncIterator[tuple[HttpClient, str]]:
    """A client, and the URL of a server that treats each connection with `talk`."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    client = HttpClient(connect_timeout=2.0)
    try:
        yield client, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/path"
    finally:
        client.close()
        server.close()


async def whole(client: HttpClient, url: str, body: bytes = b"", silence: float = 5.0) -> bytes:
    """The body of an answer; its response is closed."""
    response = await client.request("POST", url, body, silence=silence)
    try:
        return await response.body()
    finally:
        response.close()


async def test_a_request_says_what_it_is_and_the_answer_is_read() -> None:
    seen = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(SHORT)
        await reader.read()

    async with served(talk) as (client, url):
        response = await client.request("POST", url, b"abc", silence=5)
        assert response.status == 200
        assert response.headers[b"x-kind"] == b"a"
        assert await response.body() == b"ok"
        response.close()
    assert seen[0].startswith(b"POST /path HTTP/1.1\r\nhost: 127.0.0.1:")
    assert seen[0].endswith(b"\r\n\r\nabc")


async def test_a_chunked_body_arrives_whole_however_it_is_cut() -> None:
    draw = random.Random(fresh_seed())
    body = draw.randbytes(5000)
    wire, at = CHUNKED, 0
    while at < len(body):
        size = draw.randint(1, 900)
        part = body[at : at + size]
        wire += b"%x\r\n" % len(part) + part + b"\r\n"
        at += size
    wire += b"0\r\n\r\n"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader):
            sent = 0
            while sent < len(wire):
                size = draw.randint(1, 400)
                writer.write(wire[sent : sent + size])
                await writer.drain()
                await asyncio.sleep(0)
                sent += size

    async with served(talk) as (client, url):
        for _ in range(5):
            assert await whole(client, url) == body


async def test_a_connection_is_used_again_once_its_answer_was_read() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await read_request(reader):
            writer.write(SHORT)

    async with served(talk) as (client, url):
        for _ in range(10):
            assert await whole(client, url) == b"ok"
        assert connections == 1
        await asyncio.gather(*(whole(client, url) for _ in range(5)))
        assert connections <= 5


async def test_a_pod_that_asks_for_it_gets_a_new_connection() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(SHORT.replace(b"X-Kind: a", b"connection: close"))

    async with served(talk) as (client, url):
        for _ in range(3):
            assert await whole(client, url) == b"ok"
    assert connections == 3


async def test_a_stale_connection_is_replaced_without_an_error() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers once, then drops the connection when asked again: the pod was restarted."""
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(SHORT)
        await read_request(reader)
        writer.transport.abort()

    async with served(talk) as (client, url):
        for _ in range(4):
            assert await whole(client, url) == b"ok"
    assert connections == 4


async def test_an_answer_to_nothing_is_never_the_next_requests() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(SHORT + SHORT[:-2] + b"no")
        await reader.read()

    async with served(talk) as (client, url):
        for _ in range(3):
            assert await whole(client, url) == b"ok"
    assert connections == 3


async def test_connections_that_pods_close_are_forgotten() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(SHORT)

    async with served(talk) as (client, url):
        await asyncio.gather(*(whole(client, url) for _ in range(20)))
        await asyncio.sleep(0.3)
        assert not any(host.idle for host in client._hosts.values())


async def test_a_fresh_connection_that_is_dropped_is_not_tried_again() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.transport.abort()

    async with served(talk) as (client, url):
        with pytest.raises(BrokenError):
            await whole(client, url)
    assert connections == 1


@pytest.mark.parametrize(
    "wire",
    [
        CHUNKED + b"5\r\nhel",
        CHUNKED + b"5\r\nhello\r\n",
        SHORT[:-1],
        b"",
        b"HTTP/1.1 20",
        b"SSH-2.0-OpenSSH\r\n",
        CHUNKED + b"zz\r\n",
    ],
)
async def test_an_answer_that_is_cut_or_no_http_is_broken(wire: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(wire)
        await writer.drain()

    async with served(talk) as (client, url):
        with pytest.raises(BrokenError):
            await whole(client, url)


async def test_nobody_there_is_a_connect_error() -> None:
    client = HttpClient(connect_timeout=1.0)
    with pytest.raises(ConnectError):
        await client.request("GET", "http://127.0.0.1:1/x", silence=1)


@pytest.mark.parametrize("wire", [b"", CHUNKED, CHUNKED + b"2\r\nhi\r\n"])
async def test_silence_is_an_error_in_every_phase(wire: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(wire)
        await reader.read()

    async with served(talk) as (client, url):
        with pytest.raises(SilentError):
            await whole(client, url, silence=0.2)


async def test_a_slow_reader_stops_the_sender_and_is_not_taken_for_silence() -> None:
    total = 8 << 20

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        for _ in range(128):
            writer.write(bytes(total // 128))
            await writer.drain()
        await reader.read()

    async with served(talk) as (client, url):
        response = await client.request("POST", url, silence=1.0)
        await asyncio.sleep(2.0)
        first = await response.read()
        assert len(first) < total // 2
        rest = 0
        while data := await response.read():
            rest += len(data)
        assert len(first) + rest == total
        response.close()


async def test_closing_before_the_end_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED + b"2\r\nhi\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with served(talk) as (client, url):
        response = await client.request("POST", url, silence=5)
        assert await response.read() == b"hi"
        response.close()
        await asyncio.wait_for(gone.wait(), 2)


async def test_cancelling_a_request_closes_the_connection() -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        asked.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with served(talk) as (client, url):
        task = asyncio.create_task(client.request("POST", url, silence=5))
        await asyncio.wait_for(asked.wait(), 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gone.wait(), 2)


async def test_abandoning_a_host_fails_what_waits_for_it() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(CHUNKED + b"2\r\nhi\r\n")
        await reader.read()

    async with served(talk) as (client, url):
        response: Response = await client.request("POST", url, silence=5)
        assert await response.read() == b"hi"
        task = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        client.abandon(url, "is gone")
        with pytest.raises(SilentError, match="is gone"):
            await task
        response.close()
