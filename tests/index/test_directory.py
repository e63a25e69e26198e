"""The gateway's side: members at hand, with Redis and without."""

import asyncio

import pytest
from index_helpers import FINGERPRINT, eventually, member
from redis_server import RedisServer

from tasuki_index import Directory, Index, directory as directory_module


async def test_members_are_found_by_name_and_alias_and_leave_with_their_ttl(index: Index) -> None:
    await index.announce(member("a", aliases=("nick",)), 10.0)
    await index.announce(member("b", model="other", fingerprint="e" * 64), 0.2)
    directory = Directory(index)
    assert directory.stale
    await directory.refresh()
    assert not directory.stale
    assert [found.pod for found in directory.members("nick")] == ["a"]
    assert {found.pod for found in directory.members()} == {"a", "b"}
    await asyncio.sleep(0.25)
    await directory.refresh()
    assert directory.members("other") == []


async def test_the_last_known_members_stay_when_redis_is_gone(redis_server: RedisServer) -> None:
    index = Index(redis_server.url, timeout=0.25)
    await index.announce(member("a"), 10.0)
    directory = Directory(index, interval=0.05)
    directory.start()
    await asyncio.sleep(0.2)
    redis_server.kill()
    await asyncio.sleep(0.2)
    assert directory.stale
    directory.learn(member("b"))
    assert {found.pod for found in directory.members("tiny")} == {"a", "b"}
    redis_server.start()

    async def fresh() -> bool:
        return not directory.stale

    await eventually(fresh)
    assert directory.members() == []
    await directory.close()
    await index.close()


async def test_a_pod_marked_down_returns_after_a_while_or_as_a_new_incarnation(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "DOWN_SECONDS", 0.2)
    await index.announce(member("a"), 10.0)
    directory = Directory(index)
    await directory.refresh()
    directory.mark_down(member("a"))
    assert directory.members() == []
    await index.announce(member("a", incarnation="two"), 10.0)
    await directory.refresh()
    assert [found.incarnation for found in directory.members()] == ["two"]
    directory.mark_down(member("a", incarnation="two"))
    await asyncio.sleep(0.25)
    assert len(directory.members()) == 1


async def test_a_model_without_pods_is_no_longer_asked_for(index: Index) -> None:
    await index.announce(member("a"), 0.05)
    await asyncio.sleep(0.1)
    assert await index.members() == []
    assert await index._connection.command("SMEMBERS", "tasuki:models") == set()
    await index.announce(member("a"), 10.0)
    assert [found.fingerprint for found in await index.members()] == [FINGERPRINT]
