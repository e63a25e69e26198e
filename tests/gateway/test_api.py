"""The API as OpenAI's client and plain HTTP see it; the pods are fakes that keep the protocol."""

import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from gateway_stack import Stack, Starter

LONG = "the quick brown fox " * 200


@pytest.fixture
def sdk(stack: Stack) -> openai.OpenAI:
    """OpenAI's client against the gateway."""
    return openai.OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0)


def hello(**fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": "fake", "messages": [{"role": "user", "content": "hi"}], **fields}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream; the end mark is checked and left out."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_chat_streams_the_text_that_it_returns_whole(sdk: openai.OpenAI) -> None:
    asked: Any = hello(max_tokens=40, seed=7, temperature=0.5)
    whole = sdk.chat.completions.create(**asked)
    chunks = list(
        sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    usage = chunks.pop().usage
    assert whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert usage is not None
    assert whole.usage is not None
    assert usage.model_dump() == whole.usage.model_dump()
    assert usage.completion_tokens == 40
    assert usage.total_tokens == usage.prompt_tokens + 40
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_choices_come_in_prompt_order_with_n_inside(sdk: openai.OpenAI) -> None:
    asked: Any = {"model": "fake", "prompt": ["one", "two", "three"], "n": 2, "seed": 3}
    whole = sdk.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == list(range(6))
    alone = [
        sdk.completions.create(**(asked | {"prompt": prompt})).choices[j].text
        for prompt in asked["prompt"]
        for j in range(2)
    ]
    assert [choice.text for choice in whole.choices] == alone
    streamed = [""] * 6
    for chunk in sdk.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6 * 16


def test_a_prompt_is_the_same_as_text_and_as_ids(stack: Stack, sdk: openai.OpenAI) -> None:
    ids = stack.client.post("/tokenize", json={"prompt": "über die Brücke"}).json()["tokens"]
    prompts: list[Any] = ["über die Brücke", ["über die Brücke"], ids, [ids]]
    texts = {
        sdk.completions.create(model="fake", prompt=prompt, seed=1).choices[0].text
        for prompt in prompts
    }
    assert len(texts) == 1


def test_tokenize_and_detokenize_are_inverse(stack: Stack) -> None:
    plain = stack.client.post("/tokenize", json={"model": "fake", "prompt": "日本 fox"}).json()
    assert plain.keys() == {"count", "max_model_len", "tokens"}
    assert plain["count"] == len(plain["tokens"])
    assert plain["max_model_len"] == 4096
    back = stack.client.post("/detokenize", json={"tokens": plain["tokens"]}).json()
    assert back == {"prompt": "日本 fox"}
    chat = stack.client.post("/tokenize", json=hello(return_token_strs=True)).json()
    assert chat["token_strs"][0] == "<|im_start|>"
    assert len(chat["token_strs"]) == chat["count"]
    answer = stack.client.post("/v1/chat/completions", json=hello()).json()
    assert answer["usage"]["prompt_tokens"] == chat["count"]


def test_content_parts_are_the_same_as_a_string(stack: Stack) -> None:
    parts = hello(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}], x=1)
    del parts["x"]
    ask = [stack.client.post("/tokenize", json=body).json() for body in (hello(), parts)]
    assert ask[0] == ask[1]
    picture = hello(messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    error = stack.client.post("/v1/chat/completions", json=picture)
    assert error.status_code == 400
    assert error.json()["error"]["param"] == "messages[0].content[0].type"


def test_a_clients_template_is_run_only_where_that_is_allowed(stack: Stack, start: Starter) -> None:
    mine = hello(chat_template="{% for m in messages %}{{ m.content }}!{% endfor %}")
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = stack.client.post(path, json=mine)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "chat_template"
    assert stack.client.post("/tokenize", json=hello(chat_template="default")).status_code == 200
    trusting = start("--trust-request-chat-template", prefill=0, decode=1)
    ids = trusting.client.post("/tokenize", json=mine).json()["tokens"]
    text = trusting.client.post("/detokenize", json={"tokens": ids}).json()
    assert text == {"prompt": "hi!"}


def test_models_are_listed_with_aliases(stack: Stack, sdk: openai.OpenAI) -> None:
    listed = {model.id: model for model in sdk.models.list()}
    assert listed.keys() == {"fake", "fake-alias"}
    one = stack.client.get("/v1/models/fake-alias").json()
    assert one["parent"] == "fake"
    assert one["max_model_len"] == 4096
    assert one["root"] == "file:///fake"
    answer = stack.client.post("/v1/chat/completions", json=hello(model="fake-alias")).json()
    assert answer["model"] == "fake-alias"


def test_a_stream_has_the_headers_that_proxies_and_clients_need(stack: Stack) -> None:
    response = stack.client.post(
        "/v1/chat/completions", json=hello(stream=True), headers={"X-Request-Id": "my-id-1"}
    )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"] == "my-id-1"
    assert "usage" not in events(response)[-1]
    hostile = stack.client.get("/v1/models", headers={"X-Request-Id": "a/../b"})
    assert hostile.headers["x-request-id"] != "a/../b"


def test_token_ids_are_returned_when_asked_for(stack: Stack) -> None:
    body = {"prompt": "hi", "return_token_ids": True, "seed": 1}
    choice = stack.client.post("/v1/completions", json=body).json()["choices"][0]
    assert len(choice["token_ids"]) == 16
    text = stack.client.post("/detokenize", json={"tokens": choice["token_ids"]}).json()["prompt"]
    assert choice["text"] == text


def hand_overs(stack: Stack) -> int:
    seen = [event for pod in stack.decode for event in pod.call("/seen")["seen"]]
    return sum(event["ticket"] for event in seen if "ticket" in event)


def test_a_long_prompt_goes_through_a_prefill_pod_and_a_short_one_does_not(stack: Stack) -> None:
    before = hand_overs(stack)
    stack.client.post("/v1/completions", json={"prompt": "short"})
    assert hand_overs(stack) == before
    stack.client.post("/v1/completions", json={"prompt": LONG})
    assert hand_overs(stack) == before + 1
    stack.client.post("/v1/completions", json={"prompt": LONG, "prompt_logprobs": 1})
    assert hand_overs(stack) == before + 1


def test_what_the_pods_say_is_long_goes_before_what_the_gateway_thinks(start: Starter) -> None:
    stack = start(
        "--prefill-threshold", "0", pod_arguments=("--policy", '{"prefill_threshold": 100000}')
    )
    stack.client.post("/v1/completions", json={"prompt": LONG})
    assert hand_overs(stack) == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, None),
        ("POST", "/v1/chat/completions", b"", 400, None),
        ("POST", "/v1/chat/completions", b"[]", 400, None),
        ("POST", "/v1/chat/completions", b'{"model": "fake"}', 400, "messages"),
        ("POST", "/v1/chat/completions", b'{"model": "fake", "messages": []}', 400, "messages"),
        ("POST", "/v1/chat/completions", hello(model="none"), 404, "model"),
        ("POST", "/v1/chat/completions", hello(tools=[{}]), 400, "tools"),
        ("POST", "/v1/chat/completions", hello(seed=2**64), 400, "seed"),
        ("POST", "/v1/chat/completions", hello(max_tokens=5000), 400, "messages"),
        ("POST", "/v1/chat/completions", hello(messages=[{"content": 1}]), 400, "messages[0].role"),
        ("POST", "/v1/completions", {"model": "fake"}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": []}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": [[]]}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": ["a", 1]}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": [1, 10**6]}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": [-1]}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": {"x": 1}}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": ["a"] * 300}, 400, "prompt"),
        ("POST", "/tokenize", {}, 400, "prompt"),
        ("POST", "/detokenize", {"tokens": [10**9]}, 400, "tokens"),
        ("GET", "/v1/models/none", b"", 404, "model"),
        ("GET", "/v1/chat/completions", b"", 405, None),
        ("POST", "/v1/models", b"", 405, None),
        ("GET", "/nowhere", b"", 404, None),
    ],
)
def test_errors_have_openais_shape(
    stack: Stack, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = stack.client.request(method, path, content=content)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"].endswith(".")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(stack: Stack) -> None:
    response = stack.client.post("/v1/completions", json={"prompt": [1] * 4090, "max_tokens": 10})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "4096" in message
    assert "4090" in message
    fits = stack.client.post("/v1/completions", json={"prompt": [1] * 4090, "max_tokens": 6})
    assert fits.status_code == 200


def test_what_everything_polls_is_there(stack: Stack) -> None:
    for path in ("/health", "/ping", "/ready", "/version"):
        assert stack.client.get(path).status_code == 200
    assert stack.client.get("/version").json()["version"]
    assert stack.client.get("/ready").json() == {"ready": True, "models": ["fake", "fake-alias"]}
    metrics = stack.client.get("/metrics").text
    assert 'tasuki_gateway_pods{model="fake",role="decode"} 2.0' in metrics


def test_what_a_pod_refuses_reaches_the_client_as_the_pod_said_it(stack: Stack) -> None:
    stack.fault(times=1, status=400)
    response = stack.client.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "as told"


def test_a_busy_pod_is_passed_by_and_all_busy_is_503_with_retry_after(stack: Stack) -> None:
    stack.decode[0].fault(times=20, status=503)
    for _ in range(6):
        assert stack.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    stack.fault(times=20, status=503)
    response = stack.client.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "overloaded_error"


def test_an_error_in_mid_stream_is_an_event_and_then_the_end(
    stack: Stack, sdk: openai.OpenAI
) -> None:
    stack.fault(times=1, kind=3, frames=4)
    got = events(stack.client.post("/v1/chat/completions", json=hello(stream=True)))
    assert got[-1]["error"]["message"] == "as told"
    assert got[0]["choices"][0]["delta"]["role"] == "assistant"
    stack.fault(times=1, kind=3, frames=4)
    asked: Any = hello(stream=True)
    stream = sdk.chat.completions.create(**asked)
    with pytest.raises(openai.APIError, match="as told"):
        list(stream)


def test_a_pods_error_before_the_first_token_is_a_status(stack: Stack) -> None:
    stack.fault(times=1, kind=3, frames=1)
    response = stack.client.post("/v1/chat/completions", json=hello(stream=True))
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "as told"


def test_without_the_key_there_is_no_answer(start: Starter) -> None:
    locked = start("--api-key", "s3cret", prefill=0, decode=1)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions")):
            response = locked.client.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert locked.client.get("/health").status_code == 200
    key = {"Authorization": "Bearer s3cret"}
    response = locked.client.post("/v1/completions", json={"prompt": "x"}, headers=key)
    assert response.status_code == 200
    assert "s3cret" not in locked.log.read_text()


def test_limits_of_the_gateway_are_429_and_413(start: Starter) -> None:
    small = start("--max-requests", "0", prefill=0, decode=1)
    response = small.client.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 429
    assert "retry-after" in response.headers
    tight = start("--max-body-bytes", "1000", prefill=0, decode=1)
    response = tight.client.post("/v1/completions", json={"prompt": "x" * 2000})
    assert response.status_code == 413
    assert tight.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_request_that_takes_too_long_is_a_504_or_an_event(start: Starter) -> None:
    hasty = start("--request-timeout", "3", prefill=0, decode=1)
    hasty.fault(delay=0.05)
    body = {"prompt": "x", "max_tokens": 400}
    assert hasty.client.post("/v1/completions", json=body).status_code == 504
    got = events(hasty.client.post("/v1/completions", json=body | {"stream": True}))
    assert got[-1]["error"]["type"] == "timeout_error"
    hasty.wait_idle()


def test_a_client_that_stops_reading_is_given_up_at_its_deadline(start: Starter) -> None:
    hasty = start("--request-timeout", "1", prefill=0, decode=1)
    body = json.dumps({"prompt": "x", "max_tokens": 4000, "n": 8, "stream": True}).encode()
    address = ("127.0.0.1", int(hasty.url.rpartition(":")[2]))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            + body
        )
        deadline = time.monotonic() + 30
        while hasty.metric("tasuki_gateway_requests_total{") == 0:
            assert time.monotonic() < deadline, "the request never ends"
            time.sleep(0.1)
        assert hasty.metric("tasuki_gateway_requests_in_flight") == 0
    hasty.wait_idle()
