"""Trouble with Redis costs a call its time limit once, and then nothing."""

import asyncio
import time
from pathlib import Path

import pytest
from index_helpers import FINGERPRINT, checkpoints, member, prompt, stored
from redis_server import RedisServer

from tasuki_index import Index, IndexUnavailable

NAMES = prompt("x", 20)


async def failing_seconds(index: Index) -> float:
    start = time.monotonic()
    with pytest.raises(IndexUnavailable):
        await index.lookup(FINGERPRINT, NAMES, False)
    return time.monotonic() - start


async def test_a_frozen_redis_costs_the_timeout_once_and_recovers(
    redis_server: RedisServer,
) -> None:
    index = Index(redis_server.url, timeout=0.2)
    assert await index.lookup(FINGERPRINT, NAMES, False) == {}
    redis_server.pause()
    assert 0.15 < await failing_seconds(index) < 0.5
    assert await failing_seconds(index) < 0.02
    await asyncio.sleep(1.0)
    probes = await asyncio.gather(*(failing_seconds(index) for _ in range(20)))
    assert sum(seconds > 0.02 for seconds in probes) == 1, (
        "one call probes, the others fail at once"
    )
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
