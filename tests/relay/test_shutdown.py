"""Whoever is asked to leave leaves in order, and no client notices."""

import asyncio
import random
import signal

import httpx
import pytest
from client_load import Load, start_streams
from greedy import is_greedy, random_prompt
from pods import leave
from relays import Relay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_pod_that_leaves_under_load_fails_no_request(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random, role: str
) -> None:
    pod = (mistreated.prefill if role == "prefill" else mistreated.decode)[0]
    async with Load(client, mistreated, rng).running() as load:
        await load.more(20)
        await leave(pod)
        await load.more(20)


async def test_a_stream_that_outlasts_its_pods_drain_goes_on_elsewhere(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    prompts = [random_prompt(rng, 40) for _ in range(4)]
    retried = mistreated.metric("tasuki_gateway_failovers_total", reason="retry")
    tasks = await start_streams(client, mistreated, prompts, 1800)
    # Which pod took a stream is chance: all may be routed while both are idle.
    busiest = max(mistreated.decode, key=lambda pod: pod.metric("tasuki_requests_running"))
    await leave(busiest)
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
    assert await asyncio.to_thread(gateway.wait, 60) == 0
