"""Events of a response: whatever the text, an event is one line to every client."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from tasuki_common.messages import GenerateRequest
from tasuki_common.sampling import SamplingParams
from tasuki_common.text_stream import TextDelta
from tasuki_common.tokenizer import Tokenizer, read_files
from tasuki_decode.chunks import ChunkWriter

DEMO = Path(__file__).parents[2] / "examples" / "models" / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_files(read_files(DEMO), origin="demo")


def writer(tokenizer: Tokenizer, endpoint: str) -> ChunkWriter:
    request = GenerateRequest(
        request_id="r",
        model="demo",
        endpoint=endpoint,
        response_id="cmpl-1",
        created=1,
        prompt_token_ids=[5],
        sampling=SamplingParams(seed=1),
    )
    return ChunkWriter(request, tokenizer)


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
@given(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\x85\u2028\u2029\n\x0b"))
)
def test_an_event_is_one_line_that_holds_the_text(tokenizer, endpoint, text):
    for finished in (False, True):
        delta = TextDelta(text, [7], finished, "stop" if finished else None)
        event = writer(tokenizer, endpoint).delta(0, delta, None, 1)
        if not text and not finished:
            assert event == b""
            continue
        lines = [line for line in event.decode().splitlines() if line]
        assert len(lines) == 1
        (choice,) = json.loads(lines[0].removeprefix("data: "))["choices"]
        assert (choice["delta"]["content"] if endpoint == "chat" else choice["text"]) == text
