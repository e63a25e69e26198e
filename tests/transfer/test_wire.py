"""Garbage on a connection costs a connection: no crash, no memory, no lease."""

import asyncio
import contextlib
import socket
import tracemalloc

import pytest
from fresh_seed import fresh_seed
from hypothesis import given, settings, strategies as st
from transfer_peers import FINGERPRINT, KEY, pair

from tasuki_transfer import handshake, wire
from tasuki_transfer.base import TransferError

DECODERS = [wire.HELLO, wire.PROOF, wire.FROM_TAKER, wire.FROM_GIVER, wire.FETCH, wire.WELCOME]

MESSAGES = st.one_of(
    st.builds(wire.Subscribe, st.integers(0, 2**32), st.text(max_size=40)),
    st.builds(wire.Heartbeat, st.lists(st.integers(0, 2**32), max_size=20)),
    st.builds(wire.Release, st.integers(0, 2**32)),
    st.builds(wire.Leave, st.integers(0, 2**32)),
)


@given(st.binary(max_size=200), st.sampled_from(DECODERS))
def test_any_payload_is_a_message_or_a_transfer_error(payload, decoder):
    with contextlib.suppress(TransferError):
        wire.decode_payload(payload, decoder)


@given(MESSAGES)
def test_messages_survive_the_wire(message):
    frame = wire.encode(message)
    header, payload = frame[: wire.HEADER.size], frame[wire.HEADER.size :]
    assert wire.payload_size(header, wire.MESSAGE_LIMIT) == len(payload)
    assert wire.decode(header, payload, wire.FROM_TAKER) == message


@given(MESSAGES, st.data())
def test_a_damaged_frame_is_noticed(message, data):
    frame = bytearray(wire.encode(message))
    at = data.draw(st.integers(4, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    header, payload = bytes(frame[: wire.HEADER.size]), bytes(frame[wire.HEADER.size :])
    with pytest.raises(TransferError):
        wire.decode(header, payload, wire.FROM_TAKER)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**20))
def test_a_length_over_the_limit_takes_no_memory(size, limit):
    header = wire.HEADER.pack(size, 0)
    if size <= limit:
        assert wire.payload_size(header, limit) == size
    else:
        with pytest.raises(TransferError):
            wire.payload_size(header, limit)


async def _throw(port: int, data: bytes) -> None:
    """Send bytes as a stranger and wait until the giver hangs up or says something."""
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", port)) as sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        await loop.sock_sendall(sock, data)
        sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(5):
            while await loop.sock_recv(sock, 4096):
                pass


async def test_garbage_never_harms_the_giver():
    async with pair(fresh_seed(), lease_seconds=120) as both:
        ticket = both.ticket("r")
        both.giver.complete("r")
        hello = wire.encode(wire.Hello(wire.VERSION, b"n" * handshake.NONCE_BYTES))
        huge = wire.HEADER.pack(2**32 - 1, 0)
        tracemalloc.start()
        for _ in range(100):
            noise = both.random.randbytes(both.random.randrange(300))
            for data in (noise, hello + noise, huge + noise, hello + huge, hello[:-1]):
                await _throw(ticket.port, data)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()
        await both.taker.pull(ticket, {}, 5)


@given(st.lists(st.binary(max_size=64), max_size=8))
@settings(max_examples=50)
def test_garbage_from_a_peer_that_holds_the_key_ends_only_its_connection(payloads):
    async def scenario() -> None:
        async with pair(0) as both:
            ticket = both.ticket("r")
            both.giver.complete("r")
            for kind in ("control", "data", "other"):
                sock = socket.create_connection((ticket.host, ticket.port))
                channel = wire.Channel(sock)
                terms = wire.Terms(kind, FINGERPRINT, "first")
                await handshake.connect(channel, KEY, terms)
                for payload in payloads:
                    await asyncio.get_running_loop().sock_sendall(sock, payload)
                channel.close()
            await both.taker.pull(ticket, {}, 5)

    asyncio.run(scenario())


async def test_a_recorded_proof_is_worth_nothing():
    async with pair(fresh_seed()) as both:
        ticket = both.ticket("r")
        loop = asyncio.get_running_loop()
        nonce = b"n" * handshake.NONCE_BYTES
        encoded = b"terms"

        def answer(challenge: bytes) -> wire.Proof:
            return wire.Proof(encoded, handshake._mac(KEY, b"taker", nonce + challenge, encoded))

        recorded: wire.Proof | None = None
        reasons = []
        for _ in range(2):
            sock = socket.create_connection((ticket.host, ticket.port))
            channel = wire.Channel(sock)
            await loop.sock_sendall(sock, wire.encode(wire.Hello(wire.VERSION, nonce)))
            challenge = await channel.read(wire.CHALLENGE)
            assert isinstance(challenge, wire.Challenge)
            recorded = recorded or answer(challenge.nonce)
            await channel.write(recorded)
            refusal = await channel.read(wire.ACCEPTANCE)
            assert isinstance(refusal, wire.Refused)
            reasons.append(refusal.reason)
            channel.close()
        assert reasons == ["protocol", "unauthorized"]
