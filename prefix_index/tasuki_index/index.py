"""Who is alive, and who holds how much of a prefix: the shared index in Redis.

Losing Redis loses speed, never an answer, and no answer of the index binds a pod: what it credits
is a hint that the pod's own cache has the last word on. `scripts/` holds the work itself, one Lua
script per verb, so that each verb is one round trip and atomic.
"""

import asyncio
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from tasuki_common import logs
from tasuki_common.messages import Member
from tasuki_index.connection import CONNECTIONS, Connection, Script
from tasuki_index.events import Change

log = logs.get("tasuki.index")

MAX_CHECKPOINT_PROBES = 2048
"""Per look-up. When they run out, pods not yet resolved are credited with nothing."""
MODELS = "tasuki:models"

_ANNOUNCE = Script("sweep", "retire", "announce")
_ENLIST = Script("enlist")
_WITHDRAW = Script("retire", "withdraw")
_MEMBERS = Script("members")
_PUBLISH = Script("publish")
_LOOKUP = Script("lookup")

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Member)
_OPS = {
    ("block", False): b"\0",
    ("block", True): b"\1",
    ("checkpoint", False): b"\2",
    ("checkpoint", True): b"\3",
}


class Registration(NamedTuple):
    """What a pod's published entries hang on. It ends with the pod, or with Redis's memory."""

    mark: bytes
    """Two bytes that stand for this pod and incarnation in every entry."""
    sequence: int = 0
    """Batches published so far."""


class Index:
    """The index at `url`: redis://, rediss://, unix://PATH or redis+cluster://host:port.

    Every method raises `IndexUnavailable` when a round trip fails or takes more than `timeout`
    seconds, and at once for a second after that.
    """

    def __init__(self, url: str, *, timeout: float = 0.25) -> None:
        self._connection = Connection(url, timeout)

    async def announce(
        self, member: Member, ttl: float, held: Registration | None = None
    ) -> Registration:
        """Says that `member` lives for `ttl` more seconds; returns its registration.

        Equal to `held`: all that was published still counts. Another one: nothing does, and the pod
        must publish its whole cache again. Without `held`, what the pod had published is dropped.
        """
        mark, sequence = held or (b"", 0)
        answer: bytes = await self._connection.run(
            _ANNOUNCE,
            _root(member.fingerprint),
            member.pod,
            member.incarnation,
            _encoder.encode(member),
            math.ceil(ttl * 1000),
            mark,
            sequence,
        )
        await self._connection.run(_ENLIST, MODELS, member.fingerprint)
        return held if held is not None and answer == mark else Registration(answer)

    async def withdraw(self, member: Member) -> None:
        """Ends the registration of `member`, unless another incarnation has taken its name."""
        root = _root(member.fingerprint)
        await self._connection.run(_WITHDRAW, root, member.pod, member.incarnation)

    async def members(self) -> list[Member]:
        """All live pods of all models: a round trip for each model, some of them at once.

        None waits for a connection within its time limit, however many models there are.
        """
        models: Iterable[bytes] = await self._connection.command("SMEMBERS", MODELS)
        fingerprints = sorted(name.decode() for name in models)
        found: list[Member] = []
        for first in range(0, len(fingerprints), CONNECTIONS):
            some = fingerprints[first : first + CONNECTIONS]
            for members in await asyncio.gather(*map(self._members_of, some)):
                found += members
        return found

    async def publish(
        self, fingerprint: str, registration: Registration, changes: Sequence[Change]
    ) -> Registration | None:
        """Applies one batch of a pod's changes (about 512); returns the registration to go on with.

        None: Redis does not know the registration or a batch before this one, and the pod must
        announce itself anew. What a registration has published must stay closed under prefixes (no
        block without the one before it), as `Chain` makes it; look-ups rely on it.
        """
        events = b"".join(_OPS[kind, stored] + name for kind, stored, name in changes)
        sequence = registration.sequence + 1
        applied = await self._connection.run(
            _PUBLISH, _root(fingerprint), registration.mark, sequence, events
        )
        return registration._replace(sequence=sequence) if applied else None

    async def lookup(
        self, fingerprint: str, hashes: Sequence[bytes], needs_checkpoint: bool
    ) -> dict[str, int]:
        """How many blocks of a prompt each live pod could resume, in one round trip.

        `hashes`: the names of the prompt's full blocks, in order. Pods that hold nothing are left
        out. With `needs_checkpoint`, a depth is that of the deepest checkpoint whose blocks are all
        held. A depth is never more than what the pod has published and not taken back.
        """
        if not hashes:
            return {}
        names = b"".join(hashes)
        answer: list[bytes | int] = await self._connection.run(
            _LOOKUP, _root(fingerprint), names, int(needs_checkpoint), MAX_CHECKPOINT_PROBES
        )
        pods, depths = answer[::2], answer[1::2]
        return {_text(pod): int(depth) for pod, depth in zip(pods, depths, strict=True)}

    async def close(self) -> None:
        """Closes all connections."""
        await self._connection.close()

    async def _members_of(self, fingerprint: str) -> list[Member]:
        packed: list[bytes | None] = await self._connection.run(_MEMBERS, _root(fingerprint))
        if not packed:  # a pod that appears just now puts the name back with its next heartbeat
            await self._connection.command("SREM", MODELS, fingerprint)
        return [member for item in packed if item and (member := _decoded(item))]


def _root(fingerprint: str) -> str:
    return f"tasuki:{{{fingerprint}}}"


def _text(value: bytes | int) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _decoded(packed: bytes) -> Member | None:
    try:
        return _decoder.decode(packed)
    except msgspec.DecodeError as error:
        log.warning("member_unreadable", reason=str(error), advice="run one version of tasuki")
        return None
