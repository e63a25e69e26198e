"""Frames and messages of the control and data connections.

    frame: u32 payload bytes, u64 xxh3 of the payload (little-endian), payload (msgpack)

Every length is checked against a limit before memory is taken. After a `Granted` on a data
connection come exactly `num_bytes` raw bytes, whose checksums the offers carry.
"""

import asyncio
import socket
import struct
from typing import Literal, TypeVar

import msgspec
import xxhash

from tasuki_transfer.base import Reason, TransferError

VERSION = 2
HEADER = struct.Struct("<IQ")
HANDSHAKE_LIMIT = 4096
"""Payload bytes of a frame from a peer that has not proved that it holds the key."""
MESSAGE_LIMIT = 1 << 20
SPANS_PER_MESSAGE = 8192
_SOCKET_OPTIONS = {
    socket.TCP_NODELAY: 1,
    socket.TCP_KEEPIDLE: 10,  # seconds of silence, then probes
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 30_000,  # milliseconds that sent bytes may wait to be taken
}
"""A peer whose machine is gone, or that takes nothing, ends the connection within 30 seconds."""

T = TypeVar("T")

Checksum = Literal["xxh3", "mix64"]
"""How spans are summed: xxh3_64 is the fastest on a CPU, tasuki_kernels.checksum's on a GPU."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Taker, first: which protocol, and a challenge."""

    version: int
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """Giver's answer to a Hello."""

    nonce: bytes


class Terms(msgspec.Struct, frozen=True):
    """What the taker expects to find, and what the connection is for."""

    kind: str
    """control or data."""
    fingerprint: str
    incarnation: str


class Proof(msgspec.Struct, frozen=True, tag=True):
    """Taker: encoded Terms under its MAC."""

    terms: bytes
    mac: bytes


class Pool(msgspec.Struct, frozen=True, array_like=True):
    """One region of the giver: its shape and, for one-sided reads, where it lies."""

    count: int
    span_bytes: int
    address: int
    device: int
    """CUDA device, -1 for host memory."""


class Welcome(msgspec.Struct, frozen=True):
    """What the giver has to say before the first pull."""

    pools: dict[str, Pool]
    lease_seconds: float
    checksum: Checksum
    """The kind in this giver's offers."""
    nixl: bytes = b""
    """Metadata of the giver's NIXL agent; empty where it has none."""


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Giver: encoded Welcome under its MAC."""

    welcome: bytes
    mac: bytes


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Giver: no, and why. The connection ends."""

    reason: Reason
    message: str


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """Taker: tell me the spans of this request as they are finished."""

    pull: int
    """Chosen by the taker, names this pull on this connection."""
    request_id: str


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Taker: I am still at these; extends their leases."""

    pulls: list[int]


class Release(msgspec.Struct, frozen=True, tag=True):
    """Taker: all bytes are here and right; end the lease and say whether it stood."""

    pull: int


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Taker: no longer interested; the lease goes on for whoever comes next."""

    pull: int


class Offered(msgspec.Struct, frozen=True, array_like=True):
    """One span that will not change any more while its lease lasts."""

    pool: str
    index: int
    ordinal: int
    checksum: int


class Offer(msgspec.Struct, frozen=True, tag=True):
    """Giver: spans that are finished."""

    pull: int
    spans: list[Offered]


class Complete(msgspec.Struct, frozen=True, tag=True):
    """Giver: everything has been offered; `note` is what it has to say beside the bytes."""

    pull: int
    note: bytes = b""


class Released(msgspec.Struct, frozen=True, tag=True):
    """Giver: lease and generations stood until now; they end here."""

    pull: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Giver: this pull cannot succeed."""

    pull: int
    reason: Reason
    message: str


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Taker, on a data connection: send bytes start..stop of each of these spans, in order."""

    request_id: str
    pool: str
    ordinals: list[int]
    start: int
    stop: int


class Granted(msgspec.Struct, frozen=True, tag=True):
    """Giver, on a data connection: that many raw bytes follow."""

    num_bytes: int


FromTaker = Subscribe | Heartbeat | Release | Leave
FromGiver = Offer | Complete | Released | Failed

Decoder = msgspec.msgpack.Decoder
HELLO: Decoder[Hello] = Decoder(Hello)
CHALLENGE: Decoder[Challenge | Refused] = Decoder(Challenge | Refused)
PROOF: Decoder[Proof] = Decoder(Proof)
TERMS: Decoder[Terms] = Decoder(Terms)
ACCEPTANCE: Decoder[Accepted | Refused] = Decoder(Accepted | Refused)
WELCOME: Decoder[Welcome] = Decoder(Welcome)
FROM_TAKER: Decoder[FromTaker] = Decoder(FromTaker)
FROM_GIVER: Decoder[FromGiver] = Decoder(FromGiver)
FETCH: Decoder[Fetch] = Decoder(Fetch)
GRANT: Decoder[Granted | Refused] = Decoder(Granted | Refused)

_encode = msgspec.msgpack.Encoder().encode


def encode(message: msgspec.Struct) -> bytes:
    """One frame."""
    payload = _encode(message)
    return HEADER.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + payload


def payload_size(header: bytes, limit: int) -> int:
    """Bytes that follow `header`; TransferError("protocol") when they are more than `limit`."""
    size: int = HEADER.unpack(header)[0]
    if size > limit:
        raise TransferError("protocol", f"A frame of {size} bytes is over the limit of {limit}.")
    return size


def decode(header: bytes, payload: bytes, decoder: Decoder[T]) -> T:
    """The message in a frame; TransferError("protocol") when it is damaged or another message."""
    if xxhash.xxh3_64_intdigest(payload) != HEADER.unpack(header)[1]:
        raise TransferError("protocol", "A frame's checksum is wrong.")
    return decode_payload(payload, decoder)


def decode_payload(payload: bytes, decoder: Decoder[T]) -> T:
    """The message in msgpack; TransferError("protocol") when it is another or none."""
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TransferError("protocol", f"A frame holds no expected message: {error}.") from error


class Channel:
    """Frames over a connected non-blocking socket; reads never take more than the frame."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _SOCKET_OPTIONS.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def read(self, decoder: Decoder[T], limit: int = MESSAGE_LIMIT) -> T:
        """The next message. Raises TransferError: truncated, protocol."""
        header = await self._read_exactly(HEADER.size)
        payload = await self._read_exactly(payload_size(header, limit))
        return decode(header, payload, decoder)

    async def write(self, message: msgspec.Struct) -> None:
        """Send one message; one writer at a time. Raises TransferError("truncated")."""
        frame = encode(message)
        try:
            await self._loop.sock_sendall(self.sock, frame)
        except OSError as error:
            raise TransferError("truncated", f"The connection broke: {error}.") from error

    async def _read_exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            try:
                got = await self._loop.sock_recv_into(self.sock, view[done:])
            except OSError as error:
                raise TransferError("truncated", f"The connection broke: {error}.") from error
            if not got:
                raise TransferError("truncated", "The peer closed the connection.")
            done += got
        return bytes(data)

    async def write_all(self, outbox: asyncio.Queue[msgspec.Struct]) -> None:
        """Send what is put into `outbox` until cancelled. Raises TransferError("truncated")."""
        while True:
            await self.write(await outbox.get())

    def close(self) -> None:
        """End the connection; a reader in another task must have been cancelled before."""
        self.sock.close()
