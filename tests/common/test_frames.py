"""Frames: what goes in comes out, however the stream is cut."""

import time

import pytest
from hypothesis import given, strategies as st

from tasuki_common.frames import Decoder, Frame, Kind, encode

frames = st.lists(
    st.tuples(
        st.sampled_from(Kind),
        st.integers(0, 2**16 - 1),
        st.lists(st.integers(0, 2**32 - 1), max_size=4),
        st.binary(max_size=40),
    ),
    max_size=8,
)


@given(frames, st.data())
def test_frames_come_out_as_they_went_in_and_as_soon_as_they_are_whole(
    sent: list[tuple[Kind, int, list[int], bytes]], data: st.DataObject
) -> None:
    packed = [encode(*frame) for frame in sent]
    wire = b"".join(packed)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=12)))
    decoder, got = Decoder(), []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += decoder.feed(wire[start:end])
        whole = sum(len(b"".join(packed[: i + 1])) <= end for i in range(len(packed)))
        assert len(got) == whole
    assert got == [
        Frame(kind, choice, b"".join(t.to_bytes(4, "little") for t in tokens), payload)
        for kind, choice, tokens, payload in sent
    ]


def test_a_kind_that_is_none_is_an_error() -> None:
    wire = bytearray(encode(Kind.CHUNK, 0, [], b""))
    wire[8] = 9
    with pytest.raises(ValueError, match="9"):
        Decoder().feed(bytes(wire))


def test_a_long_frame_costs_time_in_proportion_to_its_length() -> None:
    wire, decoder = encode(Kind.CHUNK, 0, [], bytes(100 << 20)), Decoder()
    began = time.process_time()
    got: list[Frame] = []
    for at in range(0, len(wire), 1 << 16):
        got += decoder.feed(wire[at : at + (1 << 16)])
    assert len(got) == 1
    assert time.process_time() - began < 2.0
