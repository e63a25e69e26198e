"""Who may connect: mutual proof of one shared key, bound to this connection and its terms.

    taker → giver   Hello(version, nonce)
    giver → taker   Challenge(nonce)
    taker → giver   Proof(terms, MAC(key, "taker", both nonces, terms))
    giver → taker   Accepted(welcome, MAC(key, "giver", both nonces, welcome))  or  Refused

Fresh nonces of both sides make a recorded proof worthless; the two labels keep a proof from being
reflected. Terms name the fingerprint and the incarnation that the ticket promised, so a taker never
reads from a pod of another model or from a process that was restarted on the same port. The key
authenticates peers; it does not encrypt.
"""

import hmac
import secrets
from collections.abc import Callable

import msgspec

from tasuki_common.errors import ConfigError
from tasuki_transfer import wire
from tasuki_transfer.base import TransferError

NONCE_BYTES = 32
HANDSHAKE_SECONDS = 5.0
MIN_KEY_BYTES = 16


def check_key(key: bytes) -> bytes:
    """`key`, when it is long enough to authenticate anything; else ConfigError."""
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"The transfer key has {len(key)} bytes; TASUKI_TRANSFER_KEY must hold the same "
            f"{MIN_KEY_BYTES} or more on all pods."
        )
    return key


def _mac(key: bytes, label: bytes, nonces: bytes, payload: bytes) -> bytes:
    return hmac.digest(key, label + nonces + payload, "sha256")


async def connect(channel: wire.Channel, key: bytes, terms: wire.Terms) -> wire.Welcome:
    """The taker's side. Raises TransferError: unauthorized, refused_*, truncated, protocol."""
    mine = secrets.token_bytes(NONCE_BYTES)
    await channel.write(wire.Hello(wire.VERSION, mine))
    challenge = await channel.read(wire.CHALLENGE, wire.HANDSHAKE_LIMIT)
    if isinstance(challenge, wire.Refused):
        raise TransferError(challenge.reason, challenge.message)
    nonces = mine + challenge.nonce
    encoded = msgspec.msgpack.encode(terms)
    await channel.write(wire.Proof(encoded, _mac(key, b"taker", nonces, encoded)))
    answer = await channel.read(wire.ACCEPTANCE)
    if isinstance(answer, wire.Refused):
        raise TransferError(answer.reason, answer.message)
    if not hmac.compare_digest(answer.mac, _mac(key, b"giver", nonces, answer.welcome)):
        raise TransferError("unauthorized", "The giver does not hold our transfer key.")
    return wire.decode_payload(answer.welcome, wire.WELCOME)


async def accept(
    channel: wire.Channel, key: bytes, welcome: Callable[[wire.Terms], wire.Welcome]
) -> wire.Terms:
    """The giver's side; `welcome` raises TransferError for terms that cannot be met.

    Raises TransferError, after the taker has been told why.
    """
    try:
        hello = await channel.read(wire.HELLO, wire.HANDSHAKE_LIMIT)
        if hello.version != wire.VERSION or len(hello.nonce) != NONCE_BYTES:
            raise TransferError(
                "refused_version",
                f"We speak transfer protocol {wire.VERSION}, not {hello.version}.",
            )
        mine = secrets.token_bytes(NONCE_BYTES)
        await channel.write(wire.Challenge(mine))
        proof = await channel.read(wire.PROOF, wire.HANDSHAKE_LIMIT)
        nonces = hello.nonce + mine
        if not hmac.compare_digest(proof.mac, _mac(key, b"taker", nonces, proof.terms)):
            raise TransferError("unauthorized", "The taker does not hold our transfer key.")
        terms = wire.decode_payload(proof.terms, wire.TERMS)
        encoded = msgspec.msgpack.encode(welcome(terms))
    except TransferError as error:
        if error.reason != "truncated":
            await channel.write(wire.Refused(error.reason, str(error)))
        raise
    await channel.write(wire.Accepted(encoded, _mac(key, b"giver", nonces, encoded)))
    return terms
