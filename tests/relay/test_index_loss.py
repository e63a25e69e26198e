"""Losing the index costs speed, never an answer."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from greedy import is_greedy, random_prompt
from relays import Relay, complete, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORKERS = 8


async def test_redis_killed_and_restarted_under_load_fails_no_request(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    assert mistreated.redis is not None
    prompts = [random_prompt(rng, rng.randrange(20, 150)) for _ in range(12)]
    expected = []
    for prompt in prompts:
        tokens = (await complete(client, mistreated, prompt)).tokens[0]
        assert is_greedy(mistreated.model, prompt, tokens)
        expected.append(tokens)
    over = asyncio.Event()
    answered = 0

    async def work() -> None:
        nonlocal answered
        while not over.is_set():
            which = rng.randrange(len(prompts))
            salt = str(rng.randrange(4))
            stream = await complete(client, mistreated, prompts[which], cache_salt=salt)
            assert stream.whole, stream.error
            assert stream.tokens[0] == expected[which]
            answered += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(WORKERS):
            group.create_task(work())
        await asyncio.sleep(1)
        mistreated.redis.kill()
        await asyncio.sleep(4)
        while_away = answered
        await asyncio.to_thread(mistreated.redis.start)
        await asyncio.sleep(3)
        over.set()
    assert while_away > WORKERS
    assert answered > while_away
    assert mistreated.metric("tasuki_gateway_index_errors_total") > 0
    assert mistreated.metric("tasuki_gateway_failovers_total", reason="connect") == 0


async def test_the_index_knows_again_what_pods_hold_after_it_lost_its_memory(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    assert mistreated.redis is not None
    prompt = random_prompt(rng, 401)
    assert (await complete(client, mistreated, prompt)).whole
    mistreated.redis.kill()
    await asyncio.to_thread(mistreated.redis.start)
    local = mistreated.metric("tasuki_gateway_routed_total", kind="local")
    async with asyncio.timeout(20):
        while mistreated.metric("tasuki_gateway_routed_total", kind="local") == local:
            await asyncio.sleep(0.5)
            stream = await complete(client, mistreated, prompt, max_tokens=2)
            assert stream.whole, stream.error
    assert stream.usage is not None
    assert stream.usage["prompt_tokens_details"]["cached_tokens"] == 400


@pytest.fixture(scope="module")
def without_index(folders: Path, model: Path) -> Iterator[Relay]:
    """A relay that never had a Redis; the gateway knows its pods by their addresses."""
    relay = Relay(folders / "without_index", model, transports=("tcp",), index=False)
    with running(relay) as relay:
        yield relay


async def test_a_relay_without_an_index_hands_prompts_over(
    without_index: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    prompts = [random_prompt(rng, 100) for _ in range(4)]
    for prompt in prompts:
        stream = await complete(client, without_index, prompt)
        assert is_greedy(without_index.model, prompt, stream.tokens[0])
    assert without_index.decode_metric("tasuki_transfer_seconds_count") == len(prompts)
    without_index.until_idle()
