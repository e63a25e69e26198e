"""Other engine settings come in as Kubernetes rolls them out: new pods, then the old ones leave."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from client_load import Load, start_streams
from greedy import is_greedy, random_prompt
from pods import PodProcess, leave
from relays import SHORT_DRAIN_SECONDS, Relay, log_lines, running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ROLES = ("prefill", "decode")
LONG = 1800


@pytest.fixture
def old(folders: Path, model: Path, request: pytest.FixtureRequest) -> Iterator[Relay]:
    """A pod of each role; the gateway learns of others from the index."""
    folder = folders / str(request.node.name)
    with running(
        Relay(folder, model, transports=("tcp",), seeds=False, drain_seconds=SHORT_DRAIN_SECONDS)
    ) as one:
        yield one


@pytest.fixture
def new(old: Relay) -> Iterator[dict[str, PodProcess]]:
    """A pod of each role with larger blocks, starting."""
    kept = ("transfer_backends", "aliases", "redis_url", "heartbeat_seconds", "drain_seconds")
    flags: dict[str, Any] = {name: old.decode[0].flags[name] for name in kept}
    pods = {
        role: PodProcess(
            role,
            old.model,
            old.folder / f"new-{role}.log",
            engine={"block_size": 32},
            **{"pod_name": f"new-{role}", **flags},
        )
        for role in ROLES
    }
    yield pods
    for pod in pods.values():
        assert pod.stop() == 0


def until_idle(relay: Relay) -> None:
    """Until the gateway has logged all requests: a client has its answer a moment before."""
    in_flight = "tasuki_gateway_requests_in_flight"
    until(lambda: relay.metric(in_flight) == 0, 30.0, "requests do not end")


@pytest.mark.parametrize("first", ROLES)
async def test_a_rollout_under_load_fails_no_request_and_pairs_no_strangers(
    old: Relay,
    new: dict[str, PodProcess],
    client: httpx.AsyncClient,
    rng: random.Random,
    first: str,
) -> None:
    before = {"prefill": old.prefill[0], "decode": old.decode[0]}
    async with Load(client, old, rng).running() as load:
        await load.more(20)
        for role in sorted(ROLES, key=lambda role: role != first):
            await asyncio.to_thread(new[role].wait_ready)
            await leave(before[role])
            await load.more(10)
        await load.more(20)
    until_idle(old)
    done = [e for e in log_lines(old.gateway_log) if e["event"] == "request_done"]
    pairs = {(giver, taker) for e in done for giver, taker in e["pods"] if giver is not None}
    assert pairs == {("prefill-0", "decode-0"), ("new-prefill", "new-decode")}
    assert load.answered == sum(e["status"] == 200 for e in done) == len(done)


async def test_streams_that_outlast_the_drain_go_on_with_the_new_settings(
    old: Relay, new: dict[str, PodProcess], client: httpx.AsyncClient, rng: random.Random
) -> None:
    for role in ROLES:
        await asyncio.to_thread(new[role].wait_ready)
    prompts = [random_prompt(rng, 40) for _ in range(4)]
    tasks = await start_streams(client, old, prompts, LONG)
    await leave(old.decode[0])
    for prompt, task in zip(prompts, tasks, strict=True):
        stream = await task
        assert stream.whole, stream.error
        assert len(stream.tokens[0]) == LONG
        assert is_greedy(old.model, prompt, stream.tokens[0])
    until_idle(old)
    done = [e for e in log_lines(old.gateway_log) if e["event"] == "request_done"]
    takers = [[taker for _, taker in e["pods"]] for e in done]
    assert takers == [["decode-0", "new-decode"]] * len(prompts)
