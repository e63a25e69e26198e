"""One redis-server for the tests that do not harm it, and one each for those that do."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis_server import RedisServer

from tasuki_index import Index


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path).start()
    yield server
    server.stop()


@pytest.fixture
async def index(shared_redis: RedisServer) -> AsyncIterator[Index]:
    with shared_redis.client() as client:
        client.flushall()
    index = Index(shared_redis.url, timeout=5.0)
    yield index
    await index.close()
