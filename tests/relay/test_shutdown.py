"""Whoever is asked to leave leaves in order, and no client notices."""

import asyncio
import random
import signal

import httpx
import pytest
from greedy import is_greedy, random_prompt
from pods import PodProcess
from relays import Relay, Stream, body, complete, events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORKERS = 8


class Load:
    """Clients that keep asking, and hold every answer against transformers."""

    def __init__(self, client: httpx.AsyncClient, relay: Relay, rng: random.Random) -> None:
        self._client, self._relay, self._rng = client, relay, rng
        self.answered = 0
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`, and all answers are here."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._ask())

    def stop(self) -> None:
        """No new requests."""
        self._over.set()

    async def _ask(self) -> None:
        while not self._over.is_set():
            prompt = random_prompt(self._rng, self._rng.randrange(20, 200))
            stream = await complete(self._client, self._relay, prompt, max_tokens=24)
            assert stream.whole, stream.error
            assert is_greedy(self._relay.model, prompt, stream.tokens[0])
            self.answered += 1


async def leave(pod: PodProcess) -> None:
    """SIGTERM; the pod must be gone by itself, with status 0 and its books in balance."""
    pod.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(pod.process.wait, 30) == 0, pod.log.read_text()[-3000:]
    assert pod.lines("drain_6_gone")
    assert not pod.lines("engine_failed")


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_pod_that_leaves_under_load_fails_no_request(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random, role: str
) -> None:
    pod = (mistreated.prefill if role == "prefill" else mistreated.decode)[0]
    load = Load(client, mistreated, rng)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        await asyncio.sleep(2)
        before = load.answered
        await leave(pod)
        await asyncio.sleep(2)
        load.stop()
    assert before > 0
    assert load.answered > before


async def reading(
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
        asyncio.ensure_future(reading(client, relay, prompt, event, length))
        for prompt, event in zip(prompts, started, strict=True)
    ]
    for event in started:
        await event.wait()
    return tasks


async def test_a_stream_that_outlasts_its_pods_drain_goes_on_elsewhere(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    prompts = [random_prompt(rng, 40) for _ in range(4)]
    retried = mistreated.metric("tasuki_gateway_failovers_total", reason="retry")
    tasks = await start_streams(client, mistreated, prompts, 1800)
    await leave(mistreated.decode[0])
    for prompt, task in zip(prompts, tasks, strict=True):
        stream = await task
        assert stream.whole, stream.error
        assert len(stream.tokens[0]) == 1800
        assert is_greedy(mistreated.model, prompt, stream.tokens[0])
    assert mistreated.metric("tasuki_gateway_failovers_total", reason="retry") > retried


async def test_a_gateway_that_leaves_finishes_its_streams(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    prompts = [random_prompt(rng, 40) for _ in range(12)]
    tasks = await start_streams(client, mistreated, prompts, 200)
    gateway = mistreated.gateway.process
    gateway.send_signal(signal.SIGTERM)
    for prompt, task in zip(prompts, tasks, strict=True):
        stream = await task
        assert stream.whole, stream.error
        assert is_greedy(mistreated.model, prompt, stream.tokens[0])
    assert await asyncio.to_thread(gateway.wait, 10) == 0
