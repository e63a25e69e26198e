"""Trouble with Redis costs a call its time limit once, and then nothing."""

import asyncio
import contextlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from fresh_seed import fresh_seed
from index_helpers import FINGERPRINT, checkpoints, member, prompt, stored
from redis_server import RedisServer

from tasuki_index import Index, IndexUnavailable
from tasuki_index.connection import CONNECTIONS

NAMES = prompt("x", 20)


async def failing_seconds(index: Index) -> float:
    start = time.monotonic()
    with pytest.raises(IndexUnavailable):
        await index.lookup(FINGERPRINT, NAMES, False)
    return time.monotonic() - start


async def test_a_frozen_redis_costs_the_timeout_once_and_recovers(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(redis_server.url, timeout=1.0)
    tried, evaluate = 0, index._connection._evaluate

    async def counted(*call: Any) -> Any:
        nonlocal tried
        tried += 1
        return await evaluate(*call)

    monkeypatch.setattr(index._connection, "_evaluate", counted)
    assert await index.lookup(FINGERPRINT, NAMES, False) == {}
    redis_server.pause()
    tried = 0
    assert 0.75 < await failing_seconds(index) < 2.5
    assert await failing_seconds(index) < 0.75
    assert tried == 1
    await asyncio.sleep(1.0)
    probes = await asyncio.gather(*(failing_seconds(index) for _ in range(20)))
    assert tried == 2, "one call probes, the others fail at once"
    assert sorted(probes)[-2] < 0.75
    redis_server.resume()
    await asyncio.sleep(1.1)
    assert await index.lookup(FINGERPRINT, NAMES, False) == {}
    await index.close()


async def test_a_restarted_redis_is_met_without_an_error(redis_server: RedisServer) -> None:
    index = Index(redis_server.url, timeout=1.0)
    await index.announce(member("a"), 10.0)
    redis_server.kill()
    redis_server.start()
    assert await index.lookup(FINGERPRINT, NAMES, False) == {}
    await index.close()


async def test_a_call_that_is_not_tried_says_why_the_last_one_failed() -> None:
    index = Index("redis://127.0.0.1:1", timeout=0.5)
    words = set()
    for _ in range(3):
        with pytest.raises(IndexUnavailable) as caught:
            await index.members()
        words.add(str(caught.value))
    assert len(words) == 1, "a status with these words would change each time"
    await index.close()


@pytest.mark.slow
async def test_pods_of_very_many_models_are_listed_within_the_limit_of_each_call(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, limit = 320, 2.0
    patient, index = Index(redis_server.url, timeout=200.0), Index(redis_server.url, timeout=limit)
    evaluate = index._connection._evaluate

    async def from_afar(*call: Any) -> Any:
        await asyncio.sleep(0.1)
        return await evaluate(*call)

    monkeypatch.setattr(index._connection, "_evaluate", from_afar)
    pods = [member(f"p{number}", fingerprint=f"{number:064}") for number in range(many)]
    try:
        await asyncio.gather(*(patient.announce(pod, 120.0) for pod in pods))
        begun = time.monotonic()
        assert len(await index.members()) == many
        assert time.monotonic() - begun > limit, "too few for this test to mean something"
    finally:
        await index.close()
        await patient.close()


async def test_nobody_at_the_address_is_told_without_the_password() -> None:
    index = Index("redis://user:secret@127.0.0.1:1", timeout=0.5)
    with pytest.raises(IndexUnavailable) as caught:
        await index.members()
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)
    await index.close()


async def test_a_cancelled_call_does_not_leave_its_answer_to_the_next(
    redis_server: RedisServer,
) -> None:
    index = Index(redis_server.url, timeout=5.0)
    held = await index.announce(member("a"), 60.0)
    await index.publish(FINGERPRINT, held, stored(NAMES))
    other = prompt("y", 20)
    for turn in range(200):
        task = asyncio.create_task(index.lookup(FINGERPRINT, NAMES, False))
        await asyncio.sleep(turn * 1e-5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await index.lookup(FINGERPRINT, other, False) == {}
    await index.close()


async def test_a_crowd_of_calls_shares_a_few_connections(redis_server: RedisServer) -> None:
    index = Index(redis_server.url, timeout=20.0)

    async def ask(patience: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(index.lookup(FINGERPRINT, NAMES, False), patience)

    rng = random.Random(fresh_seed())
    for _ in range(5):  # some of them hang up
        await asyncio.gather(*(ask(rng.choice((20.0, rng.expovariate(100)))) for _ in range(200)))
    with redis_server.client() as client:
        assert len(client.client_list()) - 1 <= CONNECTIONS
    for _ in range(CONNECTIONS + 1):  # nobody left with a place among them
        assert await index.lookup(FINGERPRINT, NAMES, False) == {}
    await index.close()


async def test_a_cluster_keeps_each_model_in_one_slot_and_runs_every_verb(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, cluster=True).start()
    index = Index(server.url, timeout=5.0)
    try:
        for fingerprint in ("a" * 64, "b" * 64):
            announced = member("p-" + fingerprint[0], fingerprint=fingerprint)
            held = await index.announce(announced, 10.0)
            changes = stored(NAMES) + checkpoints(NAMES[3::4])
            assert await index.publish(fingerprint, held, changes)
            assert await index.lookup(fingerprint, NAMES, True) == {announced.pod: 20}
        assert {found.pod for found in await index.members()} == {"p-a", "p-b"}
        with server.client() as client:
            keys = [key.decode() for key in client.keys("*")]
            slots = {key: client.execute_command("CLUSTER KEYSLOT", key) for key in keys}
        for fingerprint in ("a" * 64, "b" * 64):
            assert len({slot for key, slot in slots.items() if fingerprint in key}) == 1
        await index.withdraw(member("p-a", fingerprint="a" * 64))
        assert await index.lookup("a" * 64, NAMES, True) == {}
        server.kill()
        with pytest.raises(IndexUnavailable):
            await index.members()
    finally:
        await index.close()
        server.stop()


async def test_a_cancelled_task_ends_wherever_its_call_stands(shared_redis: RedisServer) -> None:
    index = Index(shared_redis.url, timeout=5.0)

    async def call_for_ever() -> None:
        while True:
            await index.members()

    for number in range(1500):
        task = asyncio.create_task(call_for_ever())
        await asyncio.sleep(number % 100 * 2e-5)
        task.cancel()
        assert (await asyncio.wait({task}, timeout=5))[0], "a cancellation was lost"
        assert task.cancelled()
    await index.close()
