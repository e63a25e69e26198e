"""Givers and takers over real sockets, with regions whose every byte is random."""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence

import msgspec
import torch

from tasuki_common.messages import Ticket
from tasuki_transfer.base import Backend, Outcome, Regions
from tasuki_transfer.giver import Giver
from tasuki_transfer.spans import Span
from tasuki_transfer.taker import Taker

KEY = b"a key that both pods were given."
FINGERPRINT = "granite/bf16/16"
LEASE_SECONDS = 5.0

SHAPES = {"full": (96, 8192), "window": (24, 4096), "state": (4, 3 << 20)}
"""Rows and bytes of each region; a state takes more than one part of a tcp stream."""


def random_regions(seed: int, device: str = "cpu") -> Regions:
    """Regions of SHAPES with random content."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        for name, shape in SHAPES.items()
    }


def empty_regions(device: str = "cpu") -> Regions:
    """Regions of SHAPES with zeros."""
    return {
        name: torch.zeros(shape, dtype=torch.uint8, device=device) for name, shape in SHAPES.items()
    }


class Ends:
    """Counts how leases ended, by request."""

    def __init__(self) -> None:
        self.of: dict[str, list[Outcome]] = {}

    def __call__(self, request_id: str, outcome: Outcome) -> None:
        self.of.setdefault(request_id, []).append(outcome)


class Pair:
    """One giver, one taker, their regions, and what became of the leases."""

    def __init__(
        self,
        seed: int,
        backends: Sequence[Backend],
        *,
        lease_seconds: float = LEASE_SECONDS,
        incarnation: str = "first",
        device: str = "cpu",
    ) -> None:
        self.random = random.Random(seed)
        self.device = device
        self.source = random_regions(seed, device)
        self.target = empty_regions(device)
        self.ends = Ends()
        self.rows: list[int] = []
        self.generations: dict[tuple[str, int], int] = {}
        self.giver = Giver(
            regions=self.source,
            fingerprint=FINGERPRINT,
            incarnation=incarnation,
            key=KEY,
            backends=backends,
            lease_seconds=lease_seconds,
            on_end=self.ends,
            generation=lambda pool, index: self.generations.get((pool, index), 0),
        )
        self.taker = Taker(regions=self.target, fingerprint=FINGERPRINT, key=KEY, backends=backends)

    def ticket(self, request_id: str) -> Ticket:
        """Open a lease."""
        return Ticket(pod="prefill-0", **self.giver.open(request_id, 16))

    def spans(self, **counts: int) -> list[Span]:
        """Random rows of each pool, as a prefix of that many spans, in the order of the call."""
        return [
            Span(pool, index, ordinal, 0)
            for pool, count in counts.items()
            for ordinal, index in enumerate(self.random.sample(range(SHAPES[pool][0]), count))
        ]

    def want(self, spans: list[Span], share: float = 1.0) -> dict[str, dict[int, int]]:
        """A random share of the spans, each with a random row of its own in the taker's region."""
        wanted: dict[str, dict[int, int]] = {}
        free = {pool: self.random.sample(range(rows), rows) for pool, (rows, _) in SHAPES.items()}
        for span in spans:
            if self.random.random() < share:
                wanted.setdefault(span.pool, {})[span.ordinal] = free[span.pool].pop()
        return wanted

    def assert_moved(self, spans: list[Span], wanted: dict[str, dict[int, int]]) -> None:
        """Wanted rows hold what the giver's rows hold; all other rows were not touched."""
        expected = empty_regions(self.device)
        for span in spans:
            row = wanted.get(span.pool, {}).get(span.ordinal)
            if row is not None:
                expected[span.pool][row] = self.source[span.pool][span.index]
        for pool, rows in expected.items():
            assert torch.equal(rows, self.target[pool]), pool

    async def close(self) -> None:
        """End both sides."""
        await self.taker.close()
        await self.giver.close()


@contextlib.asynccontextmanager
async def pair(
    seed: int,
    backends: Sequence[Backend] = ("tcp",),
    *,
    lease_seconds: float = LEASE_SECONDS,
    device: str = "cpu",
) -> AsyncIterator[Pair]:
    """A started pair on loopback."""
    both = Pair(seed, backends, lease_seconds=lease_seconds, device=device)
    await both.giver.start("127.0.0.1", 0)
    try:
        yield both
    finally:
        await both.close()


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def busy_threads() -> list[str]:
    """Names of this package's threads that live."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tasuki-")]


class CuttingProxy:
    """Relays connections to a port and cuts them all once `limit` bytes came back through it."""

    def __init__(self, port: int, limit: int) -> None:
        self._port = port
        self._left = limit
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        """Listen on a free loopback port."""
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, up_writer]
        await asyncio.gather(self._copy(reader, up_writer), self._copy(up_reader, writer, True))

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if count:
                    data, self._left = data[: self._left], max(self._left - len(data), 0)
                writer.write(data)
                await writer.drain()
                if count and not self._left:
                    self.cut()
        writer.close()

    def cut(self) -> None:
        """End all connections, half-sent as they are."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        """Stop."""
        self.cut()
        self._server.close()
        await self._server.wait_closed()


class GiverProcess:
    """A giver of random regions in a process of its own, with two complete leases.

    `ticket` has the spans, `warm` none: pulling it makes the connections.
    """

    def __init__(self, seed: int, backend: Backend, counts: dict[str, int]) -> None:
        command = [sys.executable, __file__, str(seed), backend, json.dumps(counts)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.ticket, self.warm = msgspec.json.decode(
            self._process.stdout.readline(), type=tuple[Ticket, Ticket]
        )

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def end(self) -> None:
        """Kill and reap."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


async def _serve(seed: int, backend: Backend, counts: dict[str, int]) -> None:
    both = Pair(seed, [backend], lease_seconds=60)
    await both.giver.start("127.0.0.1", 0)
    ticket = both.ticket("r")
    both.giver.offer("r", both.spans(**counts))
    both.giver.complete("r")
    warm = both.ticket("warm")
    both.giver.complete("warm")
    sys.stdout.write(msgspec.json.encode((ticket, warm)).decode() + "\n")
    sys.stdout.flush()
    await asyncio.sleep(120)


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))  # type: ignore[arg-type]
