"""Clients that keep asking a relay while something is done to it."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import httpx
from greedy import is_greedy, random_prompt
from relays import Relay, Stream, body, complete, events

WORKERS = 8


class Load:
    """Holds every answer against transformers; one that is wrong or fails ends the load."""

    def __init__(self, client: httpx.AsyncClient, relay: Relay, rng: random.Random) -> None:
        self._client, self._relay, self._rng = client, relay, rng
        self.answered = 0
        self._over = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """While the block runs clients ask, and after it until their last answers are here."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._ask())
            yield self
            self._over.set()

    async def more(self, count: int, seconds: float = 60.0) -> None:
        """Until so many more answers are here."""
        wanted = self.answered + count
        async with asyncio.timeout(seconds):
            while self.answered < wanted:  # noqa: ASYNC110 - the clients only count
                await asyncio.sleep(0.02)

    async def _ask(self) -> None:
        while not self._over.is_set():
            prompt = random_prompt(self._rng, self._rng.randrange(20, 200))
            stream = await complete(self._client, self._relay, prompt, max_tokens=24)
            assert stream.whole, stream.error
            assert is_greedy(self._relay.model, prompt, stream.tokens[0])
            self.answered += 1


async def _read(
    client: httpx.AsyncClient, relay: Relay, prompt: list[int], started: asyncio.Event, length: int
) -> Stream:
    """A stream read to its end; `started` is set at its tenth token."""
    stream = Stream()
    async for _ in events(client, relay, body(prompt, max_tokens=length), stream):
        if len(stream.tokens.get(0, [])) >= 10:
            started.set()
    started.set()
    return stream


async def start_streams(
    client: httpx.AsyncClient, relay: Relay, prompts: list[list[int]], length: int
) -> "list[asyncio.Task[Stream]]":
    """Streams of `length` tokens, all begun."""
    started = [asyncio.Event() for _ in prompts]
    tasks = [
        asyncio.ensure_future(_read(client, relay, prompt, event, length))
        for prompt, event in zip(prompts, started, strict=True)
    ]
    for event in started:
        await event.wait()
    return tasks
