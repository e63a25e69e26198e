"""A TCP proxy that damages or cuts what one side sends, to put between two pods."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

Damage = Callable[[bytes, int], bytes | None]
"""(data, offset in the connection's stream) -> what is passed on; None cuts the connection."""


def flip_byte_at(position: int) -> Damage:
    """Inverts one bit of the byte at `position` of each connection's stream."""

    def damage(data: bytes, offset: int) -> bytes:
        if offset <= position < offset + len(data):
            at = position - offset
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        return data

    return damage


def cut_at(position: int) -> Damage:
    """Ends each connection after `position` bytes."""
    return lambda data, offset: data if offset + len(data) < position else None


def pass_on(data: bytes, offset: int) -> bytes:
    """Changes nothing."""
    return data


@contextlib.asynccontextmanager
async def proxy(port: int, damage: Damage) -> AsyncIterator[int]:
    """Listens on the port it yields; what the server at `port` answers goes through `damage`."""

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, damage: Damage
    ) -> None:
        offset = 0
        while data := await reader.read(4096):
            damaged = damage(data, offset)
            if damaged is None:
                break
            offset += len(data)
            writer.write(damaged)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(
                pump(reader, upstream_writer, pass_on), pump(upstream_reader, writer, damage)
            )

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
