"""The journal: what the client has, however the stream was cut."""

import struct

import pytest
from hypothesis import given, strategies as st

from tasuki_common.frames import Decoder, Kind, encode
from tasuki_common.messages import ResumedChoice
from tasuki_gateway.journal import Journal

Step = tuple[int, list[int], bytes]
steps = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2**32 - 1), max_size=3), st.binary()),
    max_size=30,
)


@given(steps, st.data())
def test_what_is_passed_on_and_what_is_journaled_agree_at_every_cut(
    script: list[Step], data: st.DataObject
) -> None:
    journal, decoder = Journal(3), Decoder()
    stream = b"".join(encode(Kind.CHUNK, *step) for step in script)
    cut = data.draw(st.integers(0, len(stream)))
    whole: list[Step] = []
    passed: dict[int, bytes] = {0: b"", 1: b"", 2: b""}
    for piece in (stream[: cut // 2], stream[cut // 2 : cut]):
        for frame in decoder.feed(piece):
            passed[frame.choice] += journal.take(frame)
            whole.append(script[len(whole)])
    tokens = {c: [t for choice, ts, _ in whole if choice == c for t in ts] for c in passed}
    resumed = journal.resume()
    assert journal.num_tokens == sum(map(len, tokens.values()))
    assert [list(choice.token_ids) for choice in resumed] == (
        [tokens[c] for c in range(3)] if any(tokens.values()) else []
    )
    for choice, ids in tokens.items():
        payload = b"".join(p for c, _, p in whole if c == choice)
        assert passed[choice] == (payload if ids else b"")


def test_what_comes_before_the_first_token_is_held_until_it() -> None:
    journal, decoder = Journal(1), Decoder()
    role, first, more = decoder.feed(
        encode(Kind.CHUNK, 0, [], b"role ")
        + encode(Kind.CHUNK, 0, [7], b"a")
        + encode(Kind.FINISH, 0, [8], b"b")
    )
    assert journal.take(role) == b""
    assert not journal.begun
    assert journal.take(first) == b"role a"
    assert journal.take(more) == b"b"
    assert journal.finished
    assert journal.resume() == (ResumedChoice(token_ids=[7, 8], finished=True),)


def test_a_choice_that_ends_without_a_token_is_passed_on() -> None:
    journal = Journal(1)
    (frame,) = Decoder().feed(encode(Kind.FINISH, 0, [], b"end"))
    assert journal.take(frame) == b"end"
    assert journal.begun
    assert journal.finished


def test_what_was_held_is_forgotten_when_another_pod_begins_anew() -> None:
    journal = Journal(1)
    role = Decoder().feed(encode(Kind.CHUNK, 0, [], b"role "))[0]
    journal.take(role)
    assert journal.resume() == ()
    (frame,) = Decoder().feed(encode(Kind.CHUNK, 0, [1], b"x"))
    assert journal.take(frame) == b"x"


def test_a_choice_nobody_asked_for_is_an_error() -> None:
    (frame,) = Decoder().feed(encode(Kind.CHUNK, 5, [1], b"x"))
    with pytest.raises(IndexError):
        Journal(2).take(frame)


def test_tokens_are_little_endian_on_the_wire() -> None:
    journal = Journal(1)
    (frame,) = Decoder().feed(encode(Kind.CHUNK, 0, [2**32 - 1, 1], b""))
    assert frame.tokens == struct.pack("<II", 2**32 - 1, 1)
    journal.take(frame)
    assert journal.only == [2**32 - 1, 1]
