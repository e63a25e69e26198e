"""What a model's own policy allows: through a real gateway, as its pods announce it."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from gateway_stack import Stack, Starter
from hypothesis import given, strategies as st
from redis_server import RedisServer

from tasuki_common.policy import Policy, key_digest, together

OURS, THEIRS, GATEWAYS = "a-key-of-the-model-1", "a-key-of-the-model-2", "the-gateways-own-key"
LATE_SECONDS = 30.0


def until(true: Callable[[], bool], what: str) -> None:
    """The gateway hears of a policy with the pods' next heartbeat."""
    deadline = time.monotonic() + LATE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"not within {LATE_SECONDS} s: {what}"
        time.sleep(0.05)


def closed(*keys: str, **fields: Any) -> dict[str, Any]:
    """A policy with these API keys."""
    return {"key_digests": [key_digest("fake", key.encode()) for key in keys], **fields}


@pytest.fixture(scope="module")
def redis_stack(start: Starter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway with a key of its own, which learns of its pods through Redis."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield start("--api-key", GATEWAYS, redis_url=server.url)
    server.stop()


@pytest.fixture
def stack(redis_stack: Stack) -> Iterator[Stack]:
    """It, and every pod as it began."""
    yield redis_stack
    policy(redis_stack, {})
    until(lambda: listed(redis_stack, GATEWAYS) != [], "everything is allowed again")


def policy(stack: Stack, fields: dict[str, Any]) -> None:
    for pod in stack.pods:
        pod.call("/policy", fields)


def listed(stack: Stack, key: str) -> list[str]:
    """Names in /v1/models as the key sees them."""
    answer = stack.client.get("/v1/models", headers=bearer(key))
    return [model["id"] for model in answer.json().get("data", [])]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def ask(stack: Stack, key: str, **fields: Any) -> httpx.Response:
    body = {"model": "fake", "prompt": "hello there", "max_tokens": 2, **fields}
    return stack.client.post("/v1/completions", json=body, headers=bearer(key))


def test_a_model_with_keys_of_its_own_opens_to_them_alone(stack: Stack) -> None:
    assert ask(stack, GATEWAYS).status_code == 200
    policy(stack, closed(OURS, THEIRS))
    until(lambda: ask(stack, OURS).status_code == 200, "the model's key counts")
    assert ask(stack, THEIRS).status_code == 200
    assert ask(stack, OURS, model="fake-alias").status_code == 200
    refused = ask(stack, GATEWAYS)
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "fake" in refused.json()["error"]["message"]
    for key in ("", "nobodys-key-at-all"):
        assert ask(stack, key).status_code == 401


def test_every_endpoint_that_names_the_model_wants_its_key(stack: Stack) -> None:
    policy(stack, closed(OURS))
    until(lambda: listed(stack, OURS) == ["fake", "fake-alias"], "the model's key counts")
    assert listed(stack, GATEWAYS) == []
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ]
    for path, body in requests:
        for key, status in ((OURS, 200), (GATEWAYS, 401)):
            body |= {"model": "fake"}
            answer = stack.client.post(path, json=body, headers=bearer(key))
            assert answer.status_code == status, (path, answer.text)
    for key, status in ((OURS, 200), (GATEWAYS, 401)):
        assert stack.client.get("/v1/models/fake", headers=bearer(key)).status_code == status


def test_openais_client_streams_with_the_models_key(stack: Stack) -> None:
    policy(stack, closed(OURS))
    until(lambda: ask(stack, OURS).status_code == 200, "the model's key counts")
    sdk = openai.OpenAI(base_url=stack.url + "/v1", api_key=OURS, max_retries=0)
    events = sdk.completions.create(model="fake", prompt="x", max_tokens=4, stream=True)
    assert sum(bool(event.choices) for event in events) > 0


def test_while_pods_differ_a_key_is_needed_and_each_of_them_opens(stack: Stack) -> None:
    stack.decode[0].call("/policy", closed(OURS))
    until(lambda: ask(stack, OURS).status_code == 200, "the first key counts")
    assert ask(stack, GATEWAYS).status_code == 401
    stack.decode[1].call("/policy", closed(THEIRS))
    until(lambda: ask(stack, THEIRS).status_code == 200, "the second key counts")
    assert ask(stack, OURS).status_code == 200


def test_a_model_that_is_not_exposed_is_neither_listed_nor_served(stack: Stack) -> None:
    policy(stack, {"exposed": False})
    until(lambda: listed(stack, GATEWAYS) == [], "it is listed no more")
    refused = ask(stack, GATEWAYS)
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"
    policy(stack, {})
    until(lambda: ask(stack, GATEWAYS).status_code == 200, "it is served again")


def test_a_stream_goes_on_when_its_model_is_hidden(stack: Stack) -> None:
    stack.fault(delay=0.2)
    try:
        with stack.client.stream(
            "POST",
            "/v1/completions",
            json={"model": "fake", "prompt": "x", "max_tokens": 20, "stream": True},
            headers=bearer(GATEWAYS),
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            policy(stack, {"exposed": False})
            until(lambda: listed(stack, GATEWAYS) == [], "it is listed no more")
            assert "data: [DONE]" in list(lines)
    finally:
        stack.fault()


def test_a_request_beyond_the_models_limit_is_429_and_there_is_room_again(stack: Stack) -> None:
    policy(stack, {"max_requests": 2})
    stack.fault(delay=0.1)
    try:

        def crowd() -> list[int]:
            with ThreadPoolExecutor(6) as pool:
                sent = [pool.submit(ask, stack, GATEWAYS, max_tokens=10) for _ in range(6)]
                return sorted(one.result().status_code for one in sent)

        until(lambda: crowd() == [200, 200, 429, 429, 429, 429], "two at a time")
    finally:
        stack.fault()
    assert ask(stack, GATEWAYS).status_code == 200


def test_lengths_are_held_against_the_policy(stack: Stack) -> None:
    policy(stack, {"max_prompt_tokens": 5, "max_output_tokens": 3})
    until(lambda: ask(stack, GATEWAYS, max_tokens=4).status_code == 400, "the limit counts")
    refused = ask(stack, GATEWAYS, max_tokens=4).json()["error"]
    assert (refused["param"], "3 at most" in refused["message"]) == ("max_tokens", True)
    unasked = ask(stack, GATEWAYS, prompt=[1, 2], max_tokens=None).json()
    assert unasked["usage"]["completion_tokens"] == 3
    long = ask(stack, GATEWAYS, prompt=[1] * 6).json()["error"]
    assert (long["param"], "5 at most" in long["message"]) == ("prompt", True)
    assert ask(stack, GATEWAYS, prompt=[1] * 5).status_code == 200
    chat = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
    asked = stack.client.post("/v1/chat/completions", json=chat, headers=bearer(GATEWAYS))
    assert asked.json()["error"]["param"] == "messages"


_LIMITS = st.none() | st.integers(1, 9)
_POLICIES = st.builds(
    Policy,
    exposed=st.booleans(),
    key_digests=st.lists(st.sampled_from("abc"), unique=True).map(tuple),
    max_requests=_LIMITS,
    max_prompt_tokens=_LIMITS,
    max_output_tokens=_LIMITS,
    prefill_threshold=_LIMITS,
)


@given(st.lists(_POLICIES, min_size=1, max_size=4))
def test_together_no_pod_loosens_what_another_one_demands(policies: list[Policy]) -> None:
    both = together(policies)
    for policy in policies:
        assert policy.exposed or not both.exposed
        assert set(policy.key_digests) <= set(both.key_digests)
        for name in ("max_requests", "max_prompt_tokens", "max_output_tokens"):
            limit, most = getattr(policy, name), getattr(both, name)
            assert limit is None or (most is not None and most <= limit)


def test_a_digest_is_of_one_model() -> None:
    assert key_digest("a", b"key") != key_digest("b", b"key")
    assert key_digest("a", b"key") != key_digest("a", b"key2")
