"""Streams of every decoder kind against one decode of everything.

Not here: that `tokenizers` itself decodes right.
"""

import itertools
import time

import pytest
import tiny_tokenizers
from hypothesis import given, settings, strategies as st
from tiny_tokenizers import KINDS, TEXTS, tokenizer

EXACT_KINDS = ("byte_level", "byte_fallback_strip", "byte_fallback")


def ids_and_cuts(kind: str) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    """Any ids, ids just outside the vocabulary too, with places to cut; bytes are frequent."""
    size = tokenizer(kind).vocab_size
    token_id = st.one_of(st.integers(0, size + 2), st.integers(5, min(size, 265)))
    ids = st.lists(token_id, max_size=40)
    return st.tuples(ids, st.lists(st.integers(0, 40), max_size=8).map(sorted))


def streamed(kind: str, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    stream = tokenizer(kind).detokenizer(skip_special_tokens=skip, at_start=True)
    borders = [0, *cuts, len(ids)]
    pieces = [stream.push(ids[a:b]) for a, b in itertools.pairwise(borders)]
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(kind: str, skip: bool, data: st.DataObject) -> None:
    ids, cuts = data.draw(ids_and_cuts(kind))
    whole = tiny_tokenizers.inner(kind).decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(kind, ids, cuts, skip)) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)))
def test_no_character_is_split(kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text, add_special_tokens=False)
    whole = tokenizer(kind).decode(ids, skip_special_tokens=False)
    pieces = streamed(kind, ids, list(range(len(ids))), skip=False)
    assert "".join(pieces) == whole
    assert "".join(pieces).count("\ufffd") == whole.count("\ufffd")


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_a_character_is_said_as_soon_as_its_last_byte_or_the_end_of_its_run_is_there(
    kind: str,
) -> None:
    made = tokenizer(kind)
    ids = made.encode("a😀b", add_special_tokens=False)
    seen, stream = "", made.detokenizer(at_start=True)
    for token_id in ids[:-1]:
        seen += stream.push([token_id])
    if kind == "byte_level":
        assert seen == "a😀"
    assert seen + stream.push(ids[-1:]) == "a😀b"


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_text_that_goes_on_from_a_prompt_keeps_its_first_space(kind: str) -> None:
    made = tokenizer(kind)
    whole = "The relay hands a prompt on"
    ids = made.encode(whole, add_special_tokens=False)
    for cut in range(1, len(ids)):
        stream = made.detokenizer()
        assert made.decode(ids[:cut]) + stream.push(ids[cut:]) + stream.flush() == whole


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_bytes_of_tokens_join_to_the_text(kind: str) -> None:
    made = tokenizer(kind)
    for text in TEXTS:
        ids = made.encode(text, add_special_tokens=False)
        joined = b"".join(made.token_bytes(token_id) for token_id in ids).decode()
        assert joined.removeprefix(" ") == text
    for token_id in range(made.vocab_size):
        assert made.token_text(token_id) == made.token_bytes(token_id).decode(errors="replace")
    assert made.token_bytes(made.vocab_size + 7) == b""


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_token_costs_less_than_five_microseconds(kind: str) -> None:
    made = tokenizer(kind)
    ids = made.encode(" ".join(TEXTS) * 20, add_special_tokens=False)
    stream = made.detokenizer()
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for token_id in ids:
            stream.push((token_id,))
        best = min(best, time.process_time() - start)
    assert best / len(ids) < 5e-6
