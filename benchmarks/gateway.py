"""What a gateway costs: its process's CPU time per request and per streamed token, and its memory.

    python benchmarks/gateway.py [--sglang-router PATH] [--vllm-router PATH] [--requests 1000]

All routers get the same load from the same fake workers in one run: chat prompts of 1,000 words, 16
connections, CPU time from /proc (so a busy machine blurs it little). The others' routers neither
tokenize nor ask an index; ours is measured alone (`local`: parse, template, tokenize, one leg) and
whole (`index + prefill`: hashes, a look-up in Redis, a ticket, then the stream). Others come from
PyPI, in an environment of their own:

    python -m venv /tmp/routers && /tmp/routers/bin/pip install sglang-router vllm-router

A second table has the CPU time of one leg to a pod, 32 tokens streamed, by the HTTP client that
makes it: ours, httpx, and aiohttp where it is installed.
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import tokenizers
import uvloop

SUPPORT = Path(__file__).parent.parent / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

import fake_pods  # noqa: E402
from redis_server import RedisServer, free_port  # noqa: E402

from tasuki_gateway.http_client import HttpClient  # noqa: E402

CONNECTIONS = 16
WORDS = 1000
STREAMED = 32
PROSE = " ".join(pydoc_data.topics.topics.values())


class Cost(NamedTuple):
    """Of one router."""

    name: str
    answer: float
    """CPU microseconds per request, one token, one JSON answer."""
    stream: float
    """The same, 32 tokens streamed."""
    resident: float
    """MB after the load."""

    @property
    def token(self) -> float:
        """CPU microseconds per streamed token."""
        return (self.stream - self.answer) / (STREAMED - 1)


def train_tokenizer(path: Path) -> None:
    """A byte-level BPE of 4,096 tokens on Python's own documentation."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    inner.train_from_iterator([PROSE], trainer)
    inner.save(str(path))


def bodies(count: int, *, stream: bool, max_tokens: int) -> list[bytes]:
    """Chat requests with prompts of their own."""
    words = PROSE.split()
    starts = [random.randrange(len(words) - WORDS) for _ in range(count)]
    return [
        json.dumps(
            {
                "model": fake_pods.MODEL,
                "messages": [{"role": "user", "content": " ".join(words[at : at + WORDS])}],
                "max_tokens": max_tokens,
                "stream": stream,
            }
        ).encode()
        for at in starts
    ]


async def load(port: int, requests: list[bytes]) -> None:
    """Sends all requests over `CONNECTIONS` kept-alive connections."""
    queue = list(requests)

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while queue:
            body = queue.pop()
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json"
            writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not answer.startswith(b"http/1.1 200"):
                raise SystemExit(f"a router answered {answer!r}")
            if b"content-length: " in answer:
                size = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(size)
            else:
                await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()

    await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and its children."""
    family = [process, *process.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in family)


def measure(name: str, pid: int, port: int, count: int) -> Cost:
    """The cost of the router in process `pid`."""
    process = psutil.Process(pid)
    asyncio.run(load(port, bodies(count // 4, stream=False, max_tokens=1)))
    asyncio.run(load(port, bodies(count // 4, stream=True, max_tokens=STREAMED)))
    costs = []
    for stream, tokens in ((False, 1), (True, STREAMED)):
        requests = bodies(count, stream=stream, max_tokens=tokens)
        before = cpu_seconds(process)
        asyncio.run(load(port, requests))
        costs.append((cpu_seconds(process) - before) / count * 1e6)
    resident = (
        sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / 1e6
    )
    return Cost(name, *costs, resident)


@contextlib.contextmanager
def workers(*arguments: str, prefill: int = 0) -> Iterator[list[fake_pods.Process]]:
    """Two fast decode workers, and `prefill` prefill pods."""
    roles = ["decode", "decode", *["prefill"] * prefill]
    started = [
        fake_pods.Process(role, f"{role}-{i}", "--pause", "0.004", "--no-record", *arguments)
        for i, role in enumerate(roles)
    ]
    try:
        yield started
    finally:
        for pod in started:
            pod.stop()


def measure_own(name: str, count: int, folder: Path, redis_url: str | None) -> Cost:
    """Our gateway: with a Redis and a prefill pod, or without."""
    arguments = ["--tokenizer", str(folder / "tokenizer.json")]
    if redis_url:
        arguments += ["--redis-url", redis_url]
    with workers(*arguments, prefill=1 if redis_url else 0) as pods:
        found = ["--redis-url", redis_url] if redis_url else ["--seeds", _urls(pods, ",")]
        port = free_port()
        gateway = fake_pods.GatewayProcess(*found, port=port, log=folder / "gateway.log")
        try:
            gateway.wait_ready()
            return measure(name, gateway.process.pid, port, count)
        finally:
            gateway.stop()


def measure_other(name: str, command: list[str], count: int, folder: Path) -> Cost:
    """A router of others."""
    with workers("--tokenizer", str(folder / "tokenizer.json")) as pods:
        port = free_port()
        urls = [pod.url for pod in pods]
        arguments = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls]
        arguments += ["--prometheus-port", str(free_port()), "--log-level", "error"]
        with (folder / "other.log").open("wb") as log:
            process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
        try:
            _wait_for(port, process, folder / "other.log")
            return measure(name, process.pid, port, count)
        finally:
            process.terminate()
            process.wait(20)


async def _leg_costs(url: str, count: int) -> dict[str, float]:
    """CPU microseconds of this process per POST and streamed answer, by client."""
    body = bodies(1, stream=True, max_tokens=STREAMED)[0]
    room = asyncio.Semaphore(CONNECTIONS)
    own = HttpClient(connect_timeout=2.0)

    async def by_own() -> None:
        response = await own.request("POST", url, body, silence=10)
        await response.body()
        response.close()

    async def by_httpx() -> None:
        async with spare.stream("POST", url, content=body) as answer:
            async for _ in answer.aiter_raw():
                pass

    async def by_aiohttp() -> None:
        async with session.post(url, data=body) as answer:
            async for _ in answer.content.iter_any():
                pass

    async def cost(leg: Callable[[], Awaitable[None]]) -> float:
        async def one() -> None:
            async with room:
                await leg()

        await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
        before = time.process_time()
        await asyncio.gather(*(one() for _ in range(count)))
        return (time.process_time() - before) / count * 1e6

    costs = {"tasuki": await cost(by_own)}
    async with httpx.AsyncClient(timeout=10) as spare:
        costs["httpx"] = await cost(by_httpx)
    if importlib.util.find_spec("aiohttp"):
        aiohttp = importlib.import_module("aiohttp")
        async with aiohttp.ClientSession() as session:
            costs["aiohttp"] = await cost(by_aiohttp)
    own.close()
    return costs


def measure_legs(count: int, folder: Path) -> dict[str, float]:
    """The second table."""
    with workers("--tokenizer", str(folder / "tokenizer.json")) as pods:
        url = pods[0].url + "/v1/chat/completions"
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_leg_costs(url, count))


def _urls(pods: list[fake_pods.Process], separator: str) -> str:
    return separator.join(pod.url for pod in pods)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    probe = bodies(1, stream=False, max_tokens=1)
    while time.monotonic() < deadline and process.poll() is None:
        try:
            asyncio.run(load(port, probe * CONNECTIONS))
            return
        except (OSError, SystemExit, asyncio.IncompleteReadError):
            time.sleep(0.3)
    raise SystemExit(f"a router did not come up: {log.read_text()[-2000:]}")


def main() -> None:
    """Measures all, prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sglang-router", help="Path of its executable.")
    parser.add_argument("--vllm-router", help="Path of its executable.")
    parser.add_argument("--requests", type=int, default=1000)
    options = parser.parse_args()
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder / "tokenizer.json")
        legs = measure_legs(options.requests, folder)
        redis = RedisServer(folder).start()
        try:
            own = "tasuki, index + prefill"
            costs.append(measure_own("tasuki, local", options.requests, folder, None))
            costs.append(measure_own(own, options.requests, folder, redis.url))
        finally:
            redis.stop()
        for label, path in (("sglang", options.sglang_router), ("vllm", options.vllm_router)):
            for policy in ("cache_aware", "round_robin"):
                if path:
                    verb = ["launch"] if label == "sglang" else []
                    command = [path, *verb, "--policy", policy]
                    title = f"{label}-router, {policy}"
                    costs.append(measure_other(title, command, options.requests, folder))
    row = "{:<28}{:>14}{:>18}{:>12}{:>10}\n"
    sys.stdout.write(row.format("", "µs / answer", "µs / 32 tokens", "µs / token", "MB"))
    for cost in costs:
        numbers = (f"{x:.0f}" for x in (cost.answer, cost.stream))
        sys.stdout.write(
            row.format(cost.name, *numbers, f"{cost.token:.1f}", f"{cost.resident:.0f}")
        )
    sys.stdout.write(f"\n{'one leg of 32 tokens, by client':<42}{'µs':>18}\n")
    for name, microseconds in legs.items():
        sys.stdout.write(f"{name:<42}{microseconds:>18.0f}\n")


if __name__ == "__main__":
    main()
