"""Bodies of requests: whatever comes in, a request or a 400 that names a field comes out."""

from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, strategies as st

from tasuki_common.errors import RequestError
from tasuki_common.sampling import SamplingParams
from tasuki_gateway import bodies, sampling

VOCAB = 100
KINDS = [bodies.Chat, bodies.Completion, bodies.Tokenize, bodies.Detokenize]
FIELDS = sorted(
    {name for kind in KINDS for name in kind.__struct_fields__} | set(bodies.NEUTRAL) | {"zzz"}
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def chat(**fields: Any) -> bodies.Chat:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return bodies.parse(msgspec.json.encode(body), bodies.Chat)


def completion(**fields: Any) -> bodies.Completion:
    return bodies.parse(msgspec.json.encode({"prompt": "hi", **fields}), bodies.Completion)


def params(body: bodies.Chat | bodies.Completion, **defaults: Any) -> SamplingParams:
    return sampling.sampling_params(body, defaults=defaults, vocab_size=VOCAB)


@given(st.binary() | st.text().map(str.encode), st.sampled_from(KINDS))
def test_bytes_that_are_no_request_are_refused(body: bytes, kind: type[Any]) -> None:
    assume(not body.strip().startswith(b"{"))
    with pytest.raises(RequestError):
        bodies.parse(body, kind)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.sampled_from(KINDS))
def test_any_object_is_a_request_or_refused(fields: dict[str, Any], kind: type[Any]) -> None:
    try:
        body = bodies.parse(msgspec.json.encode(fields), kind)
        if isinstance(body, bodies.Chat | bodies.Completion):
            msgspec.msgpack.encode((params(body), body.priority))
    except RequestError:
        return


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid JSON"):
        bodies.parse(b"[" * 200_000, bodies.Chat)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"zzz": 1}, "zzz"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"guided_json": {}}, "guided_json"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": True}, "n"),
        ({"priority": 2**70}, "priority"),
        ({"top_k": 2**70}, "top_k"),
        ({"min_tokens": 2**70}, "min_tokens"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": None}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ],
)
def test_a_field_that_cannot_be_served_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"seed": 2**63}, "seed", str(2**63 - 1)),
        ({"seed": 2**70}, "seed", str(2**63 - 1)),
        ({"seed": -(2**63) - 1}, "seed", str(-(2**63))),
        ({"temperature": -1}, "temperature", "0 or more"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"n": 0}, "n", "1 to 128"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "1 or more"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
        ({"logit_bias": {"100": 1, "7": 1, "x": 1, "-1": 1}}, "logit_bias", "100, x, -1"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "²"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "token id"),
        ({"stop": ["a"] * 65}, "stop", "64"),
        ({"stop_token_ids": [5, 100]}, "stop_token_ids", "99"),
        ({"stop": [""]}, "stop", "empty"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_bound(
    fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(RequestError) as caught:
        params(chat(**fields))
    assert caught.value.param == param
    assert said in str(caught.value)


def test_null_is_the_default_everywhere() -> None:
    fields = dict.fromkeys(bodies.Chat.__struct_fields__) | dict.fromkeys(bodies.NEUTRAL)
    del fields["messages"]
    body = chat(**fields)
    assert body == chat()


def test_fields_without_effect_and_neutral_values_are_accepted() -> None:
    harmless: dict[str, Any] = dict.fromkeys(bodies.NO_EFFECT, "anything")
    neutral = {name: values[0] for name, values in bodies.NEUTRAL.items()}
    assert chat(**harmless, **neutral) == chat()


def test_the_models_defaults_hold_where_the_client_says_nothing() -> None:
    asked = params(chat(top_p=0.5), temperature=0.7, top_p=0.9, top_k=20)
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.7, 0.5, 20)


def test_every_request_has_a_seed() -> None:
    assert params(chat(seed=-5)).seed == -5
    assert params(chat()).seed != params(chat()).seed


def test_limits_are_16_for_completions_and_the_context_for_chat() -> None:
    assert params(completion()).max_tokens == 16
    assert params(chat()).max_tokens is None
    assert params(chat(max_tokens=3)).max_tokens == 3
    assert params(chat(max_tokens=3, max_completion_tokens=4)).max_tokens == 4
    assert params(completion(max_tokens=0, echo=True)).max_tokens == 0
    with pytest.raises(RequestError):
        params(completion(max_tokens=0))


def test_logprobs_mean_what_each_endpoint_says() -> None:
    assert params(chat()).logprobs is None
    assert params(chat(logprobs=True)).logprobs == 0
    assert params(chat(logprobs=True, top_logprobs=5)).logprobs == 5
    assert params(completion(logprobs=0)).logprobs == 0
    echoed = params(completion(logprobs=2, echo=True))
    assert (echoed.logprobs, echoed.prompt_logprobs) == (2, 2)
