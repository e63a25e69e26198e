"""A thousand clients that leave at random moments leave nothing behind."""

import asyncio
import json
import random
import time
from collections import Counter

import httpx
import pytest
from greedy import is_greedy, random_prompt
from relays import Relay, body, complete

from tasuki_index.connection import CONNECTIONS
from tasuki_transfer.tcp import STREAMS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HANG_UPS = 1000
AT_ONCE = 32
LINK = STREAMS + 1
"""Connections of a decode pod's engine with the prefill pod's: streams, and one for calls. All may
be down when things are counted first."""
DECODE_PODS = 2
POOLED = {"threads": 8, "engine descriptors": LINK}
"""By so many a process's pools may still grow to their bounds; a leak would be hundreds."""
MOMENTS = ("connected", "mid-request", "mid-prefill", "mid-stream")


async def hang_up(relay: Relay, rng: random.Random) -> str:
    """Connects, and leaves at a random moment; which one."""
    moment = rng.choice(MOMENTS)
    port = int(relay.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        request = body(
            random_prompt(rng, rng.randrange(1, 400)),
            stream=rng.random() < 0.8,
            max_tokens=rng.randrange(1, 200),
            n=rng.choice((1, 1, 3)),
            temperature=1.0,
        )
        content = json.dumps(request if request["stream"] else request | {"stream_options": None})
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        head += f"content-length: {len(content)}\r\n\r\n"
        whole = (head + content).encode()
        if moment == "mid-request":
            whole = whole[: rng.randrange(1, len(whole))]
        if moment != "connected":
            writer.write(whole)
        if moment == "mid-prefill":
            await asyncio.sleep(rng.expovariate(1 / 0.05))
        if moment == "mid-stream":
            await reader.readuntil(b"\r\n\r\n")
            async with asyncio.timeout(60):
                for _ in range(rng.randrange(12)):
                    if not await reader.read(4096):
                        break
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
    return moment


async def burst(relay: Relay, rng: random.Random, count: int) -> Counter[str]:
    """So many hang-ups, some at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one() -> str:
        async with room:
            return await hang_up(relay, rng)

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


def bound(name: str, before: int) -> int:
    """So much may be there in the end: what was there before, but for what is pooled."""
    if name.endswith("Redis"):
        return CONNECTIONS
    links = DECODE_PODS if name == "prefill-0 engine descriptors" else 1
    return before + links * sum(more for kind, more in POOLED.items() if name.endswith(kind))


async def settled(relay: Relay, baseline: dict[str, int], seconds: float) -> dict[str, int]:
    """What is more than it may be; empty as soon as nothing is."""
    deadline = time.monotonic() + seconds
    while True:
        now = relay.resources()
        more = {name: count for name, count in now.items() if count > bound(name, baseline[name])}
        if not more or time.monotonic() > deadline:
            return more
        await asyncio.sleep(0.5)


async def test_a_thousand_hang_ups_leave_no_block_slot_lease_task_thread_or_descriptor(
    relay: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    await burst(relay, rng, 3 * AT_ONCE)
    await asyncio.to_thread(relay.until_idle, 90.0)
    await asyncio.sleep(7)  # idle connections between the processes are closed by then
    baseline = relay.resources()
    (giver,) = relay.prefill
    expired = giver.metric("tasuki_leases_ended_total", outcome="expired")
    moments = await burst(relay, rng, HANG_UPS)
    assert min(moments[moment] for moment in MOMENTS) > HANG_UPS // 8
    await asyncio.to_thread(relay.until_idle, 90.0)
    late = giver.metric("tasuki_leases_ended_total", outcome="expired") - expired
    assert late <= HANG_UPS // 50, "a goodbye may overtake what it ends, but that is rare"
    assert not await settled(relay, baseline, 30.0)
    assert relay.metric("tasuki_gateway_requests_total", code="500") == 0
    prompt = random_prompt(rng, 150)
    stream = await complete(client, relay, prompt)
    assert is_greedy(relay.model, prompt, stream.tokens[0])
