"""The stream from a decode pod to the gateway: small binary frames in an HTTP response body.

    header, 12 bytes little-endian: u32 payload bytes, u16 tokens, u16 choice, u8 kind, 3 bytes 0
    tokens: u32 each             what the gateway journals, so that another pod can continue
    payload                      bytes for the client, passed through unread

A `CHUNK` carries one or more complete SSE events ("data: {...}\\n\\n") or none, and the tokens
whose text they complete; a `FINISH` is a `CHUNK` after which its choice is finished. `DONE` ends a
whole stream and carries a JSON `Usage`; a body that ends without it was cut. `ERROR` carries a JSON
`ErrorResponse` and ends the stream; whether another pod may continue is the kind's business:
`RETRY` says the pod failed, `ERROR` that the request did.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

CONTENT_TYPE = "application/x-tasuki-frames"
_HEADER = struct.Struct("<IHHBxxx")


class Kind(IntEnum):
    """What a frame means."""

    CHUNK = 0
    FINISH = 1
    DONE = 2
    ERROR = 3
    RETRY = 4


class Frame(NamedTuple):
    """One frame; `tokens` holds little-endian u32s, `payload` is for the client."""

    kind: Kind
    choice: int
    tokens: bytes
    payload: bytes


def encode(kind: Kind, choice: int, tokens: list[int], payload: bytes) -> bytes:
    """One frame as bytes."""
    header = _HEADER.pack(len(payload), len(tokens), choice, kind)
    return header + struct.pack(f"<{len(tokens)}I", *tokens) + payload


class Decoder:
    """Cuts a byte stream into frames; keeps what is incomplete for the next call."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._missing = _HEADER.size
        """Bytes until a header or a frame is complete: a long one is joined once."""

    def feed(self, data: bytes) -> list[Frame]:
        """Frames completed by `data`.

        Raises:
            ValueError: a header names no kind of frame.
        """
        self._missing -= len(data)
        if self._missing > 0:
            self._parts.append(data)
            return []
        if self._parts:
            data = b"".join([*self._parts, data])
        frames: list[Frame] = []
        start, end = 0, len(data)
        stop = _HEADER.size
        while stop <= end:
            payload_bytes, num_tokens, choice, kind = _HEADER.unpack_from(data, start)
            tokens_at = start + _HEADER.size
            payload_at = tokens_at + 4 * num_tokens
            stop = payload_at + payload_bytes
            if stop > end:
                break
            start = stop
            frames.append(
                Frame(Kind(kind), choice, data[tokens_at:payload_at], data[payload_at:stop])
            )
            stop = start + _HEADER.size
        self._parts = [data[start:]] if start < end else []
        self._missing = stop - end
        return frames
