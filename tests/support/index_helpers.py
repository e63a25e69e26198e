"""Pods and prompts for tests of the index."""

import hashlib
from collections.abc import Sequence
from typing import Any

from tasuki_common.messages import Member
from tasuki_index import Change

FINGERPRINT = "f" * 64


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
