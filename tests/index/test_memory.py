"""What died is swept, what lives stays, and nothing is kept for ever."""

import asyncio

import pytest
import redis
from index_helpers import FINGERPRINT, member, prompt, stored
from redis_server import RedisServer

from tasuki_index import Index, IndexUnavailable, Registration

ROOT = f"tasuki:{{{FINGERPRINT}}}"
LAP_TTL = 1800 * 3.0
"""With this time to live a lone pod's heartbeat visits every bucket."""


def entries(client: redis.Redis) -> int:
    return sum(client.hlen(key) for key in client.keys(ROOT.replace("{", "[{]") + ":b*"))


async def test_entries_of_the_dead_are_swept_and_those_of_the_living_stay(
    index: Index, shared_redis: RedisServer
) -> None:
    names = prompt("x", 300)
    first = await index.announce(member("a"), LAP_TTL)
    await index.publish(FINGERPRINT, first, stored(names))
    second = await index.announce(member("b"), LAP_TTL)
    second_published = await index.publish(FINGERPRINT, second, stored(names[:100]))
    await index.withdraw(member("a"))
    with shared_redis.client() as client:
        assert entries(client) == 300
        await index.announce(member("b"), LAP_TTL, second_published)
        assert entries(client) == 100
    assert await index.lookup(FINGERPRINT, names, False) == {"b": 100}


async def test_a_mark_is_given_out_again_only_after_a_whole_lap(index: Index) -> None:
    marks = []
    for number in range(4):
        registration = await index.announce(member("a", incarnation=str(number)), 1.0)
        marks.append(registration.mark)
    assert len(set(marks)) == 4
    held = await index.announce(member("b"), LAP_TTL)
    for _ in range(5):
        assert await index.announce(member("b"), LAP_TTL, held) == held
    again = await index.announce(member("c"), 1.0)
    assert again.mark in marks[:3]


async def test_every_key_expires_by_itself(index: Index, shared_redis: RedisServer) -> None:
    held = await index.announce(member("a"), 10.0)
    await index.publish(FINGERPRINT, held, stored(prompt("x", 50)))
    with shared_redis.client() as client:
        lasting = {key for key in client.keys("*") if client.ttl(key) < 0}
    assert lasting == {b"tasuki:models"}


async def test_a_pod_that_never_returns_is_forgotten_after_its_grace(
    index: Index, shared_redis: RedisServer
) -> None:
    await index.announce(member("a"), 0.01)
    with shared_redis.client() as client:
        client.zadd(f"{ROOT}:alive", {"a": 1})
        await index.announce(member("b"), 10.0)
        assert client.hkeys(f"{ROOT}:members") == [b"b"]
        assert client.zcard(f"{ROOT}:dead") == 1


async def test_marks_that_ran_out_are_an_error_with_the_pods_name(
    index: Index, shared_redis: RedisServer
) -> None:
    with shared_redis.client() as client:
        client.hset(f"{ROOT}:counters", "marks", 65535)
    with pytest.raises(Exception, match="no mark is free for a"):
        await index.announce(member("a"), 10.0)


@pytest.mark.slow
async def test_many_pods_and_gateways_at_once_see_only_whole_answers(index: Index) -> None:
    """Every pod publishes its prompt block by block and takes it back; depths stay in bounds."""
    names = prompt("x", 64)
    done = asyncio.Event()

    async def pod(name: str) -> None:
        held: Registration = await index.announce(member(name), 300.0)
        for _ in range(10):
            for changes in (stored(names), [c._replace(stored=False) for c in stored(names)][::-1]):
                for start in range(0, 64, 8):
                    published = await index.publish(FINGERPRINT, held, changes[start : start + 8])
                    assert published is not None
                    held = published
        await index.publish(FINGERPRINT, held, stored(names))

    async def gateway() -> None:
        while not done.is_set():
            depths = await index.lookup(FINGERPRINT, names, False)
            assert all(depth % 8 == 0 and 0 < depth <= 64 for depth in depths.values())

    gateways = [asyncio.create_task(gateway()) for _ in range(8)]
    await asyncio.gather(*(pod(f"pod-{number}") for number in range(20)))
    done.set()
    await asyncio.gather(*gateways)
    expected = {f"pod-{number}": 64 for number in range(20)}
    assert await index.lookup(FINGERPRINT, names, False) == expected


async def test_a_full_index_still_knows_who_lives(redis_server: RedisServer) -> None:
    index = Index(redis_server.url, timeout=5.0)
    held = await index.announce(member("old"), 10.0)
    with redis_server.client() as client:
        client.config_set("maxmemory", "1")
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            client.set("more", "data")
    assert await index.announce(member("old"), 10.0, held) == held
    new = await index.announce(member("new"), 10.0)
    await index.announce(member("other", fingerprint="e" * 64), 10.0)
    assert {one.pod for one in await index.members()} == {"old", "new", "other"}
    await index.withdraw(member("old"))
    assert {one.pod for one in await index.members()} == {"new", "other"}
    with pytest.raises(IndexUnavailable, match="maxmemory"):
        await index.publish(FINGERPRINT, new, stored(prompt("x", 5)))
    await index.close()
