"""Whatever happens to a hand-over, the client gets the right tokens, and a metric says why.

Faults come from outside: a proxy between the pods that flips a bit or cuts, a SIGKILL, a restart, a
wait beyond the lease.
"""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from damaging_proxy import cut_at, flip_byte_at, proxy
from greedy import is_greedy
from pods import Answer, PodProcess, generate, prefill, running, until_idle

from tasuki_common.messages import Ticket

NUM_TOKENS = 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def fragile(folders: Path, model: Path, request: pytest.FixtureRequest) -> Iterator[PodProcess]:
    """A prefill pod to be mistreated: long prompts in many steps; a parameter: its lease."""
    pod = PodProcess(
        "prefill",
        model,
        folders / "fragile.log",
        engine={"max_num_batched_tokens": 4, "num_blocks": 400},
        lease_seconds=getattr(request, "param", 30.0),
        drain_seconds=1.0,
    )
    with running(pod):
        yield pod


@pytest.fixture
def prompt(seed: int, request: pytest.FixtureRequest) -> list[int]:
    rng = random.Random(f"{seed} {request.node.name}")
    return [rng.randrange(3, 250) for _ in range(300)]


async def assert_recomputed(
    answer: Answer, model: Path, prompt: list[int], pod: PodProcess, before: float, reason: str
) -> None:
    assert answer.error is None
    assert len(answer.tokens[0]) == NUM_TOKENS
    assert is_greedy(model, prompt, answer.tokens[0])
    assert pod.metric("tasuki_transfer_failures_total", reason=reason) == before + 1
    await until_idle(pod)


async def run(
    client: httpx.AsyncClient,
    pod: PodProcess,
    model: Path,
    prompt: list[int],
    ticket: Ticket,
    reason: str,
) -> None:
    before = pod.metric("tasuki_transfer_failures_total", reason=reason)
    answer = await generate(client, pod, prompt, ticket=ticket, max_tokens=NUM_TOKENS)
    await assert_recomputed(answer, model, prompt, pod, before, reason)


async def test_a_flipped_bit_is_noticed(
    client: httpx.AsyncClient,
    fragile: PodProcess,
    decode_pod: PodProcess,
    model: Path,
    prompt: list[int],
) -> None:
    ticket = await prefill(client, fragile, prompt)
    async with proxy(ticket.port, flip_byte_at(9000)) as port:
        damaged = msgspec.structs.replace(ticket, port=port)
        await run(client, decode_pod, model, prompt, damaged, "checksum")


async def test_a_cut_connection_is_noticed(
    client: httpx.AsyncClient,
    fragile: PodProcess,
    decode_pod: PodProcess,
    model: Path,
    prompt: list[int],
) -> None:
    ticket = await prefill(client, fragile, prompt)
    async with proxy(ticket.port, cut_at(9000)) as port:
        damaged = msgspec.structs.replace(ticket, port=port)
        await run(client, decode_pod, model, prompt, damaged, "truncated")


@pytest.mark.parametrize("fragile", [1.0], indirect=True)
async def test_an_expired_lease_is_refused(
    client: httpx.AsyncClient,
    fragile: PodProcess,
    decode_pod: PodProcess,
    model: Path,
    prompt: list[int],
) -> None:
    ticket = await prefill(client, fragile, prompt)
    async with asyncio.timeout(60):
        while not fragile.metric("tasuki_leases_ended_total", outcome="expired"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await until_idle(fragile)
    await run(client, decode_pod, model, prompt, ticket, "expired")


async def test_a_prefill_pod_restarted_on_the_same_port_is_not_taken_for_the_old_one(
    client: httpx.AsyncClient,
    fragile: PodProcess,
    decode_pod: PodProcess,
    model: Path,
    prompt: list[int],
) -> None:
    ticket = await prefill(client, fragile, prompt)
    await asyncio.to_thread(fragile.restart)
    await run(client, decode_pod, model, prompt, ticket, "refused_incarnation")


async def test_a_prefill_pod_that_is_gone_costs_a_recomputation(
    client: httpx.AsyncClient,
    fragile: PodProcess,
    decode_pod: PodProcess,
    model: Path,
    prompt: list[int],
) -> None:
    ticket = await prefill(client, fragile, prompt)
    fragile.kill()
    await asyncio.sleep(1.0)
    await run(client, decode_pod, model, prompt, ticket, "unreachable")


async def test_a_prefill_pod_killed_in_mid_pull_costs_a_recomputation(
    client: httpx.AsyncClient,
    fragile: PodProcess,
    decode_pod: PodProcess,
    model: Path,
    seed: int,
) -> None:
    rng = random.Random(seed + 5)
    prompt = [rng.randrange(3, 250) for _ in range(1900)]  # many steps: it is not done
    before = decode_pod.metric("tasuki_transfer_failures_total")
    engine = fragile.engine_pid()
    ticket = await prefill(client, fragile, prompt)
    answering = asyncio.ensure_future(
        generate(client, decode_pod, prompt, ticket=ticket, max_tokens=NUM_TOKENS)
    )
    await asyncio.sleep(0.03)
    os.kill(engine, signal.SIGKILL)
    answer = await answering
    assert len(answer.tokens[0]) == NUM_TOKENS
    assert is_greedy(model, prompt, answer.tokens[0])
    assert decode_pod.metric("tasuki_transfer_failures_total") == before + 1
    await until_idle(decode_pod)


async def test_a_ticket_of_another_prompt_or_salt_is_refused(
    client: httpx.AsyncClient,
    prefill_pod: PodProcess,
    decode_pod: PodProcess,
    model: Path,
    prompt: list[int],
) -> None:
    other = [*prompt[:17], (prompt[17] + 1) % 250, *prompt[18:]]
    await run(
        client,
        decode_pod,
        model,
        prompt,
        await prefill(client, prefill_pod, other),
        "refused_prefix",
    )
    salted = await prefill(client, prefill_pod, prompt, cache_salt="theirs")
    await run(client, decode_pod, model, prompt, salted, "refused_prefix")


async def test_a_ticket_of_another_model_is_refused(
    client: httpx.AsyncClient,
    prefill_pod: PodProcess,
    decode_pod: PodProcess,
    model: Path,
    prompt: list[int],
) -> None:
    ticket = await prefill(client, prefill_pod, prompt)
    other = msgspec.structs.replace(ticket, fingerprint="0" * 64)
    await run(client, decode_pod, model, prompt, other, "refused_fingerprint")
