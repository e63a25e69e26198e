"""Look-ups on a real Redis against a plain model of what every pod holds."""

import asyncio
import itertools

from hypothesis import given, settings, strategies as st
from index_helpers import FINGERPRINT, Event, member, prompt
from redis_server import RedisServer

from tasuki_index import Chain, Index

BLOCKS, PODS = 24, ("a", "b", "c", "d")
PROMPT = prompt("p", BLOCKS)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(PODS),
        st.sampled_from(["block", "block", "checkpoint", "run"]),
        st.booleans(),
        st.integers(0, BLOCKS - 1),
    ),
    max_size=60,
)


def events_of(kind: str, stored: bool, block: int) -> list[Event]:
    """One step: a block, a checkpoint, or a whole run of blocks from the first."""
    if kind == "checkpoint":
        return [Event("checkpoint", stored, PROMPT[block])]
    first = 0 if kind == "run" else block
    return [
        Event("block", stored, PROMPT[n], PROMPT[n - 1] if n else b"")
        for n in range(first, block + 1)
    ]


def true_depth(held: set[tuple[str, bytes]], needs_checkpoint: bool) -> int:
    """The deepest resumable boundary, as DESIGN defines it."""
    whole = list(itertools.takewhile(lambda name: ("block", name) in held, PROMPT))
    if not needs_checkpoint:
        return len(whole)
    return max((n + 1 for n, name in enumerate(whole) if ("checkpoint", name) in held), default=0)


@given(EVENTS)
@settings(max_examples=60)
def test_lookup_credits_every_pod_with_exactly_what_it_could_resume(
    shared_redis: RedisServer, events: list[tuple[str, str, bool, int]]
) -> None:
    asyncio.run(check(shared_redis, events))


async def check(server: RedisServer, events: list[tuple[str, str, bool, int]]) -> None:
    with server.client() as client:
        client.flushall()
    index = Index(server.url, timeout=5.0)
    held: dict[str, set[tuple[str, bytes]]] = {pod: set() for pod in PODS}
    chains = {pod: Chain() for pod in PODS}
    registrations = {pod: await index.announce(member(pod), 10.0) for pod in PODS}
    for pod, kind, stored, block in events:
        step = events_of(kind, stored, block)
        for event in step:
            (held[pod].add if stored else held[pod].discard)((event.kind, event.hash))
        published = await index.publish(FINGERPRINT, registrations[pod], chains[pod].apply(step))
        assert published is not None
        registrations[pod] = published
    for needs_checkpoint in (False, True):
        truth = {pod: true_depth(held[pod], needs_checkpoint) for pod in PODS}
        truth = {pod: depth for pod, depth in truth.items() if depth}
        assert await index.lookup(FINGERPRINT, PROMPT, needs_checkpoint) == truth
    await index.close()
