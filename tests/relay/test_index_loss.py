"""Losing the index costs speed, never an answer."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from draw_margins import settled_prompt
from greedy import is_greedy, random_prompt
from relays import Relay, complete, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORKERS = 8
NUM_TOKENS = 16


async def test_redis_killed_and_restarted_under_load_fails_no_request(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    assert mistreated.redis is not None
    prompts = [
        settled_prompt(rng, mistreated.model, rng.randrange(20, 150), NUM_TOKENS) for _ in range(12)
    ]
    expected = []
    for prompt in prompts:
        tokens = (await complete(client, mistreated, prompt, max_tokens=NUM_TOKENS)).tokens[0]
        assert is_greedy(mistreated.model, prompt, tokens)
        expected.append(tokens)
    over = asyncio.Event()
    answered = 0

    async def work() -> None:
        nonlocal answered
        while not over.is_set():
            which = rng.randrange(len(prompts))
            salt = str(rng.randrange(4))
            stream = await complete(
                client, mistreated, prompts[which], cache_salt=salt, max_tokens=NUM_TOKENS
            )
            assert stream.whole, stream.error
            assert stream.tokens[0] == expected[which]
            answered += 1

    async def more(count: int) -> None:
        """Until so many more answers are here."""
        wanted = answered + count
        async with asyncio.timeout(60):
            while answered < wanted:  # noqa: ASYNC110 - the clients only count
                await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        for _ in range(WORKERS):
            group.create_task(work())
        await more(WORKERS)
        mistreated.redis.kill()
        await asyncio.sleep(4)
        await more(2 * WORKERS)  # more than were under way
        await asyncio.to_thread(mistreated.redis.start)
        await asyncio.sleep(3)
        await more(2 * WORKERS)
        over.set()
    assert mistreated.metric("tasuki_gateway_index_failures_total") > 0
    assert mistreated.metric("tasuki_gateway_failovers_total", reason="connect") == 0


async def test_the_index_knows_again_what_pods_hold_after_it_lost_its_memory(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    assert mistreated.redis is not None
    prompt = random_prompt(rng, 401)
    assert (await complete(client, mistreated, prompt)).whole
    mistreated.redis.kill()
    await asyncio.to_thread(mistreated.redis.start)
    local = mistreated.metric("tasuki_gateway_routed_total", route="local")
    async with asyncio.timeout(60):
        while mistreated.metric("tasuki_gateway_routed_total", route="local") == local:
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
