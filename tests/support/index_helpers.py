"""Pods and prompts for tests of the index."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from tasuki_common.messages import Member
from tasuki_index import Change, Kind

FINGERPRINT = "f" * 64
Condition = Callable[[], Awaitable[bool]]


async def eventually(condition: Condition, seconds: float = 30.0) -> None:
    """Returns once `condition` holds; fails if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if await condition():
            return
        assert time.monotonic() < deadline, "the condition did not come to hold in time"
        await asyncio.sleep(0.02)


class Event(NamedTuple):
    """A cache event, in the shape of the engine's."""

    kind: Kind
    stored: bool
    hash: bytes
    parent: bytes = b""


def cached(names: Sequence[bytes]) -> list[Event]:
    """The events by which an engine tells that it cached a prompt's blocks."""
    parents = [b"", *names]
    return [
        Event("block", True, name, parent) for name, parent in zip(names, parents, strict=False)
    ]


def member(pod: str, **fields: Any) -> Member:
    """A member that announces itself as `pod`, with `fields` changed."""
    defaults: dict[str, Any] = {
        "pod": pod,
        "incarnation": "one",
        "role": "decode",
        "model": "tiny",
        "fingerprint": FINGERPRINT,
        "url": f"http://{pod}",
        "max_model_len": 4096,
        "block_size": 16,
        "hash_algorithm": "xxh3",
        "hash_revision": "r",
        "needs_checkpoint": False,
    }
    return Member(**defaults | fields)


def prompt(name: str, blocks: int) -> list[bytes]:
    """Names of the blocks of a prompt, as chained hashes are: equal prefixes have equal names."""
    return [hashlib.sha256(f"{name}/{i}".encode()).digest()[:16] for i in range(blocks)]


def stored(names: Sequence[bytes]) -> list[Change]:
    """The changes by which blocks appear."""
    return [Change("block", True, name) for name in names]


def checkpoints(names: Sequence[bytes]) -> list[Change]:
    """The changes by which checkpoints appear."""
    return [Change("checkpoint", True, name) for name in names]
