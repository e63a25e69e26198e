"""The pod's side: what a pod caches is found, through every outage of Redis."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from index_helpers import FINGERPRINT, Condition, Event, cached, eventually, member, prompt
from redis_server import RedisServer

from tasuki_common.messages import Load, Member
from tasuki_index import Index, IndexUnavailable, Publisher, publisher as publisher_module


def depth_is(index: Index, names: list[bytes], expected: dict[str, int]) -> Condition:
    async def check() -> bool:
        try:
            return await index.lookup(FINGERPRINT, names, False) == expected
        except IndexUnavailable:
            return False

    return check


@pytest.fixture
async def outage_index(redis_server: RedisServer) -> AsyncIterator[Index]:
    index = Index(redis_server.url, timeout=0.5)
    yield index
    await index.close()


async def test_what_is_cached_is_found_and_what_is_evicted_is_not(index: Index) -> None:
    names = prompt("x", 2000)
    publisher = Publisher(index, lambda: member("a"))
    publisher.start()
    publisher.record(cached(names))
    await eventually(depth_is(index, names, {"a": 2000}))
    publisher.record([Event("block", False, names[1000])])
    await eventually(depth_is(index, names, {"a": 1000}))
    publisher.record([Event("block", True, names[1000], names[999])])
    await eventually(depth_is(index, names, {"a": 2000}))
    await publisher.close()
    assert await index.lookup(FINGERPRINT, names, False) == {}
    assert await index.members() == []


async def test_each_heartbeat_carries_the_load_of_the_moment(index: Index) -> None:
    running = 0

    def now() -> Member:
        return member("a", load=Load(running=running))

    publisher = Publisher(index, now, ttl=0.3)
    publisher.start()
    for running in (1, 2):

        async def seen(expected: int = running) -> bool:
            return [found.load.running for found in await index.members()] == [expected]

        await eventually(seen)
    await publisher.close()


async def test_announce_soon_does_not_wait_for_the_heartbeat(index: Index) -> None:
    draining = False
    publisher = Publisher(index, lambda: member("a", draining=draining), ttl=600.0)
    publisher.start()

    async def announced() -> bool:
        return bool(await index.members())

    await eventually(announced)
    draining = True
    publisher.announce_soon()

    async def seen() -> bool:
        return [found.draining for found in await index.members()] == [True]

    await eventually(seen)
    await publisher.close()


async def test_everything_is_published_again_after_redis_lost_its_memory(
    redis_server: RedisServer, outage_index: Index
) -> None:
    names = prompt("x", 1500)
    publisher = Publisher(outage_index, lambda: member("a"), ttl=1.0)
    publisher.start()
    publisher.record(cached(names[:1000]))
    await eventually(depth_is(outage_index, names, {"a": 1000}))
    redis_server.kill()
    publisher.record(cached(names)[1000:])
    publisher.record([Event("block", False, names[1400])])
    await asyncio.sleep(0.5)
    redis_server.start()
    await eventually(depth_is(outage_index, names, {"a": 1400}))

    async def reachable() -> bool:
        return publisher.reachable

    await eventually(reachable)  # Redis has the last batch before the publisher has its answer
    await publisher.close()


async def test_everything_is_published_again_after_a_flush(index: Index) -> None:
    names = prompt("x", 700)
    publisher = Publisher(index, lambda: member("a"), ttl=0.6)
    publisher.start()
    publisher.record(cached(names))
    await eventually(depth_is(index, names, {"a": 700}))
    await index._connection.command("FLUSHALL")
    await eventually(depth_is(index, names, {"a": 700}))
    await publisher.close()


async def test_a_pod_that_starts_while_redis_is_away_appears_later(
    redis_server: RedisServer, outage_index: Index
) -> None:
    names = prompt("x", 10)
    redis_server.stop()
    publisher = Publisher(outage_index, lambda: member("a"))
    publisher.start()
    publisher.record(cached(names))

    async def unreachable() -> bool:
        return not publisher.reachable

    await eventually(unreachable)
    redis_server.start()
    await eventually(depth_is(outage_index, names, {"a": 10}))
    await publisher.close()


async def test_changes_of_a_long_freeze_do_not_pile_up(
    redis_server: RedisServer, outage_index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "MAX_PENDING", 1000)
    names = prompt("x", 5000)
    publisher = Publisher(outage_index, lambda: member("a"), ttl=1.0)
    publisher.start()
    await eventually(depth_is(outage_index, names, {}))
    redis_server.pause()
    most = 0
    for start in range(0, 5000, 100):
        publisher.record(cached(names)[start : start + 100])
        most = max(most, publisher.pending)
        await asyncio.sleep(0.01)
    redis_server.resume()
    assert most <= 1000
    await eventually(depth_is(outage_index, names, {"a": 5000}))
    await publisher.close()


async def test_closing_without_redis_does_not_hang(
    redis_server: RedisServer, outage_index: Index
) -> None:
    publisher = Publisher(outage_index, lambda: member("a"))
    publisher.start()
    await asyncio.sleep(0.1)
    redis_server.pause()
    async with asyncio.timeout(20.0):
        await publisher.close()
    redis_server.resume()


async def test_two_pods_of_one_name_do_not_race(index: Index) -> None:
    """The later one wins; the earlier one tries again once a second at most."""
    names = prompt("x", 50)
    publishers = [
        Publisher(index, lambda i=i: member("a", incarnation=i), ttl=0.5)  # type: ignore[misc]
        for i in ("one", "two")
    ]
    for publisher in publishers:
        publisher.start()
    for start in range(50):
        for publisher in publishers:
            publisher.record(cached(names)[start : start + 1])
        await asyncio.sleep(0.02)
    with_marks = await index._connection.command(
        "HGET", f"tasuki:{{{FINGERPRINT}}}:counters", "marks"
    )
    assert int(with_marks) < 20
    for publisher in publishers:
        await publisher.close()
