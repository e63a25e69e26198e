"""How a pod leaves: drained in order, with a broken engine, or killed; nothing stays behind."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
import tiny_models
from fresh_seed import fresh_seed
from pods import Answer, PodProcess, generate_request, prefill, running, stream
from redis_server import RedisServer

from tasuki_common.frames import Kind
from tasuki_index.index import Index

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PROMPT = [5 + i % 40 for i in range(50)]
LONG = 1000
ENDLESS = 1900
"""Tokens of streams that are cut; the model has 2048 positions."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("granite_hybrid", tmp_path_factory.mktemp("life"), fresh_seed())


@pytest.fixture
def pod(model: Path, tmp_path: Path) -> Iterator[PodProcess]:
    with running(PodProcess("decode", model, tmp_path / "decode.log")) as (pod,):
        yield pod


async def begin(pod: PodProcess, answer: Answer, length: int = ENDLESS) -> "asyncio.Task[None]":
    """A long stream, after its first frame."""
    begun = asyncio.Event()

    async def read() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            async for frame in stream(client, pod, generate_request(PROMPT, max_tokens=length)):
                answer.add(frame)
                begun.set()

    task = asyncio.ensure_future(read())
    await asyncio.wait_for(begun.wait(), 30)
    return task


async def gone(*pids: int) -> None:
    """Until none of the processes lives."""
    async with asyncio.timeout(20):
        while any(map(_lives, pids)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_a_drain_finishes_what_runs_and_refuses_what_comes(pod: PodProcess) -> None:
    answer = Answer()
    async with httpx.AsyncClient(timeout=30) as client:
        reading = await begin(pod, answer, LONG)
        engine = pod.engine_pid()
        pod.process.send_signal(signal.SIGTERM)
        while (await client.get(f"{pod.url}/ready")).status_code == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        body = msgspec.msgpack.encode(generate_request(PROMPT))
        refused = await client.post(f"{pod.url}/generate", content=body)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert (await client.get(f"{pod.url}/member")).status_code == 200
    await reading
    assert len(answer.tokens[0]) == LONG
    assert answer.usage is not None
    assert await asyncio.to_thread(pod.process.wait, 60) == 0
    await gone(engine)
    steps = [line["event"] for line in map(msgspec.json.decode, pod.log.read_bytes().splitlines())]
    story = [event for event in steps if event.startswith("drain_")]
    assert [int(event.split("_")[1]) for event in story] == [1, 2, 3, 4, 5, 6]


async def test_a_second_signal_ends_streams_so_that_another_pod_goes_on(pod: PodProcess) -> None:
    answer = Answer()
    reading = await begin(pod, answer)
    pod.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        while not pod.lines("drain_2_admission_closed"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await asyncio.to_thread(pod.stop) == 0
    await reading
    assert answer.error is not None
    assert answer.error["kind"] is Kind.RETRY
    assert answer.usage is None


async def test_an_engine_that_dies_ends_streams_with_retry_and_the_pod_with_1(
    pod: PodProcess,
) -> None:
    answer = Answer()
    reading = await begin(pod, answer)
    os.kill(pod.engine_pid(), signal.SIGKILL)
    await reading
    assert answer.error is not None
    assert answer.error["kind"] is Kind.RETRY
    assert await asyncio.to_thread(pod.process.wait, 20) == 1
    assert pod.lines("engine_lost")


async def test_an_engine_does_not_outlive_a_pod_that_was_killed(pod: PodProcess) -> None:
    answer = Answer()
    reading = await begin(pod, answer)
    engine = pod.engine_pid()
    pod.kill()
    with pytest.raises(httpx.HTTPError):
        await reading
    await gone(engine)


async def test_a_draining_prefill_pod_waits_for_its_leases(model: Path, tmp_path: Path) -> None:
    pod = PodProcess("prefill", model, tmp_path / "prefill.log", lease_seconds=10.0)
    with running(pod):
        async with httpx.AsyncClient(timeout=30) as client:
            await prefill(client, pod, PROMPT)
            pod.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(1.5)
            assert pod.process.poll() is None
        assert await asyncio.to_thread(pod.process.wait, 60) == 0
    (waited,) = pod.lines("drain_3_waited")
    assert waited["leases"] == 0


async def test_a_cancelled_prefill_frees_its_blocks_and_its_lease(
    model: Path, tmp_path: Path
) -> None:
    pod = PodProcess("prefill", model, tmp_path / "prefill.log", lease_seconds=600.0)
    rng = random.Random(0)
    with running(pod):
        async with httpx.AsyncClient(timeout=30) as client:
            for wait in (0.0, 0.5):
                prompt = [rng.randrange(3, 250) for _ in range(600)]
                ticket = await prefill(client, pod, prompt)
                await asyncio.sleep(wait)
                await client.delete(f"{pod.url}/requests/{ticket.request_id.rsplit('.', 1)[0]}")
                async with asyncio.timeout(10):
                    while pod.metric("tasuki_leases") or pod.metric("tasuki_blocks_used"):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
        assert pod.metric("tasuki_leases_ended_total", outcome="failed") == 2


async def test_a_pod_is_a_member_with_its_prefixes_until_it_leaves(
    model: Path, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        pod = PodProcess("decode", model, tmp_path / "decode.log", redis_url=server.url)
        with running(pod):
            index = Index(server.url, timeout=10.0)
            async with asyncio.timeout(10):
                while not (members := await index.members()):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert members[0].url == pod.url
            assert members[0].needs_checkpoint
            await asyncio.to_thread(pod.stop)
            assert await index.members() == []
            await index.close()
    finally:
        server.stop()


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    pod = PodProcess("decode", tmp_path, tmp_path / "decode.log")
    assert pod.process.wait(60) == 1
    (line,) = pod.lines("engine_lost")
    assert str(tmp_path) in line["reason"]
    assert "Traceback" not in pod.log.read_text()


def test_a_setting_that_cannot_work_is_one_line_and_status_2(model: Path, tmp_path: Path) -> None:
    for number, flags in enumerate(
        ({"engine": {"block_sise": 16}}, {"transfer_backends": "carrier-pigeon"})
    ):
        pod = PodProcess("decode", model, tmp_path / f"{number}.log", **flags)
        assert pod.process.wait(30) == 2
        (line,) = pod.lines("cannot_start")
        assert "block_sise" in line["reason"] or "carrier-pigeon" in line["reason"]


async def test_a_pod_is_ready_once_the_index_knows_it_and_stays_so_without_it(
    model: Path, tmp_path: Path
) -> None:
    redis = RedisServer(tmp_path, tcp=True)
    pod = PodProcess("decode", model, tmp_path / "decode.log", redis_url=redis.url)
    with running(pod):
        async with httpx.AsyncClient(timeout=30) as client:

            async def ready() -> bool:
                return (await client.get(f"{pod.url}/ready")).status_code == 200

            answer = await client.get(f"{pod.url}/ready")
            assert (answer.status_code, answer.text) == (503, "not in the index")
            redis.start()
            try:
                async with asyncio.timeout(20):
                    while not await ready():  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            finally:
                redis.stop()
            await asyncio.sleep(2)
            assert await ready()
