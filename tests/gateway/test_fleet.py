"""The fleet: which models and pods a gateway knows."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import fake_pods
import httpx
import msgspec
import plain_http
import pytest
from gateway_stack import Starter
from redis_server import RedisServer, free_port

from tasuki_common.messages import Member
from tasuki_common.policy import key_digest
from tasuki_gateway import fleet as fleet_module
from tasuki_gateway.fleet import Fleet
from tasuki_gateway.http_client import HttpClient
from tasuki_index import Index


@pytest.fixture
def pod() -> Iterator[fake_pods.Process]:
    """One decode pod."""
    process = fake_pods.Process("decode", "d")
    yield process
    process.stop()


async def test_a_model_that_is_gone_for_good_is_forgotten(
    pod: fake_pods.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = HttpClient(connect_timeout=1.0)
    fleet = Fleet(client, None, [pod.url], 1000)
    await fleet.refresh()
    assert fleet.names.keys() == fleet.groups.keys() == {"fake", "fake-alias"}
    pod.stop()
    await fleet.refresh()
    assert fleet.names.keys() == {"fake", "fake-alias"}
    assert not fleet.groups
    monkeypatch.setattr(fleet_module, "FORGET_SECONDS", 0.0)
    await fleet.refresh()
    await fleet.refresh()
    assert not fleet.names
    assert not fleet._texts
    client.close()


async def test_names_of_one_fingerprint_share_a_tokenizer_and_nothing_else() -> None:
    pods = [
        fake_pods.Process("decode", f"d{i}", "--model", model, "--context", context)
        for i, (model, context) in enumerate([("a", "4096"), ("b", "2048"), ("b", "1024")])
    ]
    client = HttpClient(connect_timeout=1.0)
    fleet = Fleet(client, None, [pod.url for pod in pods], 1000)
    try:
        await fleet.refresh()
        known = {name: (one.model, one.max_model_len) for name, one in fleet.names.items()}
        assert known == {
            "a": ("a", 4096),
            "a-alias": ("a", 4096),
            "b": ("b", 1024),
            "b-alias": ("b", 1024),
        }
        assert len({id(one.text) for one in fleet.names.values()}) == 1
    finally:
        client.close()
        for pod in pods:
            pod.stop()


async def test_a_model_that_the_index_learned_of_just_now_is_answered(
    start: Starter, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path).start()
    gateway = start(redis_url=server.url)
    index = Index(server.url, timeout=5.0)
    pods = [fake_pods.Process("decode", f"new-{i}", "--model", f"new{i}") for i in range(5)]
    try:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
            for number, pod in enumerate(pods):
                card = (await client.get(f"{pod.url}/member")).content
                await index.announce(msgspec.msgpack.decode(card, type=Member), ttl=60.0)
                body = {"model": f"new{number}", "prompt": "a", "max_tokens": 2}
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
            assert (await client.get("/v1/models/none")).status_code == 404
    finally:
        await index.close()
        for pod in pods:
            pod.stop()
        server.stop()


async def test_a_model_is_not_denied_while_the_index_does_not_answer(
    start: Starter, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path).start()
    gateway = start(redis_url=server.url)
    index = Index(server.url, timeout=5.0)
    pod = fake_pods.Process("decode", "new", "--model", "new")
    try:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
            card = (await client.get(f"{pod.url}/member")).content
            await index.announce(msgspec.msgpack.decode(card, type=Member), ttl=60.0)
            server.pause()
            body = {"model": "new", "prompt": "a", "max_tokens": 2}
            asked = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.sleep(0.6)  # longer than the gateway waits for the index
            server.resume()
            answer = await asked
            assert answer.status_code == 200, answer.text
    finally:
        await index.close()
        pod.stop()
        server.stop()


async def test_a_model_that_the_index_learned_of_just_now_opens_to_its_own_key(
    start: Starter, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path).start()
    gateway = start("--api-key", "the-gateways-own-key", redis_url=server.url)
    index = Index(server.url, timeout=5.0)
    pods = [fake_pods.Process("decode", f"kept-{i}", "--model", f"kept{i}") for i in range(5)]
    try:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
            for number, pod in enumerate(pods):
                key = f"a-key-of-model-number-{number}"
                pod.call("/policy", {"key_digests": [key_digest(f"kept{number}", key.encode())]})
                card = (await client.get(f"{pod.url}/member")).content
                await index.announce(msgspec.msgpack.decode(card, type=Member), ttl=60.0)
                body = {"model": f"kept{number}", "prompt": "a", "max_tokens": 2}
                headers = {"authorization": f"Bearer {key}"}
                answer = await client.post("/v1/completions", json=body, headers=headers)
                assert answer.status_code == 200, answer.text
    finally:
        await index.close()
        for pod in pods:
            pod.stop()
        server.stop()


def test_a_gateway_has_started_once_it_has_read_the_index(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, tcp=True)
    flags = (f"--redis-url={server.url}",)
    gateway = fake_pods.GatewayProcess(*flags, port=free_port(), log=tmp_path / "log")

    def says(path: str) -> int:
        return plain_http.get(gateway.url + path).status_code

    def until(path: str, status: int) -> None:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(httpx.ConnectError):
                if says(path) == status:
                    return
            assert time.monotonic() < deadline, path
            time.sleep(0.05)

    try:
        until("/health", 200)
        assert says("/started") == 503
        server.start()
        until("/started", 200)
        assert says("/ready") == 503, "there is no model"
        server.stop()
        time.sleep(2)
        assert says("/started") == 200
    finally:
        server.stop()
        assert gateway.stop() == 0
