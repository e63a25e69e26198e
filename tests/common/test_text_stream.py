"""Text of one choice: stop strings, stop tokens, and going on where another stream left off.

The expected text is found by looking at the whole text once; the stream sees a token at a time.
"""

import itertools
import time
import tracemalloc

import pytest
from hypothesis import given, settings, strategies as st
from tiny_tokenizers import TEXTS, tokenizer

from tasuki_common.sampling import SamplingParams
from tasuki_common.text_stream import TextDelta, TextStream

KINDS = ("byte_level", "byte_fallback_strip", "metaspace")
EOS = 1


def ids_of(text: str, kind: str = "byte_level") -> list[int]:
    return tokenizer(kind).encode(text, add_special_tokens=False)


def stops() -> st.SearchStrategy[list[str]]:
    """Likely to be met: pieces of the training texts, short and self-similar strings."""
    cut = st.tuples(st.sampled_from(TEXTS), st.integers(0, 40), st.integers(1, 12)).map(
        lambda t: t[0][t[1] : t[1] + t[2]] or "x"
    )
    short = st.text(alphabet="ab né", min_size=1, max_size=4)
    return st.lists(st.one_of(cut, short), max_size=3)


@st.composite
def cases(draw: st.DrawFn, kind: str) -> tuple[list[int], SamplingParams, list[int]]:
    """Tokens, parameters, and where to cut the tokens into pushes."""
    texts = st.one_of(st.sampled_from(TEXTS), st.text(alphabet="ab né😀", max_size=20))
    random_ids = st.lists(st.integers(0, tokenizer(kind).vocab_size), max_size=20)
    ids = draw(st.one_of(texts.map(lambda text: ids_of(text, kind)), random_ids))
    params = SamplingParams(
        stop=draw(stops()),
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        min_tokens=draw(st.sampled_from([0, 0, 1, 5])),
        max_tokens=None,
        logprobs=draw(st.sampled_from([None, 0])),
    )
    return ids, params, draw(st.lists(st.integers(0, 40), max_size=6).map(sorted))


def run(stream: TextStream, ids: list[int], cuts: list[int]) -> list[TextDelta]:
    """The deltas of `ids` pushed in parts, the last of which ends by length."""
    borders = [0, *[cut for cut in cuts if cut < len(ids)], len(ids)]
    deltas: list[TextDelta] = []
    for start, end in itertools.pairwise(borders):
        deltas.append(stream.push(ids[start:end], "length" if end == len(ids) else None))
        if deltas[-1].finished:
            break
    return deltas


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def expected(kind: str, ids: list[int], params: SamplingParams) -> tuple[str, str | None]:
    """Text and stop string, by the definition: the first end after min_tokens, the longest."""
    made = tokenizer(kind).detokenizer(skip_special_tokens=params.skip_special_tokens)
    early = "".join(made.push([token_id]) for token_id in ids[: params.min_tokens])
    rest = made.push(ids[params.min_tokens :])
    flushed = made.flush()
    whole = early + rest + flushed
    exempt = len(whole) if len(ids) <= params.min_tokens else len(early)
    for end in range(exempt + 1, len(whole) + 1):
        hits = [stop for stop in params.stop or () if whole[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return whole[: end if params.include_stop_str_in_output else end - len(stop)], stop
    return whole, None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_text_ends_at_the_stop_string_that_ends_first(kind: str, data: st.DataObject) -> None:
    ids, params, cuts = data.draw(cases(kind))
    text, stop = expected(kind, ids, params)
    deltas = run(TextStream(tokenizer(kind), params), ids, cuts)
    assert text_of(deltas) == text
    assert deltas[-1].finished
    assert deltas[-1].stop_reason == stop
    assert deltas[-1].finish_reason == ("stop" if stop else "length")
    assert not any(delta.finished for delta in deltas[:-1])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_a_primed_stream_says_exactly_the_rest(kind: str, data: st.DataObject) -> None:
    ids, params, cuts = data.draw(cases(kind))
    split = data.draw(st.integers(0, len(ids)))
    made = tokenizer(kind)
    first = TextStream(made, params)
    head = [first.push([token_id]) for token_id in ids[:split] if not first.finished]
    second = TextStream(made, params, primed_token_ids=ids[:split])
    assert second.finished == first.finished
    whole = run(TextStream(made, params), ids, list(range(len(ids))))
    if not second.finished:
        tail = run(second, ids[split:], cuts)
        assert text_of(head) + text_of(tail) == text_of(whole)
        assert tail[-1][3:5] == whole[-1][3:5]
        offsets = [offset for delta in head + tail for offset in delta.text_offsets]
        assert offsets == [offset for delta in whole for offset in delta.text_offsets]
    else:
        assert text_of(head) == text_of(whole)
        assert second.stop_reason == whole[-1].stop_reason


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_tokens_that_count_end_with_the_one_that_completes_the_stop_string(
    kind: str, data: st.DataObject
) -> None:
    ids, params, cuts = data.draw(cases(kind))
    singly = run(TextStream(tokenizer(kind), params), ids, list(range(len(ids))))
    deltas = run(TextStream(tokenizer(kind), params), ids, cuts)
    counted = [token_id for delta in deltas for token_id in delta.token_ids]
    assert counted == [token_id for delta in singly for token_id in delta.token_ids]
    assert counted == ids[: len(counted)]
    if params.logprobs is not None:
        assert [len(delta.text_offsets) for delta in deltas] == [
            len(delta.token_ids) for delta in deltas
        ]


def test_a_stop_string_is_found_across_tokens_and_nothing_of_it_is_said() -> None:
    stream = TextStream(tokenizer("byte_level"), SamplingParams(stop=["END", "x"]))
    said = [stream.push([token_id]) for token_id in ids_of("so EN so END more")[:-2]]
    upto = next(i for i, delta in enumerate(said) if delta.finished)
    assert text_of(said[: upto + 1]) == "so EN so "
    assert said[upto].stop_reason == "END"


def test_what_only_looked_like_a_stop_string_is_said_when_it_is_none() -> None:
    stream = TextStream(tokenizer("byte_level"), SamplingParams(stop="abc"))
    assert stream.push(ids_of("xab")).text == "x"
    assert stream.push(ids_of("ab")).text == "ab"
    assert stream.push([], "length").text == "ab"


def test_a_stop_token_counts_and_is_not_said() -> None:
    made = tokenizer("byte_level")
    ids = [*ids_of("Hi"), made.encode("!", add_special_tokens=False)[0]]
    delta = TextStream(made, SamplingParams()).push(ids, "stop", ids[-1])
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("Hi", ids, ids[-1])
    kept = TextStream(made, SamplingParams(include_stop_str_in_output=True)).push(ids, "stop")
    assert kept.text == "Hi!"
    shown = TextStream(made, SamplingParams(skip_special_tokens=False)).push([*ids, EOS], "stop")
    assert shown.text == "Hi!"


def test_offsets_are_where_each_token_begins_in_the_text() -> None:
    stream = TextStream(tokenizer("byte_level"), SamplingParams(logprobs=1))
    ids = ids_of("Größe 😀!")
    delta = stream.push([*ids, EOS], "stop")
    assert delta.text == "Größe 😀!"
    assert len(delta.text_offsets) == len(ids) + 1
    made, seen = tokenizer("byte_level"), b""
    for token_id, offset in zip([*ids, EOS], delta.text_offsets, strict=True):
        assert offset == len(seen.decode(errors="ignore"))
        seen += made.token_bytes(token_id)


def test_a_push_costs_less_than_five_microseconds_without_stop_strings() -> None:
    made, ids = tokenizer("byte_level"), ids_of(" ".join(TEXTS) * 20)
    best = float("inf")
    for _ in range(5):
        stream = TextStream(made, SamplingParams())
        start = time.process_time()
        for token_id in ids:
            stream.push((token_id,))
        best = min(best, time.process_time() - start)
    assert best / len(ids) < 5e-6


def test_a_long_stop_string_costs_no_more_memory_than_itself() -> None:
    made, params = tokenizer("byte_level"), SamplingParams(stop=["x" * 20_000])
    tracemalloc.start()
    stream = TextStream(made, params)
    stream.push(made.encode("xx xxx"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
