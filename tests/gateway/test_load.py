"""Many clients at once, and an index that comes and goes under them."""

import asyncio
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from fresh_seed import fresh_seed
from gateway_stack import Stack, Starter
from redis_server import RedisServer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs"]


def body(draw: random.Random, **fields: Any) -> dict[str, Any]:
    """A request with a prompt of its own, short or long."""
    prompt = " ".join(draw.choices(WORDS, k=draw.choice((3, 30, 400))))
    return {"prompt": prompt, "seed": draw.randint(0, 99), "max_tokens": 20, **fields}


async def statuses(stack: Stack, bodies: list[dict[str, Any]]) -> Counter[int]:
    """The status of each answer, all asked at once; what streams must end well."""
    limits = httpx.Limits(max_connections=len(bodies))

    async def one(client: httpx.AsyncClient, asked: dict[str, Any]) -> int:
        response = await client.post("/v1/completions", json=asked)
        if response.status_code == 200 and asked.get("stream"):
            assert response.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in response.text
        return response.status_code

    async with httpx.AsyncClient(base_url=stack.url, timeout=60, limits=limits) as client:
        return Counter(await asyncio.gather(*(one(client, asked) for asked in bodies)))


@pytest.mark.slow
async def test_64_streams_at_once_each_get_their_own_text(stack: Stack) -> None:
    draw = random.Random(fresh_seed())
    asked = [body(draw) for _ in range(64)]

    async def text(client: httpx.AsyncClient, one: dict[str, Any]) -> str:
        answer = await client.post("/v1/completions", json=one | {"stream": True})
        return answer.text.replace(answer.text.split('"id":"')[1].split('"')[0], "ID")

    async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
        alone = [await text(client, one) for one in asked]
        stack.fault(delay=0.002)
        together = await asyncio.gather(*(text(client, one) for one in asked))
    strip = [
        [line.split('"created"')[0] + line.split('"choices"')[-1] for line in t.split("\n\n")]
        for t in (*alone, *together)
    ]
    assert strip[:64] == strip[64:]


@pytest.mark.slow
async def test_500_at_once_get_an_answer_or_are_told_to_wait(start: Starter) -> None:
    stack = start("--max-requests", "300")
    draw = random.Random(fresh_seed())
    counts = await statuses(stack, [body(draw, stream=draw.random() < 0.5) for _ in range(500)])
    assert counts.keys() <= {200, 429, 503}
    assert counts[200] > 0
    stack.wait_idle()
    assert stack.metric("tasuki_gateway_requests_in_flight") == 0


@pytest.mark.slow
async def test_an_index_that_dies_and_returns_fails_no_request(
    start: Starter, tmp_path: Path
) -> None:
    redis = RedisServer(tmp_path).start()
    try:
        stack = start(redis_url=redis.url)
        draw = random.Random(fresh_seed())
        over = asyncio.Event()
        counts: Counter[int] = Counter()

        async def load(client: httpx.AsyncClient) -> None:
            while not over.is_set() or counts.total() <= 50:
                answer = await client.post("/v1/completions", json=body(draw))
                counts[answer.status_code] += 1

        async def break_the_index() -> None:
            await asyncio.sleep(1.5)
            redis.kill()
            await asyncio.sleep(2.5)
            await asyncio.to_thread(redis.start)
            await asyncio.sleep(1.5)
            redis.pause()
            await asyncio.sleep(1.5)
            redis.resume()
            await asyncio.sleep(2)
            over.set()

        async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
            await asyncio.gather(break_the_index(), *(load(client) for _ in range(8)))
        assert counts.keys() == {200}, counts
        assert stack.metric("tasuki_gateway_index_failures_total") > 0
    finally:
        redis.stop()


def until_refused(stack: Stack) -> None:
    """Until the gateway takes no connections any more."""
    host, port = stack.url.removeprefix("http://").split(":")
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except ConnectionRefusedError:
            return
        assert time.monotonic() < deadline, "it still listens"
        time.sleep(0.02)


def test_sigterm_lets_streams_finish_and_takes_no_new_ones(start: Starter) -> None:
    stack = start(prefill=0, decode=1)
    stack.fault(delay=0.1)
    asked = {"prompt": "x", "max_tokens": 60, "stream": True}

    def terminate() -> None:
        stack.gateway.process.send_signal(signal.SIGTERM)
        until_refused(stack)
        with pytest.raises(httpx.ConnectError):
            httpx.post(f"{stack.url}/v1/completions", json=asked)

    text = stack.stream_while(terminate, asked)
    assert text.endswith("data: [DONE]\n\n")
    assert '"error"' not in text
    assert stack.gateway.process.wait(30) == 0


def test_what_does_not_finish_in_time_ends_with_an_error(start: Starter) -> None:
    stack = start("--drain-timeout", "0.5", prefill=0, decode=1)
    stack.fault(delay=0.05)
    text = stack.stream_while(
        lambda: stack.gateway.process.send_signal(signal.SIGTERM),
        {"prompt": "x", "max_tokens": 2000, "stream": True},
    )
    assert "shutting down" in text
    assert text.endswith("data: [DONE]\n\n")
    stack.wait_idle()
