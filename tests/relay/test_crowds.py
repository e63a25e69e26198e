"""Many clients at once: each gets its own right tokens, or is told to come back later."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from greedy import is_greedy, random_prompt
from relays import Relay, Stream, complete, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


async def test_64_streams_at_once_are_each_what_they_are_alone(
    relay: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    prompts = [random_prompt(rng, rng.randrange(1, 200)) for _ in range(64)]
    streams = await asyncio.gather(
        *(complete(client, relay, prompt, max_tokens=32) for prompt in prompts)
    )
    assert all(stream.whole for stream in streams), [s.error for s in streams if not s.whole]
    for prompt, stream in zip(prompts, streams, strict=True):
        assert is_greedy(relay.model, prompt, stream.tokens[0])
        assert stream.usage is not None
        assert stream.usage["completion_tokens"] == 32
    relay.until_idle()


@pytest.fixture(scope="module")
def narrow(folders: Path, model: Path) -> Iterator[Relay]:
    """A relay with little room: short queues, few blocks."""
    engine = {"max_queued_requests": 24, "max_num_seqs": 8, "num_blocks": 120}
    with running(
        Relay(
            folders / "narrow",
            model,
            transports=("tcp",),
            engine=engine,
            gateway_flags=("--max-requests=300",),
        )
    ) as relay:
        yield relay


async def test_500_requests_at_once_get_right_answers_or_are_told_to_come_back(
    narrow: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    prompts = [random_prompt(rng, rng.randrange(20, 120)) for _ in range(500)]
    streams = await asyncio.gather(*(complete(client, narrow, prompt) for prompt in prompts))
    by_status: dict[int, list[tuple[list[int], Stream]]] = {}
    for prompt, stream in zip(prompts, streams, strict=True):
        by_status.setdefault(stream.status, []).append((prompt, stream))
    assert set(by_status) == {200, 429, 503}
    assert all(stream.whole for _, stream in by_status[200])
    for prompt, stream in rng.sample(by_status[200], min(40, len(by_status[200]))):
        assert is_greedy(narrow.model, prompt, stream.tokens[0])
    assert all(len(stream.tokens[0]) == 16 for _, stream in by_status[200])
    narrow.until_idle()


async def test_a_refused_request_is_told_when_to_come_back(
    narrow: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    async def ask() -> httpx.Response:
        request = {"model": "tiny", "prompt": random_prompt(rng, 60), "max_tokens": 4}
        return await client.post(f"{narrow.url}/v1/completions", json=request)

    refused = [r for r in await asyncio.gather(*(ask() for _ in range(400))) if r.is_error]
    assert refused
    for response in refused:
        assert response.status_code in (429, 503)
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] in ("rate_limit_error", "overloaded_error")
    narrow.until_idle()
