"""Counters and usage tell exactly which tokens of a prompt nobody had to compute."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny_models
from greedy import is_greedy, random_prompt
from index_helpers import eventually
from pods import PodProcess
from relays import Relay, Stream, complete, running

from tasuki_common import hashing
from tasuki_index import Index, IndexUnavailable

BLOCK = 16
TRIES = 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", params=["granite_hybrid", "qwen3"])
def counted(request: pytest.FixtureRequest, folders: Path, seed: int) -> Iterator[Relay]:
    """One prefill pod and one decode pod of their own, so that counters are theirs alone."""
    model = tiny_models.make(request.param, folders, seed)
    folder = folders / f"counted-{request.param}"
    with running(Relay(folder, model, transports=("tcp",))) as relay:
        yield relay


class Counters:
    """What a pod counted since this was made."""

    def __init__(self, pod: PodProcess) -> None:
        self._pod = pod
        self._before = self._read()

    def since(self) -> dict[str, int]:
        """Tokens looked up, hit, computed."""
        return {name: value - self._before[name] for name, value in self._read().items()}

    def _read(self) -> dict[str, int]:
        metrics = {
            "query": "tasuki_prefix_query_tokens_total",
            "hit": "tasuki_prefix_hit_tokens_total",
            "computed": "tasuki_prompt_tokens_computed_total",
        }
        return {name: int(self._pod.metric(metric)) for name, metric in metrics.items()}


async def ask(
    client: httpx.AsyncClient, relay: Relay, prompt: list[int]
) -> tuple[Stream, dict[str, int], dict[str, int]]:
    """An answer, and what the prefill and the decode pod counted over it."""
    giver, taker = Counters(relay.prefill[0]), Counters(relay.decode[0])
    stream = await complete(client, relay, prompt, max_tokens=8)
    assert stream.whole, stream.error
    assert is_greedy(relay.model, prompt, stream.tokens[0])
    relay.until_idle()
    await asyncio.sleep(0.5)  # what pods counted is told by then
    await until_known(relay, prompt)
    return stream, giver.since(), taker.since()


async def until_known(relay: Relay, prompt: list[int]) -> None:
    """Until the index says that the decode pod holds all of a prompt that it may skip."""
    assert relay.redis is not None
    member = relay.decode[0].member()
    root = hashing.root_hash(member.hash_algorithm, member.hash_revision)
    covered = prompt[: (len(prompt) - 1) // BLOCK * BLOCK]
    names = hashing.block_hashes(member.hash_algorithm, root, covered, BLOCK)
    index = Index(relay.redis.url, timeout=5.0)

    async def known() -> bool:
        try:
            depths = await index.lookup(member.fingerprint, names, member.needs_checkpoint)
        except IndexUnavailable:
            return False
        return depths.get(member.pod) == len(names)

    try:
        await eventually(known, 60.0)
    finally:
        await index.close()


def cached_tokens(stream: Stream) -> int:
    assert stream.usage is not None
    return int(stream.usage["prompt_tokens_details"]["cached_tokens"])


async def test_each_hit_is_counted_to_the_token(
    counted: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    length = rng.randrange(100, 200)
    prompt = random_prompt(rng, length)
    aligned = (length - 1) // BLOCK * BLOCK

    stream, giver, taker = await ask(client, counted, prompt)
    assert giver == {"query": length, "hit": 0, "computed": aligned}
    assert taker == {"query": length, "hit": aligned, "computed": length - aligned}
    assert cached_tokens(stream) == 0

    for _ in range(TRIES):
        failures = counted.metric("tasuki_gateway_index_failures_total")
        stream, giver, taker = await ask(client, counted, prompt)
        if counted.metric("tasuki_gateway_index_failures_total") == failures:
            break  # else the index was too slow for the gateway, which did without it
    assert giver == {"query": 0, "hit": 0, "computed": 0}
    assert taker == {"query": length, "hit": aligned, "computed": length - aligned}
    assert cached_tokens(stream) == aligned

    longer = prompt[:aligned] + random_prompt(rng, 5 * BLOCK + 1)
    further = aligned + 5 * BLOCK
    stream, giver, taker = await ask(client, counted, longer)
    assert giver == {"query": len(longer), "hit": aligned, "computed": 5 * BLOCK}
    assert taker == {"query": len(longer), "hit": further, "computed": 1}
    assert cached_tokens(stream) == aligned
