"""What the operator hears of an index that is slow, or gone."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import kopf
import pytest
from index_helpers import eventually, member
from redis_server import RedisServer

from tasuki_index import Index
from tasuki_operator import outside
from tasuki_operator.api import Api
from tasuki_operator.metrics import Metrics
from tasuki_operator.outside import Outside


@pytest.fixture
async def index(tmp_path: Path) -> AsyncIterator[tuple[RedisServer, Outside]]:
    """A Redis with one member, and who asks it; no API server is there, and none is needed."""
    server = RedisServer(tmp_path).start()
    pods = Index(server.url, timeout=5.0)
    await pods.announce(member("models/one"), ttl=60.0)
    await pods.close()
    api = Api(kopf.ConnectionInfo(server="http://127.0.0.1:1"), Metrics())
    asked = Outside(api, None)
    try:
        yield server, asked
    finally:
        await asked.close()
        await api.close()
        server.kill()


async def listed(asked: Outside, server: RedisServer) -> list[str] | None:
    """Names of the pods; None: the index is away."""
    members = (await asked.listing(server.url)).members
    return None if members is None else [one.pod for one in members]


async def test_an_index_that_is_busy_for_a_moment_is_not_away(
    index: tuple[RedisServer, Outside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "_BELIEVED_SECONDS", 4.0)
    monkeypatch.setattr(outside, "_INDEX_SECONDS", 1.0)
    server, asked = index
    heard = time.monotonic()  # what it hears first is no older
    assert await listed(asked, server) == ["models/one"]
    server.pause()
    while True:
        found = await listed(asked, server)
        if time.monotonic() - heard >= 4.0:
            break
        assert found == ["models/one"]
        await asyncio.sleep(0.02)

    async def is_away() -> bool:
        return await listed(asked, server) is None

    await eventually(is_away)
    server.resume()

    async def is_back() -> bool:
        return await listed(asked, server) == ["models/one"]

    await eventually(is_back)


async def test_who_needs_a_new_answer_does_not_get_an_old_one(
    index: tuple[RedisServer, Outside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "_FRESH_SECONDS", 600.0)
    monkeypatch.setattr(outside, "_LONGEST_SECONDS", 600.0)
    server, asked = index
    assert await listed(asked, server) == ["models/one"]
    pods = Index(server.url, timeout=5.0)
    await pods.announce(member("models/two"), ttl=60.0)
    await pods.close()
    assert await listed(asked, server) == ["models/one"]
    new = await asked.listing(server.url, since=time.monotonic())
    assert sorted(new.by_pod) == ["models/one", "models/two"]
    assert await asked.listing(server.url) == new


async def test_an_index_that_nobody_asks_for_any_more_is_left(
    index: tuple[RedisServer, Outside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "_FORGOTTEN_SECONDS", 0.0)
    server, asked = index
    assert await listed(asked, server) == ["models/one"]
    with server.client() as client:
        before = len(client.client_list())
        assert (await asked.listing("redis://127.0.0.1:1")).members is None

        async def is_left() -> bool:
            return len(client.client_list()) < before

        await eventually(is_left)
    assert await listed(asked, server) == ["models/one"]


async def test_many_that_ask_for_an_index_at_once_share_it(
    index: tuple[RedisServer, Outside], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, asked = index
    assert await listed(asked, server) == ["models/one"]
    monkeypatch.setattr(outside, "_FORGOTTEN_SECONDS", 0.5)
    await asyncio.sleep(0.6)  # that one is let go of while the next one is made
    again = server.url + "?db=0"
    with server.client() as client:
        found = await asyncio.gather(*(asked.listing(again) for _ in range(8)))
        assert all(listing.members for listing in found)
        await asked.close()

        async def all_left() -> bool:
            return len(client.client_list()) == 1

        await eventually(all_left)


async def test_a_url_that_is_none_is_told(index: tuple[RedisServer, Outside]) -> None:
    listing = await index[1].listing("http://user:secret@host")
    assert listing.members is None
    assert "redis" in listing.error
    assert "secret" not in listing.error
